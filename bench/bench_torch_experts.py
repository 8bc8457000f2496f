"""The CPU experts against those of transformers: `python bench/bench_torch_experts.py [--quick]`.

Every variant computes the same layer. The variants take turns, call by call, and the medians are
compared, because a shared machine is never quiet for long.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moert.backends.torch_experts import TorchExperts
from moert.config import MoEConfig
from moert.steps.experts_reference import experts_reference
from moert.topk import TopK
from moert.weights import ExpertWeights

THEIRS = ("grouped_mm", "eager", "batched_mm")
# batched_mm copies the weights of every (token, slot): pointless beyond this many
BATCHED_MAX_SLOTS = 16
INPUTS = 31
LAYERS = {
    "mixtral-like": MoEConfig(8, 2, 512, 1024),
    "qwen-like": MoEConfig(32, 4, 256, 512),
    "fine-grained": MoEConfig(64, 8, 1024, 256),
    "gpt-oss-like": MoEConfig(32, 4, 720, 720, activation="swiglu_oai", bias=True),
}
Call = Callable[[torch.Tensor, TopK], torch.Tensor]


def their_experts(cfg: MoEConfig, weights: ExpertWeights) -> nn.Module:
    """transformers' module on the same tensors."""
    shapes = {"hidden_size": cfg.hidden_size, "intermediate_size": cfg.intermediate_size}
    experts = {"num_local_experts": cfg.num_experts, "num_experts_per_tok": cfg.top_k}
    gpt_oss = cfg.activation == "swiglu_oai"
    config = (GptOssConfig if gpt_oss else MixtralConfig)(**shapes, **experts)
    with torch.device("meta"):
        module = (GptOssExperts if gpt_oss else MixtralExperts)(config)
    tensors = {"gate_up_proj": weights.w13, "down_proj": weights.w2}
    if gpt_oss:
        tensors = {name: tensor.transpose(1, 2) for name, tensor in tensors.items()}
        tensors |= {"gate_up_proj_bias": weights.b13, "down_proj_bias": weights.b2}
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


def layer_weights(cfg: MoEConfig) -> ExpertWeights:
    """Random weights, stored as the family stores them."""
    weights = ExpertWeights.random(cfg)
    if cfg.activation != "swiglu_oai":
        return weights
    w13, w2 = (w.transpose(1, 2).contiguous() for w in (weights.w13, weights.w2))
    return ExpertWeights.from_tensors(
        w13, w2, weights.b13, weights.b2, interleaved=True, transposed=True
    )


def variants(cfg: MoEConfig, tokens: int) -> dict[str, Call]:
    """moert's and transformers' implementations, by name."""
    weights = layer_weights(cfg)
    scratch = {n: torch.empty(s, dtype=d) for n, s, d in TorchExperts.scratch_fields(cfg, tokens)}
    ours = TorchExperts(cfg, weights, scratch)
    out = torch.empty(tokens, cfg.hidden_size, dtype=cfg.torch_dtype)
    module = their_experts(cfg, weights)

    def run(x: torch.Tensor, topk: TopK) -> torch.Tensor:
        ours.run(x, topk.weights, topk.ids, out, x.shape[0], False)
        return out

    def other(name: str) -> Call:
        def call(x: torch.Tensor, topk: TopK) -> torch.Tensor:
            module.config._experts_implementation = name
            return module(x, topk.ids, topk.weights)

        return call

    calls: dict[str, Call] = {"moert": run}
    for name in THEIRS:
        if name != "batched_mm" or tokens * cfg.top_k <= BATCHED_MAX_SLOTS:
            calls[name] = other(name)
    reference = make_inputs(cfg, tokens, 0)
    expected = experts_reference(*reference, weights, cfg)
    for name, call in calls.items():
        error = (call(*reference).float() - expected).norm() / expected.norm()
        assert error < 2e-2, f"{name}: relative error {error:.1e}"
    return calls


def make_inputs(cfg: MoEConfig, tokens: int, seed: int) -> tuple[torch.Tensor, TopK]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cfg.hidden_size, generator=generator).to(cfg.torch_dtype)
    scores = torch.randn(tokens, cfg.num_experts, generator=generator).softmax(-1)
    weights, ids = scores.topk(cfg.top_k)
    return x, TopK(weights.to(cfg.torch_dtype), ids)


@torch.inference_mode()
def measure(cfg: MoEConfig, tokens: int, seconds: float) -> dict[str, float]:
    """Median microseconds a call of every variant, all taking turns for `seconds`."""
    calls = variants(cfg, tokens)
    inputs = [make_inputs(cfg, tokens, seed) for seed in range(INPUTS)]
    shuffled = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < 7:
        # random order and inputs: nobody always finds the weights that the one before left in the cache
        for name, call in shuffled.sample(list(calls.items()), len(calls)):
            x, topk = inputs[shuffled.randrange(INPUTS)]
            begin = time.perf_counter()
            call(x, topk)
            times[name].append(time.perf_counter() - begin)
        turn += 1
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the time for each row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    args = parser.parse_args()
    print("microseconds a call (median); x: how many times as long as moert")
    print(f"{'layer':<14}{'dtype':<10}{'threads':>7}{'T':>5}{'moert':>10}", end="")
    print("".join(f"{name:>14}{'x':>7}" for name in THEIRS))
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, layer in LAYERS.items():
            for dtype in args.dtypes:
                for tokens in args.tokens:
                    times = measure(replace(layer, dtype=dtype), tokens, 0.5 if args.quick else 1.5)
                    row = f"{name:<14}{dtype:<10}{threads:>7}{tokens:>5}{times['moert']:>10.0f}"
                    for other in THEIRS:
                        t = times.get(other)
                        row += f"{'':>21}" if t is None else f"{t:>14.0f}{t / times['moert']:>7.2f}"
                    print(row, flush=True)


if __name__ == "__main__":
    main()
