"""Sorting: the S = T*K rows of a call, grouped by expert and padded to whole blocks (AITER's layout)."""

from __future__ import annotations

import torch

from moert.errors import InputError
from moert.steps.sorting.checks import check_out, check_sort, strategy_of
from moert.steps.sorting.layout import SortBuffers, SortedRows, max_blocks, padded_rows
from moert.steps.sorting.reference import sort_reference

__all__ = ["SortBuffers", "SortedRows", "max_blocks", "padded_rows", "sort", "sort_reference"]


def sort(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    block_size: int,
    *,
    policy: int = 0,
    num_valid: torch.Tensor | None = None,
    expert_mask: torch.Tensor | None = None,
    out: SortBuffers | SortedRows | None = None,
) -> SortedRows:
    """Group the rows (token, slot) of a call by expert; see `SortedRows` for what comes back.

    With `out` a `SortBuffers`, nothing is allocated on a GPU; with a `SortedRows`, or none, the multi-phase
    strategy takes its scratch from torch's allocator, as a CPU always does. Captured, the call must have been
    made before with the same sizes; the captured launches read and write the very tensors given.

    Args:
        topk_ids: [T, K] int32 or int64, unit inner stride; an id outside 0..E-1 is no row.
        topk_weights: [T, K] float32, bfloat16 or float16, unit inner stride, same device.
        num_experts: E, at most 1024 on a GPU.
        block_size: BM, every expert's rows are padded to a multiple of it.
        policy: 0 the faster one by this device's measured crossover, recorded here or shipped, or by a rule
            where none was measured (`crossovers.py`); 1 one-shot (a single launch); 2 multi-phase (three
            launches). Results are the same; on a CPU all three run the same code.
        num_valid: one int32 on the same device; rows from there on are not read.
        expert_mask: [E] int32 on the same device; experts with 0 are left out, and the others numbered
            anew in `sorted_expert_ids`.
        out: where to write, for at least T rows of K ids. New tensors without it.

    Raises:
        InputError: an argument does not fit, policy 3 (no sort) or an unknown one.
        UnsupportedError: T >= 2^24, K > 127, or a strategy or E that the device cannot run.
        StateError: first use of these sizes inside a stream capture.
    """
    check_sort(topk_ids, topk_weights, num_experts, block_size, num_valid, expert_mask)
    tokens, top_k = topk_ids.shape
    strategy = strategy_of(policy)
    device = topk_ids.device
    rows, scratch = (out.rows, out.scratch) if isinstance(out, SortBuffers) else (out, None)
    if rows is None:
        rows = SortedRows.empty(tokens, top_k, num_experts, block_size, device)
    elif not isinstance(rows, SortedRows):
        raise InputError(f"out: got {type(out).__name__}, need SortBuffers, SortedRows or None")
    else:
        check_out(rows, scratch, tokens, top_k, num_experts, block_size, device)
    topk_weights = topk_weights.detach()
    if device.type == "cpu":
        from moert.steps.sorting.torch_sort import sort_torch

        live = tokens if num_valid is None else max(0, min(tokens, int(num_valid)))
        sort_torch(topk_ids, topk_weights, num_experts, block_size, live, expert_mask, rows)
        return rows
    from moert.steps.sorting.gpu import sort_gpu

    sort_gpu(
        strategy,
        topk_ids,
        topk_weights,
        num_experts,
        block_size,
        num_valid,
        expert_mask,
        rows,
        scratch,
    )
    return rows
