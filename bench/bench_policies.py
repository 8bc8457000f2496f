"""The tuner's choice against each sorting strategy forced, whole layers over E and T; writes policies.json.

    python bench/bench_policies.py [--experts E ...] [--tokens T ...] [--out DIR] [--budget SECONDS]

For each E four share groups over the same weights: sort_policy 0 (measured), 1, 2 and 3, each tuned by
itself, whatever was recorded before, so that every strategy has the tiles that suit it. A figure is a layer
of one graph over a chain of layers (`device_timing.py`), the four interleaved. "behind" is by how much the
measured choice is slower than the best of the three; more than ALLOWED in any cell makes the exit code 1.
Without a sort weights are read once for every row: past DIRECT_ROWS rows that way is timed with default
tiles, on few layers.

Written after every E; a file that is there already is taken up where it ends (--again starts anew). --budget
stops before an E that would not be done in time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
import triton  # noqa: E402
from device_timing import DEVICE, GPU, device_us, replayable  # noqa: E402
from layer_chain import Chain, check, make_chain, share_group  # noqa: E402
from taken_up import Budget, save, taken_up  # noqa: E402

from moert.config import MoEConfig  # noqa: E402
from moert.device import device_facts  # noqa: E402
from moert.runtime import MoERuntime  # noqa: E402
from moert.weights import ExpertWeights  # noqa: E402

EXPERTS = (8, 32, 64, 128, 256, 512)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TOP_K, HIDDEN, INTER = 8, 1024, 256
LAYERS = 16  # of which even 8 experts each are several caches
FEW_LAYERS = 2
DIRECT_ROWS = 512
ALLOWED = 0.03
POLICIES = {0: "measured", 1: "one_shot", 2: "multi_phase", 3: "none"}


def groups_of(
    cfg: MoEConfig, weights: Sequence[ExpertWeights], tokens: Sequence[int], **options: Any
) -> dict[tuple[str, int], list[MoERuntime]]:
    """The layers that serve a policy, by its name, and a T."""
    found: dict[tuple[str, int], list[MoERuntime]] = {}
    for policy, name in POLICIES.items():
        few = [t for t in tokens if policy != 3 or t * cfg.top_k <= DIRECT_ROWS]
        many = [t for t in tokens if t not in few]
        for some, tensors, tune in (
            (few, weights, "force"),
            (many, weights[:FEW_LAYERS], "off"),
        ):
            if some:
                begin = time.perf_counter()
                made = {"sort_policy": policy, "tune": tune, **options}
                layers = share_group(cfg, tensors, some, **made)
                found |= {(name, t): layers for t in some}
                seconds = time.perf_counter() - begin
                print(f"E={cfg.num_experts} {name}, T={some}: ready in {seconds:.1f} s", flush=True)
    return found


def cell(chains: dict[str, Chain], tokens: int) -> dict[str, Any]:
    """Microseconds of a layer for every policy, and how far the measured choice is behind."""
    for chain in chains.values():
        check(chain)
    graphs = {name: replayable(chain.run) for name, chain in chains.items()}
    times = device_us(graphs, target_ms=2.0, rounds=15 if GPU else 1)
    us = {name: round(times[name] / len(chains[name].layers), 3) for name in chains}
    best = min(us[name] for name in us if name != "measured")
    plans = {name: chain.layers[0].plan().for_tokens(tokens) for name, chain in chains.items()}
    return {
        "us": us,
        "behind": round(us["measured"] / best - 1, 4),
        "choice": {name: str(plan.choice) for name, plan in plans.items()},
    }


def cells(
    cfg: MoEConfig, tokens: Sequence[int], layers: int = LAYERS, **options: Any
) -> dict[str, Any]:
    """A cell for each T, of one E."""
    weights = [ExpertWeights.random(cfg, seed=seed, device=DEVICE) for seed in range(layers)]
    groups = groups_of(cfg, weights, tokens, **options)
    found = {}
    for t in tokens:
        chains = {name: make_chain(groups[name, t], t, seed=t) for name in POLICIES.values()}
        found[str(t)] = made = cell(chains, t)
        texts = "  ".join(f"{name} {us:.2f}" for name, us in made["us"].items())
        behind = f"behind {made['behind']:+.1%}"
        print(f"E={cfg.num_experts} T={t}: {texts}  {behind}", flush=True)
    for group in {id(group): group for group in groups.values()}.values():
        for layer in group:
            layer.close()
    return found


def measure(
    path: Path, experts: Sequence[int], tokens: Sequence[int], budget: float | None, again: bool
) -> dict[str, Any]:
    """Fill the report at `path`, E by E."""
    report: dict[str, Any] = {
        "device": device_facts(DEVICE).name,
        "made_with": {"torch": torch.__version__, "triton": triton.__version__},
        "shape": {"K": TOP_K, "H": HIDDEN, "I": INTER, "layers": LAYERS, "dtype": "bfloat16"},
        "cells": {},
    }
    if not again:
        report = taken_up(path, report)
    spent = Budget(budget)
    for number in experts:
        done = report["cells"].get(str(number), {})
        missing = [t for t in tokens if str(t) not in done]
        if not missing:
            continue
        if not spent.allows(f"E={number}"):
            break
        with spent.on_one():
            found = {**done, **cells(MoEConfig(number, TOP_K, HIDDEN, INTER), missing)}
        report["cells"][str(number)] = dict(sorted(found.items(), key=lambda item: int(item[0])))
        save(path, report)
        torch.cuda.empty_cache()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="*", default=EXPERTS)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    for name in ("MOERT_TUNE", "MOERT_BACKEND", "MOERT_SORT_POLICY"):
        os.environ.pop(name, None)
    out = args.out or ROOT / "bench" / "results" / device_facts(DEVICE).slug
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as records, torch.cuda.stream(torch.cuda.Stream()):
        os.environ["MOERT_TUNING_DIR"] = records
        path = out / "policies.json"
        report = measure(path, args.experts, args.tokens, args.budget, args.again)
    behind = [c["behind"] for row in report["cells"].values() for c in row.values()]
    worst = max(behind, default=0.0)
    print(f"{len(behind)} cells, the measured choice is at most {worst:+.1%} behind the best")
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
