"""Tile choice for int4 weights: pure functions of (configuration, device facts, T).

Portable kernels everywhere; on NVIDIA the streaming ones too, which win while an expert has few rows
(`moert/steps/streaming`, with figures), and on Hopper those with warps that copy, of fixed-point inputs for
some rows, of widened weights for many (`moert/steps/specialised`). Which serves which bucket is measured;
here is where that starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moert.backends import fixed_tiles, specialised_tiles, stream_choices
from moert.backends.triton_tile_limits import is_rdna
from moert.backends.triton_tiles import portable_rows
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile
from moert.quantization.int4_layout import columns_per_group

# past this many routed rows a direct plan re-reads weights too often to be worth timing
DIRECT_ROWS = 64
LEAST_ROWS = 16  # BM that all matrix instructions take
# BM, BN, BK and warps of tiles that spill although their sums are few
SPILLS = {
    "sm_80": ((128, 64, 128, 4),),
    "sm_100": ((32, 64, 128, 4), (32, 128, 128, 8)),
}
FLOAT32_ROWS = 32  # BM up to which no product of float32 spills


def group_of(cfg: MoEConfig, columns: int) -> int:
    """Columns of a weight's row that share a scale."""
    assert cfg.quant is not None
    return columns_per_group(cfg.quant.group_size, columns)


def step_of(group: int, most: int = 128) -> int:
    """BK: the widest step that lies within one group."""
    return max(width for width in (16, 32, 64, 128) if group % width == 0 and width <= most)


def default_choice(cfg: MoEConfig, facts: DeviceFacts, tokens: int, copied: bool = True) -> Choice:
    """The choice made without measurement: direct up to 64 rows of at most 4 tokens, then sorted; of portable
    kernels where weights cannot be copied as they lie."""
    rows = tokens * cfg.top_k
    strategy = "one_shot" if rows <= 1024 else "multi_phase"
    if tokens <= 4 and rows <= DIRECT_ROWS:
        found = _direct(cfg, facts, tokens)
    else:
        found = _sorted(cfg, facts, tokens, strategy)
        mean = rows / cfg.num_experts
        if copied:
            fixed = fixed_tiles.default(cfg, facts, strategy, mean)
            specialised = fixed or specialised_tiles.default(cfg, facts, strategy, mean)
            if specialised is not None:
                return specialised
    return next(choice for choice in found if copied or _portable(choice))


def _portable(choice: Choice) -> bool:
    tiles = (choice.gate_up, choice.down)
    return all(tile is None or tile.kernel == "tile" for tile in tiles)


def direct_choice(cfg: MoEConfig, facts: DeviceFacts) -> Choice:
    """The portable direct pair: right for any number of tokens and any address."""
    sizes = (cfg.hidden_size, cfg.intermediate_size)
    up, down = (_direct_tile(cfg, facts, columns) for columns in sizes)
    return Choice("none", up, down)


def unaligned_choice(choice: Choice, cfg: MoEConfig, facts: DeviceFacts) -> Choice:
    """The same launches on the same arena views, in portable kernels."""
    if choice.strategy == "none":
        return replace(direct_choice(cfg, facts), dependent=choice.dependent)
    assert choice.gate_up is not None
    bm = portable_rows(choice.gate_up.bm)
    # inputs that may lie anywhere are loaded one by one, and take more registers
    warps = 4 if bm <= 32 and cfg.dtype != "float32" else 8
    up, down = _tiles(cfg, facts, bm, 4, warps, 1 if bm < LEAST_ROWS else 2, most=32)
    return replace(choice, gate_up=up, down=down, crowded=None)


def candidates(
    cfg: MoEConfig, facts: DeviceFacts, tokens: int, strategies: Sequence[str]
) -> list[Choice]:
    """Choices worth timing, the default first, without repeats."""
    default = default_choice(cfg, facts, tokens)
    found = {default: None}
    rows = tokens * cfg.top_k
    if "none" in strategies and (rows <= 4 * DIRECT_ROWS or len(strategies) == 1):
        found |= dict.fromkeys(_direct(cfg, facts, tokens))
    sorts = [s for s in strategies if s != "none"]
    sorts.sort(key=lambda s: s != default.strategy)
    for strategy, most in zip(sorts, (None, 3), strict=False):
        # how rows are sorted and how they are multiplied hardly influence each other
        found |= dict.fromkeys(list(_sorted(cfg, facts, tokens, strategy))[:most])
        if most is None:
            mean = rows / cfg.num_experts
            found |= dict.fromkeys(fixed_tiles.choices(cfg, facts, strategy, mean))
            found |= dict.fromkeys(specialised_tiles.choices(cfg, facts, strategy, mean))
    return list(found)


def _direct(cfg: MoEConfig, facts: DeviceFacts, tokens: int) -> Iterator[Choice]:
    yield from stream_choices.direct_choices(cfg, facts, tokens)
    yield replace(direct_choice(cfg, facts), dependent=facts.dependent_launch)
    if facts.dependent_launch:
        yield direct_choice(cfg, facts)


def _direct_tile(cfg: MoEConfig, facts: DeviceFacts, columns: int) -> Tile:
    step = step_of(group_of(cfg, columns))
    if facts.kind != "hip":
        return Tile(1, 16, step, 4, 1)
    # a wave reads as many bytes a lane as a step has: 16 from 64 columns on
    row_tiles = max(1, facts.warp_size // (32 * max(1, step // 64)))
    return Tile(1, 16 * row_tiles, step, 1, 1)


def _sorted(cfg: MoEConfig, facts: DeviceFacts, tokens: int, strategy: str) -> Iterator[Choice]:
    """The likeliest first."""
    mean = tokens * cfg.top_k / cfg.num_experts
    if mean <= 24:
        yield from stream_choices.grouped_choices(cfg, facts, strategy, tokens)
    tallest = max(LEAST_ROWS, 3 * mean) if cfg.dtype != "float32" else FLOAT32_ROWS
    sizes = [bm for bm in (16, 32, 64, 128) if bm <= tallest][-3:]
    sizes.sort(key=lambda bm: abs(bm - max(16.0, 1.5 * mean)))
    for bm in sizes:
        for row_tiles, warps, stages in _shapes(bm, cfg, facts):
            up, down = _tiles(cfg, facts, bm, row_tiles, warps, stages)
            if all(_fits(tile, facts) for tile in (up, down)):
                yield Choice(strategy, up, down, facts.dependent_launch)


def tall_pair(bm: int, cfg: MoEConfig, facts: DeviceFacts) -> tuple[Tile, Tile] | None:
    """The likeliest tiles of blocks of BM rows; None where none fit."""
    if cfg.dtype == "float32" and bm > FLOAT32_ROWS:
        return None
    pairs = (_tiles(cfg, facts, bm, *shape) for shape in _shapes(bm, cfg, facts))
    return next((pair for pair in pairs if all(_fits(tile, facts) for tile in pair)), None)


def _shapes(bm: int, cfg: MoEConfig, facts: DeviceFacts) -> tuple[tuple[int, int, int], ...]:
    """Row tiles, warps and stages. Row tiles in fours: `wgmma` takes 64 rows at a time."""
    if cfg.dtype == "float32":
        return ((4, 8 if facts.kind == "cuda" else 4, 2),)
    if is_rdna(facts):
        return ((4, 4, 2), (8, 8, 2), (8, 4, 2), (4, 8, 2))
    if facts.kind != "cuda":
        # 16 bytes of codes a lane of 64
        return ((8, 4, 2), (4, 2, 2))
    if bm <= 32:
        return ((4, 4, 3), (4, 4, 4), (8, 4, 3), (8, 8, 3))
    return ((8, 8, 3), (4, 4, 3), (8, 4, 3), (16, 8, 3))


def _tiles(
    cfg: MoEConfig,
    facts: DeviceFacts,
    bm: int,
    row_tiles: int,
    warps: int,
    stages: int,
    most: int = 128,
) -> tuple[Tile, Tile]:
    if cfg.dtype == "float32":
        most = min(most, 32)
    elif facts.kind != "cuda":
        most = min(most, 64)
    steps = (step_of(group_of(cfg, n), most) for n in (cfg.hidden_size, cfg.intermediate_size))
    up, down = (Tile(bm, row_tiles * 16, step, warps, stages) for step in steps)
    return up, down


def _fits(tile: Tile, facts: DeviceFacts) -> bool:
    """Whether a device has the shared memory, and the registers: what compiling for each of them told."""
    if facts.kind == "cpu":
        return True
    if shared_bytes(tile) > facts.shared_memory:
        return False
    if (tile.bm, tile.bn, tile.bk, tile.num_warps) in SPILLS.get(facts.arch, ()):
        return False
    # the product of a group lies beside the sum
    sums = tile.bm * tile.bn // (tile.num_warps * facts.warp_size)
    return sums <= (32 if is_rdna(facts) else 64)


def shared_bytes(tile: Tile) -> int:
    """Bytes of shared memory: stages of codes and of inputs, 16 bits each at least."""
    return tile.num_stages * tile.bk * (tile.bn // 2 + 2 * tile.bm)
