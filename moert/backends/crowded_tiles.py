"""Tiles beside those of a choice, for calls whose rows crowd on few experts (`Choice.crowded`). Pure.

A choice is fastest for the routing it was timed with, which is even. Where all tokens take the same experts,
every expert has as many rows as there are tokens, and blocks of few rows read its weights again and again.

On an H200, microseconds a layer with all tokens on the same experts, in brackets before: E=128 K=4 H=I=2880
in bfloat16, T=256 128 (412), T=64 100 (121); E=256 K=8 H=7168 I=256, T=256 117 (204); E=128 K=8 H=2048
I=768, T=256 61 (92). By even routing two kernels that have nothing to do cost about 2 us (the last layer at
T=512: 310.7 for 308.6). Tried and lost: a specialised kernel that ends before its warps part where it has no
blocks (0.3 us at most, in 30 cells).
"""

from __future__ import annotations

from dataclasses import replace

from moert.backends import int4_tiles, specialised_tiles, triton_tiles
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice, Tile

LEAST_TOKENS = 33  # for blocks of 64 rows to be better than half full at best
MOST_PAIRS = 3


def choices(cfg: MoEConfig, facts: DeviceFacts, choice: Choice, tokens: int) -> list[Choice]:
    """The choice with each pair of tall tiles that is worth timing beside its own.

    Args:
        choice: without tiles for crowds.
        tokens: B; an expert has at most so many rows.
    """
    if choice.strategy == "none" or not choice.tiles or tokens < LEAST_TOKENS:
        return []
    pairs = _pairs(cfg, facts, tokens)
    # the device takes them where they at least halve how often weights are read
    tall = [pair for pair in pairs if pair[0].bm >= 2 * choice.reach]
    return [replace(choice, crowded=pair) for pair in tall[:MOST_PAIRS]]


def _pairs(cfg: MoEConfig, facts: DeviceFacts, tokens: int) -> list[tuple[Tile, Tile]]:
    """The tallest first; specialised ones where the device has them."""
    most = min(128, 2 * tokens - 2)
    found = specialised_tiles.tall_pairs(cfg, facts, tokens, most)
    if found:
        return found
    tiles = triton_tiles if cfg.quant is None else int4_tiles
    portable = [tiles.tall_pair(bm, cfg, facts) for bm in (128, 64) if bm <= most]
    return [pair for pair in portable if pair is not None]
