"""Measures plans on the GPU at hand and writes them where the package ships them from.

    python scripts/ship_plans.py [--shape NAME ...] [--format NAME ...] [--out DIR]

Each record is made by the tuner exactly as a user's own start-up makes it, on random weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from shapes import FORMATS, SHAPES, in_format  # noqa: E402


class Spent:
    """A filter of the logger "moert": the seconds that tuning says it spent, by what they went into."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def __call__(self, record: logging.LogRecord) -> bool:
        self.seconds.update(getattr(record, "spent", {}))
        return True

    def __str__(self) -> str:
        return ", ".join(f"{work} {seconds:.0f} s" for work, seconds in self.seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--format", nargs="*", choices=list(FORMATS), default=["bfloat16", "int4"])
    parser.add_argument("--out", type=Path, default=ROOT / "moert" / "tuning" / "shipped")
    args = parser.parse_args()
    log = logging.getLogger("moert")
    log.setLevel(logging.DEBUG)  # for what is read of it: only warnings are shown
    with tempfile.TemporaryDirectory() as records:
        os.environ["MOERT_TUNING_DIR"] = records
        from moert import ExpertWeights, MoERuntime

        for name, form in ((n, f) for n in args.shape for f in args.format):
            cfg, start, spent = in_format(SHAPES[name], form), time.perf_counter(), Spent()
            weights = ExpertWeights.random(cfg, device="cuda")
            log.addFilter(spent)
            with MoERuntime(cfg, weights, tune="force") as rt:
                seconds = time.perf_counter() - start
                print(f"{name} {form}: {seconds:.0f} s ({spent})\n{rt.plan()}", flush=True)
            log.removeFilter(spent)
            # copied after every shape: an interruption keeps what there is
            for record in Path(records).rglob("*.json"):
                target = args.out / record.relative_to(records)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(record, target)


if __name__ == "__main__":
    main()
