"""Choices of the warp-specialised kernels: what is refused, what fits, what a tile compiles to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moert.backends import int4_tiles, stream_tiles, triton_tiles
from moert.backends.specialised_tiles import (
    choices,
    default,
    every_tile,
    readable,
    refuses,
    specialised_int4_shape,
    specialised_shape,
    tall_pairs,
)
from moert.backends.triton import TritonBackend
from moert.cli.absent import absent_weights
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES
from moert.plan import STRATEGIES, Choice, Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.specialised.tall_shape import TallShape
from moert.weights import ExpertWeights

H200 = KNOWN_DEVICES["sm_90"]
PLAIN = MoEConfig(128, 8, 2048, 768)
INT4 = replace(PLAIN, quant=Quant("int4", 128))
# two sizes that are multiples of 16 and of no block
ODD = replace(PLAIN, hidden_size=528, intermediate_size=208)
CONFIGS = {
    "16 bits": PLAIN,
    "16 bits, odd": replace(ODD, dtype="float16"),
    "ungated": replace(ODD, gated=False),
    "mixtral": MoEConfig(8, 2, 4096, 14336),
    "g128": INT4,
    "g128, odd": replace(ODD, quant=Quant("int4", 128)),
    "g32, zero points": replace(ODD, quant=Quant("int4", 32, symmetric=False)),
    "a group a row": replace(ODD, quant=Quant("int4", -1)),
    "ungated, int4": replace(ODD, gated=False, quant=Quant("int4", 64)),
    "narrow": replace(INT4, hidden_size=32, intermediate_size=16),
}
MEANS = (6.0, 16.0, 24.0, 64.0, 1000.0)


def tiles(cfg: MoEConfig) -> set[Tile]:
    found = every_tile(cfg, H200)
    assert len(found) == len(set(found))
    for mean in MEANS:
        for choice in choices(cfg, H200, "one_shot", mean):
            assert choice.gate_up == choice.down and choice.dependent
            assert choice.gate_up in found
    return set(found)


@pytest.mark.parametrize("arch", sorted(set(KNOWN_DEVICES) - {"sm_90"}))
def test_other_devices_are_refused(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    reason = refuses(INT4, facts)
    assert reason is not None and "compute capability 9.0" in reason
    assert not list(choices(INT4, facts, "one_shot", 64.0))
    assert default(INT4, facts, "one_shot", 64.0) is None


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        (replace(PLAIN, dtype="float32"), "16-bit"),
        (replace(PLAIN, intermediate_size=196), "and I of 8"),
        (replace(INT4, quant=Quant("int4", 96)), "groups of"),
    ],
    ids=["float32", "narrow rows", "g96"],
)
def test_layers_that_are_refused(cfg: MoEConfig, reason: str) -> None:
    assert reason in str(refuses(cfg, H200))
    assert not list(choices(cfg, H200, "one_shot", 64.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tile_fits(name: str) -> None:
    """Shared memory, whole instructions; programs go over all rows of the weights, steps over a whole row."""
    cfg = CONFIGS[name]
    assert refuses(cfg, H200) is None
    found = tiles(cfg)
    assert len(found) >= 2
    for tile in found:
        assert tile.kernel == "specialised" and tile.bk in (
            (64,) if cfg.quant is None else (64, 128)
        )
        for up in (True, False):
            rows, columns = (cfg.hidden_size, cfg.intermediate_size)[:: 1 if up else -1]
            if cfg.quant is None:
                shape = specialised_shape(cfg, H200, tile, up=up)
                width, steps = shape.width, shape.steps
                assert width * (1 + shape.paired) == tile.bn
                # every part of a block is a whole instruction, and a partition's rows of weights too
                assert shape.first in (64, 128) and shape.second in (0, 32)
                assert shape.first + shape.second == tile.bm
                assert isinstance(shape, TallShape) == (shape.second > 0)
                assert isinstance(shape, TallShape) or shape.part_rows % 64 == 0
                assert not isinstance(shape, TallShape) or shape.part_columns % 64 == 0
            else:
                int4 = specialised_int4_shape(cfg, H200, tile, up=up)
                shape, width, steps = int4, int4.width, int4.steps
                assert width * (1 + int4.paired) == tile.bn
                # columns of instructions: powers of two from 16 on, the last of which are live in any block
                assert int4.fewest <= int4.fewer <= int4.first <= int4.bm == tile.bm
                assert int4.first + int4.second == tile.bm and int4.second in (0, int4.first // 4)
                counts = (int4.first, int4.second, int4.fewer, int4.fewest)
                assert all(n == 0 or (n.bit_count() == 1 and n >= 16) for n in counts)
                # registers of three groups of four warps: the first partition has what the others leave
                assert int4.warps != 4 or sum(int4.registers) <= 3 * 168 - 168
                # a partition's row tiles go round its warps, a block's scales are of one or two groups
                assert int4.row_tiles % int4.warps == 0 and int4.parts in (1, 2)
                assert int4.parts * int4.group == 64 or int4.group >= 64
                assert int4.step_groups * int4.group == tile.bk or int4.group >= tile.bk
            assert (shape.tiles - 1) * width < columns <= shape.tiles * width
            assert (steps - 1) * tile.bk < rows <= steps * tile.bk
            assert shape.shared_bytes <= H200.shared_memory
            assert shape.programs == H200.compute_units


def test_tiles_for_crowds_leave_few_units_idle() -> None:
    """Narrow ones where few experts have few rows of weights, wide ones where there are enough."""
    deepseek = MoEConfig(256, 8, 7168, 256)
    widths = {
        (cfg.hidden_size, tokens, up.bm): (up.bn, down.bn)
        for cfg in (PLAIN, deepseek)
        for tokens in (64, 256)
        for up, down in tall_pairs(cfg, H200, tokens, 128)
    }
    assert widths == {
        (2048, 64, 128): (128, 128),
        (2048, 64, 64): (128, 128),
        (2048, 256, 128): (256, 256),
        (2048, 256, 64): (128, 256),
        (7168, 64, 128): (64, 256),
        (7168, 64, 64): (64, 256),
        (7168, 256, 128): (64, 256),
        (7168, 256, 64): (128, 256),
    }
    assert {up.bm for up, _ in tall_pairs(PLAIN, H200, 40, 64)} == {64}
    assert all(up == down for up, down in tall_pairs(INT4, H200, 64, 128))
    assert tall_pairs(PLAIN, KNOWN_DEVICES["gfx942"], 64, 128) == []


def test_blocks_that_experts_fill_come_first() -> None:
    """None of which an expert fills less than a quarter; the tallest of int4 in whole groups alone."""
    firsts = {
        mean: next(choices(INT4, H200, "one_shot", mean)).gate_up for mean in (8, 16, 32, 64, 500)
    }
    assert [tile.bm for tile in firsts.values() if tile] == [32, 32, 64, 80, 128]
    for mean in MEANS:
        for cfg in (PLAIN, INT4):
            for choice in choices(cfg, H200, "one_shot", mean):
                assert choice.gate_up is not None and choice.gate_up.bm <= 4 * mean
    even = [c.gate_up for c in choices(PLAIN, H200, "one_shot", 64.0) if c.gate_up]
    lower = [(128, 256), (128, 128), (64, 256)]
    assert [(tile.bm, tile.bn) for tile in even if tile.bm in (64, 128)] == lower
    assert not list(choices(INT4, H200, "one_shot", 5.0))
    assert not list(choices(PLAIN, H200, "one_shot", 15.0))
    tallest = {g: max(t.bm for t in tiles(replace(INT4, quant=Quant("int4", g)))) for g in (32, -1)}
    assert tallest == {32: 160, -1: 160} and max(tile.bm for tile in tiles(INT4)) == 160
    fine = tiles(replace(INT4, quant=Quant("int4", 32)))
    assert max(tile.bm for tile in fine if tile.bn == 256) == 80


def test_tall_blocks() -> None:
    """First, and the default, where they hold nearly every expert's rows and their first part does not."""
    for mean, blocks in ((32, {64, 128}), (64, {64, 128}), (128, {64, 128, 160})):
        found = [c.gate_up for c in choices(PLAIN, H200, "one_shot", mean) if c.gate_up]
        assert {tile.bm for tile in found} == blocks
        chosen = default(PLAIN, H200, "one_shot", mean)
        assert chosen is not None and chosen.gate_up == found[0]
        assert found[0].bm == {32: 64, 64: 128, 128: 160}[mean]
    assert {pair[0].bm for pair in tall_pairs(PLAIN, H200, 512, 128)} == {64, 128}
    backend = TritonBackend(PLAIN, absent_weights(PLAIN), H200)
    for bm, bn, fits in ((160, 256, True), (160, 128, True), (160, 64, False), (80, 256, False)):
        tile = Tile(bm, bn, 64, 4, 3, "specialised")
        assert backend.can_run(Choice("one_shot", tile, tile), 64) == fits


def test_tall_blocks_of_int4() -> None:
    """First where they hold nearly every expert's rows, elsewhere behind wider tiles, and for crowds none."""
    firsts = {32: 64, 45: 64, 64: 80, 80: 128, 100: 128, 128: 160, 1000: 128}
    for mean, first in firsts.items():
        found = [c.gate_up.bm for c in choices(INT4, H200, "one_shot", mean) if c.gate_up]
        tall = ({80} if 40 <= mean <= 80 else set()) | ({160} if mean >= 80 else set())
        assert found[0] == first and {bm for bm in found if bm.bit_count() > 1} == tall
        assert not tall or found[0] in tall or found[-1] in tall
    assert {pair[0].bm for pair in tall_pairs(INT4, H200, 512, 160)} == {64, 128}
    backend = TritonBackend(INT4, absent_weights(INT4), H200)
    for bm, bn, warps, fits in ((160, 128, 4, True), (160, 128, 8, False), (160, 256, 4, False)):
        tile = Tile(bm, bn, 128, warps, 3, "specialised")
        assert backend.can_run(Choice("one_shot", tile, tile), 64) == fits


@pytest.mark.parametrize(("cfg", "few", "many"), [(PLAIN, 256, 512), (INT4, 64, 512)])
def test_default_from_many_rows_on(cfg: MoEConfig, few: int, many: int) -> None:
    module = triton_tiles if cfg.quant is None else int4_tiles
    kernels = [module.default_choice(cfg, H200, tokens).gate_up.kernel for tokens in (few, many)]
    assert kernels[0] != "specialised" and kernels[1] == "specialised"
    for tokens in (few, many):
        default_choice = module.default_choice(cfg, H200, tokens)
        found = module.candidates(cfg, H200, tokens, STRATEGIES)
        assert found[0] == default_choice and len(found) == len(set(found))
        assert any(choice.gate_up.kernel == "tile" for choice in found)


def unreadable(cfg: MoEConfig) -> ExpertWeights:
    """int4 columns in another order, or transposed 16-bit weights."""
    if cfg.quant is None:
        return absent_weights(cfg, transposed=True)
    weights = absent_weights(cfg)
    assert isinstance(weights.w13, Int4Matrix)
    order = torch.empty(cfg.num_experts, cfg.hidden_size, dtype=torch.int32, device="meta")
    return replace(weights, w13=replace(weights.w13, permutation=order))


@pytest.mark.parametrize("cfg", [PLAIN, INT4, replace(INT4, num_experts=8)], ids=str)
def test_weights_that_cannot_be_copied_are_left_to_portable_kernels(cfg: MoEConfig) -> None:
    """Their default is as good as where there are no other kernels."""
    backend = TritonBackend(cfg, unreadable(cfg), H200)
    for tokens in (64, 512, 4096):
        default_choice = backend.default_choice(tokens)
        found = backend.candidates(tokens, STRATEGIES)
        assert found[0] == default_choice
        assert {tile.kernel for c in found for tile in (c.gate_up, c.down) if tile} == {"tile"}
        assert default_choice.strategy != "none" and default_choice.gate_up is not None
        mean = tokens * cfg.top_k / cfg.num_experts
        assert default_choice.gate_up.bm >= min(64, mean / 2)


def test_unaligned_calls_are_portable_on_the_same_arena() -> None:
    for cfg in (PLAIN, INT4):
        backend = TritonBackend(cfg, absent_weights(cfg), H200)
        for tile in tiles(cfg):
            choice = Choice("multi_phase", tile, tile, True)
            unaligned = backend.unaligned(choice)
            assert unaligned.gate_up is not None and unaligned.gate_up.kernel == "tile"
            # blocks of tall tiles are of no power of two
            assert unaligned.gate_up.bm == {160: 128, 80: 64}.get(tile.bm, tile.bm)
            fields = {field.name: field for field in backend.fields(4096, choice)}
            needed = backend.fields(4096, unaligned)
            assert [field.name for field in needed] == list(fields)
            for field in needed:
                whole = fields[field.name]
                assert field.dtype == whole.dtype
                larger = zip(field.shape, whole.shape, strict=True)
                assert all(size <= most for size, most in larger)
                assert unaligned.gate_up.bm != tile.bm or field == whole


def test_weights_beyond_32_bit_offsets_are_left_to_others() -> None:
    """Rows of an expert may be far apart: experts first in the shape, not in memory."""
    cfg = MoEConfig(256, 8, 7168, 2048)
    w13 = torch.empty(2 * 2048, 256, 7168, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    near = absent_weights(cfg)
    far = replace(near, w13=w13)
    assert stream_tiles.readable(far) and readable(near) and not readable(far)
    backend = TritonBackend(cfg, far, H200)
    found = [backend.default_choice(4096), *backend.candidates(4096, STRATEGIES)]
    assert "specialised" not in {tile.kernel for c in found for tile in (c.gate_up, c.down) if tile}


def test_a_plan_for_other_weights_runs_portable_kernels() -> None:
    """Layers that share have one plan; what one of them cannot copy it reads otherwise, on the same arena."""
    for cfg in (PLAIN, INT4):
        near = TritonBackend(cfg, absent_weights(cfg), H200)
        far = TritonBackend(cfg, unreadable(cfg), H200)
        for tokens in (1, 64, 4096):
            for choice in near.candidates(tokens, STRATEGIES):
                tiles = {tile.kernel for tile in (choice.gate_up, choice.down) if tile}
                assert near.can_run(choice, 64) and far.can_run(choice, 64) == (tiles == {"tile"})
                names = far.kernels(tokens, choice)
                assert not [n for n in names if "stream" in n or "specialised" in n]
                assert far.fields(tokens, choice) == near.fields(tokens, choice)


@pytest.mark.parametrize(
    "change",
    [
        {"bk": 256},
        {"num_warps": 16},
        {"bm": 16},
        {"bn": 512},
        {"num_stages": 40},
        {"num_stages": 1},
    ],
    ids=str,
)
def test_tiles_that_no_kernel_is_written_for(change: dict[str, int]) -> None:
    """A record that somebody wrote by hand."""
    for cfg in (PLAIN, INT4):
        backend = TritonBackend(cfg, absent_weights(cfg), H200)
        for tile in tiles(cfg):
            assert backend.can_run(Choice("one_shot", tile, tile), 64)
            other = replace(tile, **change)
            assert not backend.can_run(Choice("one_shot", tile, other), 64)


def test_records_of_the_kernels_with_one_multiplying_partition() -> None:
    """It had eight warps, with 16-bit weights: users' caches may hold such tiles."""
    old = replace(every_tile(PLAIN, H200)[0], num_warps=8)
    backend = TritonBackend(PLAIN, absent_weights(PLAIN), H200)
    assert not backend.can_run(Choice("one_shot", old, old), 64)
