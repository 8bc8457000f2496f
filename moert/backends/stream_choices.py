"""Choices of the streaming kernels (`moert/steps/streaming`, `moert/steps/registers`): what to time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from moert.backends.even_routing import distinct_experts, rows_of_nearly_all
from moert.backends.stream_tiles import fits, refuses, stream_shape
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile
from moert.steps.weight_tiles import BLOCK, ROWS

_Shape = tuple[int, int, int, int, int, int]
_Shapes = tuple[_Shape, ...]


class _Lists(NamedTuple):
    """Shapes worth timing: row tiles a warp, warps over rows, warps over the reduction, blocks of 64 columns
    a step, stages, repeats.

    The first of each list is where the others start from: sorted, the two GEMMs hardly influence each other.
    Of 36 to 66 shapes timed on an H200 for each list of direct and grouped kernels, these few together were
    within 1% of the best in every cell of four to five layers and five T (greedily chosen). Of direct int4
    shapes those are left that were best somewhere beside kernels through registers.

    Args:
        direct_up, direct_down: a row a program.
        held_up, held_down: the same, through registers: of 20 and 14 shapes, those that were best of a layer
            and T = 1, 2 or 4.
        up, down: sorted rows, in blocks of 8.
        gathered_up, gathered_down: all rows of an expert, without a sort.
        summed_down: a token's experts a program, after gathered_up.
    """

    direct_up: _Shapes
    direct_down: _Shapes
    held_up: _Shapes
    held_down: _Shapes
    up: _Shapes
    down: _Shapes
    gathered_up: _Shapes
    gathered_down: _Shapes
    summed_down: _Shapes


_INT4 = _Lists(
    direct_up=((2, 1, 2, 2, 4, 1), (1, 1, 2, 4, 3, 1), (2, 1, 2, 2, 3, 1)),
    direct_down=(
        *((2, 1, 8, 2, 4, 1), (2, 1, 4, 2, 3, 1), (4, 1, 8, 2, 3, 1), (4, 1, 4, 2, 4, 1)),
    ),
    held_up=(
        *((1, 1, 4, 2, 6, 1), (2, 1, 4, 2, 4, 1), (1, 1, 8, 2, 3, 1), (1, 1, 4, 4, 3, 1)),
        *((2, 1, 8, 2, 2, 1),),
    ),
    held_down=(
        *((2, 1, 8, 2, 4, 1), (1, 1, 8, 2, 6, 1), (2, 1, 8, 2, 2, 1), (1, 1, 8, 4, 3, 1)),
        *((2, 1, 4, 2, 4, 1), (2, 1, 16, 2, 2, 1), (4, 1, 4, 2, 2, 1)),
    ),
    up=(
        *((2, 4, 1, 2, 4, 1), (2, 4, 1, 4, 3, 1), (4, 4, 1, 4, 3, 1), (4, 4, 1, 2, 4, 1)),
        *((4, 4, 1, 2, 3, 1), (2, 4, 1, 2, 3, 1)),
    ),
    down=(
        *((2, 4, 1, 2, 3, 2), (2, 4, 1, 2, 4, 1), (1, 4, 2, 4, 3, 1), (2, 1, 4, 1, 4, 1)),
        *((2, 2, 2, 2, 4, 1), (4, 4, 1, 1, 4, 2), (2, 4, 1, 2, 3, 4), (2, 2, 2, 1, 4, 1)),
        *((2, 4, 1, 2, 3, 1), (4, 4, 1, 2, 3, 1)),
    ),
    gathered_up=((2, 4, 1, 2, 4, 1), (2, 4, 1, 4, 3, 1), (2, 2, 1, 2, 4, 1), (2, 1, 2, 2, 4, 1)),
    gathered_down=((2, 4, 1, 2, 4, 1), (2, 4, 1, 2, 3, 2), (1, 4, 2, 4, 3, 1), (2, 2, 2, 2, 4, 1)),
    summed_down=((4, 1, 4, 2, 4, 1), (2, 1, 4, 2, 3, 1), (4, 1, 8, 2, 3, 1)),
)
# four times the bytes a step
_16_BITS = _Lists(
    direct_up=(
        *((1, 1, 4, 2, 3, 1), (1, 1, 4, 1, 4, 1), (1, 1, 4, 2, 4, 1), (1, 1, 2, 2, 4, 1)),
        *((2, 1, 2, 1, 4, 1), (2, 1, 4, 1, 3, 1), (1, 2, 2, 2, 3, 1)),
    ),
    direct_down=(
        *((1, 1, 8, 1, 4, 1), (1, 1, 4, 2, 4, 1), (2, 1, 8, 1, 4, 1), (1, 1, 4, 2, 6, 1)),
        *((1, 1, 4, 1, 6, 1), (1, 1, 4, 1, 3, 1), (2, 1, 4, 1, 3, 1), (2, 1, 8, 1, 3, 1)),
    ),
    held_up=(),
    held_down=(),
    up=(
        *((2, 1, 4, 1, 3, 1), (1, 4, 1, 2, 3, 1), (2, 2, 2, 1, 3, 1), (1, 1, 4, 2, 4, 1)),
        *((1, 1, 4, 1, 6, 1), (1, 8, 1, 1, 4, 1)),
    ),
    down=(
        *((1, 4, 1, 2, 3, 2), (1, 4, 1, 1, 4, 2), (2, 2, 2, 1, 3, 2), (1, 2, 2, 2, 4, 1)),
        *((1, 1, 4, 2, 4, 1), (1, 4, 1, 2, 3, 1), (1, 8, 1, 1, 4, 1), (1, 4, 1, 1, 4, 1)),
    ),
    gathered_up=((1, 1, 4, 2, 3, 1), (1, 1, 2, 2, 4, 1), (2, 2, 2, 1, 3, 1), (1, 1, 4, 1, 6, 1)),
    gathered_down=((1, 4, 1, 2, 3, 2), (1, 2, 2, 2, 4, 1), (1, 1, 4, 2, 4, 1)),
    summed_down=((1, 1, 4, 2, 4, 1), (1, 1, 8, 1, 4, 1), (1, 1, 4, 1, 6, 1)),
)
# int4 in blocks of 16 tokens: what a warp widens serves twice as many, and x is read as often as there are
# fewer row tiles
_TALL_UP = ((4, 4, 1, 2, 3, 1), (4, 4, 1, 1, 4, 1), (2, 4, 1, 2, 4, 1))
_TALL_DOWN = ((4, 4, 1, 2, 3, 1), (2, 4, 1, 2, 4, 1), (4, 4, 1, 2, 3, 2))

# the down tile of int4 weights to begin with where the first one would have fewer programs a unit. On an H200
# with the first gate/up tile, first and this: E=8 K=2 H=4096 I=14336, T=8, 1 program a unit: 324 and 167 us;
# E=128 K=4 H=I=2880, T=8, 3 programs a unit: 140 and 113; with 5 programs a unit no more than 6% apart
_MANY_PROGRAMS_DOWN, _FEW_PROGRAMS = (2, 2, 2, 2, 4, 1), 4

# rows of a block, and tokens that a gathered tile has columns for
LEAST = 8
# blocks taken together at most: eight take registers of programs with one (E=128 K=8 H=2048 I=768, T=64 on an
# H200: 284.6 us for 273.0 of four; where all tokens take the same experts 47.9 for 44.5). Then, so that two
# programs fit, accumulators of a lane and shared memory
_MOST_TOGETHER, _MOST_SUMS, _MOST_SHARED = 4, 32, 113 << 10


# the devices that defaults were measured on, by compute capability; mean rows an expert from which on one
# program reads for all rows of an expert, and up to which sorted rows are streamed without measurement
_MEASURED, _SHARED_MEAN, _STREAMED_MEAN = (90,), 0.25, 1.0


def default(cfg: MoEConfig, facts: DeviceFacts, strategy: str, tokens: int) -> Choice | None:
    """The choice made without measurement for 16-bit weights; None where other kernels are as good.

    On an H200 the tuner took choices of these kinds for five layers over T=1 to 32, which were this much
    faster than portable kernels: E=128 K=8 H=2048 I=768 17% at T=1, 10% at T=2, 7% at T=8, 3% at T=16; E=8
    K=2 H=4096 I=14336 20% at T=2, 31% at T=4; E=256 K=8 H=7168 I=256 9% at T=1, 6% at T=16, 7% at T=32.

    Args:
        strategy: how rows of more tokens than a block has would be sorted.
    """
    if facts.compute_capability not in _MEASURED or cfg.quant is not None:
        return None
    mean = tokens * cfg.top_k / cfg.num_experts
    if tokens <= LEAST:
        kernel = "stream" if tokens == 1 or mean < _SHARED_MEAN else "gathered"
        found = direct_choices(cfg, facts, tokens)
        return next((c for c in found if c.gate_up and c.gate_up.kernel == kernel), None)
    if mean > _STREAMED_MEAN:
        return None
    return next(grouped_choices(cfg, facts, strategy, tokens), None)


def direct_choices(cfg: MoEConfig, facts: DeviceFacts, tokens: int) -> Iterator[Choice]:
    """Strategy "none": a program for each row; where there are few, also one for all rows of an expert."""
    if refuses(cfg, facts) is not None:
        return
    lists = _lists(cfg)

    def tiles(shapes: _Shapes, up: bool, kernel: str) -> list[Tile]:
        return _tiles(cfg, facts, shapes, up, LEAST, kernel, direct=kernel != "gathered")

    ups, downs = tiles(lists.direct_up, True, "stream"), tiles(lists.direct_down, False, "stream")
    ring = _pairs("none", ups, downs, facts)
    ups, downs = tiles(lists.held_up, True, "registers"), tiles(lists.held_down, False, "registers")
    # which of these goes well with which is a matter of how programs of the two share a unit: E=128 K=8
    # H=2048 I=768, T=1 on an H200: the best of one varied at a time 9.8 us, of all 8.8
    held = (Choice("none", up, down, facts.dependent_launch) for up in ups for down in downs)
    # where lanes have too many inputs to make numbers of for the first tile, others are slow as well: E=8 K=2
    # H=4096 I=14336, T=1: 53.4 us, through the ring 50.6
    slow = downs[:1] != tiles(lists.held_down[:1], False, "registers")
    yield from chain(ring, held) if slow else chain(held, ring)
    if 1 < tokens <= LEAST:
        ups = tiles(lists.gathered_up, True, "gathered")
        downs = tiles(lists.gathered_down, False, "gathered")
        downs += tiles(lists.summed_down, False, "stream")
        yield from _pairs("none", ups, downs, facts)


def grouped_choices(
    cfg: MoEConfig, facts: DeviceFacts, strategy: str, tokens: int
) -> Iterator[Choice]:
    """Sorted strategies."""
    if refuses(cfg, facts) is not None:
        return
    mean, lists = tokens * cfg.top_k / cfg.num_experts, _lists(cfg)
    lists = lists._replace(down=_in_order(cfg, facts, lists.down, tokens))
    ups, downs = (
        [
            wide
            for tile in _tiles(cfg, facts, shapes, up, LEAST)
            for wide in _taken_together(cfg, tile, up, tokens, mean)
        ]
        for shapes, up in ((lists.up, True), (lists.down, False))
    )
    yield from _pairs(strategy, ups, downs, facts)
    if cfg.quant is not None and mean > 3:
        tall = 2 * LEAST
        ups = _tiles(cfg, facts, _TALL_UP, True, tall)
        yield from _pairs(strategy, ups, _tiles(cfg, facts, _TALL_DOWN, False, tall), facts)


def _lists(cfg: MoEConfig) -> _Lists:
    return _16_BITS if cfg.quant is None else _INT4


def _pairs(
    strategy: str, ups: list[Tile], downs: list[Tile], facts: DeviceFacts
) -> Iterator[Choice]:
    """One varied at a time."""
    if ups and downs:
        yield from (Choice(strategy, up, downs[0], facts.dependent_launch) for up in ups)
        yield from (Choice(strategy, ups[0], down, facts.dependent_launch) for down in downs[1:])


def _in_order(cfg: MoEConfig, facts: DeviceFacts, downs: _Shapes, tokens: int) -> _Shapes:
    """Sorted rows' down tiles, the one to begin with first."""
    if cfg.quant is None:
        return downs
    tile = _tile(cfg, downs[0], LEAST, False, "stream")
    blocks = distinct_experts(cfg.num_experts, cfg.top_k, tokens)
    programs = blocks * stream_shape(cfg, tile, up=False, direct=False).tiles
    if programs >= _FEW_PROGRAMS * facts.compute_units:
        return downs
    return tuple(dict.fromkeys((_MANY_PROGRAMS_DOWN, *downs)))


def _taken_together(
    cfg: MoEConfig, tile: Tile, up: bool, tokens: int, mean: float
) -> Iterator[Tile]:
    """A tile that takes an expert's blocks one by one, and together as far as registers last.

    16-bit weights whose reduction is not split: always together, for it costs nothing where there is one
    block (E=128 K=8 H=2048 I=768, T=64 on an H200: one by one 279.5 us, up to four together 279.5), and
    skewed routing a fraction. int4: where experts have a few rows, one by one is 2% ahead at times, and where
    they have many, far behind; as many together as hold nearly every expert's rows (E=8 K=2 H=4096 I=14336,
    T=32, 8 rows an expert: one by one 251 us, two 242, four 248).
    """
    rows = float(tokens)
    if cfg.quant is not None:
        # of nearly every expert; registers for more would cost all of them
        rows = min(rows, max(rows_of_nearly_all(mean), LEAST + 1))
    blocks = 1 << (math.ceil(rows / LEAST) - 1).bit_length()
    most = min(_MOST_TOGETHER, blocks)
    while most > 1 and not _roomy(cfg, replace(tile, together=most), up):
        most //= 2
    alone = most == 1 or (tile.split > 1 if cfg.quant is None else mean <= LEAST)
    several = most > 1 and (cfg.quant is None or mean >= 2)
    found = [tile] * alone + [replace(tile, together=most)] * several
    # the likelier first: about as many experts have two blocks as have one, or most have one
    yield from reversed(found) if cfg.quant is not None and 2 * mean > LEAST else found


def _roomy(cfg: MoEConfig, tile: Tile, up: bool) -> bool:
    shape = stream_shape(cfg, tile, up=up, direct=False)
    sums = shape.rows * shape.bm * shape.together * shape.split // (32 * shape.warps)
    # parts of the reduction have scales, and sums of inputs, of their own
    most = _MOST_SUMS // shape.split if shape.int4 else _MOST_SUMS
    return sums <= most and shape.shared_bytes(False) <= _MOST_SHARED


def _tiles(
    cfg: MoEConfig,
    facts: DeviceFacts,
    shapes: _Shapes,
    up: bool,
    bm: int,
    kernel: str = "stream",
    direct: bool = False,
) -> list[Tile]:
    """Those that fit, without repeats.

    Args:
        direct: of kernels with one row a program, or one token.
    """
    tiles = (_tile(cfg, shape, bm, up, kernel) for shape in shapes)
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
