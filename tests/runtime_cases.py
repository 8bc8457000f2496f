"""Tiny layers and calls for the tests of the runtime on a CPU, on both of its backends there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from expert_cases import make_weights, relative_error

from moert import MoEConfig, MoERuntime, TopK
from moert.config import Quant
from moert.steps.experts_reference import experts_reference

BACKENDS = ("torch", "triton")
MAX_TOKENS, BUCKETS = 8, (1, 2, 5)  # plans for 1, 2, 5 and 8 tokens: direct and sorted ones
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
NAN = math.nan
# nothing a multiple of a tile, nothing equal
CFG = MoEConfig(5, 2, 40, 24, dtype="float32")
STRANGE = (-1, CFG.num_experts, 2**30, -(2**31))
STRANGE_64 = (*STRANGE, 2**40, 2**40 + 1, 2**32, -(2**63))  # some with a valid low word


@dataclass
class Case:
    """The tensors of one call."""

    x: torch.Tensor
    topk: TopK
    out: torch.Tensor

    def expected(self, rt: MoERuntime) -> torch.Tensor:
        return experts_reference(self.x, self.topk, rt.weights, rt.cfg)

    def call(self, rt: MoERuntime, **options: Any) -> torch.Tensor:
        return rt.forward(self.x, self.topk, self.out, **options)

    def rows(self, count: int) -> Case:
        """Of the first tokens alone."""
        weights, ids = self.topk
        return Case(self.x[:count], TopK(weights[:count], ids[:count]), self.out[:count])


def guarded(
    rows: int, columns: int, dtype: torch.dtype, stride: int, fill: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] inside a buffer full of `fill`, and the buffer."""
    buffer = torch.full((rows + 4, stride), fill, dtype=dtype)
    return buffer[2 : 2 + rows, 1 : 1 + columns], buffer


def make_case(
    cfg: MoEConfig,
    tokens: int,
    seed: int = 0,
    ids: torch.dtype = torch.int32,
    weights: torch.dtype = torch.float32,
    strange: float = 0.2,
    wide: int = 0,
) -> Case:
    """Random rows, `wide` elements further apart than they must be; duplicates and ids of nobody among the
    ids, out full of NaN."""
    g = torch.Generator().manual_seed(1000 * seed + tokens)
    dtype = cfg.torch_dtype

    def rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tokens, columns + wide, dtype=dtype)[:, :columns]

    x = rows(cfg.hidden_size, dtype).copy_(torch.randn(tokens, cfg.hidden_size, generator=g))
    chosen = torch.randint(0, cfg.num_experts, (tokens, cfg.top_k), generator=g)
    odd = torch.tensor(STRANGE_64 if ids == torch.int64 else STRANGE)
    which = torch.randint(0, len(odd), chosen.shape, generator=g)
    swap = torch.rand(chosen.shape, generator=g) < strange
    topk_ids = rows(cfg.top_k, ids).copy_(torch.where(swap, odd[which], chosen))
    topk_weights = rows(cfg.top_k, weights).copy_(torch.rand(chosen.shape, generator=g))
    out = torch.full((tokens, cfg.hidden_size + wide), NAN, dtype=dtype)[:, : cfg.hidden_size]
    return Case(x, TopK(topk_weights, topk_ids), out)


def make_runtime(
    backend: str, cfg: MoEConfig = CFG, storage: str = "plain", seed: int = 0, **options: Any
) -> MoERuntime:
    weights = make_weights(cfg, storage, seed)
    if "share" not in options:
        options = {"backend": backend, "max_tokens": MAX_TOKENS, "buckets": BUCKETS, **options}
    return MoERuntime(cfg, weights, **options)


def poison(rt: MoERuntime) -> None:
    """The arena and the result that the next call without out= writes: NaN."""
    rt._group.arena.poison()
    rt._group.results.peek_output(rt._group.options.max_tokens).fill_(NAN)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative L2 error within the dtype's tolerance, and rows of zeros exactly so; NaN never passes."""
    assert got.shape == expected.shape
    assert not got.isnan().any()
    nobody = ~expected.any(1)
    assert not got[nobody].any()
    if not nobody.all():
        error = relative_error(got, expected)
        assert error <= TOLERANCE[got.dtype], error


def check_call(rt: MoERuntime, case: Case, **options: Any) -> torch.Tensor:
    """One call on a poisoned arena, against the reference."""
    poison(rt)
    y = case.call(rt, **options)
    assert y is case.out
    assert_close(y, case.expected(rt))
    return y


LAYERS: dict[str, tuple[MoEConfig, str]] = {
    "plain": (CFG, "plain"),
    "half": (replace(CFG, dtype="float16"), "plain"),
    "transposed": (replace(CFG, dtype="float16"), "transposed"),
    "bias": (replace(CFG, bias=True, activation="gelu_tanh"), "plain"),
    "bias-float32": (replace(CFG, dtype="float16", bias=True), "bias-float32"),
    "gpt-oss": (replace(CFG, activation="swiglu_oai", bias=True), "interleaved"),
    "interleaved-transposed": (replace(CFG, dtype="float16"), "interleaved-transposed"),
    "limit": (replace(CFG, activation_limit=0.5), "plain"),
    "ungated": (replace(CFG, gated=False, activation="relu2"), "plain"),
    "ungated-bias": (replace(CFG, gated=False, bias=True, activation="gelu"), "transposed"),
    "top-1": (replace(CFG, top_k=1), "plain"),
    "every-expert": (replace(CFG, top_k=5), "plain"),
    "shard-of-fewer-than-k": (replace(CFG, top_k=7), "plain"),
    "one-expert": (MoEConfig(1, 1, 17, 3, dtype="float32"), "plain"),
    "one-wide": (MoEConfig(3, 2, 1, 1, bias=True, dtype="float32"), "plain"),
    "larger-than-a-tile": (MoEConfig(3, 2, 64, 63, dtype="float32"), "plain"),
    "int4": (replace(CFG, bias=True, quant=Quant("int4", 32, symmetric=False)), "plain"),
    "int4-half": (replace(CFG, dtype="float16", gated=False, quant=Quant("int4", -1)), "plain"),
}
