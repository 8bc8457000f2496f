"""The sort on the CPU: one stable sort of all ids, then every place by arithmetic."""

from __future__ import annotations

import torch

from moert.steps.sorting.layout import SortedRows


def sort_torch(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    block_size: int,
    live: int,
    expert_mask: torch.Tensor | None,
    out: SortedRows,
) -> None:
    """Write `out` up to the rows in use; `live` is 0..T, the others as for `moert.sort`, on the CPU."""
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids[:live].reshape(-1).long()
    if expert_mask is None:
        kept = torch.ones(num_experts, dtype=torch.bool, device="cpu")
    else:
        kept = expert_mask != 0
    local = kept.cumsum(0) - 1
    routed = (ids >= 0) & (ids < num_experts)
    routed &= kept[torch.where(routed, ids, 0)]
    row = routed.nonzero().squeeze(1)
    expert, order = local[ids[row]].sort(stable=True)
    row = row[order]

    counts = torch.bincount(expert, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    first_block = blocks.cumsum(0) - blocks
    rank = torch.arange(len(row), device="cpu") - (counts.cumsum(0) - counts)[expert]
    at = first_block[expert] * block_size + rank
    num_blocks = int(blocks.sum())
    padded = num_blocks * block_size

    token, slot = row // top_k, row % top_k
    out.sorted_token_ids[:padded] = top_k << 24 | num_tokens
    out.sorted_token_ids[at] = (slot << 24 | token).to(torch.int32)
    out.sorted_weights[:padded] = 0.0
    out.sorted_weights[at] = topk_weights[token, slot].float()
    out.sorted_expert_ids[:num_blocks] = (
        torch.arange(num_experts, device="cpu").repeat_interleave(blocks).to(torch.int32)
    )
    out.num_valid_ids[0] = padded
    out.num_valid_ids[1] = live
