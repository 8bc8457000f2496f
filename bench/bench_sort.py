"""Device time of routing and of each sorting strategy over T and E; writes sort.json for this device.

Where the strategies cross is recorded in the user's cache as well: `moert.sort` goes by it from then on.

    python bench/bench_sort.py [--out DIR]

A figure is one of 20 equal sorts in a graph (K = 8, blocks of 16 rows, fp32 weights, int32 ids, random
routing), so the launch is in it; "empty" is a kernel that does nothing, measured alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
import triton  # noqa: E402
from device_timing import captured, device_us  # noqa: E402
from layer_chain import uniform_ids  # noqa: E402

from moert.arena import Arena, Field, layout  # noqa: E402
from moert.call import Call, call_key  # noqa: E402
from moert.config import MoEConfig  # noqa: E402
from moert.device import device_facts  # noqa: E402
from moert.launch import CompiledLaunch, compile_launch  # noqa: E402
from moert.runtime import MoERuntime  # noqa: E402
from moert.steps.sorting.crossovers import record, rows_from_times  # noqa: E402
from moert.steps.sorting.launches import feasible, sort_fields, sort_launches  # noqa: E402
from moert.topk import TopK  # noqa: E402
from moert.weights import ExpertWeights  # noqa: E402

EXPERTS = (8, 32, 64, 128, 256, 512)
TOKENS = tuple(1 << n for n in range(13))
TOP_K, BLOCK_M, REPEATS = 8, 16, 20
STRATEGIES = ("one_shot", "multi_phase")


def sort_runs(experts: int, tokens: int) -> dict[str, Any]:
    """For each feasible strategy, a function that enqueues one sort."""
    device = torch.device("cuda", torch.cuda.current_device())
    facts = device_facts(device)
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32, device=device), 16)
    rows = torch.zeros(tokens, 16, dtype=torch.bfloat16, device=device)
    topk = TopK(torch.rand(tokens, TOP_K, device=device), uniform_ids(tokens, experts, TOP_K))
    call.set(call_key(rows, topk, rows, None, "keep"), rows, topk, rows, None)
    runs = {}
    for strategy in STRATEGIES:
        if feasible(strategy, tokens, experts, TOP_K, facts) is not None:
            continue
        fields = [Field(*f) for f in sort_fields(strategy, tokens, experts, TOP_K, BLOCK_M)]
        views = Arena(device, layout(fields)[1]).views(fields)
        launches = sort_launches(
            strategy,
            facts,
            tokens,
            experts,
            TOP_K,
            BLOCK_M,
            views,
            dependent=facts.dependent_launch,
        )
        compiled = [CompiledLaunch(x, compile_launch(x, torch.bfloat16)) for x in launches]

        def run(compiled: list[CompiledLaunch] = compiled, views: Any = views) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for launch in compiled:
                launch.run(call.values, tokens, stream)

        runs[strategy] = run
    return runs


def repeated(run: Any) -> Any:
    def many() -> None:
        for _ in range(REPEATS):
            run()

    return captured(many).replay


def timed(runs: dict[str, Any]) -> dict[str, float]:
    """Microseconds of one run of each."""
    with torch.cuda.stream(torch.cuda.Stream()):
        times = device_us({n: repeated(r) for n, r in runs.items()}, target_ms=1.0, rounds=7)
    return {name: round(us / REPEATS, 2) for name, us in times.items()}


@triton.jit
def _empty_kernel(pointer):
    pass


def routing_and_sort() -> dict[str, dict[str, float]]:
    """Routing, then the one-shot sort, E = 128, K = 8, bf16 logits: what a layer does before its GEMMs."""
    cfg = MoEConfig(num_experts=128, top_k=TOP_K, hidden_size=64, intermediate_size=64)
    weights = ExpertWeights.random(cfg, device="cuda")
    rows = {}
    with MoERuntime(cfg, weights, tune="off", max_tokens=64, buckets=(64,)) as rt:
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            logits = torch.randn(tokens, 128, device="cuda").bfloat16()
            sort = sort_runs(128, tokens)["one_shot"]

            def both(logits: torch.Tensor = logits, sort: Any = sort) -> None:
                rt.route(logits)
                sort()

            rows[str(tokens)] = timed({"routing": lambda x=logits: rt.route(x), "both": both})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = device_facts(torch.device("cuda", torch.cuda.current_device()))
    scratch = torch.zeros(1, device="cuda")
    empty = timed({"empty": lambda: _empty_kernel[(1,)](scratch)})["empty"]
    cells = {e: {t: timed(sort_runs(e, t)) for t in TOKENS} for e in EXPERTS if e >= TOP_K}
    report = {
        "device": facts.name,
        "made_with": {"torch": torch.__version__, "triton": triton.__version__},
        "empty kernel us": empty,
        "top_k": TOP_K,
        "block_m": BLOCK_M,
        "us": cells,
        "routing and sort us": routing_and_sort(),
    }
    print(f"{'E':>4} {'T':>5}  " + "  ".join(f"{s:>11}" for s in STRATEGIES))
    for experts, rows in cells.items():
        for tokens, row in rows.items():
            times = "  ".join(f"{row.get(s, float('nan')):>11.2f}" for s in STRATEGIES)
            print(f"{experts:>4} {tokens:>5}  {times}")
    print("routing and sort:", json.dumps(report["routing and sort us"]))
    out = args.out or ROOT / "bench" / "results" / facts.slug
    out.mkdir(parents=True, exist_ok=True)
    (out / "sort.json").write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads((out / "sort.json").read_text())
    try:
        print("recorded in", record(facts, rows_from_times(report["us"], TOP_K)))
    except OSError as error:
        print(f"not recorded for moert.sort: {error}")


if __name__ == "__main__":
    main()
