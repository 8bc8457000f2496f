"""`moert bench`: how long a layer takes here, and whether that got worse since a file was written."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moert.cli.arguments import (
    add_layer,
    add_layer_options,
    layer_options,
    print_json,
    print_table,
    tokens,
)
from moert.cli.layer_times import LayerTimes
from moert.cli.plan import config_of
from moert.cli.regression import PERCENT, Change, Figure, better_of, changes
from moert.config import MoEConfig
from moert.env import BACKENDS, TUNE_MODES
from moert.errors import ConfigError
from moert.tuning.progress import Progress

EXAMPLES = """examples:
  moert bench 128,8,2048,768                             T = 1, 8, 64 and 512
  moert bench path/to/model --tokens 1 4 16 --json
  moert bench 128,8,2048,768 --out before.json
  moert bench 128,8,2048,768 --compare before.json       exit code 1 if a median is 10% slower

Layers are chained as in a model: each has weights and a random routing of its own, and the output of one is
the input of the next. On a GPU they are replayed from one graph and timed by events on the device. What looks
slower is measured once more before it counts. Keep the machine quiet; two of one kind differ by 2 per cent.
"""
TOKENS = (1, 8, 64, 512)
FORMAT = 1


def configure(parser: argparse.ArgumentParser) -> None:
    add_layer(parser)
    parser.add_argument("--tokens", nargs="+", type=tokens, metavar="T", default=list(TOKENS))
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--tune", choices=TUNE_MODES, help="as for a runtime (MOERT_TUNE)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="that an earlier run wrote")
    parser.add_argument(
        "--percent", type=float, default=PERCENT, help="growth that is a regression (%(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> int:
    # the routed experts: what peers' figures are of
    cfg = replace(config_of(args.layer, layer_options(args)), shared_experts=0, shared_gate=False)
    before = None if args.compare is None else read(args.compare, cfg)
    counts = sorted(set(args.tokens))
    with LayerTimes(cfg, counts, backend=args.backend, tune=args.tune) as layers:
        found = {
            "format": FORMAT,
            "config": plain(cfg),
            **layers.facts(),
            "tokens": measure(layers, counts),
        }
        compared: list[Change] = []
        if before is not None:
            old, new = figures(before["tokens"]), figures(found["tokens"])
            suspects = [c for c in changes(old, new, args.percent) if c.regressed]
            if suspects:
                again = measure(layers, [int(change.name[2:]) for change in suspects])
                new = better_of(new, figures(again))
            compared = changes(old, new, args.percent)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    worse = [change for change in compared if change.regressed]
    if args.json:
        print_json({**found, "compared": [as_json(change) for change in compared]})
    else:
        print(cfg)
        print_found(found, compared)
    return bool(worse)


def measure(layers: LayerTimes, counts: list[int]) -> dict[str, dict[str, Any]]:
    progress = Progress(f"{len(counts)} batch sizes", len(counts), verb="timing")
    found = {}
    try:
        for done, count in enumerate(counts):
            progress.update(done, f"T={count}")
            found[str(count)] = layers.measure(count)
    finally:
        progress.close()
    return found


def plain(cfg: MoEConfig) -> dict[str, Any]:
    """The description as JSON; where a checkpoint lies is no part of it."""
    return {name: value for name, value in asdict(cfg).items() if name != "path"}


def read(path: Path, cfg: MoEConfig) -> dict[str, Any]:
    """What an earlier run wrote.

    Raises:
        ConfigError: no such file, another kind of file, or figures of another layer.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, need {FORMAT}")
        known = MoEConfig.from_dict(found["config"])
        figures(found["tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--compare {path}: not written by `moert bench --out` ({type(error).__name__}: {error})"
        ) from None
    if known != cfg:
        raise ConfigError(f"--compare {path}: of another layer, {known}; here it is {cfg}")
    return found


def figures(cells: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    return {f"T={count}": Figure(float(cell["us"])) for count, cell in cells.items()}


def as_json(change: Change) -> dict[str, Any]:
    return {
        "tokens": int(change.name[2:]),
        "before_us": change.before,
        "us": change.now,
        "percent": round(change.percent, 2),
        "regressed": change.regressed,
    }


def print_found(found: dict[str, Any], compared: list[Change]) -> None:
    print(
        f"on {found['device']}, backend {found['backend']}, {found['layers']} layers, {found['how']}"
    )
    rows = [
        (int(count), round(c["us"], 2), round(c["GB_per_s"], 1), c["source"], c["plan"])
        for count, c in found["tokens"].items()
    ]
    print_table(("T", "us a layer", "GB/s", "source", "plan"), rows)
    for change in compared:
        print(change)
