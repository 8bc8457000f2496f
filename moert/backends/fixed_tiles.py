"""Choices of the kernels of int4 weights and fixed-point inputs (`moert/steps/fixed_point`)."""

from __future__ import annotations

from collections.abc import Iterator

from moert.backends import specialised_tiles
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile
from moert.steps.fixed_point.layout import STEP
from moert.steps.specialised.fixed_shape import FixedShape

# mean rows an expert between which these kernels are worth timing, and between which they are the default. On
# an H200 they were this much faster than the best of all others: E=8, K=2, H=4096, I=14336, 8 rows 20%, 16
# rows 22%; E=128, K=8, H=2048, I=768, 16 rows 20%, 32 rows 3%; E=256, K=8, H=7168, I=256, 8 rows 6%, 16 rows
# 23%; E=512, K=10, H=2048, I=512, 10 rows 9%. With 32 rows the first of these layers was 14% slower
LEAST_MEAN, MOST_MEAN = 3, 48
DEFAULT_MEANS = (8, 32)
# BM, BN and stages
_TILES = ((16, 256, 6), (32, 256, 6))
_WARPS = 4  # of each multiplying partition


def refuses(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot serve; None where they can."""
    if cfg.quant is None:
        return "int4 weights only"
    size = cfg.quant.group_size
    if size % STEP and size != -1:
        return f"groups of multiples of {STEP} columns"
    return specialised_tiles.refuses(cfg, facts)


def choices(cfg: MoEConfig, facts: DeviceFacts, strategy: str, mean: float) -> Iterator[Choice]:
    """Sorted strategies, the likeliest first; `mean` rows an expert gets."""
    if not LEAST_MEAN <= mean <= MOST_MEAN:
        return
    # blocks that hold an expert's rows, and of which it fills a quarter; first the taller that it fills half
    worth_timing = {16: mean <= 16, 32: mean >= 8}
    tiles = [tile for tile in every_tile(cfg, facts) if worth_timing[tile.bm]]
    for tile in sorted(tiles, key=lambda t: (t.bm > 2 * mean, -t.bm)):
        yield Choice(strategy, tile, tile, facts.dependent_launch)


def default(cfg: MoEConfig, facts: DeviceFacts, strategy: str, mean: float) -> Choice | None:
    """The choice made without measurement; None where other kernels are as good."""
    least, most = DEFAULT_MEANS
    return next(choices(cfg, facts, strategy, mean), None) if least <= mean < most else None


def every_tile(cfg: MoEConfig, facts: DeviceFacts) -> list[Tile]:
    """All tiles that these kernels are written for, the device being able."""
    if refuses(cfg, facts) is not None:
        return []
    tiles = (Tile(bm, bn, STEP, _WARPS, stages, "fixed") for bm, bn, stages in _TILES)
    return [tile for tile in tiles if fits(cfg, facts, tile)]


def fits(cfg: MoEConfig, facts: DeviceFacts, tile: Tile) -> bool:
    """Whether a tile is one that the kernels are written for, and the device has the shared memory."""
    known = tile.kernel == "fixed" and refuses(cfg, facts) is None
    known &= tile.num_stages >= 2 and tile.bk == STEP and tile.num_warps == _WARPS
    known &= (tile.bm, tile.bn) in {(bm, bn) for bm, bn, _ in _TILES}
    if not known:
        return False
    shapes = (fixed_shape(cfg, facts, tile, up=up) for up in (True, False))
    return all(shape.shared_bytes <= facts.shared_memory for shape in shapes)


def fixed_shape(cfg: MoEConfig, facts: DeviceFacts, tile: Tile, *, up: bool) -> FixedShape:
    """What a tile compiles to."""
    return FixedShape(**specialised_tiles.int4_sizes(cfg, facts, tile, up))
