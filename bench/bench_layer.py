"""Decode times of a layer per shape and T, times the floor, beside R; writes layer-<dtype>.json.

    python bench/bench_layer.py [--shape NAME ...] [--tokens T ...] [--dtype bfloat16] [--out DIR]

One graph over several layers with separate weights and routings, each layer's out the next one's x; checked
against the fp32 reference first. R is one plain read of the same bytes, cold, in the same process.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
import triton  # noqa: E402
from device_timing import captured, device_us, read_us  # noqa: E402
from layer_chain import Chain, make_chain, make_layers  # noqa: E402
from shapes import SHAPES  # noqa: E402

from moert.config import MoEConfig  # noqa: E402
from moert.device import device_facts  # noqa: E402
from moert.steps.experts_reference import experts_reference  # noqa: E402
from moert.topk import TopK  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MAX_ERROR = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-5}
LAYER_BYTES = 24 << 30  # of weights of a chain, at most


def layer_count(cfg: MoEConfig) -> int:
    """4 to 8 layers, as many as fit LAYER_BYTES."""
    rows = cfg.w13_rows + cfg.intermediate_size
    layer = cfg.num_experts * rows * cfg.hidden_size * cfg.torch_dtype.itemsize
    return max(4, min(8, LAYER_BYTES // layer))


def check(chain: Chain) -> float:
    """Relative L2 error of the first layer against the fp32 reference, on up to 16 rows."""
    layer, topk, x, out = chain.layers[0], chain.topks[0], chain.rows[0], chain.rows[1]
    out.fill_(float("nan"))
    layer.forward(x, topk, out)
    rows = slice(0, x.shape[0], max(1, x.shape[0] // 16))
    sample = TopK(topk.weights[rows], topk.ids[rows])
    expected = experts_reference(x[rows], sample, layer.weights, layer.cfg)
    error = float((out[rows].float() - expected).norm() / expected.norm())
    if not error <= MAX_ERROR[layer.cfg.dtype] or out.isnan().any():
        raise SystemExit(f"wrong result, relative error {error:.1e}: nothing is timed")
    return error


def measure(name: str, cfg: MoEConfig, tokens: tuple[int, ...]) -> dict[str, Any]:
    """All T of one shape."""
    largest = max(tokens)
    layers = make_layers(cfg, layer_count(cfg), max_tokens=max(512, largest))
    report = layers[0].plan()
    cells = {}
    for count in tokens:
        chain = make_chain(layers, count, seed=count)
        error = check(chain)
        run = captured(chain.run).replay if count <= 512 else chain.run
        with torch.cuda.stream(torch.cuda.Stream()):
            us = device_us({"us": run}, rounds=9)["us"] / len(layers)
        plan, floor = report.for_tokens(count), chain.floor_us()
        read = read_us(chain.hit_bytes(), len(layers))
        cells[count] = {
            "us": round(us, 2),
            "floor us": round(floor, 2),
            "times the floor": round(us / floor, 3),
            "read us": round(read, 2),
            "error": error,
            "choice": str(plan.choice),
            "source": plan.source,
        }
        print(
            f"{name:<18} T={count:<5} {us:8.1f} us  {us / floor:5.2f} x floor  R {read:7.1f} us  "
            f"{plan.source} {plan.choice}",
            flush=True,
        )
    for layer in layers:
        layer.close()
    return {"layers": len(layers), "config": repr(cfg), "tokens": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=list(MAX_ERROR))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = device_facts(torch.device("cuda", torch.cuda.current_device()))
    report: dict[str, Any] = {
        "device": facts.name,
        "made_with": {"torch": torch.__version__, "triton": triton.__version__},
        "dtype": args.dtype,
        "shapes": {},
    }
    out = args.out or ROOT / "bench" / "results" / facts.slug
    out.mkdir(parents=True, exist_ok=True)
    for name in args.shape:
        cfg = replace(SHAPES[name], dtype=args.dtype)
        report["shapes"][name] = measure(name, cfg, tuple(args.tokens))
        # written after every shape: an interruption keeps what there is
        path = out / f"layer-{args.dtype}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
