"""Streams through registers: what their inputs become, and what a tile of theirs compiles to."""

from __future__ import annotations

from dataclasses import replace

import gluon_on_cpu
import pytest
import torch

pytest.importorskip("triton")

from moert.backends.stream_choices import direct_choices
from moert.backends.stream_tiles import fits, stream_shape
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES
from moert.plan import Choice, Tile
from moert.steps.fixed_point.reference import split
from moert.steps.registers.numbers import stage_numbers
from moert.steps.registers.shape import RegisterShape

H200 = KNOWN_DEVICES["sm_90"]
INT4 = MoEConfig(128, 8, 2048, 768, quant=Quant("int4", 128))
FINE = MoEConfig(128, 4, 2880, 2880, quant=Quant("int4", 32))


def shape_of(
    cfg: MoEConfig, bk: int, split: int, up: bool = True, stages: int = 3
) -> RegisterShape:
    tile = Tile(8, 32, bk, split, stages, "registers", split)
    shape = stream_shape(cfg, tile, up=up, direct=True)
    assert isinstance(shape, RegisterShape)
    return shape


def staged(x: torch.Tensor, shape: RegisterShape) -> list[torch.Tensor]:
    """[staged, split, width] as `stage_numbers` puts it into shared memory."""
    x = x.view(shape.staged, shape.split, shape.width)
    parts = gluon_on_cpu.bound(stage_numbers)(gluon_on_cpu.Value(x), shape)
    return [part.data for part in parts]


@pytest.mark.parametrize(
    ("group", "bk", "sub"), [(128, 128, 1), (128, 256, 1), (32, 128, 4), (64, 128, 2), (32, 64, 2)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_those_of_the_reference(
    group: int, bk: int, sub: int, dtype: torch.dtype
) -> None:
    """The same bytes, units and sums; words lie as lanes read them."""
    cfg = replace(INT4, hidden_size=1024, quant=Quant("int4", group))
    shape = shape_of(cfg, bk, 2)
    assert (shape.sub, shape.span) == (sub, min(128, bk))
    rows = shape.staged * shape.split * shape.width // shape.span
    x = torch.randn(rows, shape.span).mul_(torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    x[1] = 0
    planes, worth, _ = split(x)
    words, worths, sums = staged(x, shape)
    count = (shape.staged, shape.split, shape.spans)
    planes = planes[:, :, : shape.span].reshape(*count, 2, shape.span // 64, 4, 4, 4)
    # step, part, piece, plane, block, chunk, quarter, bytes -> .., block, plane, quarter, chunk, bytes
    expected = planes.permute(0, 1, 2, 4, 3, 6, 5, 7).contiguous().view(torch.int32)[..., 0]
    torch.testing.assert_close(words, expected.reshape(words.shape), rtol=0, atol=0)
    by_part = worth.view(count).permute(0, 2, 1).reshape(worths.shape)
    # of zeros alone a unit may be worth any number
    some = (x != 0).any(-1).view(count).permute(0, 2, 1).reshape(worths.shape)
    assert worths.isfinite().all() and not some.all()
    torch.testing.assert_close(worths[some], by_part[some], rtol=0, atol=0)
    groups = (x.float() / worth).round().view(*count, sub, -1).sum(4)
    torch.testing.assert_close(sums, groups.permute(0, 2, 3, 1).reshape(sums.shape), rtol=0, atol=0)


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_makes_its_span_none(strange: float) -> None:
    shape = shape_of(replace(INT4, hidden_size=1024), 128, 2)
    x = torch.randn(shape.staged * shape.split, shape.span, dtype=torch.bfloat16)
    x[3, 17] = strange
    _, worths, _ = staged(x, shape)
    assert worths.isnan().nonzero().tolist() == [[1, 1]]


def test_what_a_tile_compiles_to() -> None:
    shape = shape_of(INT4, 256, 4)
    assert (shape.spans, shape.sub, shape.scaled) == (2, 1, 2)
    assert (shape.steps, shape.iterations, shape.turns) == (2, 2, 1)
    assert shape.held_words == 3 * 2 * 4 * 4  # stages, row tiles, blocks of 64 columns, words
    assert shape.staged_inputs == 2048 // (32 * 4)
    fine = shape_of(FINE, 128, 4)
    assert (fine.spans, fine.sub, fine.scaled, fine.parts) == (1, 4, 1, 4)
    assert (fine.iterations, fine.staged, fine.turns) == (6, 8, 2)
    down = shape_of(FINE, 128, 8, up=False)
    assert (down.steps, down.iterations) == (23, 12)  # of a slot; of four, in eight parts
    assert down.asked == 16
    # a group longer than a step: its scale once for each step
    row = shape_of(replace(INT4, quant=Quant("int4", -1)), 128, 4)
    assert (row.sub, row.scaled, row.parts) == (1, 1, 1)


def test_shared_memory_and_registers_decide_what_fits() -> None:
    def fitting(cfg: MoEConfig, up: bool, **changes: int) -> bool:
        tile = replace(Tile(8, 32, 128, 8, 4, "registers", 8), **changes)
        return fits(cfg, H200, tile, up=up, direct=True)

    assert fitting(INT4, True) and fitting(INT4, False)
    assert not fitting(INT4, True, num_stages=8)
    # a lane would make numbers of 128 inputs; of twice as many warps it has half of them
    wide = MoEConfig(8, 2, 4096, 14336, quant=Quant("int4", 128))
    assert not fitting(wide, False) and fitting(wide, True)
    assert fitting(wide, False, num_warps=16, split=16)


@pytest.mark.parametrize("cfg", [INT4, FINE, replace(INT4, quant=Quant("int4", 64, False))])
def test_choices(cfg: MoEConfig) -> None:
    """Both GEMMs through registers, or neither, every pair of them; int4 alone; after no sort."""
    found = list(direct_choices(cfg, H200, 4))
    held = [c for c in found if c.gate_up and c.gate_up.kernel == "registers"]
    ups, downs = {c.gate_up for c in held}, {c.down for c in held}
    assert len(held) == len(set(held)) == len(ups) * len(downs) > 8
    kernels = {(c.gate_up.kernel, c.down.kernel) for c in found if c.gate_up and c.down}
    assert ("registers", "registers") in kernels
    assert all((up == "registers") == (down == "registers") for up, down in kernels)
    assert found[0].gate_up is not None and found[0].gate_up.kernel == "registers"
    plain = direct_choices(replace(cfg, quant=None), H200, 4)
    assert all(tile.kernel != "registers" for c in plain for tile in c.tiles)
    with pytest.raises(ValueError, match="follow no sort"):
        Choice.from_json({**found[0].to_json(), "strategy": "one_shot"})
