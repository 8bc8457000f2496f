"""Tiles for crowds: only where they can be taken, and what every known device can hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moert.arena import absent_views
from moert.backends import int4_tiles, triton_tiles
from moert.backends.crowded_tiles import LEAST_TOKENS, choices
from moert.backends.triton import TritonBackend
from moert.cli.absent import absent_weights
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES
from moert.plan import STRATEGIES, Choice, Tile
from moert.steps.sorting.layout import takes_crowded

QWEN = MoEConfig(128, 8, 2048, 768)
LAYERS = {
    "bfloat16": QWEN,
    "float32": replace(QWEN, dtype="float32"),
    "int4": replace(QWEN, quant=Quant("int4", 128)),
    "int4 with zero points": replace(QWEN, quant=Quant("int4", 32, symmetric=False)),
    "odd": MoEConfig(7, 3, 333, 77, bias=True),
}
TOKENS = (1, 8, 32, 33, 48, 64, 65, 100, 128, 250, 512, 4096)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_a_crowd_of_all_tokens_takes_them(arch: str, name: str) -> None:
    cfg, facts = LAYERS[name], KNOWN_DEVICES[arch]
    tiles = triton_tiles if cfg.quant is None else int4_tiles
    for tokens in TOKENS:
        for choice in tiles.candidates(cfg, facts, tokens, STRATEGIES):
            found = choices(cfg, facts, choice, tokens)
            assert len(found) == len(set(found)) <= 3
            if choice.strategy == "none" or tokens < LEAST_TOKENS:
                assert found == []
            for other in found:
                assert replace(other, crowded=None) == choice
                rows = tokens - tokens % other.crowded_bm if tokens > other.crowded_bm else tokens
                assert takes_crowded([rows] * cfg.top_k, other.reach, other.crowded_bm)
                assert Choice.from_json(other.to_json()) == other


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_specialised_where_the_device_has_them(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    for name in ("bfloat16", "int4"):
        cfg = LAYERS[name]
        backend = TritonBackend(cfg, absent_weights(cfg), facts)
        base = backend.candidates(64, ("one_shot",))[0]
        found = backend.crowded_choices(base, 256)
        kernels = {tile.kernel for choice in found for tile in choice.crowded or ()}
        assert kernels == {"specialised" if arch == "sm_90" else "tile"}
        unaligned = backend.unaligned(found[0])
        assert unaligned.crowded is None
        fields = {field.name: field for field in backend.fields(256, found[0])}
        assert fields["crowded_valid_ids"].shape == (2,)
        # what runs in its place finds its buffers, and room in them
        for field in backend.fields(256, unaligned):
            assert fields[field.name].shape[0] >= field.shape[0]
        for choice in found:
            (sort, *_) = backend.launches(256, choice, absent_views(backend.fields(256, choice)))
            sizes = {name: sort.constants[name] for name in ("BM", "CROWDED_BM", "REACH")}
            assert choice.gate_up is not None
            expected = (choice.gate_up.bm, choice.crowded_bm, choice.reach)
            assert tuple(sizes.values()) == expected
        names = backend.kernels(256, found[0])
        assert [name.split("_")[0] for name in names[-5:-1]] == ["gate", "down"] * 2


def test_weights_that_only_the_own_tiles_can_read() -> None:
    """Tiles for crowds are left out then, and the others serve all."""
    cfg, facts = LAYERS["bfloat16"], KNOWN_DEVICES["sm_90"]
    weights = absent_weights(cfg, transposed=True)
    own = Choice("one_shot", Tile(16, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4), True)
    (crowded, *_) = choices(cfg, facts, own, 256)
    backend = TritonBackend(cfg, weights, facts)
    assert backend.can_run(own, 256) and not backend.can_run(crowded, 256)
    assert backend.kernels(256, crowded) == backend.kernels(256, own)


def test_the_device_is_told_how_far_a_reading_reaches() -> None:
    """Blocks taken together count as one, which is where the two numbers differ."""
    cfg, facts = LAYERS["bfloat16"], KNOWN_DEVICES["sm_90"]
    together = [
        choice
        for choice in triton_tiles.candidates(cfg, facts, 64, ("one_shot",))
        if choice.gate_up is not None and choice.reach > choice.gate_up.bm
    ]
    backend = TritonBackend(cfg, absent_weights(cfg), facts)
    found = [other for choice in together for other in backend.crowded_choices(choice, 256)]
    assert found
    for choice in found:
        (sort, *_) = backend.launches(256, choice, absent_views(backend.fields(256, choice)))
        assert sort.constants["REACH"] == choice.reach > sort.constants["BM"]


def test_no_tile_that_fits_no_tile_for_crowds() -> None:
    small = replace(KNOWN_DEVICES["gfx1151"], shared_memory=4096)
    choice = triton_tiles.default_choice(QWEN, small, 256)
    assert choices(QWEN, small, choice, 256) == []
    assert choices(QWEN, KNOWN_DEVICES["sm_90"], Choice("one_shot"), 256) == []
