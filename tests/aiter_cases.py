"""Layers and calls for the tests of the AITER backend on CPU tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from expert_cases import relative_error

from moert import ExpertWeights, MoEConfig, MoERuntime, TopK
from moert.device import KNOWN_DEVICES
from moert.steps.experts_reference import experts_reference

CFG = MoEConfig(5, 2, 128, 128, dtype="float16")
MI300 = KNOWN_DEVICES["gfx942"]
STRANGE = (-1, 5, 6, 2**30, -(2**31), 2**32 + 1)  # the last has a valid low word
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = math.nan
SEQUENCE = ["moe_sorting_opus_fwd", "ck_moe_stage1_fwd", "ck_moe_stage2_fwd"]


def make(cfg: MoEConfig = CFG, **options: Any) -> MoERuntime:
    weights = options.pop("weights", None) or ExpertWeights.random(cfg, seed=1)
    options = {"max_tokens": 6, "buckets": (1, 4), "backend": "aiter", **options}
    return MoERuntime(cfg, weights, **options)


def routing(cfg: MoEConfig, tokens: int, ids: torch.dtype = torch.int32, seed: int = 0) -> TopK:
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, cfg.num_experts, (tokens, cfg.top_k), generator=g)
    for number, strange in enumerate(STRANGE[: len(STRANGE) if ids is torch.int64 else -1]):
        if number < tokens:
            chosen[number, number % cfg.top_k] = strange
    return TopK(torch.rand(tokens, cfg.top_k, generator=g), chosen.to(ids))


def rows(cfg: MoEConfig, tokens: int, fill: float | None = None) -> torch.Tensor:
    if fill is not None:
        return torch.full((tokens, cfg.hidden_size), fill, dtype=cfg.torch_dtype)
    g = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, cfg.hidden_size, generator=g).to(cfg.torch_dtype)


def poison(rt: MoERuntime) -> None:
    assert rt._group.arena is not None
    rt._group.arena.poison()


def assert_right(got: torch.Tensor, x: torch.Tensor, topk: TopK, rt: MoERuntime) -> None:
    expected = experts_reference(x, topk, rt.weights, rt.cfg)
    error = relative_error(got, expected)
    assert error <= TOLERANCE[got.dtype], error  # NaN never passes
