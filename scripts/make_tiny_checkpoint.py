"""Make a small, deterministic mixture-of-experts checkpoint with transformers' own model classes.

    python scripts/make_tiny_checkpoint.py --family qwen3_moe --out DIR [--dtype bfloat16] [--seed 0]

What is in it: moert/cli/tiny_checkpoint.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moert.cli.tiny_checkpoint import FAMILIES, make, make_model

__all__ = ["FAMILIES", "make", "make_model"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny mixture-of-experts checkpoint.")
    parser.add_argument("--family", required=True, choices=sorted(FAMILIES))
    parser.add_argument("--out", required=True, help="directory, made if missing")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = make(args.family, args.out, args.dtype, args.seed)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {args.family}, {args.dtype}, seed {args.seed}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
