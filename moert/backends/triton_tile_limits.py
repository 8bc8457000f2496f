"""Which tiles a device has the registers for: what compiling the kernels for every known device told. Pure.

Triton 3.6; gate/up and down, dense, interleaved and transposed weights, biases, all dtypes. A device that is
not listed gets what spills on none of its kind.
"""

from __future__ import annotations

from typing import Final

from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Tile

# BM, BN, BK, warps of grouped tiles that spill with 2-byte elements and wide loads
_GROUPED: Final[dict[str, set[tuple[int, int, int, int]]]] = {
    "sm_80": {(128, 128, 64, 8), (128, 64, 64, 4), (16, 64, 64, 4)},
    "sm_90": {(128, 128, 64, 4)},
    "sm_100": {(32, 256, 64, 8), (64, 64, 128, 4), (64, 128, 64, 8), (128, 128, 64, 4)},
    "gfx90a": set(),
    "gfx942": set(),
    "gfx950": {(32, 128, 64, 8)},
    # their own list of tiles has none
    "gfx1100": set(),
    "gfx1151": set(),
    "gfx1201": set(),
}
_GROUPED_ANYWHERE: Final = {shape for shapes in _GROUPED.values() for shape in shapes}
# BN, BK, warps, stages of direct tiles that spill with 2-byte elements
_DIRECT: Final = {
    "sm_100": {(4, 1024, 4, 3)},
    "rdna": {(8, 256, 4, 6), (16, 128, 2, 4), (32, 128, 2, 4), (32, 256, 4, 3)},
}
# all that spill nowhere with 4-byte elements, and on RDNA with narrow loads
_DIRECT_CAREFUL: Final = {(8, 256, 4, 3), (8, 256, 4, 4), (4, 256, 4, 4), (8, 512, 8, 4)}


def is_rdna(facts: DeviceFacts) -> bool:
    """AMD's graphics architecture: waves of 32 and 256 vector registers, no accumulation registers."""
    return facts.kind == "hip" and facts.warp_size == 32


def needs_care(cfg: MoEConfig) -> bool:
    """Matrix units that take float32 are not used, and rows that begin anywhere are loaded piece by piece."""
    if cfg.dtype == "float32":
        return True
    sizes = (cfg.hidden_size, cfg.intermediate_size)
    return any(size * cfg.torch_dtype.itemsize % 16 for size in sizes)


def most_rows(cfg: MoEConfig, facts: DeviceFacts) -> int:
    """The largest BM for which there is a tile that does not spill."""
    if cfg.dtype != "float32":
        return 128
    return 16 if is_rdna(facts) else 64


def careful_tile(bm: int, cfg: MoEConfig, facts: DeviceFacts) -> Tile:
    """A tile of BM rows, up to `most_rows`, that spills nowhere, whatever the dtype and the loads."""
    if cfg.dtype == "float32":
        return Tile(bm, 32, 32, 4, 2)
    # waves of 64 have the accumulators of 8 warps in 4
    warps = 8 if bm == 128 and facts.warp_size == 32 else 4
    # sm_100: two registers of the down GEMM with biases spill where copies run ahead
    return Tile(bm, 64, 32, warps, 1 if bm == 128 and facts.arch == "sm_100" else 2)


def wide(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> bool:
    """Whether the tile of weights has 16 bytes for each of its threads."""
    threads = tile.num_warps * facts.warp_size
    return tile.bn * tile.bk * cfg.torch_dtype.itemsize >= 16 * threads


def grouped_fits(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> bool:
    """Whether a grouped tile keeps to the registers of a device, and its loads are wide."""
    if not wide(tile, cfg, facts):
        return False
    if needs_care(cfg) and not is_rdna(facts):
        return tile.bn * tile.bk <= 2048
    shape = (tile.bm, tile.bn, tile.bk, tile.num_warps)
    return shape not in _GROUPED.get(facts.arch, _GROUPED_ANYWHERE)


def direct_fits(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> bool:
    """Whether a direct tile keeps to the registers of a device, and its loads are wide."""
    if not wide(tile, cfg, facts):
        return False
    shape = (tile.bn, tile.bk, tile.num_warps, tile.num_stages)
    if cfg.dtype == "float32" or (is_rdna(facts) and needs_care(cfg)):
        return shape in _DIRECT_CAREFUL
    return shape not in _DIRECT.get("rdna" if is_rdna(facts) else facts.arch, set())
