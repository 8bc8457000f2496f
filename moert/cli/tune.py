"""`moert tune`: measure the plans of a layer geometry on the GPU at hand and keep them as records."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moert.backends.registry import select_backend
from moert.build import plan_options, plan_sizes
from moert.cli.arguments import (
    add_layer,
    add_layer_options,
    add_plan_options,
    layer_options,
    print_json,
)
from moert.cli.plan import config_of, plan_json
from moert.config import MoEConfig
from moert.device import device_facts
from moert.env import read_env
from moert.errors import UnsupportedError
from moert.plan import PlanReport
from moert.tuning.store import directories, geometry
from moert.tuning.tuner import plan_buckets
from moert.weights import ExpertWeights

EXAMPLES = """examples:
  moert tune 128,8,2048,768                         keep records in the first directory of look-up
  moert tune path/to/model --out records            keep them here; MOERT_TUNING_DIR=records finds them
  moert tune 8,2,4096,14336 --buckets 1 8 64 --force --json

A runtime does the same by itself at its first start (MOERT_TUNE=auto); this is for doing it beforehand, on a
quiet GPU. Weights are random: which plan is fast depends on the shape alone.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_layer(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the records")
    parser.add_argument("--force", action="store_true", help="measure what has a record, too")
    add_plan_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> int:
    cfg = config_of(args.layer, layer_options(args))
    begin = time.perf_counter()
    report, path = tune(cfg, args)
    seconds = time.perf_counter() - begin
    if args.json:
        print_json(to_json(cfg, report, path, seconds))
        return 0
    print(f"{cfg}\n{report}")
    print(f"{measured(report)} of {len(report)} plans measured in {seconds:.0f} s; records: {path}")
    return 0


def tune(cfg: MoEConfig, args: argparse.Namespace) -> tuple[PlanReport, Path]:
    """Plans of every bucket, and the file that holds them.

    Raises:
        UnsupportedError: there is no GPU, or no backend serves the layer on it.
    """
    env, place = read_env(), gpu()
    facts = device_facts(place)
    options = plan_options(
        replace(env, sort_policy=env.sort_policy or 0),
        place,
        max_tokens=args.max_tokens,
        buckets=args.buckets,
        graphs="host",
        sort_policy=args.sort_policy,
        tune="force" if args.force else "auto",
    )
    launched = cfg.as_launched
    kind, notes = select_backend(args.backend, launched, facts)
    backend = kind(launched, ExpertWeights.random(launched, device=place), facts)
    folder = args.out or env.tuning_dir
    said = [*notes, *backend.notes]
    plans = plan_buckets(
        backend,
        plan_sizes(options),
        policy=options.sort_policy,
        mode=options.tune,
        tuning_dir=folder,
        notes=said,
    )
    name = geometry(launched, backend.weights, backend.name)
    path = directories(folder)[0][0] / facts.slug / f"{name}.json"
    report = PlanReport(backend.name, backend.same_bits, options.graphs, tuple(said), plans)
    return report, path


def gpu() -> torch.device:
    """The current GPU.

    Raises:
        UnsupportedError: there is none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "no GPU: there is nothing to measure here, the CPU has one plan for each batch size; for what a "
            "device would run by the heuristic: moert plan --device ARCH"
        )
    return torch.device("cuda", torch.cuda.current_device())


def measured(report: PlanReport) -> int:
    return sum(plan.source == "tuned" for plan in report.plans)


def to_json(cfg: MoEConfig, report: PlanReport, path: Path, seconds: float) -> dict[str, Any]:
    return {
        "config": repr(cfg),
        "backend": report.backend,
        "notes": list(report.notes),
        "records": str(path),
        "measured": measured(report),
        "seconds": round(seconds, 1),
        "plans": [plan_json(plan) for plan in report.plans],
    }
