"""Tiles of the streaming kernels (`moert/steps/streaming`, `moert/steps/registers`): where they serve, what a
tile compiles to."""

from __future__ import annotations

from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Tile
from moert.quantization.int4_layout import Int4Matrix, columns_per_group
from moert.steps.registers.shape import RegisterShape
from moert.steps.streaming.shape import StreamShape
from moert.steps.weight_tiles import BLOCK, ROWS
from moert.weights import ExpertWeights

# of a lane: registers for weights on their way, and inputs on theirs to shared memory
_MOST_HELD, _MOST_STAGED = 96, 64


def refuses(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
    """Why the streaming kernels cannot serve; None where they can."""
    if facts.compute_capability < 80:
        return (
            "made of NVIDIA's asynchronous copies and matrix instructions of compute capability 8.0"
        )
    if cfg.dtype == "float32":
        return "16-bit activations only"
    # x has the caller's distance between rows, which is known to be a multiple of 16 elements or of nothing
    if cfg.hidden_size % 16 or cfg.intermediate_size % 8:
        return "rows are copied 16 bytes at a time: H has to be a multiple of 16 and I of 8"
    size = 32 if cfg.quant is None else cfg.quant.group_size
    if size not in (-1, 32) and size % BLOCK:
        return "groups of 32 columns or of multiples of 64"
    return None


def readable(weights: ExpertWeights) -> bool:
    """Whether the weights lie as the streaming kernels copy them: rows begin at multiples of 16 bytes."""
    for matrix in (weights.w13, weights.w2):
        if isinstance(matrix, Int4Matrix):
            if matrix.permutation is not None:
                return False
            parts = [matrix.codes, matrix.scales, matrix.zeros]
        else:
            if matrix.stride(2) != 1 or matrix.stride(0) % 8 or matrix.stride(1) % 8:
                return False
            parts = [matrix]
        if any(part is not None and part.data_ptr() % 16 for part in parts):
            return False
    return True


def gemm_sizes(cfg: MoEConfig, up: bool) -> tuple[int, int]:
    """Columns of a weight's row, and of the output."""
    sizes = (cfg.hidden_size, cfg.intermediate_size)
    return sizes if up else sizes[::-1]


def stream_shape(
    cfg: MoEConfig,
    tile: Tile,
    *,
    up: bool,
    direct: bool,
    interleaved: bool = False,
    strides: tuple[int, int] = (0, 0),
) -> StreamShape | RegisterShape:
    """What a tile compiles to.

    Args:
        up: the gate/up GEMM, else the down GEMM.
        strides: of 16-bit weights between experts and rows, in elements.
    """
    reduction, columns = gemm_sizes(cfg, up)
    # 16-bit weights have none, and nothing asks for it
    group = columns_per_group(-1 if cfg.quant is None else cfg.quant.group_size, reduction)
    shape = RegisterShape if tile.kernel == "registers" else StreamShape
    return shape(
        int4=cfg.quant is not None,
        zeros=cfg.quant is not None and not cfg.quant.symmetric,
        group=group,
        reduction=reduction,
        columns=columns,
        paired=up and cfg.gated,
        interleaved=up and cfg.gated and interleaved,
        w_e=strides[0],
        w_n=strides[1],
        bm=tile.bm,
        row_tiles=tile.bn // ROWS,
        row_warps=tile.num_warps // tile.split,
        split=tile.split,
        blocks=tile.bk // BLOCK,
        stages=tile.num_stages,
        repeats=tile.repeats,
        slots=cfg.top_k if direct and not up else 0,
        together=tile.together,
    )


def fits(cfg: MoEConfig, facts: DeviceFacts, tile: Tile, *, up: bool, direct: bool) -> bool:
    """Whether the device has the shared memory, and a lane the registers."""
    shape = stream_shape(cfg, tile, up=up, direct=direct)
    if isinstance(shape, RegisterShape):
        held = shape.held_words <= _MOST_HELD and shape.staged_inputs <= _MOST_STAGED
    else:
        # past a few thousand values the staged inputs no longer fit the registers they pass through
        values = shape.staged * shape.split * shape.width // (32 * shape.warps)
        held = not direct or values <= 128
    return held and shape.shared_bytes(direct) <= facts.shared_memory
