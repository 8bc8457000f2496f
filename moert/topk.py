"""The routing of one call as the caller hands it over."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moert.errors import InputError

ID_DTYPES = (torch.int32, torch.int64)


class TopK(NamedTuple):
    """Routing of T tokens.

    weights: [T, K] float32 or the model's dtype. ids: [T, K] int32 or int64; an id outside 0..E-1
    means "not routed here" and contributes zero.
    """

    weights: torch.Tensor
    ids: torch.Tensor


def distinct_ids(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The K best experts of each row of `scores` [T, E] as ids [T, K] int32; -1 where E has no more."""
    best = scores.topk(min(top_k, scores.shape[1]), dim=1).indices.to(torch.int32)
    missing = top_k - best.shape[1]
    return torch.nn.functional.pad(best, (0, missing), value=-1) if missing else best


def all_as_first(ids: torch.Tensor) -> torch.Tensor:
    """Ids [T, K] by which every token takes the experts of the first one of `ids` [T, K]."""
    return ids[:1].expand_as(ids).contiguous()


def as_topk(topk: TopK | tuple[torch.Tensor, torch.Tensor]) -> TopK:
    """A `TopK` from itself or from a plain pair in either order: the integer one is the ids.

    Raises:
        InputError: not a pair of tensors, or not exactly one of integer dtype.
    """
    if isinstance(topk, TopK):
        return topk
    if not (isinstance(topk, (tuple, list)) and len(topk) == 2):
        raise InputError(
            f"topk: got {type(topk).__name__}, need TopK(weights, ids) or a pair of tensors"
        )
    first, second = topk
    for tensor in (first, second):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"topk: got a {type(tensor).__name__} inside the pair, need two tensors"
            )
    if second.dtype in ID_DTYPES and first.is_floating_point():
        return TopK(first, second)
    if first.dtype in ID_DTYPES and second.is_floating_point():
        return TopK(second, first)
    raise InputError(
        f"topk: got dtypes {first.dtype} and {second.dtype}, need ids of int32 or int64 and "
        "floating-point weights"
    )
