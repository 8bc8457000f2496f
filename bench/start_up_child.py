"""Makes one layer and some that share with it, and prints how long each took, as one line of JSON.

python bench/start_up_child.py [--tune auto|force] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from device_timing import DEVICE, synchronize  # noqa: E402
from matrix import Matrix  # noqa: E402

from moert import ExpertWeights, MoERuntime  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", default="auto")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    cfg = Matrix.here(args.smoke).usual
    weights = ExpertWeights.random(cfg, device=DEVICE)
    synchronize()
    begin = time.perf_counter()
    first = MoERuntime(cfg, weights, tune=args.tune)
    took = {"first_us": (time.perf_counter() - begin) * 1e6}
    further, layers = [], [first]
    for _ in range(3 if args.smoke else 15):
        begin = time.perf_counter()
        layers.append(MoERuntime(cfg, weights, share=first))
        further.append((time.perf_counter() - begin) * 1e6)
    sources = sorted({plan.source for plan in first.plan()})
    print(json.dumps({**took, "further_us": further, "sources": sources}))


if __name__ == "__main__":
    main()
