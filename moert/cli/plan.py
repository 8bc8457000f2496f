"""`moert plan`: what a runtime would run for each batch size, without weights and without the device."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moert.arena import layout
from moert.backends.base import Backend
from moert.backends.registry import select_backend
from moert.build import plan_options, plan_sizes
from moert.cli.absent import absent_weights
from moert.cli.arguments import (
    add_layer,
    add_layer_options,
    add_plan_options,
    layer_options,
    print_json,
    size,
)
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES, DeviceFacts, device_facts
from moert.env import Env, read_env
from moert.plan import Plan, PlanReport
from moert.share import Options, ResultBuffers
from moert.tuning.candidates import allowed_candidates, usable
from moert.tuning.store import open_store

EXAMPLES = """examples:
  moert plan 128,8,2048,768                         on this machine
  moert plan path/to/model --device gfx942          on an MI300X that is not here
  moert plan 8,2,4096,14336 --device sm_90 --buckets 1 8 64 --json

Plans come from tuning records where there is one for the device and the shape, else from the
heuristic; a runtime on the device itself would measure instead (MOERT_TUNE).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_layer(parser)
    parser.add_argument(
        "--device",
        choices=tuple(KNOWN_DEVICES),
        metavar="ARCH",
        help=f"one of {', '.join(KNOWN_DEVICES)} (the device of this machine)",
    )
    add_plan_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> int:
    env = read_env()
    cfg = config_of(args.layer, layer_options(args))
    facts = KNOWN_DEVICES[args.device] if args.device else this_device()
    options = plan_options(
        replace(env, sort_policy=env.sort_policy or 0),
        torch.device("cpu" if facts.kind == "cpu" else "cuda"),
        max_tokens=args.max_tokens,
        buckets=args.buckets,
        graphs=None,
        sort_policy=args.sort_policy,
        tune="off",
    )
    launched = cfg.as_launched
    kind, notes = select_backend(args.backend, launched, facts)
    if options.graphs == "own" and not kind.uses_graphs:
        options = replace(options, graphs="host")
    backend = kind(launched, absent_weights(cfg), facts)
    report = make_report(backend, options, env, notes)
    memory = memory_of(cfg, backend, options, report)
    if args.json:
        print_json(to_json(cfg, facts, report, memory))
        return 0
    print(f"{cfg}\non {facts.name} ({facts.arch or facts.kind})")
    print(report)
    print("memory: " + ", ".join(f"{name} {size(nbytes)}" for name, nbytes in memory.items()))
    return 0


def config_of(layer: MoEConfig | Path, changed: dict[str, Any]) -> MoEConfig:
    """A shape as it is, or what config.json says, with the fields that were asked for."""
    cfg = MoEConfig.from_pretrained(str(layer)) if isinstance(layer, Path) else layer
    return replace(cfg, **changed)


def this_device() -> DeviceFacts:
    return device_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def make_report(
    backend: Backend, options: Options, env: Env, notes: tuple[str, ...] = ()
) -> PlanReport:
    """Records where there are any, else the first candidate of the policy; nothing is measured.

    Raises:
        ConfigError: the policy cannot serve a bucket.
    """
    store = open_store(
        backend.facts, backend.cfg, backend.weights, backend.name, {}, env.tuning_dir
    )
    plans = []
    for count, captured in plan_sizes(options):
        candidates = allowed_candidates(backend, count, options.sort_policy)
        found = [
            record
            for record in store.find(count, options.sort_policy)
            if usable(backend, record.choice, count, candidates)
        ]
        provenance: dict[str, Any] = {}
        choice = candidates[0]
        if found and len(candidates) > 1:
            choice = found[0].choice
            provenance = {
                "source": found[0].source,
                "us": found[0].us,
                "default_us": found[0].default_us,
            }
        plans.append(backend.plan(count, captured, choice, **provenance))
    notes = (*notes, *backend.notes)
    return PlanReport(backend.name, backend.same_bits, options.graphs, notes, tuple(plans))


def memory_of(
    cfg: MoEConfig, backend: Backend, options: Options, report: PlanReport
) -> dict[str, int]:
    """Bytes as `MoERuntime.memory` counts them, with a router; graphs cost what only a device tells."""
    largest = options.buckets[-1]
    joins = options.graphs != "off"
    meta = torch.device("meta")
    rows = [options.max_tokens, largest if joins else 0]
    sizes = {
        "weights": backend.weights.nbytes,
        "arena": max(plan.scratch_bytes for plan in report),
        "capture_arena": max(p.scratch_bytes for p in report if p.tokens <= largest)
        if joins
        else 0,
        "results": sum(ResultBuffers(cfg, meta, count).nbytes for count in rows),
        "block": sum(layout(backend.block_fields(cfg, count))[1] for count in rows if count),
    }
    return {**sizes, "total": sum(sizes.values())}


def to_json(
    cfg: MoEConfig, facts: DeviceFacts, report: PlanReport, memory: dict[str, int]
) -> dict[str, Any]:
    return {
        "config": repr(cfg),
        "device": facts.name,
        "arch": facts.arch,
        "backend": report.backend,
        "graphs": report.graphs,
        "same_bits": report.same_bits,
        "notes": list(report.notes),
        "plans": [plan_json(plan) for plan in report.plans],
        "memory": memory,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "tokens": plan.tokens,
        "captured": plan.captured,
        "source": plan.source,
        "us": plan.us,
        "default_us": plan.default_us,
        "scratch_bytes": plan.scratch_bytes,
        "choice": plan.choice.to_json(),
        "kernels": list(plan.kernels),
    }
