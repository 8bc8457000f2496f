"""Renews what the repository holds of the GPUs at hand: checks, shipped plans, every table, in one call.

    python scripts/gpu_figures.py [--seconds N] [--only STEP ...] [--archive FILE.tar.gz]

Each step is a script of this repository, run on one GPU with its share of the cores; as many run side by side
as there are GPUs, each as soon as a GPU is free and what it builds on is done. At the end of the time what
still runs is stopped with all its children; scripts write as they go, so that what they have found stays. The
archive has the results, the shipped plans and every step's output, and is renewed whenever a step ends.
`python scripts/readme_tables.py` then takes the figures over.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
HELD = ("bench/results", "moert/tuning/shipped")


@dataclass(frozen=True)
class Step:
    """One script.

    Args:
        command: without the interpreter.
        after: steps that have to be done before, however they ended.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()


def _cases(part: str, *more: str) -> tuple[str, ...]:
    return ("bench/bench_cases.py", "--again", "--part", part, *more)


STEPS = (
    # what the host's time is part of: with nothing beside it
    Step("host", ("scripts/gpu_check.py", "--only", "host cost", "chained replays")),
    Step("plans", ("scripts/ship_plans.py", "--format", "bfloat16"), ("host",)),
    Step("plans-int4", ("scripts/ship_plans.py", "--format", "int4"), ("host",)),
    Step("choices", ("scripts/gpu_check.py", "--only", "every choice"), ("host",)),
    Step(
        "checks",
        ("scripts/gpu_check.py", "--only", "contract tests", "start-up", "memory checker"),
        ("host",),
    ),
    Step("layers", ("bench/bench_layer.py",), ("plans",)),
    Step("layers-int4", ("bench/bench_layer.py", "--dtype", "int4"), ("plans-int4",)),
    Step("skew", _cases("skew"), ("plans",)),
    Step("sort", ("bench/bench_sort.py",), ("host",)),
    # these write one file: one after the other
    Step("prefill", _cases("prefill", "--tokens", "4096"), ("skew",)),
    Step("shared", _cases("shared"), ("prefill",)),
    Step("policies", ("bench/bench_policies.py",), ("host",)),
    Step("fp16", _cases("fp16"), ("shared",)),
    Step("odd", _cases("odd"), ("fp16",)),
)


@dataclass
class Run:
    """A step that runs, and on which GPU."""

    step: Step
    gpu: int
    process: subprocess.Popen[bytes]
    begin: float = field(default_factory=time.monotonic)


def next_step(waiting: Sequence[Step], open_names: set[str]) -> Step | None:
    """The first that waits for nothing which is still to be done."""
    return next((step for step in waiting if not open_names & set(step.after)), None)


def shares(cores: Sequence[int], gpus: int) -> list[list[int]]:
    """The cores of each GPU's steps."""
    each = max(1, len(cores) // gpus)
    return [list(cores[gpu * each : (gpu + 1) * each]) or list(cores) for gpu in range(gpus)]


def visible(gpu: int) -> str:
    """The name of the GPU that is this one of those that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[gpu] if named else str(gpu)


def start(step: Step, gpu: int, cores: Sequence[int], logs: Path) -> Run:
    """In a process group of its own, so that it can be stopped with its children."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible(gpu), "PYTHONUNBUFFERED": "1"}
    with (logs / f"{step.name}.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    os.sched_setaffinity(process.pid, cores)
    return Run(step, gpu, process)


def stop(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()


def keep(archive: Path, logs: Path) -> None:
    """Replaced at once: whoever is interrupted meanwhile leaves the old archive or the new one."""
    fresh = archive.with_name(archive.name + ".new")
    with tarfile.open(fresh, "w:gz") as tar:
        for place in HELD:
            if (ROOT / place).exists():
                tar.add(ROOT / place, place)
        tar.add(logs, "logs")
    os.replace(fresh, archive)


def run_all(steps: Sequence[Step], gpus: int, seconds: float, archive: Path, logs: Path) -> int:
    """How many steps failed or were stopped, or had no time to begin."""
    end, waiting, running, failed = time.monotonic() + seconds, list(steps), [], 0
    cores = shares(sorted(os.sched_getaffinity(0)), gpus)
    while waiting or running:
        names = {step.name for step in waiting} | {run.step.name for run in running}
        for gpu in sorted(set(range(gpus)) - {run.gpu for run in running}):
            step = next_step(waiting, names)
            if step is not None:
                waiting.remove(step)
                running.append(start(step, gpu, cores[gpu], logs))
        time.sleep(0.2)
        late = time.monotonic() > end
        for run in [r for r in running if late or r.process.poll() is not None]:
            running.remove(run)
            if run.process.poll() is None:
                stop(run)
            code, took = run.process.returncode, time.monotonic() - run.begin
            failed += code != 0
            said = "stopped" if code < 0 else "ok" if code == 0 else f"exit code {code}"
            print(f"{run.step.name:<12} {said}, {took:.0f} s, GPU {run.gpu}", flush=True)
            keep(archive, logs)
        if late:
            print("".join(f"{step.name:<12} not begun\n" for step in waiting), end="", flush=True)
            return failed + len(waiting)
    return failed


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="in all (3600)")
    parser.add_argument("--only", nargs="*", choices=[step.name for step in STEPS])
    parser.add_argument("--archive", type=Path, default=ROOT / "gpu-figures.tar.gz")
    args = parser.parse_args(arguments)
    gpus = count_gpus()
    if not gpus:
        print("no GPU: nothing to measure")
        return 2
    logs = args.archive.absolute().parent / "gpu-figures-logs"
    logs.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    return 1 if run_all(steps, gpus, args.seconds, args.archive.absolute(), logs) else 0


if __name__ == "__main__":
    sys.exit(main())
