"""Measures, compares with the baseline of this device, and fails where a median got slower.

    python bench/regress.py                       everything, against bench/baselines/<device>.json
    python bench/regress.py -k "decode and T8"    some of it
    python bench/regress.py --save                make this run the baseline (say why in the commit)
    python bench/regress.py --smoke --save --baseline FILE     tiny layers, only to see that all runs

What looks slower is measured once more before it counts; the better of both medians is judged. Exit codes:
0 no regression, 1 a regression or a benchmark that failed or vanished, 2 wrong usage or nothing to compare
with. Written to --out: run.json and again.json (pytest-benchmark's format), baseline.json (what --save
would keep).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from moert.cli.regression import (  # noqa: E402
    PERCENT,
    Change,
    Figure,
    better_of,
    changes,
    missing,
)

OK, PROBLEM, USAGE = 0, 1, 2
SHOWN = 10  # largest changes that are printed even if nothing regressed


def run_benchmarks(
    suite: Path, targets: Sequence[str], result: Path, options: Sequence[str]
) -> int:
    """One run of pytest; its exit code. `result` is there afterwards if anything was measured.

    Args:
        suite: directory of the benchmarks.
        targets: tests of it by name; all of it if there are none.
        result: the JSON to write.
        options: of pytest.
    """
    result.unlink(missing_ok=True)
    # tests are named from here, in the baseline as by anybody who runs pytest in the repository
    root = ROOT if suite.is_relative_to(ROOT) else suite
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=name"]
    command += [f"--rootdir={root}", f"--benchmark-json={result}", *options]
    command += targets or [str(suite)]
    paths = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # where tests run this in a worker of theirs: pytest-benchmark would measure nothing
    env.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(command, cwd=root, env=env, check=False).returncode


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """Every median in microseconds and every number of bytes, by the test's name."""
    found = {}
    for bench in report["benchmarks"]:
        extra = bench["extra_info"]
        found[bench["fullname"]] = Figure(
            bench["stats"]["median"] * 1e6,
            percent=extra.get("regression_percent"),
            judged=not extra.get("reference"),
        )
    for test, sizes in report.get("bytes", {}).items():
        found |= {f"{test} {purpose}": Figure(n, "bytes") for purpose, n in sizes.items()}
    return found


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def as_baseline(report: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """A run as it is committed: still pytest-benchmark's format, without samples and options."""
    benches = []
    for bench in report["benchmarks"]:
        stats = {name: value for name, value in bench["stats"].items() if name != "data"}
        names = ("group", "name", "fullname", "params", "param", "extra_info")
        benches.append({**{name: bench[name] for name in names}, "stats": stats})
        # the parameters' values need not be JSON, and the name holds them
        benches[-1]["params"] = None
    return {**report, "benchmarks": benches, "selection": list(options)}


def write_baseline(path: Path, baseline: dict[str, Any]) -> None:
    """One line per benchmark: differences between two baselines can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in baseline.items() if name != "benchmarks"}
    lines = [f' "{name}": {json.dumps(value)}' for name, value in head.items()]
    rows = ",\n".join(f"  {json.dumps(bench)}" for bench in baseline["benchmarks"])
    path.write_text("{\n" + ",\n".join([*lines, f' "benchmarks": [\n{rows}\n ]']) + "\n}\n")


def plans_that_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What runs another plan than the baseline did, so that another time is no wonder."""
    old = {b["fullname"]: b["extra_info"].get("plan") for b in before["benchmarks"]}
    return [
        f"{b['fullname']}: plan was {old[b['fullname']]}, is {b['extra_info']['plan']}"
        for b in now["benchmarks"]
        if old.get(b["fullname"]) not in (None, b["extra_info"].get("plan"))
    ]


def other_machine(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = before["machine_info"], now["machine_info"]
    return [
        f"{k}: baseline {old.get(k)}, here {v}" for k, v in new.items() if old.get(k, None) != v
    ]


def compare(
    baseline: dict[str, Any], run: dict[str, Any], args: argparse.Namespace, options: list[str]
) -> int:
    """Judge a run, measuring again what looks worse; prints what it finds."""
    before, now = figures(baseline), figures(run)
    suspects = [c for c in changes(before, now, args.percent) if c.regressed]
    code = OK
    if suspects:
        targets = list(dict.fromkeys(test_of(change.name) for change in suspects))
        print(f"\nmeasuring {len(targets)} again that look worse:")
        print(*suspects, sep="\n", flush=True)
        again = args.out / "again.json"
        code = run_benchmarks(args.suite, targets, again, options)
        if again.is_file():
            now = better_of(now, figures(read(again)))
    gone = [] if args.k else missing(before, now)
    found = changes(before, now, args.percent)
    report_changes(found, gone, other_machine(baseline, run), plans_that_changed(baseline, run))
    return PROBLEM if code or gone or any(c.regressed for c in found) else OK


def test_of(name: str) -> str:
    """The test of a figure: bytes carry their purpose after it."""
    head, bracket, rest = name.partition("[")
    return name.split(" ")[0] if not bracket else head + bracket + rest.split("]")[0] + "]"


def report_changes(
    found: list[Change], gone: list[str], machines: list[str], plans: list[str]
) -> None:
    worse = [change for change in found if change.regressed]
    print(f"\ncompared {len(found)} figures with the baseline: {len(worse)} regressed")
    for title, lines in (("other machine or versions", machines), ("other plans", plans)):
        if lines:
            print(f"{title}:\n  " + "\n  ".join(lines))
    shown = worse or sorted(found, key=lambda change: -abs(change.percent))[:SHOWN]
    print("regressions:" if worse else "largest changes:")
    print("\n".join(f"  {change}" for change in shown))
    if gone:
        print("measured before, not now:\n  " + "\n  ".join(gone))


def device_slug() -> str:
    from machine import facts

    return facts().slug


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", type=Path, default=ROOT / "bench", help="directory of benchmarks (bench)"
    )
    parser.add_argument("-k", metavar="EXPR", help="only benchmarks that match, as pytest's -k")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, few rounds")
    parser.add_argument("--baseline", type=Path, help="to compare with, or to --save")
    parser.add_argument("--save", action="store_true", help="make this run the baseline")
    parser.add_argument("--percent", type=float, default=PERCENT, help="(%(default)g)")
    parser.add_argument("--out", type=Path, help="directory of results (.benchmarks/<device>)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if importlib.util.find_spec("pytest_benchmark") is None:
        print('regress: pytest-benchmark is missing: pip install ".[bench]"', file=sys.stderr)
        return USAGE
    args.suite = args.suite.resolve()
    args.out = (args.out or ROOT / ".benchmarks" / device_slug()).resolve()
    args.baseline = args.baseline or ROOT / "bench" / "baselines" / f"{device_slug()}.json"
    if not args.save and not args.baseline.is_file():
        print(f"regress: no {args.baseline}; --save makes one of a run", file=sys.stderr)
        return USAGE
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--smoke"] if args.smoke else []
    result = args.out / "run.json"
    selection = [*options, *(["-k", args.k] if args.k else [])]
    code = run_benchmarks(args.suite, [], result, selection)
    if not result.is_file():
        print(f"regress: nothing was measured (pytest's exit code {code})", file=sys.stderr)
        return PROBLEM
    run = read(result)
    new = as_baseline(run, selection)
    write_baseline(args.out / "baseline.json", new)
    print(f"results: {args.out}")
    if args.save:
        if code:
            print("regress: a benchmark failed: no baseline is made of this", file=sys.stderr)
            return PROBLEM
        write_baseline(args.baseline, new)
        print(f"baseline: {args.baseline}")
        return OK
    judged = compare(read(args.baseline), run, args, options)
    return PROBLEM if code else judged


if __name__ == "__main__":
    sys.exit(main())
