"""Choices of the streaming kernels: what is refused, what fits, what a tile compiles to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moert.backends import int4_tiles, triton_tiles
from moert.backends.stream_choices import direct_choices, grouped_choices
from moert.backends.stream_tiles import readable, refuses, stream_shape
from moert.backends.triton import TritonBackend
from moert.cli.absent import absent_weights
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES, DeviceFacts, device_facts
from moert.plan import STRATEGIES, Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.registers.shape import RegisterShape
from moert.steps.streaming.shape import StreamShape
from moert.weights import ExpertWeights

H200 = KNOWN_DEVICES["sm_90"]
INT4 = MoEConfig(128, 8, 2048, 768, quant=Quant("int4", 128))
# two sizes that are multiples of 16 and of no block
ODD = replace(INT4, hidden_size=528, intermediate_size=208)
CONFIGS = {
    "g128": INT4,
    "g128, odd": ODD,
    "g32, zero points": replace(ODD, quant=Quant("int4", 32, symmetric=False)),
    "g192": replace(ODD, quant=Quant("int4", 192)),
    "a group a row": replace(ODD, quant=Quant("int4", -1)),
    "gpt-oss": MoEConfig(128, 4, 2880, 2880, "swiglu_oai", quant=Quant("int4", 32)),
    "ungated": replace(ODD, gated=False),
    "narrow": replace(INT4, hidden_size=32, intermediate_size=16),
    "mixtral": MoEConfig(8, 2, 4096, 14336, quant=Quant("int4", 128)),
    "16 bits": replace(INT4, quant=None),
    "16 bits, odd": replace(ODD, quant=None, dtype="float16"),
}


def streams(cfg: MoEConfig, facts: DeviceFacts = H200) -> Iterator[tuple[Tile, bool, bool]]:
    """(tile, whether of the gate/up GEMM, whether direct) of every choice there is."""
    found = [c for tokens in (1, 8) for c in direct_choices(cfg, facts, tokens)]
    for strategy in ("one_shot", "multi_phase"):
        for tokens in (4, 64, 512):
            found += grouped_choices(cfg, facts, strategy, tokens)
    for choice in found:
        assert choice.gate_up is not None and choice.down is not None
        unsorted = choice.strategy == "none"
        yield choice.gate_up, True, unsorted and choice.gate_up.kernel != "gathered"
        yield choice.down, False, unsorted and choice.down.kernel != "gathered"


@pytest.mark.parametrize(
    ("changes", "arch", "said"),
    [
        ({}, "sm_90", None),
        ({}, "sm_80", None),
        ({}, "sm_100", None),
        ({}, "gfx942", "NVIDIA"),
        ({"dtype": "float16"}, "sm_90", None),
        ({"dtype": "float32"}, "sm_90", "16-bit activations"),
        ({"hidden_size": 2056}, "sm_90", "H has to be a multiple of 16"),
        ({"intermediate_size": 196}, "sm_90", "and I of 8"),
        ({"quant": None}, "sm_90", None),
        ({"quant": None, "intermediate_size": 196}, "sm_90", "and I of 8"),
        ({"quant": Quant("int4", 32)}, "sm_90", None),
        ({"quant": Quant("int4", 64, symmetric=False)}, "sm_90", None),
        ({"quant": Quant("int4", 96)}, "sm_90", "groups of 32"),
        ({"quant": Quant("int4", -1)}, "sm_90", None),
    ],
)
def test_refused(changes: dict[str, object], arch: str, said: str | None) -> None:
    cfg, facts = replace(INT4, **changes), KNOWN_DEVICES[arch]
    reason = refuses(cfg, facts)
    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)
    found = [*direct_choices(cfg, facts, 4), *grouped_choices(cfg, facts, "one_shot", 8)]
    assert bool(found) == (said is None)


def test_refused_where_there_is_no_gpu_or_an_old_one() -> None:
    assert refuses(INT4, device_facts(torch.device("cpu"))) is not None
    assert refuses(INT4, replace(H200, arch="sm_75")) is not None


def test_readable() -> None:
    """Rows at multiples of 16 bytes; int4 columns in their own order."""
    weights = absent_weights(INT4)
    assert readable(weights)
    assert isinstance(weights.w13, Int4Matrix)
    order = torch.empty(INT4.num_experts, INT4.hidden_size, dtype=torch.int32, device="meta")
    assert not readable(replace(weights, w13=replace(weights.w13, permutation=order)))
    plain = replace(ODD, quant=None)
    assert readable(absent_weights(plain))
    assert readable(absent_weights(plain, interleaved=True))
    assert not readable(absent_weights(plain, transposed=True))
    w13, w2 = torch.empty(4, 64, 32), torch.empty(4, 32, 32)
    assert readable(ExpertWeights(w13, w2))
    wide = torch.empty(4, 32, 36)[:, :, :32]
    assert not readable(ExpertWeights(w13, wide))
    assert readable(ExpertWeights(w13, torch.empty(4, 32, 40)[:, :, :32]))
    # the rows themselves, not only their distances
    shifted = torch.empty(4 * 32 * 32 + 1, dtype=torch.bfloat16)[1:].view(4, 32, 32)
    assert not readable(ExpertWeights(w13, shifted))
    packed = ExpertWeights.random(MoEConfig(2, 1, 64, 32, quant=Quant("int4", 32)))
    assert isinstance(packed.w2, Int4Matrix) and readable(packed)
    scales = torch.empty(packed.w2.scales.numel() + 1, dtype=torch.bfloat16)[1:]
    scales = scales.view(packed.w2.scales.shape)
    assert not readable(replace(packed, w2=replace(packed.w2, scales=scales)))


def test_only_readable_weights_are_streamed() -> None:
    """Candidates and the default; what is left is portable."""
    weights = absent_weights(INT4)
    assert isinstance(weights.w13, Int4Matrix)
    order = torch.empty(INT4.num_experts, INT4.hidden_size, dtype=torch.int32, device="meta")
    ordered = replace(weights, w13=replace(weights.w13, permutation=order))
    for given, expected in ((weights, True), (ordered, False)):
        backend = TritonBackend(INT4, given, H200)
        for tokens in (1, 8, 64, 8192):
            choices = [backend.default_choice(tokens), *backend.candidates(tokens, STRATEGIES)]
            kernels = {tile.kernel for c in choices for tile in (c.gate_up, c.down) if tile}
            assert "tile" in kernels
            assert ("stream" in kernels) == (expected and tokens < 8192)
            assert ("registers" in kernels) == (expected and tokens <= 8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_tile_fits(name: str, arch: str) -> None:
    """Shared memory, whole steps within groups, powers of two, no block beyond the row."""
    cfg, facts, count = CONFIGS[name], KNOWN_DEVICES[arch], 0
    for tile, up, direct in streams(cfg, facts):
        shape = stream_shape(cfg, tile, up=up, direct=direct)
        count += 1
        assert tile.kernel in ("stream", "gathered", "registers") and tile.bm in (8, 16)
        assert tile.kernel == "stream" or (tile.bm == 8 and direct == (tile.kernel == "registers"))
        assert shape.shared_bytes(direct) <= facts.shared_memory
        assert shape.warps == tile.num_warps <= 16
        for size in (shape.row_tiles, shape.blocks, shape.split, shape.row_warps, shape.bm):
            assert size & (size - 1) == 0 and size > 0, tile
        assert shape.row_tiles % shape.row_warps == 0
        assert shape.parts & (shape.parts - 1) == 0 and shape.parts <= (2 if shape.zeros else 4)
        if shape.groups > 1 and shape.int4:
            assert shape.group % shape.width == 0 or shape.parts * shape.group == shape.width
        assert shape.blocks == 1 or shape.width <= 2 * shape.reduction
    assert count >= 10


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_of_weights_is_read_once(name: str) -> None:
    """Iterations and parts go over the blocks of a row, of every slot; programs over all row tiles."""
    cfg = CONFIGS[name]
    for tile, up, direct in dict.fromkeys(streams(cfg)):
        shape = stream_shape(cfg, tile, up=up, direct=direct)
        blocks = list(read_blocks(shape))
        slots = range(max(1, shape.slots))
        expected = [
            (slot, turn, block)
            for slot in slots
            for turn in range(shape.repeats)
            for block in range(shape.row_blocks)
        ]
        assert sorted(blocks) == expected
        rows = shape.tiles * shape.row_tiles * shape.repeats
        assert rows >= shape.all_tiles > rows - shape.row_tiles * shape.repeats
        assert shape.staged >= shape.iterations
        assert shape.asked >= shape.iterations + shape.stages - 1
        if isinstance(shape, RegisterShape):
            assert shape.asked >= (shape.turns + 1) * shape.stages > shape.iterations


def read_blocks(shape: StreamShape) -> Iterator[tuple[int, int, int]]:
    """(slot, which of `repeats`, block of 64 columns), as `ask` and `ask_by_slot` have them."""
    for it in range(shape.iterations):
        for part in range(shape.split):
            slot = turn = 0
            if shape.slots:
                slot, step = divmod(it * shape.split + part, shape.steps)
            else:
                turn, step = divmod(it, shape.steps)
                step = step * shape.split + part
            for block in range(step * shape.blocks, (step + 1) * shape.blocks):
                if slot < max(1, shape.slots) and block < shape.row_blocks:
                    yield slot, turn, block


def test_what_a_tile_compiles_to() -> None:
    tile = Tile(8, 64, 128, 8, 3, "stream", 4, 2)
    shape = stream_shape(INT4, tile, up=True, direct=False)
    assert (shape.row_tiles, shape.row_warps, shape.split, shape.blocks) == (4, 2, 4, 2)
    assert (shape.reduction, shape.columns, shape.paired) == (2048, 768, True)
    assert (shape.all_tiles, shape.tiles, shape.row_blocks, shape.groups) == (96, 12, 32, 16)
    assert (shape.steps, shape.iterations) == (4, 8)  # 32 blocks, 2 for each of 4 parts; twice
    down = stream_shape(INT4, tile, up=False, direct=True)
    assert (down.reduction, down.columns, down.paired, down.slots) == (768, 2048, False, 8)
    assert (down.steps, down.iterations) == (6, 12)  # 12 blocks a slot; 8 slots over 4 parts
    assert down.all_tiles == 128
    rows = replace(INT4, quant=Quant("int4", -1, symmetric=False), hidden_size=2000)
    shape = stream_shape(rows, tile, up=True, direct=True)
    assert (shape.group, shape.groups, shape.parts, shape.zeros) == (2048, 1, 1, True)
    fine = stream_shape(
        replace(INT4, quant=Quant("int4", 32)), replace(tile, bk=64), up=True, direct=True
    )
    assert (fine.width, fine.parts) == (64, 2)
    plain = replace(INT4, quant=None)
    wide = stream_shape(plain, tile, up=True, direct=True, interleaved=True, strides=(7, 5))
    assert (wide.int4, wide.interleaved, wide.w_e, wide.w_n) == (False, True, 7, 5)
    assert wide.shared_bytes(False) > 2 * shape.shared_bytes(False)


def test_one_gemm_varies_at_a_time() -> None:
    for cfg in (INT4, replace(INT4, quant=None)):
        found = list(direct_choices(cfg, H200, 1))
        first, *others = (c for c in found if c.gate_up.kernel == "stream")
        assert all((c.gate_up == first.gate_up) != (c.down == first.down) for c in others)
        assert all(c.dependent for c in found)
        assert not any(c.dependent for c in direct_choices(cfg, KNOWN_DEVICES["sm_80"], 1))


@pytest.mark.parametrize("quant", [None, Quant("int4", 128)])
def test_an_experts_rows_are_gathered_where_the_instruction_has_columns_for_all_tokens(
    quant: Quant | None,
) -> None:
    cfg = replace(INT4, quant=quant)
    backend = TritonBackend(cfg, absent_weights(cfg), H200)
    for tokens, expected in ((1, False), (2, True), (8, True), (9, False)):
        found = [c for c in direct_choices(cfg, H200, tokens) if c.gate_up.kernel == "gathered"]
        assert bool(found) == expected
    gathered = next(c for c in direct_choices(cfg, H200, 8) if c.down.kernel == "gathered")
    assert backend.can_run(gathered, 8) and not backend.can_run(gathered, 9)
    # such a plan is not run: what runs in its place computes any number of tokens
    assert all("gathered" not in name for name in backend.kernels(9, gathered))
    kinds = {c.down.kernel for c in direct_choices(cfg, H200, 8) if c.gate_up.kernel == "gathered"}
    assert kinds == {"gathered", "stream"}


def test_rows_an_expert_decide_how_many_a_program_takes() -> None:
    def rows(cfg: MoEConfig, tokens: int) -> set[int]:
        """Most rows of an instruction."""
        found = grouped_choices(cfg, H200, "one_shot", tokens)
        return {c.gate_up.bm * c.gate_up.together for c in found if c.gate_up}

    assert [rows(INT4, tokens) for tokens in (8, 16, 64, 256)] == [
        {8},
        {8},
        {8, 16},
        {8, 16, 32},
    ]
    for tokens, blocks in ((16, {8}), (64, {8, 16})):
        found = list(grouped_choices(INT4, H200, "one_shot", tokens))
        assert {c.gate_up.bm for c in found if c.gate_up} == blocks
    plain = replace(INT4, quant=None)
    assert rows(plain, 8) == {8} and rows(plain, 64) >= {8, 16, 32}
    # as many as any routing can give an expert, where that is all tokens
    assert 16 in rows(plain, 16) and max(rows(plain, 16)) == 16


def test_streams_are_offered_where_experts_have_few_rows() -> None:
    def offered(cfg: MoEConfig, tokens: int) -> bool:
        tiles = int4_tiles if cfg.quant else triton_tiles
        found = tiles.candidates(cfg, H200, tokens, STRATEGIES)
        return any(c.gate_up is not None and c.gate_up.kernel == "stream" for c in found)

    assert [offered(INT4, tokens) for tokens in (1, 64, 2048)] == [True, True, False]
    plain = replace(INT4, quant=None)
    assert [offered(plain, tokens) for tokens in (1, 64, 2048)] == [True, True, False]


@pytest.mark.parametrize(
    ("cfg", "tokens", "first"),
    [
        (MoEConfig(8, 2, 4096, 14336, quant=Quant("int4", 128)), 8, "8x64x128/w4s4k2r1 stream"),
        (MoEConfig(128, 4, 2880, 2880, quant=Quant("int4", 32)), 8, "8x64x128/w4s4k2r1 stream"),
        (MoEConfig(128, 8, 2048, 768, quant=Quant("int4", 128)), 16, "8x128x128/w4s3k1r2 stream"),
    ],
    ids=["few experts", "few rows", "many"],
)
def test_down_begins_with_enough_programs(cfg: MoEConfig, tokens: int, first: str) -> None:
    found = list(grouped_choices(cfg, H200, "one_shot", tokens))
    downs = {str(choice.down) for choice in found}
    assert str(found[0].down) == first
    assert downs >= {"8x64x128/w4s4k2r1 stream", "8x128x128/w4s3k1r2 stream"}
