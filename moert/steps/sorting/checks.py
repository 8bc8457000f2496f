"""Refuses a sort that does not fit, before anything is written."""

from __future__ import annotations

import math

import torch

from moert.errors import InputError
from moert.steps.sorting.layout import (
    SortedRows,
    check_packable,
    max_blocks,
    padded_rows,
    scratch_shape,
)
from moert.tensor_check import check_tensor
from moert.topk import ID_DTYPES

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POLICIES = {
    0: ("auto", "one-shot for few rows, else multi-phase"),
    1: ("one_shot", "one-shot"),
    2: ("multi_phase", "multi-phase"),
    3: ("none", "no sort"),
}


def strategy_of(policy: int) -> str:
    """ "auto", "one_shot" or "multi_phase".

    Raises:
        InputError: 3, or a policy that does not exist.
    """
    meanings = ", ".join(f"{number} ({meaning})" for number, (_, meaning) in POLICIES.items())
    if isinstance(policy, bool) or policy not in POLICIES:
        raise InputError(f"policy: got {policy!r}, need one of {meanings}")
    if policy == 3:
        raise InputError("policy: got 3 (no sort), which leaves nothing to do; need 0, 1 or 2")
    return POLICIES[policy][0]


def check_sort(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    block_size: int,
    num_valid: torch.Tensor | None,
    expert_mask: torch.Tensor | None,
) -> None:
    """Raise InputError or UnsupportedError, with what was given and what is needed."""
    for name, size in (("num_experts", num_experts), ("block_size", block_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{name}: got {size!r}, need an integer >= 1")
    if not isinstance(topk_ids, torch.Tensor) or topk_ids.dim() != 2 or topk_ids.shape[1] < 1:
        raise InputError(f"topk_ids: got {_describe(topk_ids)}, need a tensor [T, K] with K >= 1")
    device, (tokens, top_k) = topk_ids.device, topk_ids.shape
    check_tensor("topk_ids", topk_ids, ID_DTYPES, device)
    check_tensor("topk_weights", topk_weights, WEIGHT_DTYPES, device, (tokens, top_k))
    if num_valid is not None:
        check_tensor("num_valid", num_valid, (torch.int32,), device)
        if num_valid.numel() != 1:
            raise InputError(f"num_valid: got {num_valid.numel()} values, need one")
    if expert_mask is not None:
        shape = (num_experts,)
        check_tensor("expert_mask", expert_mask, (torch.int32,), device, shape, contiguous=True)
    check_packable(tokens, top_k)


def check_out(
    rows: SortedRows,
    scratch: torch.Tensor | None,
    tokens: int,
    top_k: int,
    num_experts: int,
    block_size: int,
    device: torch.device,
) -> None:
    """Raise InputError unless the buffers hold a sort of T rows of K ids."""
    padded = padded_rows(tokens, top_k, num_experts, block_size)
    blocks = max_blocks(tokens, top_k, num_experts, block_size)
    needs = {
        "sorted_token_ids": (padded, torch.int32),
        "sorted_weights": (padded, torch.float32),
        "sorted_expert_ids": (blocks, torch.int32),
        "num_valid_ids": (2, torch.int32),
    }
    tensors = rows._asdict()
    if scratch is not None:
        needs["scratch"] = (math.prod(scratch_shape(tokens, top_k, num_experts)), torch.int32)
        tensors["scratch"] = scratch
    for name, (elements, dtype) in needs.items():
        tensor = tensors[name]
        check_tensor(f"out.{name}", tensor, (dtype,), device)
        if tensor.numel() < elements or not tensor.is_contiguous():
            raise InputError(
                f"out.{name}: got {_describe(tensor)}, need at least {elements} contiguous elements "
                f"for T={tokens}, K={top_k}, E={num_experts}, block_size={block_size}"
            )


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
