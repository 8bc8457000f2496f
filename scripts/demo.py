"""moert inside a language model, beside the model's own experts: same tokens, same accuracy.

    bash scripts/demo.sh [--quick] [--device cuda] [--family gpt_oss] [--dtype bfloat16] [--tokens 64]

Makes a tiny random checkpoint, opens it with transformers and experts_implementation="moert", and generates
greedily. Exit code 1 if float32 tokens differ from the eager implementation's, or if bfloat16 logits are
further from float32 than the eager implementation's by more than half.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from make_tiny_checkpoint import FAMILIES, make

import moert
from moert.integrations.transformers import Prepared, prepare, register

BATCH, PROMPT = 4, 8
# both round at every step; what differs is where, so the two distances are of one size, not equal
MOST_OF_EAGERS_ERROR = 1.5


def main() -> int:
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers")
    register()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"moert {moert.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{name}"
    )
    ok = True
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        # saved in bfloat16, so that float32 and bfloat16 models have equal weights
        path = make(args.family, folder, "bfloat16", seed=0)
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"checkpoint {args.family}, random weights, seed 0, {size / 1e6:.1f} MB")
        for dtype in args.dtype:
            print(f"\n== {dtype}")
            ok &= show(path, device, dtype, args)
    print("\nall checks passed" if ok else "\nFAILED")
    return 0 if ok else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default here: %(default)s")
    parser.add_argument("--family", default="qwen3_moe", choices=sorted(FAMILIES))
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16"), help="default: both"
    )
    parser.add_argument(
        "--tokens", type=int, help="tokens to generate, default 64, with --quick 16"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few tokens, few buckets, no measuring"
    )
    args = parser.parse_args()
    args.dtype = args.dtype or ["float32", "bfloat16"]
    args.tokens = args.tokens or (16 if args.quick else 64)
    return args


def show(path: Path, device: torch.device, dtype: str, args: argparse.Namespace) -> bool:
    """Open the checkpoint in one dtype, print everything, return whether the check passed."""
    model = open_model(path, device, dtype)
    options = {"buckets": (1, 4, 32), "max_tokens": 64, "tune": "off"} if args.quick else {}
    start = time.perf_counter()
    with prepare(model, **options) as layers:
        print(f"{len(layers)} layers with experts ready after {time.perf_counter() - start:.2f} s")
        describe(layers)
        prompt = torch.randint(2, 256, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
        prompt = prompt.to(device)
        tokens, speed = {}, {}
        for implementation in ("eager", "moert"):
            model.set_experts_implementation(implementation)
            tokens[implementation] = generate(model, prompt, args.tokens)
        for implementation in ("eager", "moert"):
            model.set_experts_implementation(implementation)
            speed[implementation] = tokens_per_second(model, prompt, args)
        stats = layers.stats()
        print("\nsteps".ljust(10) + ", ".join(f"{name} {count}" for name, count in stats.items()))
        print("speed".ljust(9) + ", ".join(f"{k} {v:.0f} tokens/s" for k, v in speed.items()))
        print_tokens(tokens)
        if dtype == "float32":
            return check_tokens(tokens)
        return check_logits(model, open_model(path, device, "float32"), tokens["eager"])


def open_model(path: Path, device: torch.device, dtype: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), experts_implementation="moert"
    )
    return model.to(device).eval()


def describe(layers: Prepared) -> None:
    for report in layers.plan():
        print(f"\n{report}")
    sizes = layers.memory()
    print(
        "\nmemory".ljust(10) + ", ".join(f"{name} {n / 2**20:.2f} MiB" for name, n in sizes.items())
    )


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy continuation [BATCH, tokens] that no end token cuts short."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    assert isinstance(output, torch.Tensor)
    return output[:, prompt.shape[1] :].cpu()


def tokens_per_second(model: Any, prompt: torch.Tensor, args: argparse.Namespace) -> float:
    """The best of a few runs; `generate` before it has warmed up everything."""
    best = float("inf")
    for _ in range(1 if args.quick else 3):
        start = time.perf_counter()
        generate(model, prompt, args.tokens)  # ends with a copy to the host
        best = min(best, time.perf_counter() - start)
    return BATCH * args.tokens / best


def print_tokens(tokens: dict[str, torch.Tensor]) -> None:
    for name, rows in tokens.items():
        print(f"{name:<9}{join(rows[0].tolist())}")


def join(values: Sequence[int], most: int = 20) -> str:
    text = " ".join(f"{value:3}" for value in values[:most])
    return text + (f" ... ({len(values)} tokens)" if len(values) > most else "")


def check_tokens(tokens: dict[str, torch.Tensor]) -> bool:
    different = (tokens["eager"] != tokens["moert"]).nonzero()
    if not len(different):
        print(f"check    all {tokens['eager'].numel()} tokens of {BATCH} sequences equal eager's")
        return True
    row, column = different[0].tolist()
    print(f"check    FAILED: sequence {row} differs from token {column} on")
    return False


def check_logits(model: Any, exact: Any, tokens: torch.Tensor) -> bool:
    """Feed the same tokens to all; how far are the bfloat16 logits from eager's in float32?"""
    tokens = tokens.to(model.device)
    exact.set_experts_implementation("eager")
    reference = exact(tokens).logits
    error = {}
    for implementation in ("eager", "moert"):
        model.set_experts_implementation(implementation)
        difference = model(tokens).logits.float() - reference
        error[implementation] = (difference.norm() / reference.norm()).item()
    ok = error["moert"] <= MOST_OF_EAGERS_ERROR * error["eager"]
    print(
        f"check    {'' if ok else 'FAILED: '}logits' distance from float32: eager {error['eager']:.2e}, "
        f"moert {error['moert']:.2e}, at most {MOST_OF_EAGERS_ERROR} times eager's is right"
    )
    return ok


if __name__ == "__main__":
    sys.exit(main())
