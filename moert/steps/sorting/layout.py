"""The sorted form of a call's rows, AITER's `moe_sorting` layout (github.com/ROCm/aiter), and its sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moert.errors import UnsupportedError

MAX_TOKENS = 2**24  # a packed entry has 24 bits for the token
MAX_TOP_K = 127  # and 7 for the slot; K itself marks padding


class SortedRows(NamedTuple):
    """Rows (token, slot) grouped by expert, each expert's rows padded to whole blocks.

    Nothing at or past `num_valid_ids[0]` rows (that many / block_size blocks) is ever written.

    sorted_token_ids: [P] int32, `slot << 24 | token`; padding is `K << 24 | M`, M the rows of the caller's
        tensors. Experts ascend; within one the tokens ascend, then the slots.
    sorted_weights: [P] float32, 0 for padding.
    sorted_expert_ids: [P / block_size] int32, the expert of each block; with an expert mask its place
        among the experts that are kept.
    num_valid_ids: [2] int32: rows with padding, live tokens.
    """

    sorted_token_ids: torch.Tensor
    sorted_weights: torch.Tensor
    sorted_expert_ids: torch.Tensor
    num_valid_ids: torch.Tensor

    @classmethod
    def empty(
        cls, tokens: int, top_k: int, num_experts: int, block_size: int, device: torch.device | str
    ) -> SortedRows:
        """Uninitialised outputs for up to `tokens` rows of K ids."""
        rows = padded_rows(tokens, top_k, num_experts, block_size)
        blocks = max_blocks(tokens, top_k, num_experts, block_size)
        return cls(
            torch.empty(rows, dtype=torch.int32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(blocks, dtype=torch.int32, device=device),
            torch.empty(2, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class SortBuffers:
    """Outputs together with the scratch that the multi-phase strategy needs: a sort that allocates nothing.

    Args:
        rows: the outputs.
        scratch: int32, at least `scratch_shape(...)` elements.
    """

    rows: SortedRows
    scratch: torch.Tensor

    @classmethod
    def empty(
        cls, tokens: int, top_k: int, num_experts: int, block_size: int, device: torch.device | str
    ) -> SortBuffers:
        """Uninitialised buffers for any sort of up to `tokens` rows of K ids."""
        return cls(
            SortedRows.empty(tokens, top_k, num_experts, block_size, device),
            torch.empty(
                scratch_shape(tokens, top_k, num_experts), dtype=torch.int32, device=device
            ),
        )


def max_blocks(tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """The most blocks that S = T*K rows can take: n + (S - n) // BM with n = min(S, E).

    An expert of c >= 1 rows takes 1 + (c - 1) // BM blocks, and sums of floors do not exceed the floor of
    the sum; one row for each of n experts and all others for one of them attain it.
    """
    rows = tokens * top_k
    hit = min(rows, num_experts)
    return hit + (rows - hit) // block_m


def padded_rows(tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """The most output rows, padding counted, that S = T*K rows can take: `max_blocks` times BM."""
    return max_blocks(tokens, top_k, num_experts, block_m) * block_m


def takes_crowded(counts: Iterable[int], reach: int, crowded_block_m: int) -> bool:
    """Whether blocks are of CROWDED_BM rows: the rule of `moert.steps.sorting.block_size`.

    Args:
        counts: rows of each expert.
        reach: rows that one reading of an expert's weights serves, otherwise.
        crowded_block_m: the same in blocks for crowds.
    """
    counts = list(counts)
    readings, crowded = (sum(-(-n // size) for n in counts) for size in (reach, crowded_block_m))
    return 0 < 2 * crowded <= readings


def certain_crowd(tokens: int, crowded_block_m: int) -> int:
    """How many of T tokens make a crowd for certain where all take the same experts.

    Args:
        crowded_block_m: at least twice what a reading reaches otherwise, which is less than T.
    """
    return tokens - tokens % crowded_block_m if tokens > crowded_block_m else tokens


def padded_experts(num_experts: int) -> int:
    """EP: E as a power of two, at least 16."""
    return max(16, 1 << (num_experts - 1).bit_length())


# of the multi-phase strategy: rows a workgroup takes at a time, and the most workgroups
PHASE_TILE = 128
MAX_SHARES = 512


def num_shares(tokens: int, top_k: int) -> int:
    """Workgroups of the multi-phase strategy for up to `tokens` rows of K ids."""
    return max(1, min(MAX_SHARES, -(-tokens * top_k // PHASE_TILE)))


def scratch_shape(tokens: int, top_k: int, num_experts: int) -> tuple[int, int]:
    """Of the multi-phase strategy's int32 scratch: rows per expert of every workgroup, then of all."""
    return num_shares(tokens, top_k) + 1, padded_experts(num_experts)


def check_packable(tokens: int, top_k: int) -> None:
    """Raise UnsupportedError unless tokens and slots fit a packed entry."""
    if tokens >= MAX_TOKENS:
        raise UnsupportedError(
            f"sort: got T={tokens}, supported is T < 2^24 a sort (24 bits of an entry); sort in chunks"
        )
    if top_k > MAX_TOP_K:
        raise UnsupportedError(
            f"sort: got K={top_k}, supported is K <= {MAX_TOP_K} (7 bits of an entry)"
        )
