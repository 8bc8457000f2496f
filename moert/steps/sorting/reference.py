"""The sort as its definition reads, expert by expert."""

from __future__ import annotations

import torch

from moert.steps.sorting.layout import SortedRows


def sort_reference(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    block_size: int,
    num_valid: int | None = None,
    expert_mask: torch.Tensor | None = None,
) -> SortedRows:
    """New tensors of exactly the rows in use; arguments as for `moert.sort`, `num_valid` an int."""
    num_tokens, top_k = topk_ids.shape
    live = num_tokens if num_valid is None else max(0, min(num_tokens, num_valid))
    ids, weights = topk_ids[:live].cpu(), topk_weights[:live].cpu().float()
    kept = [True] * num_experts if expert_mask is None else [m != 0 for m in expert_mask.tolist()]
    packed: list[torch.Tensor] = []
    sorted_weights: list[torch.Tensor] = []
    experts: list[int] = []
    for expert in range(num_experts):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)  # row-major: by token, then slot
        if not kept[expert] or not len(token):
            continue
        padding = -len(token) % block_size
        packed += [slot << 24 | token, torch.full((padding,), top_k << 24 | num_tokens)]
        sorted_weights += [weights[token, slot], torch.zeros(padding)]
        experts += [sum(kept[:expert])] * ((len(token) + padding) // block_size)
    return SortedRows(
        torch.cat([torch.empty(0, dtype=torch.int64), *packed]).to(torch.int32),
        torch.cat([torch.empty(0), *sorted_weights]),
        torch.tensor(experts, dtype=torch.int32),
        torch.tensor([len(experts) * block_size, live], dtype=torch.int32),
    )
