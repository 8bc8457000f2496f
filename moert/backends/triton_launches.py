"""The launches of the Triton backend's plans: kernels with their grids, arguments and constants."""

from __future__ import annotations

from typing import Any

import torch

from moert.backends.fixed_launches import split_inputs
from moert.backends.int4_launches import down_int4, gate_up_int4
from moert.backends.launch_parts import (
    activation_constants,
    direct_grid,
    grouped_grid,
    sort_args,
)
from moert.backends.specialised_launches import down_specialised, gate_up_specialised
from moert.backends.stream_launches import down_stream, gate_up_stream
from moert.backends.triton_tile_limits import is_rdna
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.launch import Launch, in_a_row
from moert.plan import SPECIALISED, STREAMS, Choice, Tile
from moert.steps.combine.triton import combine_kernel
from moert.steps.down.triton import down_direct_kernel, down_grouped_kernel
from moert.steps.gate_up.triton import gate_up_direct_kernel, gate_up_grouped_kernel
from moert.weights import ExpertWeights

Views = dict[str, torch.Tensor]


def direct_launches(
    cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts, choice: Choice, views: Views
) -> list[Launch]:
    """Strategy "none": gate/up by (row, columns), down by (token, columns); or by (expert, columns), and
    combine."""
    up, down = _tiles(choice)
    launches = [
        _gate_up(cfg, weights, facts, up, views, True),
        _down(cfg, weights, facts, down, views, True),
    ]
    if down.kernel == "gathered":
        launches.append(_combine(cfg, views))
    return in_a_row(launches, choice.dependent)


def grouped_launches(
    cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts, choice: Choice, views: Views
) -> list[Launch]:
    """What follows a sort: gate/up and down by (block of BM sorted rows, columns), combine.

    The pair for crowds goes first: mostly it has nothing to do, and the other one's programs are then behind
    the sort nearly as soon as without it.
    """
    launches = []
    if choice.crowded:
        crowd = {**views, "num_valid_ids": views["crowded_valid_ids"]}
        launches += _pair(cfg, weights, facts, choice.crowded, crowd)
    launches += _pair(cfg, weights, facts, _tiles(choice), views)
    return in_a_row([*launches, _combine(cfg, views)], choice.dependent)


def _pair(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tiles: tuple[Tile, Tile],
    views: Views,
) -> list[Launch]:
    up, down = tiles
    return [
        *split_inputs(cfg, up, views, up=True),
        _gate_up(cfg, weights, facts, up, views, False),
        *split_inputs(cfg, down, views, up=False),
        _down(cfg, weights, facts, down, views, False),
    ]


def _gate_up(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Views,
    direct: bool,
) -> Launch:
    if tile.kernel in STREAMS:
        return gate_up_stream(cfg, weights, tile, views, direct)
    if tile.kernel in SPECIALISED:
        return gate_up_specialised(cfg, weights, facts, tile, views)
    if cfg.quant is not None:
        return gate_up_int4(cfg, weights, facts, tile, views, direct)
    args = {"w13_ptr": weights.w13, "b13_ptr": weights.b13, "h_ptr": views["h"]}
    constants = _gate_up_constants(cfg, weights)
    if direct:
        tiles = -(-cfg.intermediate_size // tile.bn)
        return Launch(
            gate_up_direct_kernel,
            direct_grid(tiles, cfg.top_k),
            args,
            {**constants, "E": cfg.num_experts, "K": cfg.top_k, **_direct_tile(tile)},
            tile.num_warps,
            tile.num_stages,
        )
    return Launch(
        gate_up_grouped_kernel,
        grouped_grid(cfg, tile.bm, -(-cfg.intermediate_size // tile.bn)),
        {**args, **sort_args(views), "reduction": cfg.hidden_size if is_rdna(facts) else None},
        {**constants, "K": cfg.top_k, **_grouped_tile(tile)},
        tile.num_warps,
        tile.num_stages,
    )


def _down(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Views,
    direct: bool,
) -> Launch:
    if tile.kernel in STREAMS:
        return down_stream(cfg, weights, tile, views, direct)
    if tile.kernel in SPECIALISED:
        return down_specialised(cfg, weights, facts, tile, views)
    if cfg.quant is not None:
        return down_int4(cfg, weights, facts, tile, views, direct)
    args = {"w2_ptr": weights.w2, "b2_ptr": weights.b2, "h_ptr": views["h"]}
    constants = _down_constants(cfg, weights)
    if direct:
        tiles = -(-cfg.hidden_size // tile.bn)
        padded = 1 << (cfg.top_k - 1).bit_length()
        ids = {"E": cfg.num_experts, "K": cfg.top_k, "KP": padded}
        return Launch(
            down_direct_kernel,
            direct_grid(tiles, 1),
            args,
            {**constants, **ids, **_direct_tile(tile)},
            tile.num_warps,
            tile.num_stages,
        )
    rows = {"y_ptr": views["y"], "sorted_weights": views["sorted_weights"]}
    rolled = {"reduction": cfg.intermediate_size if is_rdna(facts) else None}
    return Launch(
        down_grouped_kernel,
        grouped_grid(cfg, tile.bm, -(-cfg.hidden_size // tile.bn)),
        {**args, **sort_args(views), **rows, **rolled},
        {**constants, "K": cfg.top_k, **_grouped_tile(tile)},
        tile.num_warps,
        tile.num_stages,
    )


def _combine(cfg: MoEConfig, views: Views) -> Launch:
    width = min(512, 1 << (cfg.hidden_size - 1).bit_length())
    tiles = -(-cfg.hidden_size // width)
    return Launch(
        combine_kernel,
        direct_grid(tiles, 1),
        {"y_ptr": views["y"]},
        {"E": cfg.num_experts, "K": cfg.top_k, "H": cfg.hidden_size, "BN": width},
        num_warps=2,
        num_stages=1,
    )


def _tiles(choice: Choice) -> tuple[Tile, Tile]:
    assert choice.gate_up is not None and choice.down is not None
    return choice.gate_up, choice.down


def _grouped_tile(tile: Tile) -> dict[str, int]:
    return {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}


def _direct_tile(tile: Tile) -> dict[str, int]:
    return {"BN": tile.bn, "BK": tile.bk, "STAGES": tile.num_stages}


def _gate_up_constants(cfg: MoEConfig, weights: ExpertWeights) -> dict[str, Any]:
    assert isinstance(weights.w13, torch.Tensor)
    expert, row, column = weights.w13.stride()
    return {
        "H": cfg.hidden_size,
        "I": cfg.intermediate_size,
        "W_E": expert,
        "W_N": row,
        "W_K": column,
        "GATED": cfg.gated,
        "INTERLEAVED": weights.interleaved,
        **activation_constants(cfg),
    }


def _down_constants(cfg: MoEConfig, weights: ExpertWeights) -> dict[str, Any]:
    assert isinstance(weights.w2, torch.Tensor)
    expert, row, column = weights.w2.stride()
    return {
        "H": cfg.hidden_size,
        "I": cfg.intermediate_size,
        "W_E": expert,
        "W_N": row,
        "W_K": column,
    }
