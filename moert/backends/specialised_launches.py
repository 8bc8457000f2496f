"""Launches of the warp-specialised kernels: as many workgroups as the device has units share all tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moert.backends.fixed_launches import fixed_inputs
from moert.backends.fixed_tiles import fixed_shape
from moert.backends.launch_parts import activation_constants, int4_args, sort_args
from moert.backends.specialised_tiles import specialised_int4_shape, specialised_shape
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.launch import Launch
from moert.plan import Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.down.specialised import down_specialised_kernel
from moert.steps.down.specialised_fixed import down_specialised_fixed_kernel
from moert.steps.down.specialised_int4 import down_specialised_int4_kernel
from moert.steps.down.specialised_tall import down_specialised_tall_kernel
from moert.steps.gate_up.specialised import gate_up_specialised_kernel
from moert.steps.gate_up.specialised_fixed import gate_up_specialised_fixed_kernel
from moert.steps.gate_up.specialised_int4 import gate_up_specialised_int4_kernel
from moert.steps.gate_up.specialised_tall import gate_up_specialised_tall_kernel
from moert.steps.specialised.fixed_shape import FixedShape
from moert.steps.specialised.int4_shape import SpecialisedInt4Shape
from moert.steps.specialised.shape import SpecialisedShape
from moert.steps.specialised.tall_shape import TallShape
from moert.weights import ExpertWeights


def gate_up_specialised(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
) -> Launch:
    """The gate/up GEMM; views: "h", those of the sort, and of `fixed_fields` where inputs are fixed-point."""
    constants = {"K": cfg.top_k, **activation_constants(cfg)}
    args = {"b13_ptr": weights.b13, "h_ptr": views["h"]}
    return _launch(cfg, weights, facts, tile, views, True, args, constants)


def down_specialised(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
) -> Launch:
    """The down GEMM; views as for `gate_up_specialised`, and "y"."""
    args = {
        "b2_ptr": weights.b2,
        "y_ptr": views["y"],
        "sorted_weights": views["sorted_weights"],
    }
    if tile.kernel != "fixed":
        args |= {"h_ptr": views["h"]}
    return _launch(cfg, weights, facts, tile, views, False, args, {"K": cfg.top_k})


def _launch(
    cfg: MoEConfig,
    weights: ExpertWeights,
    facts: DeviceFacts,
    tile: Tile,
    views: Mapping[str, torch.Tensor],
    up: bool,
    args: dict[str, Any],
    constants: dict[str, Any],
) -> Launch:
    matrix = weights.w13 if up else weights.w2
    name = "w13_ptr" if up else "w2_ptr"
    shape: SpecialisedShape | SpecialisedInt4Shape | FixedShape
    if isinstance(matrix, Int4Matrix):
        args |= int4_args(name, matrix)
        if tile.kernel == "fixed":
            kernel = gate_up_specialised_fixed_kernel if up else down_specialised_fixed_kernel
            shape = fixed_shape(cfg, facts, tile, up=up)
            args |= fixed_inputs(views)
        else:
            kernel = gate_up_specialised_int4_kernel if up else down_specialised_int4_kernel
            shape = specialised_int4_shape(cfg, facts, tile, up=up)
    else:
        strides = (matrix.stride(0), matrix.stride(1))
        shape = specialised_shape(
            cfg, facts, tile, up=up, interleaved=weights.interleaved, strides=strides
        )
        kernel = gate_up_specialised_kernel if up else down_specialised_kernel
        if isinstance(shape, TallShape):
            kernel = gate_up_specialised_tall_kernel if up else down_specialised_tall_kernel
        args |= {name: matrix}
    return Launch(
        kernel,
        lambda tokens: (shape.programs, 1, 1),
        {**args, **sort_args(views)},
        {**constants, "S": shape},
        tile.num_warps,
        1,
    )
