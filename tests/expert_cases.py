"""Weights, inputs and the measure of error that the tests of the experts share."""

from __future__ import annotations

import torch

from moert.arena import Arena, layout
from moert.backends.torch_experts import TorchExperts
from moert.config import MoEConfig
from moert.topk import TopK
from moert.weights import ExpertWeights

# sizes that are no multiple of anything; E is not a power of two
CFG = MoEConfig(7, 3, 66, 35, dtype="float32")


def make_weights(cfg: MoEConfig, storage: str = "plain", seed: int = 0) -> ExpertWeights:
    """`storage`: "plain", "transposed", "interleaved", "interleaved-transposed" or "bias-float32"."""
    weights = ExpertWeights.random(cfg, seed)
    if cfg.quant is not None:
        assert storage == "plain"
        return weights
    w13, w2, b13, b2 = weights.w13, weights.w2, weights.b13, weights.b2
    if storage == "bias-float32":
        assert b13 is not None and b2 is not None
        b13, b2 = b13.float(), b2.float()
    if storage.endswith("transposed"):
        w13, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w13, w2))
    interleaved = storage.startswith("interleaved")
    return ExpertWeights.from_tensors(w13, w2, b13, b2, interleaved=interleaved)


def make_inputs(cfg: MoEConfig, tokens: int, seed: int = 0) -> tuple[torch.Tensor, TopK]:
    """x [T, H] of the layer's dtype; distinct ids, float32 weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cfg.hidden_size, generator=generator).to(cfg.torch_dtype)
    scores = torch.randn(tokens, cfg.num_experts, generator=generator).softmax(-1)
    return x, TopK(*scores.topk(cfg.top_k))


def make_experts(
    cfg: MoEConfig, weights: ExpertWeights, tokens: int, like: TorchExperts | None = None
) -> TorchExperts:
    """On an arena full of NaN and -1."""
    fields = TorchExperts.scratch_fields(cfg, tokens)
    arena = Arena(torch.device("cpu"), layout(fields)[1])
    arena.poison()
    return TorchExperts(cfg, weights, arena.views(fields), like)


def run_experts(experts: TorchExperts, x: torch.Tensor, topk: TopK) -> torch.Tensor:
    """All rows live, into an output full of NaN."""
    out = torch.full_like(x, float("nan"))
    experts.run(x, topk.weights, topk.ids, out, x.shape[0], False)
    return out


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """In the L2 norm, over all elements."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
