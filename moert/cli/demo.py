"""`moert demo`: moert inside a language model, beside the model's own experts: same tokens, same accuracy.

Makes a tiny random checkpoint, opens it with transformers and experts_implementation="moert", and generates
greedily. It fails if float32 tokens differ from the eager implementation's, or if bfloat16 logits are further
from float32 than the eager implementation's by more than half.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from moert import __version__
from moert.cli.arguments import print_json, size
from moert.cli.tiny_checkpoint import FAMILIES, make
from moert.errors import UnsupportedError
from moert.integrations.transformers import Prepared, prepare, register

EXAMPLES = """examples:
  moert demo
  moert demo --quick --json                few tokens, few batch sizes
  moert demo --family gpt_oss --dtype float32

Needs transformers; nothing is downloaded: the checkpoint is made, about 1 MB. Exit code 1 if a check fails.
"""
BATCH, PROMPT = 4, 8
# both round at every step; what differs is where, so the two distances are of one size, not equal
MOST_OF_EAGERS_ERROR: Final = 1.5
DTYPES = ("float32", "bfloat16")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda or cpu (the GPU if there is one)")
    parser.add_argument("--family", default="qwen3_moe", choices=sorted(FAMILIES))
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    parser.add_argument("--tokens", type=int, help="to generate (64, with --quick 16)")
    parser.add_argument("--quick", action="store_true", help="few tokens and batch sizes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedError('the demo needs transformers: pip install "moert[hf]"')
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers")
    register()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {
        "moert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": name,
        "family": args.family,
        "dtypes": {},
    }
    say = (lambda *_: None) if args.json else print
    say(", ".join(f"{k} {found[k]}" for k in ("moert", "torch", "transformers")) + f", {name}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        # saved in bfloat16, so that float32 and bfloat16 models have equal weights
        path = make(args.family, folder, "bfloat16", seed=0)
        nbytes = sum(file.stat().st_size for file in path.iterdir())
        say(f"checkpoint {args.family}, random weights, seed 0, {nbytes / 1e6:.1f} MB")
        for dtype in args.dtype or DTYPES:
            found["dtypes"][dtype] = result = generate_both(path, device, dtype, args)
            if not args.json:
                show(dtype, result)
    passed = all(result["passed"] for result in found["dtypes"].values())
    if args.json:
        print_json({**found, "passed": passed})
    say("\nall checks passed" if passed else "\nFAILED")
    return 0 if passed else 1


def generate_both(
    path: Path, device: torch.device, dtype: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Open the checkpoint in one dtype and generate with both implementations of its experts."""
    count = args.tokens or (16 if args.quick else 64)
    model = open_model(path, device, dtype)
    options: dict[str, Any] = {}
    if args.quick:
        options = {"buckets": (1, 4, 32), "max_tokens": 64, "tune": "off"}
    begin = time.perf_counter()
    with prepare(model, **options) as layers:
        found = {"ready_s": time.perf_counter() - begin, "layers": len(layers), **facts(layers)}
        prompt = torch.randint(2, 256, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
        prompt = prompt.to(device)
        tokens, speed = {}, {}
        for implementation in ("eager", "moert"):
            model.set_experts_implementation(implementation)
            tokens[implementation] = generate(model, prompt, count)
            # what came before has warmed up everything; it ends with a copy to the host
            begin = time.perf_counter()
            generate(model, prompt, count)
            speed[implementation] = BATCH * count / (time.perf_counter() - begin)
        found |= {"steps": layers.stats(), "tokens_per_second": speed}
        found["tokens"] = {name: rows[0].tolist() for name, rows in tokens.items()}
        if dtype == "float32":
            check = check_tokens(tokens)
        else:
            check = check_logits(model, open_model(path, device, "float32"), tokens["eager"])
    passed, text = check
    return {**found, "passed": passed, "check": text}


def open_model(path: Path, device: torch.device, dtype: str) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), experts_implementation="moert"
    )
    return model.to(device).eval()


def facts(layers: Prepared) -> dict[str, Any]:
    return {"plans": [str(report) for report in layers.plan()], "memory": layers.memory()}


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


def check_tokens(tokens: dict[str, torch.Tensor]) -> tuple[bool, str]:
    """In float32 every token is the eager implementation's."""
    different = (tokens["eager"] != tokens["moert"]).nonzero()
    if not len(different):
        return True, f"all {tokens['eager'].numel()} tokens of {BATCH} sequences equal eager's"
    row, column = different[0].tolist()
    return False, f"sequence {row} differs from token {column} on"


def check_logits(model: Any, exact: Any, tokens: torch.Tensor) -> tuple[bool, str]:
    """Feed the same tokens to all; how far are the bfloat16 logits from eager's in float32?"""
    tokens = tokens.to(model.device)
    exact.set_experts_implementation("eager")
    reference = exact(tokens).logits
    error = {}
    for implementation in ("eager", "moert"):
        model.set_experts_implementation(implementation)
        difference = model(tokens).logits.float() - reference
        error[implementation] = (difference.norm() / reference.norm()).item()
    text = (
        f"logits' distance from float32: eager {error['eager']:.2e}, moert {error['moert']:.2e}, at most "
        f"{MOST_OF_EAGERS_ERROR} times eager's is right"
    )
    return error["moert"] <= MOST_OF_EAGERS_ERROR * error["eager"], text


def show(dtype: str, result: dict[str, Any]) -> None:
    print(f"\n== {dtype}")
    print(f"{result['layers']} layers with experts ready after {result['ready_s']:.2f} s")
    for plan in result["plans"]:
        print(f"\n{plan}")
    print("\nmemory".ljust(10) + ", ".join(f"{k} {size(n)}" for k, n in result["memory"].items()))
    print("steps".ljust(9) + ", ".join(f"{k} {n}" for k, n in result["steps"].items()))
    speed = result["tokens_per_second"]
    print("speed".ljust(9) + ", ".join(f"{k} {v:.0f} tokens/s" for k, v in speed.items()))
    for name, row in result["tokens"].items():
        print(f"{name:<9}{join(row)}")
    print(f"check    {'' if result['passed'] else 'FAILED: '}{result['check']}")


def join(values: Sequence[int], most: int = 20) -> str:
    text = " ".join(f"{value:3}" for value in values[:most])
    return text + (f" ... ({len(values)} tokens)" if len(values) > most else "")
