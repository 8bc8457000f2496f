"""Choices of the kernels of fixed-point inputs: what is refused, what fits, what a tile compiles to."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from moert.backends.fixed_launches import fixed_fields
from moert.backends.fixed_tiles import choices, default, every_tile, fits, fixed_shape, refuses
from moert.backends.int4_tiles import candidates, default_choice
from moert.backends.triton import TritonBackend
from moert.cli.absent import absent_weights
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES
from moert.plan import STRATEGIES, Choice, Tile
from moert.steps.fixed_point.layout import STEP

H200 = KNOWN_DEVICES["sm_90"]
PLAIN = MoEConfig(128, 8, 2048, 768)
INT4 = replace(PLAIN, quant=Quant("int4", 128))
ODD = replace(PLAIN, hidden_size=528, intermediate_size=208)
CONFIGS = {
    "g128": INT4,
    "g128, odd, zero points": replace(ODD, quant=Quant("int4", 128, symmetric=False)),
    "a group a row": replace(ODD, quant=Quant("int4", -1)),
    "ungated": replace(ODD, gated=False, quant=Quant("int4", 256)),
    "narrow": replace(INT4, hidden_size=32, intermediate_size=16),
}


@pytest.mark.parametrize("arch", sorted(set(KNOWN_DEVICES) - {"sm_90"}))
def test_other_devices_are_refused(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    assert "compute capability 9.0" in str(refuses(INT4, facts))
    assert not list(choices(INT4, facts, "one_shot", 16.0))
    assert default(INT4, facts, "one_shot", 16.0) is None


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        (PLAIN, "int4 weights only"),
        (replace(PLAIN, quant=Quant("int4", 64)), "groups of multiples of 128"),
        (replace(INT4, dtype="float32"), "16-bit"),
        (replace(INT4, intermediate_size=196), "and I of 8"),
    ],
    ids=["16 bits", "g64", "float32", "narrow rows"],
)
def test_layers_that_are_refused(cfg: MoEConfig, reason: str) -> None:
    assert reason in str(refuses(cfg, H200))
    assert every_tile(cfg, H200) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tile_fits(name: str) -> None:
    """Shared memory, registers; programs go over all rows of the weights, steps over a whole row."""
    cfg = CONFIGS[name]
    found = every_tile(cfg, H200)
    assert len(found) == 2
    for tile in found:
        assert fits(cfg, H200, tile)
        for up in (True, False):
            rows, columns = (cfg.hidden_size, cfg.intermediate_size)[:: 1 if up else -1]
            shape = fixed_shape(cfg, H200, tile, up=up)
            assert shape.bn == tile.bn and shape.bm == tile.bm
            assert shape.width * (1 + shape.paired) == tile.bn
            assert shape.piece_width * 4 == shape.width
            assert (shape.tiles - 1) * shape.width < columns <= shape.tiles * shape.width
            assert (shape.steps - 1) * STEP < rows <= shape.steps * STEP == shape.padded
            # columns of instructions, which take multiples of 8: two for each row
            assert 8 <= shape.fewest <= shape.fewer <= shape.bm
            assert shape.group >= STEP or shape.steps == 1
            assert sum(shape.registers) + 200 <= 65536 // 128
            assert shape.shared_bytes <= H200.shared_memory


@pytest.mark.parametrize(
    "change",
    [
        {"num_stages": 1},
        {"num_stages": 40},
        {"bk": 64},
        {"num_warps": 8},
        {"bm": 64},
        {"bn": 128},
        {"kernel": "specialised"},
    ],
    ids=str,
)
def test_other_tiles_are_refused(change: dict[str, int]) -> None:
    tile = every_tile(INT4, H200)[0]
    assert not fits(INT4, H200, replace(tile, **change))
    backend = TritonBackend(INT4, absent_weights(INT4), H200)
    choice = Choice("one_shot", replace(tile, **change), tile)
    assert change.get("kernel") or not backend.can_run(choice, 64)


@pytest.mark.parametrize(("tokens", "bm"), [(128, 16), (256, 32), (511, 32)])
def test_the_default_fills_half_a_block(tokens: int, bm: int) -> None:
    choice = default_choice(INT4, H200, tokens)
    assert choice.gate_up == choice.down == Tile(bm, 256, STEP, 4, 6, "fixed")
    assert choice in candidates(INT4, H200, tokens, STRATEGIES)


@pytest.mark.parametrize("tokens", [64, 512])
def test_few_and_many_rows_are_for_others(tokens: int) -> None:
    kernels = {tile.kernel for tile in default_choice(INT4, H200, tokens).tiles}
    assert "fixed" not in kernels
    timed = candidates(INT4, H200, tokens, STRATEGIES)
    assert [c for c in timed if c.gate_up is not None and c.gate_up.kernel == "fixed"]


@pytest.mark.parametrize(
    ("mean", "rows"), [(2.9, []), (3, [16]), (8, [16, 32]), (16, [32, 16]), (17, [32]), (49, [])]
)
def test_what_is_worth_timing(mean: float, rows: list[int]) -> None:
    found = choices(INT4, H200, "one_shot", mean)
    assert [choice.gate_up.bm for choice in found if choice.gate_up is not None] == rows


def test_scratch_is_as_large_as_the_larger_of_both_inputs() -> None:
    """x of 128 rows has 128 * 2048 numbers, h of 1024 rows 1024 * 768."""
    found = {field.name: field.shape for field in fixed_fields(INT4, 128)}
    assert found == {"planes": (2 * 1024 * 768,), "worth": (1024 * 6,)}


def test_launches_are_split_and_multiplied_in_turn() -> None:
    backend = TritonBackend(INT4, absent_weights(INT4), H200)
    names = backend.kernels(256, default_choice(INT4, H200, 256))
    assert list(names[-5:]) == [
        "split_x_kernel",
        "gate_up_specialised_fixed_kernel",
        "split_h_kernel",
        "down_specialised_fixed_kernel",
        "combine_kernel",
    ]
