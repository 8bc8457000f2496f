"""Checks an AMD GPU from end to end and writes one report file to send back: see rocm_check.sh.

Each part prints one line as it ends; a part that fails is reported and makes the exit code 1. Without a ROCm
device nothing runs, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "bench"), str(ROOT / "tests")]

# a layer of 1.1 GiB: several of them fit the smallest card
DECODE_SHAPE, DECODE_TOKENS = "qwen3-30b-a3b", (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = (
    "contract tests",
    "every choice",
    "allocations and copies",
    "graph replay",
    "aiter backend",
    "start-up",
    "sort crossover",
    "decode table",
)


def why_not() -> str | None:
    """What is missing to run at all; None if nothing is."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}): install PyTorch for ROCm"
    if torch.version.hip is None:
        return f"torch {torch.__version__} is not built for ROCm: install PyTorch for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no ROCm device: is the driver loaded, may this user open /dev/kfd?"
    lacking = [name for name in ("triton", "pytest") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} not found: install beside torch" if lacking else None


def allocations_and_copies(part: dict[str, Any]) -> bool:
    """1000 calls allocate nothing, and a trace of one holds the planned kernels and nothing else."""
    import torch
    from gpu_support import REAL, device_kernels, make_case, runtime

    wrong = []
    with runtime(REAL) as rt:
        for tokens in (1, 8, 64):
            case = make_case(REAL, tokens)
            for _ in range(3):
                rt.forward(case.x, case.topk, case.out)
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            for _ in range(1000):
                rt.forward(case.x, case.topk, case.out)
            torch.cuda.synchronize()
            made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
            seen = device_kernels(lambda case=case: rt.forward(case.x, case.topk, case.out))
            planned = list(rt.plan().for_tokens(tokens).kernels)
            part[f"T={tokens}"] = {"allocations": made, "trace": seen, "planned": planned}
            wrong += [tokens] if made or seen != planned else []
    return not wrong


def graph_replay(part: dict[str, Any]) -> bool:
    """Calls on ever new addresses, then on the same again, are right; the counts tell how they were launched.

    Nothing waits between calls: what is enqueued has to keep the addresses it was enqueued with.
    """
    import torch
    from gpu_support import REAL, assert_close, make_case, runtime

    with runtime(REAL) as rt:
        for tokens in (1, 3, 8, 64):
            cases = [make_case(REAL, tokens, seed=seed) for seed in range(8)]
            for repeat in (1, 3):
                for case in cases:
                    case.out.fill_(float("nan"))
                torch.cuda.synchronize()
                for case in cases:
                    for _ in range(repeat):
                        rt.forward(case.x, case.topk, case.out)
                for case in cases:
                    assert_close(case.out, case.expected(rt), case.out.dtype)
        torch.cuda.synchronize()
        counts, report = rt.stats(), rt.plan()
        part["counts"], part["graphs"], part["notes"] = counts, report.graphs, list(report.notes)
    part["kernel nodes are updated"] = counts["replays"] > 0 and counts["rebinds"] > 0
    # launches one by one are a right way to run too: the report tells which it was
    return True


def aiter_backend(part: dict[str, Any]) -> bool:
    """AITER's operators: right with both policies, eagerly and in a capture, and timed against Triton.

    Where AITER cannot be used, the reason is all that is reported.
    """
    import torch
    from gpu_support import DEVICE, REAL, make_case, runtime

    from moert.backends.aiter import AiterBackend
    from moert.device import device_facts
    from moert.errors import ConfigError

    part["why not"] = AiterBackend.supports(REAL, device_facts(torch.device("cuda", 0)))
    if part["why not"] is not None:
        return True
    worst = 0.0
    for policy in (1, 2):
        try:
            rt = runtime(REAL, backend="aiter", graphs="host", sort_policy=policy)
        except ConfigError as error:
            part[f"policy {policy}"] = str(error)
            continue
        with rt:
            for tokens in (1, 3, 8, 64):
                case, graph = make_case(REAL, tokens), torch.cuda.CUDAGraph()
                expected = case.expected(rt)
                rt.forward(case.x, case.topk, case.out)
                outputs = [case.out.clone()]
                with torch.cuda.graph(graph):
                    rt.forward(case.x, case.topk, case.out)
                case.out.fill_(float("nan"))
                graph.replay()
                outputs.append(case.out)
                for out in outputs:
                    worst = max(worst, float((out.float() - expected).norm() / expected.norm()))
            part[f"policy {policy}"] = [str(plan.choice) for plan in rt.plan()]
    part["largest relative error"] = worst
    with runtime(REAL, backend="auto", graphs="host", tune="auto", device=DEVICE) as rt:
        report = rt.plan()
        part["auto"] = {"backend": report.backend, "notes": list(report.notes)}
    # K roundings to bfloat16, where Triton's sum has one
    return worst <= 2e-2


def from_bench(script: str, result: str, *arguments: str) -> Any:
    """A part that runs one benchmark and takes over what it writes."""

    def part_of(part: dict[str, Any]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "bench" / script), *arguments, "--out", folder]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            path = Path(folder) / result
            if path.is_file():
                part["result"] = json.loads(path.read_text())
        if done.returncode:
            part["error"] = done.stderr[-2000:]
        return done.returncode == 0 and "result" in part

    return part_of


def all_parts() -> dict[str, Any]:
    import gpu_check

    tokens = [str(count) for count in DECODE_TOKENS]
    checks = (
        gpu_check.contract_tests,
        gpu_check.every_choice,
        allocations_and_copies,
        graph_replay,
        aiter_backend,
        # times are reported, not judged: the bounds are those of an H200
        lambda part: gpu_check.start_up(part) or "warm" in part,
        from_bench("bench_sort.py", "sort.json"),
        from_bench(
            "bench_layer.py",
            "layer-bfloat16.json",
            *("--shape", DECODE_SHAPE, "--tokens", *tokens),
        ),
    )
    return dict(zip(PARTS, checks, strict=True))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import triton

    from moert import __version__
    from moert.device import device_facts

    return {
        "device": asdict(device_facts(torch.device("cuda", 0))),
        "devices": torch.cuda.device_count(),
        "moert": __version__,
        "torch": torch.__version__,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, help="run these parts only")
    parser.add_argument(
        "--out", type=Path, default=Path("rocm_check.json"), help="the report (%(default)s)"
    )
    args = parser.parse_args(argv)
    if reason := why_not():
        print(f"rocm_check: nothing was run: {reason}", file=sys.stderr)
        return 2
    import gpu_check

    report = {**machine(), "parts": gpu_check.run_parts(all_parts(), args.only)}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"report: {args.out.resolve()}")
    return 0 if all(part["passed"] for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
