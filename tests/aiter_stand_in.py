"""A stand-in for AMD's aiter package on CPU tensors: signatures, contracts, a record of every call.

Contracts as in github.com/ROCm/aiter at e4048607: what the operators read and write, in which layout, and
what they demand without checking it. Here a broken demand raises `Broken`.
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np
import torch

BLOCK_N, BLOCK_K = 16, 32  # of the shuffled order, for 2-byte elements
SORT_OUTPUTS = ("sorted_token_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")


class Broken(Exception):
    """An operator was called outside its contract."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


class ActivationType(enum.Enum):
    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(enum.Enum):
    No = 0
    per_Tensor = 1
    per_Token = 2


@dataclass
class Called:
    """One call of an operator, its arguments by name."""

    name: str
    args: dict[str, Any]


def schema(operator: Callable[..., Any], first: str = "") -> str:
    """The schema that AITER's decorator registers; `first` is put before the parameters."""
    kinds = {"torch.Tensor": "Tensor", "torch.Tensor | None": "Tensor?", "int": "int"}
    parameters = [
        f"{kinds[p.annotation]} {p.name}"
        + ("" if p.default is inspect.Parameter.empty else f"={p.default}")
        for p in inspect.signature(operator).parameters.values()
    ]
    return f"{operator.__name__}({', '.join([first] * bool(first) + parameters)}) -> ()"


class StandIn(ModuleType):
    """The package.

    Args:
        opus: it has the sort that takes its scratch from the caller.

    Attributes:
        calls: of the sort and the GEMMs, in order.
        allocated: bytes that operators allocated themselves.
        change: called with each call before it runs; returns the calls to run instead.
        inert: calls are recorded and not run.
    """

    ActivationType = ActivationType
    QuantType = QuantType

    def __init__(self, opus: bool = True) -> None:
        super().__init__("aiter")
        self.calls: list[Called] = []
        self.allocated = 0
        self.change: Callable[[Called], list[Called]] = lambda call: [call]
        self.inert = False
        names = ["moe_sorting_fwd", "ck_moe_stage1_fwd", "ck_moe_stage2_fwd"]
        if opus:
            names.append("moe_sorting_opus_fwd")
            self.moe_sorting_opus_get_workspace_size = lambda *args, **options: (
                moe_sorting_opus_get_workspace_size(*args, **options)
            )
        for name in names:
            setattr(self, name, self._recorded(globals()[name]))
        self.fused_moe = ModuleType("aiter.fused_moe")

    def _recorded(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        name, signature = operator.__name__, inspect.signature(operator)

        # as there: a compiled operator's wrapper takes anything, its schema is registered with torch
        keep = wraps(operator) if name.startswith("ck_") else lambda call: call

        @keep
        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            called = Called(name, dict(bound.arguments))
            self.calls.append(called)
            if not self.inert:
                for one in self.change(called):
                    self.allocated += globals()[one.name](**one.args) or 0
            return called.args.get("out")

        return call

    def install(self, monkeypatch: Any) -> StandIn:
        ops, shuffle = ModuleType("aiter.ops"), ModuleType("aiter.ops.shuffle")
        shuffle.shuffle_weight = shuffle_weight  # type: ignore[attr-defined]
        modules = {"aiter": self, "aiter.ops": ops, "aiter.ops.shuffle": shuffle}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        return self


def shuffle_weight(x: torch.Tensor, layout: Any = (16, 16), use_int4: bool = False) -> torch.Tensor:
    demand(x.is_contiguous() and x.element_size() == 2, "a contiguous matrix of 2-byte elements")
    demand(x.shape[-2] % BLOCK_N == 0 and x.shape[-1] % BLOCK_K == 0, "whole blocks")
    n, k = x.shape[-2:]
    blocks = x.view(-1, n // BLOCK_N, BLOCK_N, k // BLOCK_K, BLOCK_K // 8, 8)
    shuffled = blocks.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)
    shuffled.is_shuffled = True  # type: ignore[attr-defined]
    return shuffled


def unshuffled(w: torch.Tensor) -> torch.Tensor:
    demand(getattr(w, "is_shuffled", False), "the operators tell the order by `is_shuffled`")
    n, k = w.shape[-2:]
    blocks = w.view(-1, n // BLOCK_N, k // BLOCK_K, BLOCK_K // 8, BLOCK_N, 8)
    return blocks.permute(0, 1, 4, 2, 3, 5).reshape(w.shape)


def moe_sorting_opus_get_workspace_size(
    tokens: int, num_experts: int, topk: int, dispatch_policy: int = 0
) -> int:
    demand(dispatch_policy in (1, 2), "a policy, not AITER's own choice")
    if dispatch_policy == 1:
        return 0
    element = 4 if tokens < 512 else 1 if topk < 255 else 2
    mesh = num_experts * (-(-tokens // 32) * 32) * element
    return int(mesh + -(-(num_experts + 1) // 32) * 32 * 4 + 128)


def moe_sorting_opus_fwd(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_weights: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    moe_buf: torch.Tensor,
    num_experts: int,
    unit_size: int,
    local_expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    dispatch_policy: int = 0,
    local_topk_ids: torch.Tensor | None = None,
    m_indices: torch.Tensor | None = None,
    reverse_sorted: torch.Tensor | None = None,
) -> None:
    tokens, topk = topk_ids.shape
    need = moe_sorting_opus_get_workspace_size(tokens, num_experts, topk, dispatch_policy)
    if need:
        demand(workspace is not None, "a workspace, or a null pointer is written")
        assert workspace is not None
        demand(workspace.dtype == torch.uint8 and workspace.numel() >= need, "workspace")
        workspace.fill_(0x5A)
    outputs = (sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids)
    sort(topk_ids, topk_weights, outputs, moe_buf, num_experts, unit_size, local_expert_mask)


def moe_sorting_fwd(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_weights: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    moe_buf: torch.Tensor,
    num_experts: int,
    unit_size: int,
    local_expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    dispatch_policy: int = 0,
) -> int:
    tokens, topk = topk_ids.shape
    outputs = (sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids)
    sort(topk_ids, topk_weights, outputs, moe_buf, num_experts, unit_size, local_expert_mask)
    return moe_sorting_opus_get_workspace_size(tokens, num_experts, topk, dispatch_policy)


def sort(
    ids: torch.Tensor,
    weights: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    moe_buf: torch.Tensor,
    experts: int,
    unit: int,
    mask: torch.Tensor | None,
) -> None:
    """Fill `outputs`; nothing at or past the padded total is written."""
    tokens, topk = ids.shape
    token_ids, sorted_weights, expert_ids, num_valid = outputs
    demand(ids.dtype == torch.int32 and ids.is_contiguous(), "ids: else nothing is launched")
    demand(weights.dtype == torch.float32 and weights.is_contiguous(), "topk_weights")
    demand(weights.shape == ids.shape, "topk_weights as many as ids")
    demand([t.dtype for t in outputs] == [torch.int32, torch.float32, torch.int32, torch.int32],
           "outputs")  # fmt: skip
    demand(num_valid.shape == (2,) and token_ids.shape == sorted_weights.shape, "lengths")
    demand(expert_ids.shape[0] * unit >= token_ids.shape[0], "a block is as long as unit_size")
    demand(bool(((ids >= 0) & (ids < experts)).all()), "ids index memory")
    demand(moe_buf.numel() == 0 or moe_buf.shape[0] == tokens, "moe_buf [M, H]")
    demand(mask is None or (mask.dtype == torch.int32 and mask.shape == (experts,)), "the mask")
    if moe_buf.numel():
        demand(moe_buf.is_contiguous() and moe_buf.dtype.itemsize == 2, "moe_buf without gaps")
        demand(moe_buf.shape[1] * 2 % 16 == 0, "a tail of less than 16 bytes is not cleared")
        moe_buf.zero_()
    host_ids, host_weights = ids.numpy(), weights.numpy()
    at = local = 0
    for expert in range(experts):
        if mask is not None and not mask[expert]:
            continue
        rows = np.argwhere(host_ids == expert)
        end = at + -(-len(rows) // unit) * unit
        demand(end <= token_ids.shape[0], "room for the padded rows")
        for place in range(at, end):
            real = place - at < len(rows)
            token, slot = rows[place - at] if real else (tokens, topk)
            token_ids[place] = int(slot) << 24 | int(token)
            sorted_weights[place] = float(host_weights[token, slot]) if real else 0.0
        expert_ids[at // unit : end // unit] = local
        at, local = end, local + 1
    num_valid.copy_(torch.tensor([at, tokens], dtype=torch.int32))


def sorted_rows(
    token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_valid: torch.Tensor,
    tokens: int,
    unit: int,
) -> list[tuple[int, int, int, int]]:
    """(place, expert, token, slot) of the rows that a GEMM over sorted blocks computes."""
    demand(num_valid.shape == (2,) and num_valid.dtype == torch.int32, "num_valid_ids")
    demand(token_ids.dtype == expert_ids.dtype == torch.int32, "int32 lists")
    demand(unit in (32, 64, 128), "block_m of an instance")
    total = int(num_valid[0])
    demand(0 <= total <= token_ids.shape[0] and total % unit == 0, "whole blocks that are there")
    rows = []
    for place in range(total):
        token, slot = int(token_ids[place]) & 0xFFFFFF, int(token_ids[place]) >> 24
        if token < tokens:
            rows.append((place, int(expert_ids[place // unit]), token, slot))
    return rows


def ck_moe_stage1_fwd(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    out: torch.Tensor,
    topk: int,
    kernelName: str = "",
    w1_scale: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    block_m: int | None = 32,
    sorted_weights: torch.Tensor | None = None,
    quant_type: QuantType = QuantType.No,
    activation: ActivationType = ActivationType.Silu,
) -> None:
    tokens, hidden = hidden_states.shape
    experts, inner = w1.shape[0], w1.shape[1] // 2
    demand(hidden_states.is_contiguous() and out.is_contiguous(), "rows without gaps")
    demand(hidden_states.dtype == out.dtype == w1.dtype, "one dtype")
    demand(out.dtype in (torch.bfloat16, torch.float16), "out dtype")
    demand(w1.shape == (experts, 2 * inner, hidden), "w1 [E, 2I, H]")
    demand(w2.shape == (experts, hidden, inner), "w2 [E, H, I]")
    demand(out.shape == (tokens, topk, inner), "out [M, topk, I]")
    demand(hidden % 128 == 0 and inner % 128 == 0, "whole tiles")
    demand(quant_type is QuantType.No and kernelName == "", "bfloat16 and float16")
    demand(sorted_weights is None, "weighted once: by stage 2")
    gated, unit = unshuffled(w1), block_m or 32
    lists = (sorted_token_ids, sorted_expert_ids, num_valid_ids)
    for _, expert, token, slot in sorted_rows(*lists, tokens, unit):
        gate, up = (gated[expert].float() @ hidden_states[token].float()).split(inner)
        act = (
            torch.nn.functional.silu
            if activation is ActivationType.Silu
            else torch.nn.functional.gelu
        )
        out[token, slot] = act(gate) * up


def ck_moe_stage2_fwd(
    inter_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    out: torch.Tensor,
    topk: int,
    kernelName: str = "",
    w2_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_m: int | None = 32,
    sorted_weights: torch.Tensor | None = None,
    quant_type: QuantType = QuantType.No,
    activation: ActivationType = ActivationType.Silu,
) -> None:
    tokens, slots, inner = inter_states.shape
    experts, hidden = w2.shape[:2]
    demand(slots == topk and inter_states.is_contiguous(), "inter_states [M, topk, I]")
    demand(out.shape == (tokens, hidden) and out.is_contiguous(), "out [M, H] without gaps")
    demand(inter_states.dtype == out.dtype == w2.dtype, "one dtype")
    demand(w1.shape == (experts, 2 * inner, hidden), "w1 [E, 2I, H]")
    demand(w2.shape == (experts, hidden, inner), "w2 [E, H, I]")
    demand(quant_type is QuantType.No and kernelName == "", "bfloat16 and float16")
    demand(sorted_weights is not None and sorted_weights.dtype == torch.float32, "sorted_weights")
    assert sorted_weights is not None
    demand(sorted_weights.shape == sorted_token_ids.shape, "a weight a row")
    down, unit = unshuffled(w2), block_m or 32
    lists = (sorted_token_ids, sorted_expert_ids, num_valid_ids)
    for place, expert, token, slot in sorted_rows(*lists, tokens, unit):
        # atomics of the output's dtype
        out[token] += sorted_weights[place] * (
            down[expert].float() @ inter_states[token, slot].float()
        )


LIBRARY = torch.library.Library("aiter", "FRAGMENT")
LIBRARY.define(schema(moe_sorting_fwd))
LIBRARY.define(schema(moe_sorting_opus_fwd))
LIBRARY.define(schema(moe_sorting_opus_get_workspace_size, "Tensor dummy"))
