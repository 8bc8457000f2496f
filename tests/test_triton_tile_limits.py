"""What a device has the registers for: `test_compile` compiles, here is what follows from its findings."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
from moert.device import KNOWN_DEVICES
from moert.plan import Tile

CFG = MoEConfig(128, 8, 2048, 768)
FLOAT = replace(CFG, dtype="float32")
H200, MI300, STRIX = (KNOWN_DEVICES[arch] for arch in ("sm_90", "gfx942", "gfx1151"))
ADA = replace(KNOWN_DEVICES["sm_80"], arch="sm_89", shared_memory=101376)


@pytest.mark.parametrize(
    ("change", "care"),
    [
        ({}, False),
        ({"dtype": "float16"}, False),
        ({"dtype": "float32"}, True),
        ({"hidden_size": 1000}, False),  # rows of 2000 bytes: 125 times 16
        ({"intermediate_size": 500}, True),  # 1000 bytes are not
        ({"hidden_size": 2041}, True),
    ],
)
def test_who_needs_care(change: dict[str, object], care: bool) -> None:
    assert needs_care(replace(CFG, **change)) == care  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tile", "fitting"),
    [
        # 128 accumulators a thread and the rest: on an A100 too many
        (Tile(128, 128, 64, 8, 3), {"sm_90", "sm_100"}),
        (Tile(128, 128, 64, 4, 4), {"sm_80"}),
        (Tile(64, 64, 128, 4, 3), {"sm_80", "sm_90"}),
        (Tile(64, 64, 64, 4, 3), {"sm_80", "sm_90", "sm_100"}),
    ],
)
def test_grouped(tile: Tile, fitting: set[str]) -> None:
    archs = ("sm_80", "sm_90", "sm_100")
    assert {a for a in archs if grouped_fits(tile, CFG, KNOWN_DEVICES[a])} == fitting
    # of a device that nobody compiled for, nothing is known but what spills nowhere
    assert grouped_fits(tile, CFG, ADA) == (fitting == set(archs))


def test_loads_are_wide() -> None:
    """64 columns of 32 are 8 bytes for each of the 512 threads of 8 waves."""
    assert wide(Tile(64, 64, 32, 4, 2), CFG, MI300) and wide(Tile(64, 64, 32, 8, 2), FLOAT, MI300)
    assert wide(Tile(64, 64, 32, 8, 2), CFG, H200)
    narrow = Tile(64, 64, 32, 8, 2)
    assert not wide(narrow, CFG, MI300) and not grouped_fits(narrow, CFG, MI300)
    assert not direct_fits(Tile(1, 4, 256, 4, 4), CFG, MI300)
    assert direct_fits(Tile(1, 4, 256, 4, 4), CFG, H200)


@pytest.mark.parametrize(
    ("cfg", "tile", "facts", "fits"),
    [
        (CFG, Tile(1, 16, 256, 4, 4), H200, True),
        (FLOAT, Tile(1, 16, 256, 4, 4), H200, False),
        (FLOAT, Tile(1, 8, 256, 4, 4), H200, True),
        (CFG, Tile(1, 8, 128, 2, 6), STRIX, True),
        (replace(CFG, intermediate_size=500), Tile(1, 8, 128, 2, 6), STRIX, False),
        (CFG, Tile(1, 16, 128, 2, 4), STRIX, False),
        (CFG, Tile(1, 4, 1024, 4, 3), KNOWN_DEVICES["sm_100"], False),
    ],
)
def test_direct(cfg: MoEConfig, tile: Tile, facts: object, fits: bool) -> None:
    assert direct_fits(tile, cfg, facts) == fits  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_careful_tile_fits_everywhere(arch: str, dtype: str) -> None:
    cfg, facts = replace(CFG, dtype=dtype), KNOWN_DEVICES[arch]
    assert most_rows(cfg, facts) == (128 if dtype != "float32" else 16 if is_rdna(facts) else 64)
    for bm in (16, 32, 64, 128):
        if bm <= most_rows(cfg, facts):
            tile = careful_tile(bm, cfg, facts)
            assert tile.bm == bm and grouped_fits(tile, cfg, facts)
            odd = replace(cfg, intermediate_size=500)
            assert grouped_fits(careful_tile(bm, odd, facts), odd, facts)
