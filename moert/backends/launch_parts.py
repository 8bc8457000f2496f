"""What the launches of GEMM kernels have alike: grids, arguments and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moert.config import MoEConfig
from moert.launch import Grid
from moert.quantization.int4_layout import Int4Matrix
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


def int4_args(name: str, matrix: Int4Matrix) -> dict[str, torch.Tensor | None]:
    """A packed matrix by the names of kernel arguments, its codes as `name`."""
    return {name: matrix.codes, "scales_ptr": matrix.scales, "zeros_ptr": matrix.zeros}


def activation_constants(cfg: MoEConfig) -> dict[str, Any]:
    """What gate/up kernels are compiled for between their sums and h."""
    return {
        "ACTIVATION": cfg.activation,
        "LIMIT": cfg.activation_limit or 0.0,
        "ALPHA": cfg.activation_alpha,
    }
