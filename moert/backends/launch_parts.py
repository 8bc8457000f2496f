"""What the launches of all GEMM kernels have alike: grids, and the sort that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from moert.config import MoEConfig
from moert.launch import Grid
from moert.steps.sorting.layout import max_blocks


def direct_grid(tiles: int, rows: int) -> Callable[[int], Grid]:
    """A program for each of `tiles` of columns and each of `rows` rows a token."""
    return lambda tokens: (tiles * tokens * rows, 1, 1)


def grouped_grid(cfg: MoEConfig, bm: int, tiles: int) -> Callable[[int], Grid]:
    """A program for each of `tiles` of columns and each block of BM sorted rows that there can be."""

    def grid(tokens: int) -> Grid:
        return (max_blocks(tokens, cfg.top_k, cfg.num_experts, bm) * tiles, 1, 1)

    return grid


def sort_args(views: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sort's arrays by the names of kernel arguments."""
    return {n: views[n] for n in ("sorted_token_ids", "sorted_expert_ids", "num_valid_ids")}
