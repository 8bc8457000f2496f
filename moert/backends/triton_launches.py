"""The launches of the Triton backend's plans: kernels with their grids, arguments and constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moert.config import MoEConfig
from moert.launch import Grid, Launch, in_a_row
from moert.plan import Choice, Tile
from moert.steps.combine.triton import combine_kernel
from moert.steps.down.triton import down_direct_kernel, down_grouped_kernel
from moert.steps.gate_up.triton import gate_up_direct_kernel, gate_up_grouped_kernel
from moert.steps.sorting.layout import max_blocks
from moert.weights import ExpertWeights

Views = dict[str, torch.Tensor]


def direct_launches(
    cfg: MoEConfig, weights: ExpertWeights, choice: Choice, views: Views
) -> list[Launch]:
    """Strategy "none": gate/up by (row, columns), down by (token, columns)."""
    up, down = _tiles(choice)
    up_tiles, down_tiles = -(-cfg.intermediate_size // up.bn), -(-cfg.hidden_size // down.bn)
    ids = {"E": cfg.num_experts, "K": cfg.top_k}
    gate_up = Launch(
        gate_up_direct_kernel,
        lambda tokens: (up_tiles * tokens * cfg.top_k, 1, 1),
        {"w13_ptr": weights.w13, "b13_ptr": weights.b13, "h_ptr": views["h"]},
        {**_gate_up_constants(cfg, weights), **ids, **_direct_tile(up)},
        up.num_warps,
        up.num_stages,
    )
    combine = Launch(
        down_direct_kernel,
        lambda tokens: (down_tiles * tokens, 1, 1),
        {"w2_ptr": weights.w2, "b2_ptr": weights.b2, "h_ptr": views["h"]},
        {
            **_down_constants(cfg, weights),
            **ids,
            **_direct_tile(down),
            "KP": 1 << (cfg.top_k - 1).bit_length(),
        },
        down.num_warps,
        down.num_stages,
    )
    return in_a_row([gate_up, combine], choice.dependent)


def grouped_launches(
    cfg: MoEConfig, weights: ExpertWeights, choice: Choice, views: Views, rolled: bool = False
) -> list[Launch]:
    """What follows a sort: gate/up and down by (block of BM sorted rows, columns), combine.

    Args:
        rolled: the loops over the reduction are kept loops.
    """
    up, down = _tiles(choice)
    sort = {n: views[n] for n in ("sorted_token_ids", "sorted_expert_ids", "num_valid_ids")}
    gate_up = Launch(
        gate_up_grouped_kernel,
        _grouped_grid(cfg, up, cfg.intermediate_size),
        {
            **sort,
            "w13_ptr": weights.w13,
            "b13_ptr": weights.b13,
            "h_ptr": views["h"],
            "reduction": cfg.hidden_size if rolled else None,
        },
        {**_gate_up_constants(cfg, weights), "K": cfg.top_k, **_grouped_tile(up)},
        up.num_warps,
        up.num_stages,
    )
    down_gemm = Launch(
        down_grouped_kernel,
        _grouped_grid(cfg, down, cfg.hidden_size),
        {
            **sort,
            "sorted_weights": views["sorted_weights"],
            "w2_ptr": weights.w2,
            "b2_ptr": weights.b2,
            "h_ptr": views["h"],
            "y_ptr": views["y"],
            "reduction": cfg.intermediate_size if rolled else None,
        },
        {**_down_constants(cfg, weights), "K": cfg.top_k, **_grouped_tile(down)},
        down.num_warps,
        down.num_stages,
    )
    width = min(512, 1 << (cfg.hidden_size - 1).bit_length())
    tiles = -(-cfg.hidden_size // width)
    combine = Launch(
        combine_kernel,
        lambda tokens: (tiles * tokens, 1, 1),
        {"y_ptr": views["y"]},
        {"E": cfg.num_experts, "K": cfg.top_k, "H": cfg.hidden_size, "BN": width},
        num_warps=2,
        num_stages=1,
    )
    return in_a_row([gate_up, down_gemm, combine], choice.dependent)


def _tiles(choice: Choice) -> tuple[Tile, Tile]:
    assert choice.gate_up is not None and choice.down is not None
    return choice.gate_up, choice.down


def _grouped_grid(cfg: MoEConfig, tile: Tile, columns: int) -> Callable[[int], Grid]:
    tiles = -(-columns // tile.bn)

    def grid(tokens: int) -> Grid:
        return (max_blocks(tokens, cfg.top_k, cfg.num_experts, tile.bm) * tiles, 1, 1)

    return grid


def _grouped_tile(tile: Tile) -> dict[str, int]:
    return {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}


def _direct_tile(tile: Tile) -> dict[str, int]:
    return {"BN": tile.bn, "BK": tile.bk, "STAGES": tile.num_stages}


def _gate_up_constants(cfg: MoEConfig, weights: ExpertWeights) -> dict[str, Any]:
    expert, row, column = weights.w13.stride()
    return {
        "H": cfg.hidden_size,
        "I": cfg.intermediate_size,
        "W_E": expert,
        "W_N": row,
        "W_K": column,
        "GATED": cfg.gated,
        "INTERLEAVED": weights.interleaved,
        "ACTIVATION": cfg.activation,
        "LIMIT": cfg.activation_limit or 0.0,
        "ALPHA": cfg.activation_alpha,
    }


def _down_constants(cfg: MoEConfig, weights: ExpertWeights) -> dict[str, Any]:
    expert, row, column = weights.w2.stride()
    return {
        "H": cfg.hidden_size,
        "I": cfg.intermediate_size,
        "W_E": expert,
        "W_N": row,
        "W_K": column,
    }
