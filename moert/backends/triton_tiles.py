"""Tile choice of the Triton backend: pure functions of (configuration, device facts, T).

The heuristic is only where tuning starts: a bucket keeps it until something measured beats it. No choice
names a tile that spills registers on its device (`triton_tile_limits`) or needs more shared memory than
there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moert.backends import specialised_tiles, stream_choices
from moert.backends.even_routing import rows_of_nearly_all
from moert.backends.triton_tile_limits import (
    careful_tile,
    direct_fits,
    grouped_fits,
    is_rdna,
    most_rows,
    needs_care,
    wide,
)
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile

# past this many routed rows a direct plan re-reads weights too often to be worth timing, unless there are so
# many experts that most rows are alone with theirs. K=8 H=1024 I=256 on an H200, T=16, direct and sorted, us:
# E=512 48.7 and 51.0, E=256 47.4 and 45.9
DIRECT_ROWS = 64
ROWS_ALONE = 0.5  # of an expert, on average
# up to this many rows an expert, weights are streamed as fast as by tiles: E=128 K=8 H=2048 I=768 on an H200,
# 8 rows: 289.8 us for 292.3, 16 rows: 305.4 for 300.9
STREAM_ROWS = 8


def default_choice(cfg: MoEConfig, facts: DeviceFacts, tokens: int, copied: bool = True) -> Choice:
    """The choice made without measurement; of portable kernels where weights cannot be copied 16 bytes at a
    time.

    Streams where they were measured and rows are few (`stream_choices.default`); else direct up to 4 tokens:
    routed rows of so few tokens are mostly alone with their expert (measured on an H200 with E=128, K=8: sort
    and matrix units begin to pay between 4 and 8 tokens). Then blocks hold the rows of nearly every expert
    where routing is even, as far as blocks of 64 (E=8 K=2 H=4096 I=14336, 32 rows an expert: blocks of 32
    took 37% longer), and one workgroup sorts while all routed rows fit it comfortably.

    The tile is the first of a list, widest first, that the device has shared memory and registers for: with
    BM of 64 and 128 gfx950, of 160 KiB, gets tiles twice as wide as gfx942, of 64 KiB. RDNA (gfx1151) has one
    width for each BM: of all that spill nowhere, the one with most waves.
    """
    rows = tokens * cfg.top_k
    dependent = facts.dependent_launch
    strategy = "one_shot" if rows <= 1024 else "multi_phase"
    if copied and (tokens > stream_choices.LEAST or _mostly_alone(cfg, rows)):
        streamed = stream_choices.default(cfg, facts, strategy, tokens)
        if streamed is not None:
            return streamed
    if tokens <= 4 and rows <= 64:
        # dependent launch of the direct pair lost on an H200 (30.1 us for 26.0 at T=1, E=32, K=8, H=2048,
        # I=768): the down programs take registers and cache from gate/up programs still at work
        return direct_choice(cfg, facts)
    mean = rows / cfg.num_experts
    most = rows_of_nearly_all(mean)
    bm = next((bm for bm in (16, 32) if most <= bm), 64 if mean <= 128 else 128)
    bm = min(bm, most_rows(cfg, facts))
    specialised = specialised_tiles.default(cfg, facts, strategy, mean) if copied else None
    if specialised is not None:
        return specialised
    for tile in _default_tiles(bm, cfg, facts):
        if _fits(tile, cfg, facts):
            return Choice(strategy, tile, tile, dependent)
    return _smallest(strategy, facts)


def _mostly_alone(cfg: MoEConfig, rows: int) -> bool:
    """Whether most routed rows have an expert of their own, or there are few."""
    return rows <= max(DIRECT_ROWS, ROWS_ALONE * cfg.num_experts)


def tall_pair(bm: int, cfg: MoEConfig, facts: DeviceFacts) -> tuple[Tile, Tile] | None:
    """The default tiles of blocks of BM rows; None where none fit."""
    if bm > most_rows(cfg, facts):
        return None
    tile = next((tile for tile in _default_tiles(bm, cfg, facts) if _fits(tile, cfg, facts)), None)
    return None if tile is None else (tile, tile)


def _smallest(strategy: str, facts: DeviceFacts) -> Choice:
    tile = Tile(16, 16, 32, 4, 1)
    return Choice(strategy, tile, tile, facts.dependent_launch)


def direct_choice(cfg: MoEConfig, facts: DeviceFacts) -> Choice:
    """The direct pair with default tiles: right for any number of tokens, fast for few."""
    sizes = (cfg.hidden_size, cfg.intermediate_size)
    up, down = (_default_direct(size, cfg, facts) for size in sizes)
    return Choice("none", up, down)


def unaligned_choice(choice: Choice, cfg: MoEConfig, facts: DeviceFacts) -> Choice:
    """The same launches on the same arena views, with tiles for loads that may be narrow.

    What is not known to be aligned is loaded element by element, and needs more registers.
    """
    if facts.kind == "cpu" or choice.gate_up is None:
        return choice
    if choice.strategy == "none":
        return replace(direct_choice(cfg, facts), dependent=choice.dependent)
    tile = careful_tile(portable_rows(choice.gate_up.bm), cfg, facts)
    return replace(choice, gate_up=tile, down=tile, crowded=None)


def portable_rows(bm: int) -> int:
    """BM of portable kernels in place of blocks of BM rows: a power of two."""
    return 1 << (bm.bit_length() - 1)


def _default_tiles(bm: int, cfg: MoEConfig, facts: DeviceFacts) -> list[Tile]:
    shapes = [(32, 64, 4, 2), (32, 32, 4, 1)]
    if is_rdna(facts):
        # of all that spill nowhere, those with most waves
        shapes = [(64, 32, 8 if bm >= 64 else 4, 2), (32, 32, 4, 1)]
    elif bm >= 64:
        shapes = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)]
        if bm == 128 and facts.kind == "cuda":
            shapes[1:1] = [(64, 64, 8, 3), (64, 64, 8, 2)]
    else:
        deep = 4 if facts.kind == "cuda" else 2
        shapes = [(64, 128, 4, deep), (64, 64, 4, deep), *shapes]
    tiles = [Tile(bm, *shape) for shape in shapes]
    if needs_care(cfg):
        tiles.insert(0, careful_tile(bm, cfg, facts))
    return tiles


def _default_direct(reduction: int, cfg: MoEConfig, facts: DeviceFacts) -> Tile:
    fitting = [tile for tile in direct_tiles(reduction, cfg, facts) if tile.bn == 8]
    if is_rdna(facts):
        # stages wait in registers there
        return min(fitting, key=lambda tile: (tile.num_stages, tile.bk))
    return fitting[len(fitting) // 3]


def _power_of_two(size: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (size - 1).bit_length()))


def _fits(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> bool:
    if shared_bytes(tile, cfg, facts) > facts.shared_memory:
        return False
    return grouped_fits(tile, cfg, facts)


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
    if "none" in strategies and (_mostly_alone(cfg, rows) or len(strategies) == 1):
        found |= dict.fromkeys(_direct_candidates(cfg, facts))
        found |= dict.fromkeys(stream_choices.direct_choices(cfg, facts, tokens))
    sorts = [s for s in strategies if s != "none"]
    sorts.sort(key=lambda s: s != default.strategy)
    for strategy, most in zip(sorts, (None, 3), strict=False):
        # how rows are sorted and how they are multiplied hardly influence each other: a few tiles tell
        # which sort is faster
        fitting = dict.fromkeys(_grouped_candidates(cfg, facts, tokens, strategy, most))
        if most is None and rows <= STREAM_ROWS * cfg.num_experts:
            fitting |= dict.fromkeys(stream_choices.grouped_choices(cfg, facts, strategy, tokens))
        if most is None:
            fitting |= dict.fromkeys(
                specialised_tiles.choices(cfg, facts, strategy, rows / cfg.num_experts)
            )
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


def direct_tiles(reduction: int, cfg: MoEConfig, facts: DeviceFacts) -> list[Tile]:
    """Tiles of a direct GEMM that waste at most a quarter of the widest step on a short reduction."""
    tiles = [
        tile
        for tile in (Tile(1, *shape) for shape in _DIRECT)
        if -(-reduction // tile.bk) * tile.bk <= 1.25 * reduction and direct_fits(tile, cfg, facts)
    ]
    if any(tile.bn == 8 for tile in tiles):
        return tiles
    short = [Tile(1, bn, _power_of_two(reduction, 16, 128), 2, 3) for bn in (4, 8)]
    return [tile for tile in short if tile.bn == 8 or wide(tile, cfg, facts)]


def _direct_candidates(cfg: MoEConfig, facts: DeviceFacts) -> Iterator[Choice]:
    sizes = (cfg.hidden_size, cfg.intermediate_size)
    up, down = (direct_tiles(size, cfg, facts) for size in sizes)
    # the two GEMMs hardly influence each other: vary one at a time, then how they are launched
    middle_up, middle_down = up[len(up) // 3], down[len(down) // 3]
    yield from (Choice("none", tile, middle_down) for tile in up)
    yield from (Choice("none", middle_up, tile) for tile in down)
    if facts.dependent_launch:
        yield from (Choice("none", middle_up, tile, True) for tile in down[::3])


# BN, BK, warps, stages
_GROUPED = (
    *((64, 128, 4, 3), (32, 128, 4, 4), (128, 128, 8, 3), (64, 128, 4, 4), (32, 256, 4, 3)),
    *((128, 64, 8, 3), (256, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4), (128, 64, 8, 4)),
)
# where the tall tiles of the list above do not fit
_GROUPED_SMALL = ((64, 64, 8, 3), (64, 64, 8, 2))
# 64 KiB of shared memory on most: more than two stages would leave only the smallest tiles
_GROUPED_HIP = (
    *((32, 64, 4, 2), (32, 128, 4, 2), (32, 256, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2)),
    *((64, 128, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
)
# BN, BK, warps, stages by BM. Compiled for gfx1100, gfx1151 and gfx1201, gate/up and down, reductions from
# 256 to 7168, odd ones and transposed weights too: these spill nowhere, taller and deeper ones in most places
_GROUPED_RDNA = {
    16: ((64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    32: ((64, 32, 4, 2), (32, 64, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
    64: ((64, 32, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    128: ((64, 32, 8, 2),),
}


def _grouped_tiles(bm: int, cfg: MoEConfig, facts: DeviceFacts) -> list[Tile]:
    careful = careful_tile(bm, cfg, facts)
    if cfg.dtype == "float32":
        return [careful]
    if is_rdna(facts):
        shapes = _GROUPED_RDNA[bm]
    elif needs_care(cfg):
        return [careful, Tile(bm, 32, 64, careful.num_warps, 2)]
    elif facts.kind == "hip":
        shapes = _GROUPED_HIP
    else:
        shapes = _GROUPED if bm < 128 or facts.arch == "sm_90" else (*_GROUPED, *_GROUPED_SMALL)
    return [Tile(bm, *shape) for shape in shapes]


def _grouped_candidates(
    cfg: MoEConfig, facts: DeviceFacts, tokens: int, strategy: str, most: int | None
) -> Iterator[Choice]:
    mean = tokens * cfg.top_k / cfg.num_experts
    tallest = min(max(16, 4 * mean), most_rows(cfg, facts))
    sizes = [bm for bm in (16, 32, 64, 128) if bm <= tallest][-3:]
    for bm in sizes:
        fitting = [tile for tile in _grouped_tiles(bm, cfg, facts) if _fits(tile, cfg, facts)]
        for tile in fitting[:most]:
            yield Choice(strategy, tile, tile, facts.dependent_launch)
