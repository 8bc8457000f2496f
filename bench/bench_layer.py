"""Decode times of a layer per shape and T, times the floor, beside R; writes layer-<dtype>.json.

    python bench/bench_layer.py [--shape NAME ...] [--tokens T ...] [--dtype bfloat16] [--out DIR]

One graph over several layers with separate weights and routings, each layer's out the next one's x; checked
against the fp32 reference first. R is one plain read of the same bytes, cold, in the same process.
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
from device_timing import read_us  # noqa: E402
from layer_chain import (  # noqa: E402
    MATMUL_FLOPS,
    READ_BYTES_PER_SECOND,
    cells,
    layer_count,
    make_chain,
    make_layers,
)
from shapes import FORMATS, SHAPES, in_format  # noqa: E402

from moert.config import MoEConfig  # noqa: E402
from moert.device import device_facts  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def measure(name: str, cfg: MoEConfig, tokens: tuple[int, ...]) -> dict[str, Any]:
    """All T of one shape."""
    largest = max(tokens)
    layers = make_layers(cfg, layer_count(cfg), max_tokens=max(512, largest))
    found = {}
    for count in tokens:
        chain = make_chain(layers, count, seed=count)
        # beyond the largest bucket nothing joins a graph
        cell = cells({name: chain}, graphs=count <= 512)[name]
        read = read_us(chain.hit_bytes(), len(layers))
        found[count] = {**cell, "read us": round(read, 2)}
        print(
            f"{name:<18} T={count:<5} {cell['us']:8.1f} us  {cell['times the floor']:5.2f} x floor  "
            f"R {read:7.1f} us  {cell['source']} {cell['choice']}",
            flush=True,
        )
    for layer in layers:
        layer.close()
    return {"layers": len(layers), "config": repr(cfg), "tokens": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=list(FORMATS), help="or format")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = device_facts(torch.device("cuda", torch.cuda.current_device()))
    report: dict[str, Any] = {
        "device": facts.name,
        "made_with": {"torch": torch.__version__, "triton": triton.__version__},
        "dtype": args.dtype,
        "limits": {
            "read_bytes_per_second": READ_BYTES_PER_SECOND,
            "matmul_flops": MATMUL_FLOPS,
        },
        "shapes": {},
    }
    out = args.out or ROOT / "bench" / "results" / facts.slug
    out.mkdir(parents=True, exist_ok=True)
    for name in args.shape:
        cfg = in_format(SHAPES[name], args.dtype)
        report["shapes"][name] = measure(name, cfg, tuple(args.tokens))
        # written after every shape: an interruption keeps what there is
        path = out / f"layer-{args.dtype}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
