"""`moert compile`: what the compilers say about kernels, and that what is wrong with one is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")
import triton
from compile_samples import (
    SMALL,
    sampled_sorts,
    sampled_specialised,
    sampled_streams,
    sampled_tiles,
    specialised_bytes,
    stream_bytes,
)

from moert.backends import triton_tiles
from moert.cli import compile
from moert.cli.compile import BUCKETS, collect
from moert.cli.compile_pool import Row, examine_all
from moert.cli.compile_report import Resources, problems, read_amdgcn, read_ptx
from moert.cli.compile_variants import (
    BESIDE,
    LAYOUTS,
    ROUTING,
    Layer,
    Variant,
    layouts_of,
    planned_launches,
)
from moert.cli.main import main
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES
from moert.plan import Choice, Tile

needs_compilers = pytest.mark.skipif(
    not triton.backends.backends.keys() >= {"amd", "nvidia"}, reason="no compilers"
)
GOOD = Resources(64, 0, 30, 0, 0, 0, 32768, 4, 8, 16)

AMDGCN = """
	global_load_dwordx2 v[0:1], v2, s[0:1]
	buffer_load_ushort v3, v4, s[4:7], 0 offen
	global_load_lds_dwordx4 v[8:9], off
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	ds_read_b128 v[4:7], v8
; Occupancy: 6
    .agpr_count:     4
    .private_segment_fixed_size: 12
    .sgpr_count:     40
    .sgpr_spill_count: 5
    .vgpr_count:     72
    .vgpr_spill_count: 3
"""
PTX = """
	ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
	ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd3, %rd4, p, 1, 1, 0, 0;
	wgmma.wait_group.sync.aligned 0;
"""
USAGE = "Function k:\n  REG:100 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0\n"


def test_amd_assembly() -> None:
    facts = KNOWN_DEVICES["gfx942"]
    found = read_amdgcn(AMDGCN, facts, num_warps=4, shared=16384)
    # 65536 bytes hold 4 workgroups of 4 waves on 4 SIMDs
    assert found == Resources(72, 4, 40, 3, 12, 0, 16384, 4, 1, 16)
    assert read_amdgcn(AMDGCN, facts, num_warps=4, shared=0).occupancy == 6
    # a CU of RDNA has two SIMDs
    assert read_amdgcn(AMDGCN, KNOWN_DEVICES["gfx1100"], num_warps=4, shared=32768).occupancy == 4


def test_nvidia_code() -> None:
    found = read_ptx(PTX, USAGE, KNOWN_DEVICES["sm_90"], num_warps=4, shared=0)
    # 104 registers of 128 threads: 4 blocks of 4 warps on 4 schedulers
    assert found == Resources(100, 0, 0, 2, 8, 0, 0, 4, 1, 16)
    large = read_ptx(PTX, USAGE, KNOWN_DEVICES["sm_90"], num_warps=4, shared=120_000)
    assert large.occupancy == 1
    narrow = read_ptx(
        PTX.replace("0x10,", "4,"), USAGE, KNOWN_DEVICES["sm_90"], num_warps=4, shared=0
    )
    assert narrow.widest_load == 8


def test_output_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Occupancy"):
        read_amdgcn("s_endpgm", KNOWN_DEVICES["gfx942"], num_warps=4, shared=0)
    with pytest.raises(ValueError, match="REG"):
        read_ptx(PTX, "", KNOWN_DEVICES["sm_90"], num_warps=4, shared=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"spills": 3}, "spills 3 registers"),
        ({"scratch": 12}, "12 bytes of scratch a lane"),
        ({"global_scratch": 256}, "256 bytes of device memory a launch"),
        ({"hidden": 3}, "3 hidden arguments, Triton adds 2"),
        ({"shared": 65536}, None),
        ({"shared": 65537}, "65537 bytes of shared memory, the device has 65536"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"widest_load": 8}, "no 16-byte load, the widest has 8"),
    ],
)
def test_problems(changes: dict[str, int], said: str | None) -> None:
    found, facts = replace(GOOD, **changes), KNOWN_DEVICES["gfx942"]
    wrong = problems(found, facts, needs_matrix=True, needs_wide=True)
    assert wrong == ([] if said is None else [said])
    if set(changes) & {"matrix", "widest_load"}:
        assert problems(found, facts, needs_matrix=False, needs_wide=False) == []


def test_every_layout_once() -> None:
    assert [layer.layout for layer in layouts_of(SMALL, LAYOUTS)] == [
        "plain",
        "plain",
        "interleaved",
        "transposed",
    ]
    assert [layer.cfg.bias for layer in layouts_of(SMALL, LAYOUTS)] == [False, True, False, False]
    ungated = replace(SMALL, gated=False)
    assert [layer.layout for layer in layouts_of(ungated, ["interleaved", "plain"])] == ["plain"]
    biased = replace(SMALL, bias=True)
    assert layouts_of(biased, ["plain", "bias"]) == [Layer(biased)]


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_what_is_collected(arch: str) -> None:
    """Every kernel of every default plan, both alignments, each specialisation once."""
    found = collect(layouts_of(SMALL, LAYOUTS), [arch], BUCKETS, False)
    assert {variant.arch for variant in found} == {arch}
    backend = Layer(SMALL).backend(arch)
    choices = {backend.default_choice(tokens) for tokens in BUCKETS}
    kernels = {
        launch.name
        for tokens in BUCKETS
        for aligned in (True, False)
        for launch in planned_launches(backend, tokens, backend.default_choice(tokens), aligned)
    }
    facts = KNOWN_DEVICES[arch]
    beside = BESIDE if facts.kind == "hip" and facts.warp_size == 64 else ()
    assert {variant.kernel for variant in found} == {*kernels, ROUTING, *beside}
    assert choices <= {variant.choice for variant in found}
    gate_ups = [v for v in found if v.kernel.startswith("gate_up") and v.layer == Layer(SMALL)]
    assert {v.aligned for v in gate_ups} == {True, False}
    assert {v.layer.layout for v in found} == {"plain", "interleaved", "transposed"}
    assert len([v for v in found if v.kernel == ROUTING]) == 6  # 3 dtypes, 2 tiles
    default, everything = (
        {(v.kernel, v.tile, v.aligned) for v in collect([Layer(SMALL)], [arch], (1, 64), wide)}
        for wide in (False, True)
    )
    assert default < everything


def test_shipped_plans_are_collected() -> None:
    cfg = MoEConfig(128, 8, 2048, 768)
    shipped = {v.choice for v in collect([Layer(cfg)], ["sm_90"], (64,), False)}
    default = Layer(cfg).backend("sm_90").default_choice(64)
    assert default in shipped
    assert shipped - {default, None}


def compiled(*variants: Variant) -> dict[Variant, Row]:
    return {row.variant: row for row in examine_all(variants, 2)}


def planted(arch: str, kernel: str, index: int, tile: Tile, strategy: str) -> Variant:
    return Variant(arch, Layer(SMALL), 2048, Choice(strategy, tile, tile), index, True, kernel)


@needs_compilers
def test_bad_kernels_are_reported() -> None:
    """One that spills, one that needs too much shared memory, one that the compiler refuses."""
    spilling = planted("gfx1151", "gate_up_direct_kernel", 0, Tile(1, 32, 128, 2, 4), "none")
    gate_up = "gate_up_grouped_kernel"
    large = planted("gfx942", gate_up, 3, Tile(64, 128, 128, 8, 2), "multi_phase")
    wrong = planted("sm_90", gate_up, 3, Tile(16, 24, 32, 4, 2), "multi_phase")
    tall = planted("sm_80", gate_up, 3, Tile(128, 128, 64, 8, 3), "multi_phase")
    found = compiled(spilling, large, wrong, tall)
    assert any("spills" in text for text in found[tall].problems)
    assert any("spills" in text for text in found[spilling].problems)
    assert any("scratch" in text for text in found[spilling].problems)
    assert found[large].resources is not None
    assert found[large].problems == (
        f"{found[large].resources.shared} bytes of shared memory, the device has 65536",
    )
    assert found[wrong].resources is None
    assert "does not compile" in found[wrong].problems[0]


@needs_compilers
def test_command_finds_a_planted_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Choice("none", Tile(1, 32, 128, 2, 4), Tile(1, 8, 128, 2, 4))
    monkeypatch.setattr(triton_tiles, "default_choice", lambda cfg, facts, tokens: bad)
    words = ["--target", "gfx1151", "--shape", "32,4,2048,768", "--layout", "plain"]
    assert main(["compile", *words, "--tokens", "1", "--defaults-only"]) == 1
    out = capsys.readouterr().out
    head, *table = out.splitlines()
    assert head.split()[:3] == ["target", "kernel", "tile"]
    spilling = [line for line in table if "1x32x128/w2s4" in line and "spills" in line]
    assert spilling and all("gate_up_direct_kernel" in line for line in spilling)
    assert "1 with problems" in out  # unaligned calls get another tile


@pytest.mark.parametrize(
    ("flags", "everything"), [([], True), (["--defaults-only"], False), (["--quick"], False)]
)
def test_whatever_a_plan_may_choose_unless_told_otherwise(
    flags: list[str], everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Variant] = []
    monkeypatch.setattr(compile, "compile_rows", lambda found, jobs: chosen.extend(found) or [])
    shape = [] if "--quick" in flags else ["--shape", "32,4,2048,768"]
    words = ["compile", "--target", "gfx942", *shape, "--tokens", "64", *flags]
    assert main(words) == 0
    layer = chosen[0].layer
    default = layer.backend("gfx942").default_choice(64)
    choices = {v.choice for v in chosen if v.layer == layer and v.choice is not None}
    assert choices > {default} if everything else choices == {default}


@needs_compilers
def test_what_tuning_may_choose_has_no_problem() -> None:
    samples = (sampled_tiles, sampled_sorts, sampled_streams)
    rows = compiled(
        *(v for arch in KNOWN_DEVICES for sample in samples for v in sample(arch)),
        *sampled_specialised(),
    )
    bad = {
        (v.arch, v.kernel, v.tile, v.aligned, v.layer.cfg): row.problems
        for v, row in rows.items()
        if row.problems
    }
    assert bad == {}
    ways = ("stream", "registers")
    streams = {v: row.resources for v, row in rows.items() if any(way in v.kernel for way in ways)}
    assert len(streams) >= 36
    for variant, found in streams.items():
        # never more than is planned with; nor much less, or choices would be refused that fit
        assert found is not None
        assert found.shared <= stream_bytes(variant) <= 1.5 * found.shared, variant
    specialised = {v: row.resources for v, row in rows.items() if "specialised" in v.kernel}
    assert len(specialised) >= 16
    for variant, found in specialised.items():
        assert found is not None
        assert found.shared <= specialised_bytes(variant) <= 1.2 * found.shared, variant
