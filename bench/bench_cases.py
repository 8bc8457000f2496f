"""Prefill, skew, odd sizes, float16 and shared experts, each beside its floor; writes cases.json.

    python bench/bench_cases.py [--part prefill skew odd fp16 shared] [--shape NAME ...] [--dtype FORMAT ...]
                                [--tokens T ...] [--out DIR] [--budget SECONDS]

What the cases are: cases.py. A figure is taken as by bench_layer.py: a layer of one graph over a chain of
layers, levelled and checked first; what is compared takes turns. Runtimes are planned for the T measured and
no other, as large a T as there may be is one call of one graph.

Written after every cell; a file that is there already is taken up where it ends (--again measures anew what
is asked for). --budget stops before what would not be done in time, as far as the like was measured before.
The exit code is 1 if something could not be measured; it is left out then, and a later run tries again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
import triton  # noqa: E402
from block_chain import make_block_chain  # noqa: E402
from cases import GOALS, PARTS, Case, Variant, all_names, cases, judged  # noqa: E402
from device_timing import DEVICE, GPU, synchronize  # noqa: E402
from layer_chain import (  # noqa: E402
    MATMUL_FLOPS,
    READ_BYTES_PER_SECOND,
    Chain,
    cells,
    layer_count,
    make_chain,
    share_group,
)
from machine import facts  # noqa: E402
from taken_up import Budget, save, taken_up  # noqa: E402

from moert.config import MoEConfig  # noqa: E402
from moert.runtime import MoERuntime  # noqa: E402
from moert.weights import ExpertWeights  # noqa: E402

FORMATS = ("bfloat16", "float16", "int4")
Keep = Callable[[int, dict[str, Any]], None]
Weights = dict[MoEConfig, list[ExpertWeights]]


def make_weights(case: Case) -> Weights:
    """Of as many layers as no cache holds, by config."""
    configs = dict.fromkeys(variant.cfg for variant in case.variants.values())
    return {
        cfg: [ExpertWeights.random(cfg, seed=s, device=DEVICE) for s in range(layer_count(cfg))]
        for cfg in configs
    }


def chain_of(layers: list[MoERuntime], variant: Variant, tokens: int) -> Chain:
    if variant.ids is None:
        return make_block_chain(layers, tokens, seed=tokens)
    return make_chain(layers, tokens, seed=tokens, ids=variant.ids)


def measure(case: Case, weights: Weights, tokens: Sequence[int], keep: Keep) -> None:
    """Every T of a group that has runtimes in common; `keep` gets each cell at once."""
    begin = time.perf_counter()
    groups: dict[MoEConfig, list[MoERuntime]] = {}
    try:
        for cfg, tensors in weights.items():
            groups[cfg] = share_group(cfg, tensors, tokens)
        print(f"{case} T={tokens}: ready in {time.perf_counter() - begin:.1f} s", flush=True)
        for t in tokens:
            chains = {
                name: chain_of(groups[variant.cfg], variant, t)
                for name, variant in case.variants.items()
            }
            found = cells(chains, with_matmul=case.part == "prefill")
            keep(t, judged(case.part, t, found))
            del chains
    finally:
        for layers in groups.values():
            for layer in layers:
                layer.close()


def told(case: Case, tokens: int, cell: dict[str, Any]) -> str:
    texts = [
        f"{name} {one['us']:.1f} us {one['times the floor']:.2f} x floor ({one['source']} "
        f"{one['choice']})"
        for name, one in cell["layers"].items()
    ]
    texts += [
        f"{key} {cell[key]:.3f}" for key in ("ratio", "matmul share", "share beside") if key in cell
    ]
    verdict = {True: "", False: "  BEYOND THE GOAL", None: ""}[cell["met"]]
    return f"{case} T={tokens}: {'; '.join(texts)}{verdict}"


def cells_of(report: dict[str, Any], case: Case, again: bool) -> dict[str, Any]:
    """Where the cells of a case go, with those that are there if they are of the same layers."""
    forms = report["parts"].setdefault(case.part, {}).setdefault(case.name, {})
    configs = {name: repr(variant.cfg) for name, variant in case.variants.items()}
    found = forms.get(case.format)
    if found is None or found["configs"] != configs:
        found = forms[case.format] = {"configs": configs, "tokens": {}}
    if again:
        for t in (t for group in case.tokens for t in group):
            found["tokens"].pop(str(t), None)
    cells: dict[str, Any] = found["tokens"]
    return cells


def free() -> None:
    """Nothing of the last case is left in memory."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def fill(path: Path, asked: Sequence[Case], budget: Budget, again: bool) -> list[str]:
    """Measure what the report at `path` lacks of these cases; what failed, and why."""
    place = facts()
    report = taken_up(
        path,
        {
            "device": place.name,
            "made_with": {"torch": torch.__version__, "triton": triton.__version__},
            "limits": {
                "read_bytes_per_second": READ_BYTES_PER_SECOND,
                "matmul_flops": MATMUL_FLOPS,
            },
            "goals": GOALS,
            "parts": {},
        },
    )
    failed = []
    for case in asked:
        done, weights = cells_of(report, case, again), {}

        def keep(t: int, cell: dict[str, Any], case: Case = case, done: Any = done) -> None:
            done[str(t)] = cell
            for key in sorted(done, key=int):  # in order, also where a later run fills a gap
                done[key] = done.pop(key)
            save(path, report)
            print(told(case, t, cell), flush=True)

        for group in case.tokens:
            missing = [t for t in group if str(t) not in done]
            kind = f"{case.part} {case.format} {group}"
            if not missing:
                continue
            if not budget.allows(f"{case} T={missing}", kind):
                return failed
            try:
                with budget.on_one(kind):
                    weights = weights or make_weights(case)
                    measure(case, weights, missing, keep)
            except Exception as problem:
                # one layer that fails costs its own figures; a device that fails costs the rest
                traceback.print_exc()
                failed.append(f"{case} T={missing}: {type(problem).__name__}: {problem}")
                del problem
            free()
            synchronize()
        weights.clear()
        free()
    return failed


def summary(report: dict[str, Any]) -> list[str]:
    """A line for each part that has a goal: how often it is met, and where it is not."""
    lines = []
    for part, names in report["parts"].items():
        found = [
            (cell["met"], f"{name} {form} T={t}")
            for name, forms in names.items()
            for form, kept in forms.items()
            for t, cell in kept["tokens"].items()
            if cell["met"] is not None
        ]
        missed = [where for met, where in found if not met]
        text = f": not {', '.join(missed)}" if missed else ""
        lines.append(f"{part}: {len(found) - len(missed)} of {len(found)} meet the goal{text}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shape", nargs="*", choices=all_names(), help="default: all")
    parser.add_argument("--dtype", nargs="*", choices=FORMATS, help="formats, but of fp16")
    parser.add_argument("--tokens", nargs="*", type=int, help="default: each part's own")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, help="seconds")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args(arguments)
    budget = Budget(args.budget)
    out = args.out or ROOT / "bench" / "results" / facts().slug
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cases.json"
    failed = fill(path, cases(args.part, args.shape, args.dtype, args.tokens), budget, args.again)
    if path.exists():
        print("\n".join(summary(taken_up(path, {}))))
    print("\n".join(f"FAILED {text}" for text in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
