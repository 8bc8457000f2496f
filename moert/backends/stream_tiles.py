"""Choices of the streaming kernels (`moert/steps/streaming`): where they serve, what is worth timing."""

from __future__ import annotations

from collections.abc import Iterator

from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile
from moert.quantization.int4_layout import Int4Matrix, columns_per_group
from moert.steps.streaming.shape import BLOCK, ROWS, StreamShape
from moert.weights import ExpertWeights


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
) -> StreamShape:
    """What a tile compiles to.

    Args:
        up: the gate/up GEMM, else the down GEMM.
        strides: of 16-bit weights between experts and rows, in elements.
    """
    reduction, columns = gemm_sizes(cfg, up)
    # 16-bit weights have none, and nothing asks for it
    group = columns_per_group(-1 if cfg.quant is None else cfg.quant.group_size, reduction)
    return StreamShape(
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
    )


# row tiles a warp, warps over rows, warps over the reduction, blocks of 64 columns a step, stages, repeats.
# The first of each list is where the others start from: the two GEMMs hardly influence each other. Of 36 to
# 66 shapes timed on an H200 for each list, these few together were within 1% of the best in every cell of
# four to five layers and five T (greedily chosen)
_DIRECT_UP = (
    *((2, 1, 2, 2, 4, 1), (1, 1, 2, 4, 3, 1), (2, 1, 2, 2, 3, 1), (2, 1, 4, 2, 4, 1)),
    *((2, 1, 2, 4, 3, 1), (1, 1, 4, 4, 3, 1), (4, 1, 2, 4, 4, 1)),
)
_DIRECT_DOWN = (
    *((2, 1, 8, 2, 4, 1), (2, 1, 4, 2, 3, 1), (1, 1, 4, 4, 6, 1), (4, 1, 4, 2, 4, 1)),
    *((4, 1, 8, 2, 3, 1), (2, 1, 8, 2, 6, 1), (1, 1, 8, 2, 4, 1)),
)
_UP = (
    *((2, 4, 1, 2, 4, 1), (2, 4, 1, 4, 3, 1), (4, 4, 1, 4, 3, 1), (4, 4, 1, 2, 4, 1)),
    (4, 4, 1, 2, 3, 1),
)
_DOWN = (
    *((2, 4, 1, 2, 3, 2), (2, 4, 1, 2, 4, 1), (1, 4, 2, 4, 3, 1), (2, 1, 4, 1, 4, 1)),
    *((2, 2, 2, 2, 4, 1), (4, 4, 1, 1, 4, 2), (2, 4, 1, 2, 3, 4), (2, 2, 2, 1, 4, 1)),
)
# blocks of 16 tokens: what a warp widens serves twice as many, and x is read as often as fewer row tiles
_TALL_UP = ((4, 4, 1, 2, 3, 1), (4, 4, 1, 1, 4, 1), (2, 4, 1, 2, 4, 1))
_TALL_DOWN = ((4, 4, 1, 2, 3, 1), (2, 4, 1, 2, 4, 1), (4, 4, 1, 2, 3, 2))
# 16-bit weights: four times the bytes a step
_WIDE_DIRECT_UP = (
    *((1, 1, 4, 2, 3, 1), (1, 1, 4, 1, 4, 1), (1, 1, 4, 2, 4, 1), (1, 1, 2, 2, 4, 1)),
    *((2, 1, 2, 1, 4, 1), (2, 1, 4, 1, 3, 1), (1, 2, 2, 2, 3, 1)),
)
_WIDE_DIRECT_DOWN = (
    *((1, 1, 8, 1, 4, 1), (1, 1, 4, 2, 4, 1), (2, 1, 8, 1, 4, 1), (1, 1, 4, 2, 6, 1)),
    *((1, 1, 4, 1, 6, 1), (1, 1, 4, 1, 3, 1), (2, 1, 4, 1, 3, 1), (2, 1, 8, 1, 3, 1)),
)
_WIDE_UP = (
    *((2, 1, 4, 1, 3, 1), (1, 4, 1, 2, 3, 1), (2, 2, 2, 1, 3, 1), (1, 1, 4, 2, 4, 1)),
    (1, 1, 4, 1, 6, 1),
)
_WIDE_DOWN = (
    *((1, 4, 1, 2, 3, 2), (1, 4, 1, 1, 4, 2), (2, 2, 2, 1, 3, 2), (1, 2, 2, 2, 4, 1)),
    (1, 1, 4, 2, 4, 1),
)

_Shape = tuple[int, int, int, int, int, int]


def direct_choices(cfg: MoEConfig, facts: DeviceFacts) -> Iterator[Choice]:
    """Strategy "none"."""
    if refuses(cfg, facts) is not None:
        return
    lists = (_DIRECT_UP, _DIRECT_DOWN) if cfg.quant else (_WIDE_DIRECT_UP, _WIDE_DIRECT_DOWN)
    yield from _one_at_a_time(cfg, facts, "none", 8, *lists)


def grouped_choices(
    cfg: MoEConfig, facts: DeviceFacts, strategy: str, mean: float
) -> Iterator[Choice]:
    """Sorted strategies; `mean` rows an expert gets."""
    if refuses(cfg, facts) is not None:
        return
    if cfg.quant is None:
        yield from _one_at_a_time(cfg, facts, strategy, 8, _WIDE_UP, _WIDE_DOWN)
        return
    if mean <= 16:
        yield from _one_at_a_time(cfg, facts, strategy, 8, _UP, _DOWN)
    if mean > 3:
        yield from _one_at_a_time(cfg, facts, strategy, 16, _TALL_UP, _TALL_DOWN)


def _one_at_a_time(
    cfg: MoEConfig,
    facts: DeviceFacts,
    strategy: str,
    bm: int,
    ups: tuple[_Shape, ...],
    downs: tuple[_Shape, ...],
) -> Iterator[Choice]:
    direct, dependent = strategy == "none", facts.dependent_launch
    sides = []
    for up, shapes in ((True, ups), (False, downs)):
        tiles = [_tile(cfg, shape, bm, up) for shape in shapes]
        sides.append([t for t in dict.fromkeys(tiles) if _fits(cfg, facts, t, up, direct)])
    if not all(sides):
        return
    (first_up, *other_ups), (first_down, *other_downs) = sides
    yield Choice(strategy, first_up, first_down, dependent)
    yield from (Choice(strategy, tile, first_down, dependent) for tile in other_ups)
    yield from (Choice(strategy, first_up, tile, dependent) for tile in other_downs)


def _tile(cfg: MoEConfig, shape: _Shape, bm: int, up: bool) -> Tile:
    row_tiles, row_warps, split, blocks, stages, repeats = shape
    columns = cfg.hidden_size if up else cfg.intermediate_size
    while blocks > 1 and (blocks * BLOCK > columns or _unfit(cfg, blocks * BLOCK)):
        blocks //= 2
    return Tile(
        bm,
        row_tiles * row_warps * ROWS,
        blocks * BLOCK,
        row_warps * split,
        stages,
        "stream",
        split,
        repeats,
    )


def _unfit(cfg: MoEConfig, width: int) -> bool:
    """Whether a step of `width` columns is neither within a group nor whole groups, or has more scales than
    there are registers for."""
    if cfg.quant is None or cfg.quant.group_size == -1 or cfg.quant.group_size % width == 0:
        return False
    group, most = cfg.quant.group_size, 4 if cfg.quant.symmetric else 2
    return width % group != 0 or width // group > most


def _fits(cfg: MoEConfig, facts: DeviceFacts, tile: Tile, up: bool, direct: bool) -> bool:
    shape = stream_shape(cfg, tile, up=up, direct=direct)
    # past a few thousand values a lane the staged inputs no longer fit the registers they pass through
    held = shape.staged * shape.split * shape.width // (32 * shape.warps) if direct else 0
    return shape.shared_bytes(direct) <= facts.shared_memory and held <= 128
