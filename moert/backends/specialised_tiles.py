"""Choices of the warp-specialised kernels (`moert/steps/specialised`): where they serve, what to time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moert.backends import stream_tiles
from moert.backends.even_routing import rows_of_nearly_all
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile
from moert.quantization.int4_layout import columns_per_group
from moert.steps.specialised.int4_shape import SpecialisedInt4Shape
from moert.steps.specialised.shape import MULTIPLY_WARPS, STEP, SpecialisedShape
from moert.steps.specialised.tall_shape import TALL, TallShape
from moert.weights import ExpertWeights

# blocks that go through the tiles side by side: T=512, E=8, K=2, H=4096, I=14336 on an H200, blocks of 128
# rows in portable kernels, 1 and 8 side by side: 1171 and 1124 us; blocks of 64 rows at T=256: 1007 and 817
SIDE = 8
# mean rows an expert from which on a block of weights is used by enough rows to be worth timing, and from
# which on they are the default. On an H200 they were this much faster than portable defaults: E=128, K=8,
# H=2048, I=768 in bfloat16, 32 rows 14%, 64 rows 16%; E=256, K=8, H=3072, I=384, 32 rows 19%; E=128, K=4,
# H=I=2880, 64 rows 17%. At 16 rows in bfloat16 blocks of 64 are level, and where all tokens take the same
# experts ahead. int4, 32 rows: 180 us for 211; 16 rows: E=8, K=2, H=4096, I=14336 283 for 500, E=128, K=4,
# H=I=2880 736 for 1062, E=256, K=8, H=7168, I=256 340 for 452
LEAST_MEAN = 16
DEFAULT_MEAN = 32
LEAST_INT4_MEAN = 6
DEFAULT_INT4_MEAN = 16
# columns of a step of int4 weights that waits at half as many barriers
LONG_STEP = 2 * STEP
# BM, BN and stages, the tallest first and of those the widest
_TILES = ((128, 256, 4), (128, 128, 6), (128, 64, 8), (64, 256, 5), (64, 128, 8), (64, 64, 12))
# the same of tall blocks. On an H200 narrow ones were 6% ahead at T=4096, E=128, K=4, H=I=2880, elsewhere
# behind
_TALL_TILES = ((TALL, 256, 4), (TALL, 128, 6))
# those worth timing where rows spread over the experts: narrow ones read x more often, which pays where few
# experts would leave units idle
_EVEN = ((128, 256), (128, 128), (64, 256))
# BM, BN, BK, warps of each of two multiplying partitions, stages; 128 rows and 256 of weights spill a
# register or two in long steps
_INT4_TILES = (
    (32, 256, 128, 4, 6),
    (32, 256, 64, 8, 6),
    (64, 256, 128, 4, 4),
    (64, 256, 64, 4, 6),
    (80, 256, 128, 4, 4),
    (128, 256, 64, 4, 6),
    (128, 256, 64, 4, 4),
    (160, 128, 128, 4, 4),
)
# BM and BN
_INT4_SIZES = {tile[:2] for tile in _INT4_TILES}


def refuses(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
    """Why the warp-specialised kernels cannot serve; None where they can."""
    if facts.compute_capability != 90:
        return "made of the matrix instructions of compute capability 9.0"
    return stream_tiles.refuses(cfg, facts)


def readable(weights: ExpertWeights) -> bool:
    """Whether the weights lie as these kernels copy them: within 32-bit offsets of their expert."""
    matrices = [m for m in (weights.w13, weights.w2) if isinstance(m, torch.Tensor)]
    reach = ((m.shape[1] - 1) * m.stride(1) + m.shape[2] for m in matrices)
    return stream_tiles.readable(weights) and max(reach, default=0) < 2**31


def choices(cfg: MoEConfig, facts: DeviceFacts, strategy: str, mean: float) -> Iterator[Choice]:
    """Sorted strategies, the likeliest first; `mean` rows an expert gets."""
    least = LEAST_MEAN if cfg.quant is None else LEAST_INT4_MEAN
    tiles = [t for t in every_tile(cfg, facts) if mean >= max(least, t.bm / 4)]
    tiles = [t for t in tiles if _worth_timing(cfg, t, mean)]
    # tall blocks first or last: where they hold nearly every expert's rows, or do not; of the others the
    # tallest of which an expert fills half
    tiles.sort(key=lambda t: (not _holds(t, mean), _is_tall(t), t.bm > 2 * mean, -t.bm))
    for tile in tiles:
        yield Choice(strategy, tile, tile, facts.dependent_launch)


def _is_tall(tile: Tile) -> bool:
    """Whether blocks are of two parts: a power of two of rows, and a quarter of it."""
    return tile.bm.bit_count() > 1


def _worth_timing(cfg: MoEConfig, tile: Tile, mean: float) -> bool:
    if _is_tall(tile):
        return tile.bm / 2 <= mean and (tile.bm == TALL or mean <= tile.bm)
    return cfg.quant is not None or (tile.bm, tile.bn) in _EVEN


def _holds(tile: Tile, mean: float) -> bool:
    """Whether a tall block holds the rows of nearly every expert, and the first part of it does not."""
    return _is_tall(tile) and 4 / 5 * tile.bm < rows_of_nearly_all(mean) <= tile.bm


def tall_pairs(
    cfg: MoEConfig, facts: DeviceFacts, tokens: int, most: int
) -> list[tuple[Tile, Tile]]:
    """Tiles for `tokens` tokens on the same experts, of blocks of 64 rows up to `most`, the tallest first."""
    every = (tile for tile in every_tile(cfg, facts) if not _is_tall(tile))
    tall = [tile for tile in every if 64 <= tile.bm <= most]
    if cfg.quant is not None:
        return [(tile, tile) for tile in sorted(tall, key=lambda tile: -tile.bm)]
    pairs = []
    for bm in dict.fromkeys(tile.bm for tile in tall):
        of_size = [tile for tile in tall if tile.bm == bm]
        up, down = (_least_copied(cfg, facts, of_size, tokens, up) for up in (True, False))
        pairs.append((up, down))
    return pairs


def _least_copied(
    cfg: MoEConfig, facts: DeviceFacts, tiles: list[Tile], tokens: int, up: bool
) -> Tile:
    """The tile of one GEMM with which a unit copies least where all tokens take the same experts.

    Few experts have few weights: wide tiles would leave units idle, narrow ones copy the rows of x often. On
    an H200, T=64, us a layer with both tiles of 256, of 128, of 64 rows of weights, and with what is chosen
    here: (E, K, H, I) = (8, 2, 4096, 14336): 223, 201, 183, 187; (256, 8, 7168, 256): 62.0, 47.5, 43.3, 41.9;
    (256, 8, 3072, 384): 34.7, 29.8, 27.8, 27.1; (128, 8, 2048, 768): 33.5, 30.4, 32.6, 30.7.
    """

    def copied(tile: Tile) -> int:
        blocks = cfg.top_k * -(-tokens // tile.bm)
        pieces = blocks * specialised_shape(cfg, facts, tile, up=up).tiles
        return -(-pieces // facts.compute_units) * (min(tile.bm, tokens) + tile.bn)

    return min(tiles, key=copied)


def default(cfg: MoEConfig, facts: DeviceFacts, strategy: str, mean: float) -> Choice | None:
    """The choice made without measurement; None where other kernels are as good."""
    least = DEFAULT_MEAN if cfg.quant is None else DEFAULT_INT4_MEAN
    return next(choices(cfg, facts, strategy, mean), None) if mean >= least else None


def every_tile(cfg: MoEConfig, facts: DeviceFacts) -> list[Tile]:
    """All tiles that these kernels are written for, the device being able."""
    if refuses(cfg, facts) is not None:
        return []
    return [tile for tile in _tiles(cfg) if fits(cfg, facts, tile)]


def _tiles(cfg: MoEConfig) -> Iterator[Tile]:
    if cfg.quant is None:
        for bm, bn, stages in (*_TILES, *_TALL_TILES):
            yield Tile(bm, bn, STEP, MULTIPLY_WARPS, stages, "specialised")
        return
    for bm, bn, bk, warps, stages in _INT4_TILES:
        if bk in _steps(cfg.quant.group_size) and _lasts(cfg, bm, bn):
            yield Tile(bm, bn, bk, warps, stages, "specialised")


def _lasts(cfg: MoEConfig, bm: int, bn: int) -> bool:
    """Whether registers last: with biases, or scales for less than two blocks, one or two of the largest tile
    would spill, with zero points those of the next one too."""
    assert cfg.quant is not None
    whole = cfg.quant.group_size == -1 or cfg.quant.group_size % LONG_STEP == 0
    most = 64 if not cfg.quant.symmetric else 128 if whole and not cfg.bias else 80
    return bn < 256 or bm <= most


def _steps(group_size: int) -> tuple[int, ...]:
    """Columns of an int4 step: groups fill it, or it lies within one."""
    whole = group_size == -1 or group_size % LONG_STEP == 0 or LONG_STEP % group_size == 0
    return (STEP, LONG_STEP) if whole else (STEP,)


def fits(cfg: MoEConfig, facts: DeviceFacts, tile: Tile) -> bool:
    """Whether a tile is one that the kernels are written for, and the device has the shared memory."""
    known = tile.kernel == "specialised" and refuses(cfg, facts) is None
    # a stage is given back once the next one is there
    known &= tile.num_stages >= 2
    if cfg.quant is None:
        known &= (tile.bm, tile.bn) in {(bm, bn) for bm, bn, _ in (*_TILES, *_TALL_TILES)}
        known &= tile.num_warps == MULTIPLY_WARPS
        known &= tile.bk == STEP
    else:
        known &= (tile.bm, tile.bn) in _INT4_SIZES
        known &= tile.num_warps == 4 or (tile.num_warps == 8 and not _is_tall(tile))
        known &= tile.bk in _steps(cfg.quant.group_size)
    if not known:
        return False
    for up in (True, False):
        shape: SpecialisedShape | SpecialisedInt4Shape
        if cfg.quant is None:
            shape = specialised_shape(cfg, facts, tile, up=up)
        else:
            shape = specialised_int4_shape(cfg, facts, tile, up=up)
        if shape.shared_bytes > facts.shared_memory:
            return False
    return True


def specialised_shape(
    cfg: MoEConfig,
    facts: DeviceFacts,
    tile: Tile,
    *,
    up: bool,
    interleaved: bool = False,
    strides: tuple[int, int] = (0, 0),
) -> SpecialisedShape:
    """What a tile of 16-bit weights compiles to.

    Args:
        up: the gate/up GEMM, else the down GEMM.
        strides: of the weights between experts and rows, in elements.
    """
    reduction, columns = stream_tiles.gemm_sizes(cfg, up)
    kind = TallShape if tile.bm == TALL else SpecialisedShape
    return kind(
        reduction=reduction,
        columns=columns,
        paired=up and cfg.gated,
        interleaved=up and cfg.gated and interleaved,
        w_e=strides[0],
        w_n=strides[1],
        bm=tile.bm,
        bn=tile.bn,
        stages=tile.num_stages,
        side=SIDE,
        programs=facts.compute_units,
    )


def specialised_int4_shape(
    cfg: MoEConfig, facts: DeviceFacts, tile: Tile, *, up: bool
) -> SpecialisedInt4Shape:
    """The same for int4 weights."""
    common = int4_sizes(cfg, facts, tile, up)
    return SpecialisedInt4Shape(bn=tile.bn, step=tile.bk, warps=tile.num_warps, **common)


def int4_sizes(cfg: MoEConfig, facts: DeviceFacts, tile: Tile, up: bool) -> dict[str, Any]:
    """What a tile of int4 weights compiles to, whatever its inputs are."""
    assert cfg.quant is not None
    reduction, columns = stream_tiles.gemm_sizes(cfg, up)
    return {
        "zeros": not cfg.quant.symmetric,
        "group": columns_per_group(cfg.quant.group_size, reduction),
        "reduction": reduction,
        "columns": columns,
        "paired": up and cfg.gated,
        "bm": tile.bm,
        "stages": tile.num_stages,
        "side": SIDE,
        "programs": facts.compute_units,
    }
