"""Launches of the portable int4 kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moert.backends.int4_tiles import group_of
from moert.backends.launch_parts import (
    activation_constants,
    direct_grid,
    grouped_grid,
    int4_args,
    sort_args,
)
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.launch import Launch
from moert.plan import Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.down.int4 import down_direct_int4_kernel, down_grouped_int4_kernel
from moert.steps.gate_up.int4 import gate_up_direct_int4_kernel, gate_up_grouped_int4_kernel
from moert.weights import ExpertWeights


def widening(cfg: MoEConfig, facts: DeviceFacts) -> str:
    """How codes become numbers: see `moert/steps/int4_codes.py`."""
    if cfg.dtype == "float32" or facts.kind == "cpu":
        return "integer"
    if facts.compute_capability >= 80:
        return "asm"
    return "magic"


def gate_up_int4(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    direct: bool,
) -> Launch:
    """The gate/up GEMM; views: "h", and those of the sort where there is one."""
    matrix = weights.w13
    assert isinstance(matrix, Int4Matrix)
    kernel = gate_up_direct_int4_kernel if direct else gate_up_grouped_int4_kernel
    args = {
        **int4_args("w13_ptr", matrix),
        "permutation_ptr": matrix.permutation,
        "b13_ptr": weights.b13,
        "h_ptr": views["h"],
    }
    constants = {
        **_constants(cfg, cfg.hidden_size, tile),
        "GATED": cfg.gated,
        **activation_constants(cfg),
    }
    tiles = matrix.codes.shape[1]
    return _launch(cfg, facts, tile, views, direct, kernel, args, constants, tiles, cfg.top_k)


def down_int4(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    direct: bool,
) -> Launch:
    """The down GEMM; views as for `gate_up_int4`, and "y"."""
    matrix = weights.w2
    assert isinstance(matrix, Int4Matrix)
    kernel = down_direct_int4_kernel if direct else down_grouped_int4_kernel
    args = {**int4_args("w2_ptr", matrix), "b2_ptr": weights.b2, "h_ptr": views["h"]}
    if not direct:
        args |= {"y_ptr": views["y"], "sorted_weights": views["sorted_weights"]}
    constants = _constants(cfg, cfg.intermediate_size, tile)
    tiles = matrix.codes.shape[1]
    return _launch(cfg, facts, tile, views, direct, kernel, args, constants, tiles, 1)


def _constants(cfg: MoEConfig, columns: int, tile: Tile) -> dict[str, Any]:
    return {
        "K": cfg.top_k,
        "H": cfg.hidden_size,
        "I": cfg.intermediate_size,
        "GROUP": group_of(cfg, columns),
        "TILES": tile.bn // 16,
        "BLOCKS": max(1, tile.bk // 64),
        "WORDS": min(4, tile.bk // 16),
    }


def _launch(
    cfg: MoEConfig,
    facts: DeviceFacts,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    direct: bool,
    kernel: Any,
    args: dict[str, Any],
    constants: dict[str, Any],
    all_tiles: int,
    rows: int,
) -> Launch:
    tiles = -(-all_tiles // constants["TILES"])
    if direct:
        constants["E"] = cfg.num_experts
        grid = direct_grid(tiles, rows)
    else:
        constants |= {"BM": tile.bm, "STAGES": tile.num_stages, "WAY": widening(cfg, facts)}
        args |= sort_args(views)
        grid = grouped_grid(cfg, tile.bm, tiles)
    return Launch(kernel, grid, args, constants, tile.num_warps, tile.num_stages)
