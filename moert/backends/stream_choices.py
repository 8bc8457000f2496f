"""Choices of the streaming kernels (`moert/steps/streaming`): what is worth timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moert.backends.stream_tiles import fits, refuses, stream_shape
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile
from moert.steps.weight_tiles import BLOCK, ROWS

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
    *((4, 4, 1, 2, 3, 1), (2, 4, 1, 2, 3, 1)),
)
_DOWN = (
    *((2, 4, 1, 2, 3, 2), (2, 4, 1, 2, 4, 1), (1, 4, 2, 4, 3, 1), (2, 1, 4, 1, 4, 1)),
    *((2, 2, 2, 2, 4, 1), (4, 4, 1, 1, 4, 2), (2, 4, 1, 2, 3, 4), (2, 2, 2, 1, 4, 1)),
    *((2, 4, 1, 2, 3, 1), (4, 4, 1, 2, 3, 1)),
)
# blocks of 16 tokens: what a warp widens serves twice as many, and x is read as often as fewer row tiles
_TALL_UP = ((4, 4, 1, 2, 3, 1), (4, 4, 1, 1, 4, 1), (2, 4, 1, 2, 4, 1))
_TALL_DOWN = ((4, 4, 1, 2, 3, 1), (2, 4, 1, 2, 4, 1), (4, 4, 1, 2, 3, 2))
# all rows of an expert, without a sort
_GATHERED_UP = ((2, 4, 1, 2, 4, 1), (2, 4, 1, 4, 3, 1), (2, 2, 1, 2, 4, 1), (2, 1, 2, 2, 4, 1))
_GATHERED_DOWN = ((2, 4, 1, 2, 4, 1), (2, 4, 1, 2, 3, 2), (1, 4, 2, 4, 3, 1), (2, 2, 2, 2, 4, 1))
_SUMMED_DOWN = ((4, 1, 4, 2, 4, 1), (2, 1, 4, 2, 3, 1), (4, 1, 8, 2, 3, 1))
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
    *((1, 1, 4, 1, 6, 1), (1, 8, 1, 1, 4, 1)),
)
_WIDE_DOWN = (
    *((1, 4, 1, 2, 3, 2), (1, 4, 1, 1, 4, 2), (2, 2, 2, 1, 3, 2), (1, 2, 2, 2, 4, 1)),
    *((1, 1, 4, 2, 4, 1), (1, 4, 1, 2, 3, 1), (1, 8, 1, 1, 4, 1), (1, 4, 1, 1, 4, 1)),
)
_WIDE_GATHERED_UP = (
    *((1, 1, 4, 2, 3, 1), (1, 1, 2, 2, 4, 1), (2, 2, 2, 1, 3, 1), (1, 1, 4, 1, 6, 1)),
)
_WIDE_GATHERED_DOWN = ((1, 4, 1, 2, 3, 2), (1, 2, 2, 2, 4, 1), (1, 1, 4, 2, 4, 1))
_WIDE_SUMMED_DOWN = ((1, 1, 4, 2, 4, 1), (1, 1, 8, 1, 4, 1), (1, 1, 4, 1, 6, 1))

# rows of a block, and tokens that a gathered tile has columns for
LEAST = 8
# blocks taken together at most: eight take registers of programs with one (E=128 K=8 H=2048 I=768, T=64 on an
# H200: 284.6 us for 273.0 of four; where all tokens take the same experts 47.9 for 44.5). Then, so that two
# programs fit, accumulators of a lane and shared memory
_MOST_TOGETHER, _MOST_SUMS, _MOST_SHARED = 4, 32, 113 << 10

_Shape = tuple[int, int, int, int, int, int]
_Shapes = tuple[_Shape, ...]


def direct_choices(cfg: MoEConfig, facts: DeviceFacts, tokens: int) -> Iterator[Choice]:
    """Strategy "none": a program for each row; where there are few, also one for all rows of an expert."""
    if refuses(cfg, facts) is not None:
        return
    up: _Shapes
    down: _Shapes
    up, down = (_DIRECT_UP, _DIRECT_DOWN) if cfg.quant else (_WIDE_DIRECT_UP, _WIDE_DIRECT_DOWN)
    ups = _tiles(cfg, facts, up, LEAST, True, "stream")
    yield from _pairs("none", ups, _tiles(cfg, facts, down, LEAST, False, "stream"), facts)
    if 1 < tokens <= LEAST:
        up, down, summed = (
            (_GATHERED_UP, _GATHERED_DOWN, _SUMMED_DOWN)
            if cfg.quant
            else (_WIDE_GATHERED_UP, _WIDE_GATHERED_DOWN, _WIDE_SUMMED_DOWN)
        )
        ups = _tiles(cfg, facts, up, LEAST, True, "gathered")
        downs = _tiles(cfg, facts, down, LEAST, False, "gathered")
        downs += _tiles(cfg, facts, summed, LEAST, False, "stream")
        yield from _pairs("none", ups, downs, facts)


def grouped_choices(
    cfg: MoEConfig, facts: DeviceFacts, strategy: str, tokens: int
) -> Iterator[Choice]:
    """Sorted strategies."""
    if refuses(cfg, facts) is not None:
        return
    mean = tokens * cfg.top_k / cfg.num_experts
    lists = (_UP, _DOWN) if cfg.quant else (_WIDE_UP, _WIDE_DOWN)
    ups, downs = (
        [
            wide
            for tile in _tiles(cfg, facts, shapes, LEAST, up, "grouped")
            for wide in _taken_together(cfg, tile, up, tokens, mean)
        ]
        for shapes, up in zip(lists, (True, False), strict=True)
    )
    yield from _pairs(strategy, ups, downs, facts)
    if cfg.quant is not None and mean > 3:
        tall = 2 * LEAST
        ups = _tiles(cfg, facts, _TALL_UP, tall, True, "grouped")
        yield from _pairs(
            strategy, ups, _tiles(cfg, facts, _TALL_DOWN, tall, False, "grouped"), facts
        )


def _pairs(
    strategy: str, ups: list[Tile], downs: list[Tile], facts: DeviceFacts
) -> Iterator[Choice]:
    """One varied at a time."""
    if not ups or not downs:
        return
    for up, down in ((ups[0], downs[0]), *((up, downs[0]) for up in ups[1:])):
        yield Choice(strategy, up, down, facts.dependent_launch)
    yield from (Choice(strategy, ups[0], down, facts.dependent_launch) for down in downs[1:])


def _taken_together(
    cfg: MoEConfig, tile: Tile, up: bool, tokens: int, mean: float
) -> Iterator[Tile]:
    """A tile that takes an expert's blocks one by one, and together as far as registers last.

    16-bit weights whose reduction is not split: always together, for it costs nothing where there is one
    block (E=128 K=8 H=2048 I=768, T=64 on an H200: one by one 279.5 us, up to four together 279.5), and
    skewed routing a fraction. int4: where experts have a few rows, one by one is 2% ahead at times, and where
    they have many, far behind.
    """
    blocks = 1 << (-(-tokens // LEAST) - 1).bit_length()
    most = min(_MOST_TOGETHER, blocks)
    while most > 1 and not _roomy(cfg, replace(tile, together=most), up):
        most //= 2
    if most == 1 or (tile.split > 1 if cfg.quant is None else mean <= LEAST):
        yield tile
    if most > 1 and (cfg.quant is None or mean >= 2):
        yield replace(tile, together=most)


def _roomy(cfg: MoEConfig, tile: Tile, up: bool) -> bool:
    shape = stream_shape(cfg, tile, up=up, direct=False)
    sums = shape.rows * shape.bm * shape.together * shape.split // (32 * shape.warps)
    # parts of the reduction have scales, and sums of inputs, of their own
    most = _MOST_SUMS // shape.split if shape.int4 else _MOST_SUMS
    return sums <= most and shape.shared_bytes(False) <= _MOST_SHARED


def _tiles(
    cfg: MoEConfig, facts: DeviceFacts, shapes: _Shapes, bm: int, up: bool, how: str
) -> list[Tile]:
    """Those that fit, without repeats.

    Args:
        how: "stream" for one row a program, "gathered" for an expert's without a sort, "grouped" after one.
    """
    kernel = "gathered" if how == "gathered" else "stream"
    tiles = (_tile(cfg, shape, bm, up, kernel) for shape in shapes)
    direct = how == "stream"
    return [t for t in dict.fromkeys(tiles) if fits(cfg, facts, t, up=up, direct=direct)]


def _tile(cfg: MoEConfig, shape: _Shape, bm: int, up: bool, kernel: str) -> Tile:
    row_tiles, row_warps, split, blocks, stages, repeats = shape
    columns = cfg.hidden_size if up else cfg.intermediate_size
    while blocks > 1 and (blocks * BLOCK > columns or _unfit(cfg, blocks * BLOCK, bm)):
        blocks //= 2
    return Tile(
        bm,
        row_tiles * row_warps * ROWS,
        blocks * BLOCK,
        row_warps * split,
        stages,
        kernel,
        split,
        repeats,
    )


def _unfit(cfg: MoEConfig, width: int, bm: int) -> bool:
    """Whether a step of `width` columns is neither within a group nor whole groups, or has more scales than
    there are registers for."""
    if cfg.quant is None or cfg.quant.group_size == -1 or cfg.quant.group_size % width == 0:
        return False
    group, most = cfg.quant.group_size, 4 if cfg.quant.symmetric else 2
    if bm > LEAST and cfg.bias:
        most = 2
    return width % group != 0 or width // group > most
