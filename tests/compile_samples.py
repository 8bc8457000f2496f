"""Kernels that plans may name, a few of each kind, to be compiled for every known device."""

from __future__ import annotations

import random
from dataclasses import replace

from moert.backends import fixed_tiles, int4_tiles, specialised_tiles, triton_tiles
from moert.backends.stream_choices import direct_choices, grouped_choices
from moert.backends.stream_tiles import stream_shape
from moert.cli.compile_variants import Layer, Variant, planned_launches
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES, DeviceFacts
from moert.plan import STRATEGIES, Choice, Tile

SMALL = MoEConfig(32, 4, 2048, 768)
SAMPLED = (
    MoEConfig(64, 6, 1000, 500),
    MoEConfig(64, 4, 7168, 256, dtype="float16", bias=True),
    MoEConfig(64, 4, 2048, 512, dtype="float32"),
    MoEConfig(8, 2, 4096, 1024, gated=False),
    MoEConfig(60, 4, 2048, 1408, quant=Quant("int4", 128)),
)


def shared_bytes(tile: Tile, cfg: MoEConfig, facts: DeviceFacts) -> int:
    if cfg.quant is not None:
        return int4_tiles.shared_bytes(tile)
    return triton_tiles.shared_bytes(tile, cfg, facts)


def sampled_tiles(arch: str) -> list[Variant]:
    """Of several layers the candidate that needs most shared memory, or any other, grouped or direct."""
    rng, facts = random.Random(arch), KNOWN_DEVICES[arch]
    found = []
    for cfg in SAMPLED:
        choices = [
            choice
            for tokens in (1, 16, 256, 4096)
            for choice in Layer(cfg).backend(arch).candidates(tokens, STRATEGIES)
            if choice.strategy != "one_shot"
        ]
        grouped = [choice for choice in choices if choice.strategy == "multi_phase"]
        largest = max(grouped, key=lambda c: shared_bytes(c.gate_up, cfg, facts))
        choice = rng.choice((largest, rng.choice(choices)))
        tokens = 1 if choice.strategy == "none" else 4096
        aligned = rng.random() < 0.75
        launches = planned_launches(Layer(cfg).backend(arch), tokens, choice, aligned)
        found += [
            Variant(arch, Layer(cfg), tokens, choice, index, aligned, launch.name)
            for index, launch in enumerate(launches)
            if launch.name.startswith(("gate_up", "down"))
        ]
    return found


def sampled_sorts(arch: str) -> list[Variant]:
    """Where registers are scarcest: many rows at once, tall blocks, experts that are no power of two."""
    found = []
    for cfg, bm in ((SMALL, 128), (MoEConfig(60, 4, 2048, 1408), 32)):
        tile = Tile(bm, 64, 32, 4, 2)
        choice = Choice("one_shot", tile, tile, KNOWN_DEVICES[arch].dependent_launch)
        found.append(Variant(arch, Layer(cfg), 1024, choice, 0, True, "sort_one_shot_kernel"))
    return found


def sampled_streams(arch: str) -> list[Variant]:
    """The first choice of each kind, and the one that takes most rows together; of rows that are no whole
    steps."""
    found, facts = [], KNOWN_DEVICES[arch]
    base = MoEConfig(24, 3, 528, 200, dtype="float16")
    for cfg in (
        replace(base, quant=Quant("int4", 32, symmetric=False)),
        replace(base, quant=Quant("int4", 32)),
        replace(base, quant=Quant("int4", 128), gated=False, activation="relu2"),
        base,
    ):
        direct = list(direct_choices(cfg, facts, 8))
        grouped = sorted(grouped_choices(cfg, facts, "one_shot", 32), key=_together)
        # through registers where there are such, and through a ring
        first = {c.gate_up.kernel: c for c in reversed(direct) if c.gate_up is not None}
        for choice in (*first.values(), *grouped[:1], *grouped[-1:]):
            launches = planned_launches(Layer(cfg).backend(arch), 8, choice, True)
            found += [
                Variant(arch, Layer(cfg), 8, choice, index, True, launch.name)
                for index, launch in enumerate(launches)
                if "stream" in launch.name or "registers" in launch.name
            ]
    return found


def _together(choice: Choice) -> int:
    tiles = (choice.gate_up, choice.down)
    return sum(tile.together for tile in tiles if tile is not None)


def sampled_specialised() -> list[Variant]:
    """Every tile, for layers with what takes most registers: biases, zero points, ragged sizes."""
    found, facts = [], KNOWN_DEVICES["sm_90"]
    ragged = MoEConfig(24, 3, 528, 200, "swiglu_oai", bias=True)
    ungated = MoEConfig(24, 3, 528, 200, "relu2", gated=False, bias=True)
    for cfg in (
        ragged,
        replace(ragged, dtype="float16"),
        ungated,
        replace(ungated, quant=Quant("int4", 64)),
        replace(ragged, quant=Quant("int4", 32)),
        replace(ragged, quant=Quant("int4", -1, symmetric=False)),
        replace(ragged, dtype="float16", quant=Quant("int4", 128, symmetric=False)),
        replace(ragged, quant=Quant("int4", 32, symmetric=False)),
    ):
        tiles = [*specialised_tiles.every_tile(cfg, facts), *fixed_tiles.every_tile(cfg, facts)]
        for tile in tiles:
            choice = Choice("multi_phase", tile, tile, facts.dependent_launch)
            launches = planned_launches(Layer(cfg).backend("sm_90"), 4096, choice, True)
            found += [
                Variant("sm_90", Layer(cfg), 4096, choice, index, True, launch.name)
                for index, launch in enumerate(launches)
                if "specialised" in launch.name
            ]
    return found


def specialised_bytes(variant: Variant) -> int:
    """Shared memory that the shape of a warp-specialised kernel says."""
    cfg, facts, up = variant.layer.cfg, KNOWN_DEVICES["sm_90"], "gate_up" in variant.kernel
    assert variant.gemm_tile is not None
    if cfg.quant is None:
        return specialised_tiles.specialised_shape(
            cfg, facts, variant.gemm_tile, up=up
        ).shared_bytes
    if variant.gemm_tile.kernel == "fixed":
        return fixed_tiles.fixed_shape(cfg, facts, variant.gemm_tile, up=up).shared_bytes
    shape = specialised_tiles.specialised_int4_shape(cfg, facts, variant.gemm_tile, up=up)
    return shape.shared_bytes


def stream_bytes(variant: Variant) -> int:
    """Shared memory that the shape of a streaming kernel says."""
    up, direct = "gate_up" in variant.kernel, "direct" in variant.kernel
    assert variant.gemm_tile is not None
    shape = stream_shape(variant.layer.cfg, variant.gemm_tile, up=up, direct=direct)
    return shape.shared_bytes(direct)
