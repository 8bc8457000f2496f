"""Tile choice of the Triton backend: pure functions of (configuration, device facts, T).

The heuristic is only where tuning starts: a bucket keeps it until something measured beats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile

# past this many routed rows a direct plan re-reads weights too often to be worth timing
DIRECT_ROWS = 64


def default_choice(cfg: MoEConfig, facts: DeviceFacts, tokens: int) -> Choice:
    """The choice made without measurement.

    direct up to 4 tokens: routed rows of so few tokens are mostly alone with their expert (measured on an
    H200 with E=128, K=8: sort and matrix units begin to pay between 4 and 8 tokens); then BM follows the
    mean rows an expert gets, and one workgroup sorts while all routed rows fit it comfortably.
    """
    rows = tokens * cfg.top_k
    dependent = facts.dependent_launch
    if tokens <= 4 and rows <= 64:
        # dependent launch of the direct pair lost on an H200 (30.1 us for 26.0 at T=1, E=32, K=8, H=2048,
        # I=768): the down programs take registers and cache from gate/up programs still at work
        return direct_choice(cfg, facts)
    mean = rows / cfg.num_experts
    bm = 16 if mean <= 12 else 32 if mean <= 32 else 64 if mean <= 128 else 128
    strategy = "one_shot" if rows <= 1024 else "multi_phase"
    for bn, bk, warps, stages in _default_tiles(bm, facts):
        tile = Tile(bm, bn, bk, warps, stages)
        if _fits(tile, cfg, facts):
            return Choice(strategy, tile, tile, dependent)
    return _smallest(strategy, facts)


def _smallest(strategy: str, facts: DeviceFacts) -> Choice:
    tile = Tile(16, 16, 32, 4, 1)
    return Choice(strategy, tile, tile, facts.dependent_launch)


def direct_choice(cfg: MoEConfig, facts: DeviceFacts) -> Choice:
    """The direct pair with default tiles: right for any number of tokens, fast for few."""
    up, down = (_default_direct(size, facts) for size in (cfg.hidden_size, cfg.intermediate_size))
    return Choice("none", up, down)


def _default_tiles(bm: int, facts: DeviceFacts) -> list[tuple[int, int, int, int]]:
    if is_rdna(facts):
        # compiled for gfx1100, gfx1151 and gfx1201: of all that spill nowhere, those with most waves
        return [(64, 32, 8 if bm >= 64 else 4, 2), (32, 32, 4, 1)]
    if bm >= 64:
        return [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)]
    deep = 4 if facts.kind == "cuda" else 2
    return [(64, 128, 4, deep), (64, 64, 4, deep), (32, 64, 4, 2), (32, 32, 4, 1)]


def is_rdna(facts: DeviceFacts) -> bool:
    """AMD's graphics architecture: waves of 32 and 256 vector registers, no accumulation registers."""
    return facts.kind == "hip" and facts.warp_size == 32


def _default_direct(reduction: int, facts: DeviceFacts) -> Tile:
    fitting = [tile for tile in direct_tiles(reduction, facts) if tile.bn == 8]
    if is_rdna(facts):
        # stages wait in registers there: compiled for gfx1151, more or wider ones spill
        return min(fitting, key=lambda tile: (tile.num_stages, tile.bk))
    return fitting[len(fitting) // 3]


def _power_of_two(size: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (size - 1).bit_length()))


def _fits(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> bool:
    return shared_bytes(tile, cfg, facts) <= facts.shared_memory


def shared_bytes(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> int:
    """Shared memory of a grouped gate/up tile: copies of the x and w tiles.

    On AMD the newest stage is in registers: Triton 3.6 keeps `num_stages - 1` copies. On NVIDIA it keeps one
    fewer than `num_stages` or as many, never more; the compiled kernel's own figure is checked again at
    start-up.
    """
    width = tile.bn * (2 if cfg.gated else 1)
    copies = tile.num_stages - 1 if facts.kind == "hip" else tile.num_stages
    return max(copies, 1) * tile.bk * (tile.bm + width) * cfg.torch_dtype.itemsize


def candidates(
    cfg: MoEConfig, facts: DeviceFacts, tokens: int, strategies: Sequence[str]
) -> list[Choice]:
    """Choices worth timing, the default first, without repeats."""
    default = default_choice(cfg, facts, tokens)
    found = {default: None}
    rows = tokens * cfg.top_k
    if "none" in strategies and (rows <= DIRECT_ROWS or len(strategies) == 1):
        found |= dict.fromkeys(_direct_candidates(cfg, facts))
    sorts = [s for s in strategies if s != "none"]
    sorts.sort(key=lambda s: s != default.strategy)
    for strategy, most in zip(sorts, (None, 3), strict=False):
        # how rows are sorted and how they are multiplied hardly influence each other: a few tiles tell
        # which sort is faster
        fitting = dict.fromkeys(_grouped_candidates(cfg, facts, tokens, strategy, most))
        found |= fitting or {_smallest(strategy, facts): None}
    return list(found)


# BN, BK, warps, stages: columns a program computes, elements of a row a step loads, threads that share them,
# steps in flight. A thread's share of x or h has to be 4 bytes or more to be loaded ahead: BK >= 64 * warps
_DIRECT = (
    *(
        (4, 512, 4, 4),
        (8, 256, 4, 3),
        (8, 256, 4, 4),
        (8, 256, 4, 6),
        (8, 512, 4, 3),
        (8, 512, 4, 4),
    ),
    *((8, 512, 8, 4), (16, 128, 2, 4), (16, 256, 4, 3), (16, 256, 4, 4), (16, 512, 8, 3)),
    *(
        (8, 128, 2, 4),
        (8, 128, 2, 6),
        (4, 256, 4, 4),
        (4, 1024, 4, 3),
        (32, 128, 2, 4),
        (32, 256, 4, 3),
    ),
)


# compiled for gfx1100, gfx1151 and gfx1201: the gate/up GEMM spills with these
_SPILLING_RDNA = frozenset({(8, 256, 4, 6), (16, 128, 2, 4), (32, 128, 2, 4), (32, 256, 4, 3)})


def direct_tiles(reduction: int, facts: DeviceFacts) -> list[Tile]:
    """Tiles of a direct GEMM that waste at most a quarter of the widest step on a short reduction."""
    tiles = [
        Tile(1, bn, bk, warps, stages)
        for bn, bk, warps, stages in _DIRECT
        if -(-reduction // bk) * bk <= 1.25 * reduction
        and not (is_rdna(facts) and (bn, bk, warps, stages) in _SPILLING_RDNA)
    ]
    return tiles or [Tile(1, bn, _power_of_two(reduction, 16, 128), 2, 3) for bn in (4, 8, 16)]


def _direct_candidates(cfg: MoEConfig, facts: DeviceFacts) -> Iterator[Choice]:
    up, down = direct_tiles(cfg.hidden_size, facts), direct_tiles(cfg.intermediate_size, facts)
    # the two GEMMs hardly influence each other: vary one at a time, then how they are launched
    middle_up, middle_down = up[len(up) // 3], down[len(down) // 3]
    yield from (Choice("none", tile, middle_down) for tile in up)
    yield from (Choice("none", middle_up, tile) for tile in down)
    if facts.dependent_launch:
        yield from (Choice("none", middle_up, tile, True) for tile in down[::3])


# BN, BK, warps, stages
_GROUPED = (
    *((64, 128, 4, 3), (32, 128, 4, 4), (128, 128, 8, 3), (64, 128, 4, 4), (32, 256, 4, 3)),
    *((128, 64, 8, 3), (256, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4)),
)
# 64 KiB of shared memory on most: more than two stages would leave only the smallest tiles
_GROUPED_HIP = (
    *((32, 64, 4, 2), (32, 128, 4, 2), (32, 256, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2)),
    *((64, 128, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
)


# BN, BK, warps, stages by BM. Compiled for gfx1100, gfx1151 and gfx1201, gate/up and down, reductions from
# 256 to 7168, odd ones too: these spill nowhere, taller and deeper ones in most places
_GROUPED_RDNA = {
    16: (
        *((64, 32, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
        *((64, 32, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    ),
    32: (
        *((64, 32, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (64, 32, 8, 2)),
        *((64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    ),
    64: ((64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    128: ((64, 32, 8, 2),),
}


def _grouped_shapes(bm: int, facts: DeviceFacts) -> tuple[tuple[int, int, int, int], ...]:
    if is_rdna(facts):
        return _GROUPED_RDNA[bm]
    return _GROUPED_HIP if facts.kind == "hip" else _GROUPED


def _grouped_candidates(
    cfg: MoEConfig, facts: DeviceFacts, tokens: int, strategy: str, most: int | None
) -> Iterator[Choice]:
    mean = tokens * cfg.top_k / cfg.num_experts
    sizes = [bm for bm in (16, 32, 64, 128) if bm <= max(16, 4 * mean)][-3:]
    for bm in sizes:
        for bn, bk, warps, stages in _grouped_shapes(bm, facts)[:most]:
            tile = Tile(bm, bn, bk, warps, stages)
            if _fits(tile, cfg, facts):
                yield Choice(strategy, tile, tile, facts.dependent_launch)
