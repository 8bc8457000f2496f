"""Checks a GPU from end to end and leaves a report: see gpu_check.sh.

Each part prints one line as it ends; a part that fails is reported and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import torch  # noqa: E402
import triton  # noqa: E402

from moert.config import MoEConfig  # noqa: E402
from moert.device import device_facts  # noqa: E402
from moert.tuning.lock import exclusive  # noqa: E402

Part = Callable[[dict[str, Any]], bool]  # fills in what is reported, tells whether all was well

# compile hundreds of kernels, and look at nobody else's memory
COMPILE_MUCH = ("test_gpu_block.py", "test_gpu_choices.py")
QWEN3_30B = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
# much like it, and nobody ships its plans
UNKNOWN = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=704)


PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]


@cache
def gpu_test_files() -> tuple[str, ...]:
    """Those with a test marked gpu."""
    command = [*PYTEST, "--collect-only", "tests"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (line for line in found.stdout.splitlines() if line.startswith("tests/"))
    return tuple(dict.fromkeys(line.split("::")[0] for line in lines))


def contract_tests(part: dict[str, Any]) -> bool:
    """Every test marked gpu but for `every_choice`."""
    return run_files(part, [f for f in gpu_test_files() if Path(f).name not in COMPILE_MUCH])


def every_choice(part: dict[str, Any]) -> bool:
    """The tests that compile whatever plans may name."""
    files = [f for f in gpu_test_files() if Path(f).name in COMPILE_MUCH]
    # each process compiles in further ones, and takes a share of the device's memory
    count = min(8, max(4, len(os.sched_getaffinity(0)) // 2))
    shared = importlib.util.find_spec("xdist") is not None
    return run_files(part, files, ["-n", str(count), "--dist", "worksteal"] if shared else [])


def run_files(part: dict[str, Any], files: list[str], options: Sequence[str] = ()) -> bool:
    """File by file, each with a line of its own as it ends; options of pytest."""
    part |= {"files": {}, "failed": [], "errors": []}
    for file in files:
        start = time.perf_counter()
        done = subprocess.run(
            [*PYTEST, *options, file], cwd=ROOT, capture_output=True, text=True, check=False
        )
        lines = done.stdout.strip().splitlines()
        summary = lines[-1] if lines else done.stderr[-500:]
        part["files"][file] = summary
        part["failed"] += [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode:
            part["errors"] += [line for line in lines if line.startswith("E  ")][:20]
        print(f"      {file}: {summary} ({time.perf_counter() - start:.0f} s)", flush=True)
    counts = {
        word: sum(map(int, re.findall(rf"(\d+) {word}", " ".join(part["files"].values()))))
        for word in ("passed", "failed", "error")
    }
    part["summary"] = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    return counts["passed"] > 0 and not counts["failed"] and not counts["error"]


def memory_checker(part: dict[str, Any]) -> bool:
    """compute-sanitizer memcheck over eager launches, replays and routing of a small odd layer."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        part["skipped"] = "compute-sanitizer is not installed"
        return True
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__]
    done = subprocess.run(
        [*command, "--child", "sanitizer"], capture_output=True, text=True, check=False
    )
    part["summary"] = (re.findall(r"ERROR SUMMARY: .*", done.stdout) or [done.stderr[-300:]])[-1]
    return done.returncode == 0


def sanitizer_child() -> None:
    from gpu_support import ODD, assert_close, make_case, runtime

    for policy in (1, 2, 3):
        with runtime(ODD, sort_policy=policy, max_tokens=24, buckets=(1, 8, 16)) as rt:
            for tokens in (1, 3, 8, 13, 24, 30):
                case = make_case(ODD, tokens)
                rt.forward(case.x, case.topk, case.out)
                assert_close(case.out, case.expected(rt), ODD.torch_dtype)
                rt.route(torch.randn(min(tokens, 24), ODD.num_experts, device="cuda"))
    torch.cuda.synchronize()


def host_cost(part: dict[str, Any]) -> bool:
    """Host time of a replayed forward against a bare graph replay, known and new addresses."""
    from device_timing import host_us
    from gpu_support import make_case, runtime, variant

    cfg = variant(QWEN3_30B, num_experts=32)
    with runtime(cfg) as rt, torch.cuda.stream(torch.cuda.Stream()):
        for tokens in (1, 8):
            cases = [make_case(cfg, tokens, seed=s) for s in range(2)]
            turn = [0]

            def known(cases: list[Any] = cases) -> None:
                rt.forward(cases[0].x, cases[0].topk, cases[0].out)

            def new(cases: list[Any] = cases, turn: list[int] = turn) -> None:
                turn[0] ^= 1
                case = cases[turn[0]]
                rt.forward(case.x, case.topk, case.out)

            slot = [plan.tokens for plan in rt.plan()].index(tokens)
            bare = rt._executor._graphs[slot]._graph.replay
            part[f"T={tokens}"] = {
                "bare replay us": round(host_us(bare), 2),
                "forward us": round(host_us(known), 2),
                "forward, new addresses us": round(host_us(new), 2),
            }
    return all(
        row["forward us"] <= row["bare replay us"] + 4
        and row["forward, new addresses us"] <= row["bare replay us"] + 10
        for row in part.values()
    )


def chained_replays(part: dict[str, Any]) -> bool:
    """48 chained calls against the same 48 layers captured in one graph, device time a layer."""
    from device_timing import captured, device_us
    from gpu_support import variant
    from layer_chain import make_chain, make_layers

    cfg = variant(QWEN3_30B, num_experts=32)
    layers = make_layers(cfg, 48, max_tokens=64, buckets=(1, 8, 64), tune="off")
    for tokens in (1, 8, 64):
        chain = make_chain(layers, tokens, seed=tokens)
        one = captured(chain.run)
        row = {}
        for name, stream in (("side stream", torch.cuda.Stream()), ("null stream", None)):
            with torch.cuda.stream(stream):
                times = device_us({"chained": chain.run, "one graph": one.replay})
            row[name] = {k: round(v / len(layers), 2) for k, v in times.items()}
        part[f"T={tokens}"] = row
    for layer in layers:
        layer.close()
    return all(
        times["chained"] <= times["one graph"] + 2.0
        for row in part.values()
        for times in row.values()
    )


def start_up(part: dict[str, Any]) -> bool:
    """A process that makes one layer, then 47 that share: with empty caches, then with warm ones."""
    with tempfile.TemporaryDirectory() as caches:
        env = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/triton", "MOERT_TUNING_DIR": caches}
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, __file__, "--child", "start_up"],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                part[name] = done.stderr[-1500:]
                return False
            part[name] = json.loads(done.stdout.splitlines()[-1])
    warm = part["warm"]
    return part["cold"]["first s"] <= 90 and warm["first s"] <= 3 and warm["further ms"] <= 50


def start_up_child() -> None:
    from moert import ExpertWeights, MoERuntime

    weights = ExpertWeights.random(UNKNOWN, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    rt = MoERuntime(UNKNOWN, weights)
    first = time.perf_counter() - start
    start = time.perf_counter()
    others = [MoERuntime(UNKNOWN, weights, share=rt) for _ in range(47)]
    further = (time.perf_counter() - start) / len(others) * 1e3
    sources = sorted({plan.source for plan in rt.plan()})
    print(
        json.dumps(
            {
                "first s": round(first, 2),
                "further ms": round(further, 1),
                "graphs MiB": rt.memory()["graphs"] >> 20,
                "sources": sources,
            }
        )
    )


PARTS: dict[str, Part] = {
    "contract tests": contract_tests,
    "every choice": every_choice,
    "memory checker": memory_checker,
    "host cost": host_cost,
    "chained replays": chained_replays,
    "start-up": start_up,
}


def run_parts(parts: dict[str, Part], only: list[str] | None = None) -> dict[str, Any]:
    """Run each part, or those asked for; an exception fails it. A line is printed as one ends."""
    found: dict[str, Any] = {}
    for name, check in parts.items():
        if only and name not in only:
            continue
        part: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            passed = check(part)
        except Exception as error:
            passed, part["error"] = False, f"{type(error).__name__}: {error}"
        found[name] = {"passed": passed, **part}
        print(told(name, found[name]), f"({time.perf_counter() - start:.0f} s)", flush=True)
    return found


def told(name: str, part: dict[str, Any]) -> str:
    """A part as one line."""
    rest = {key: value for key, value in part.items() if key != "passed"}
    return f"{'PASS' if part['passed'] else 'FAIL'}  {name}  {json.dumps(rest)}"


def kept(file: Path, heading: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier report of the same device and versions."""
    try:
        report = json.loads(file.read_text())
        same = all(report[key] == value for key, value in heading.items())
        return dict(report["parts"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_report(out: Path, heading: dict[str, Any], found: dict[str, Any], merged: bool) -> None:
    """gpu_check.json and its text, replaced whole.

    Args:
        found: parts of this run.
        merged: those of an earlier report, or of a run at other parts meanwhile, stay.
    """
    with exclusive(Path(tempfile.gettempdir()) / "moert-gpu-check.lock"):
        parts = (kept(out / "gpu_check.json", heading) if merged else {}) | found
        report = {**heading, "parts": {name: parts[name] for name in PARTS if name in parts}}
        lines = [told(*part) for part in report["parts"].items()]
        for name, text in (("json", json.dumps(report, indent=1)), ("txt", "\n".join(lines))):
            fresh = out / f"gpu_check.{name}.new"
            fresh.write_text(text + "\n")
            os.replace(fresh, out / f"gpu_check.{name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="run these parts only")
    parser.add_argument("--out", type=Path, help="directory of the report")
    parser.add_argument("--child", choices=["sanitizer", "start_up"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        {"sanitizer": sanitizer_child, "start_up": start_up_child}[args.child]()
        return 0
    facts = device_facts(torch.device("cuda", 0))
    out = args.out or ROOT / "bench" / "results" / facts.slug
    out.mkdir(parents=True, exist_ok=True)
    heading: dict[str, Any] = {
        "device": facts.name,
        "made_with": {"torch": torch.__version__, "triton": triton.__version__},
    }
    asked, found = args.only or list(PARTS), {}
    for name in asked:
        found |= run_parts({name: PARTS[name]})
        # after every part: an interruption keeps what there is
        write_report(out, heading, found, bool(args.only))
    return 0 if all(part["passed"] for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
