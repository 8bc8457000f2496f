"""Launches of the int4 kernels and of streams: grids, arguments, what they are compiled for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moert.arena import absent_views
from moert.backends.int4_launches import widening
from moert.backends.triton import TritonBackend
from moert.cli.absent import absent_weights
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES, device_facts
from moert.launch import Launch
from moert.plan import Choice, Tile
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.sorting.layout import max_blocks
from moert.weights import ExpertWeights

CPU = device_facts(torch.device("cpu"))
# 21 tiles of 8 gate and 8 up rows, 33 tiles of 16 rows
CFG = MoEConfig(8, 2, 528, 168, quant=Quant("int4", 64, symmetric=False))
STREAM = Tile(8, 64, 64, 8, 3, "stream", 2, 2)


def launches(
    cfg: MoEConfig, choice: Choice, weights: ExpertWeights | None = None
) -> dict[str, Launch]:
    """The GEMMs of 5 rows, by "up" and "down"."""
    weights = absent_weights(cfg) if weights is None else weights
    backend = TritonBackend(cfg, weights, KNOWN_DEVICES["sm_90"])
    found = backend.launches(5, choice, absent_views(backend.fields(5, choice)))
    gemms = [launch for launch in found if launch.name.startswith(("gate_up", "down"))]
    return dict(zip(("up", "down"), gemms, strict=True))


@pytest.mark.parametrize(
    ("dtype", "facts", "way"),
    [
        ("bfloat16", KNOWN_DEVICES["sm_90"], "asm"),
        ("float16", KNOWN_DEVICES["sm_80"], "asm"),
        ("float16", replace(KNOWN_DEVICES["sm_80"], arch="sm_75"), "magic"),
        ("float32", KNOWN_DEVICES["sm_90"], "integer"),
        ("bfloat16", KNOWN_DEVICES["gfx942"], "magic"),
        ("float16", KNOWN_DEVICES["gfx1151"], "magic"),
        ("float32", KNOWN_DEVICES["gfx1151"], "integer"),
        ("float16", CPU, "integer"),
    ],
    ids=str,
)
def test_how_codes_become_numbers(dtype: str, facts: object, way: str) -> None:
    assert widening(replace(CFG, dtype=dtype), facts) == way


def test_grids_of_portable_kernels() -> None:
    """Row tiles rounded up to whole programs; a token's experts are one program of the direct down GEMM."""
    up, down = Tile(1, 64, 64), Tile(1, 32, 32)
    direct = launches(CFG, Choice("none", up, down))
    assert direct["up"].grid(5) == (6 * 5 * 2, 1, 1)
    assert direct["down"].grid(5) == (17 * 5, 1, 1)
    grouped = launches(CFG, Choice("one_shot", replace(up, bm=16), replace(down, bm=16)))
    blocks = max_blocks(5, 2, 8, 16)
    assert grouped["up"].grid(5) == (blocks * 6, 1, 1)
    assert grouped["down"].grid(5) == (blocks * 17, 1, 1)


def test_grids_of_streams() -> None:
    """Twice 4 row tiles a program."""
    direct = launches(CFG, Choice("none", replace(STREAM, repeats=1), STREAM))
    assert direct["up"].grid(5) == (6 * 5 * 2, 1, 1)
    assert direct["down"].grid(5) == (5 * 5, 1, 1)
    grouped = launches(CFG, Choice("one_shot", STREAM, STREAM))
    blocks = max_blocks(5, 2, 8, 8)
    assert grouped["up"].grid(5) == (blocks * 3, 1, 1)
    assert grouped["down"].grid(5) == (blocks * 5, 1, 1)


@pytest.mark.parametrize("kernel", ["tile", "stream"])
def test_absent_tensors_are_left_out(kernel: str) -> None:
    tile = replace(STREAM, kernel=kernel)
    choice = Choice("one_shot", tile, tile)
    with_zeros = launches(CFG, choice)
    without = launches(replace(CFG, quant=Quant("int4", 64)), choice)
    for name in ("up", "down"):
        assert isinstance(with_zeros[name].args["zeros_ptr"], torch.Tensor)
        assert without[name].args["zeros_ptr"] is None
    assert with_zeros["up"].args["b13_ptr"] is with_zeros["down"].args["b2_ptr"] is None
    biased = launches(replace(CFG, bias=True), choice)
    assert biased["up"].args["b13_ptr"] is not None and biased["down"].args["b2_ptr"] is not None


def test_steps_in_blocks_and_words() -> None:
    for width, blocks, words in ((128, 2, 4), (64, 1, 4), (32, 1, 2), (16, 1, 1)):
        tile = Tile(1, 32, width)
        constants = launches(CFG, Choice("none", tile, tile))["up"].constants
        assert (constants["TILES"], constants["BLOCKS"], constants["WORDS"]) == (2, blocks, words)
    rows = replace(CFG, quant=Quant("int4", -1))
    found = launches(rows, Choice("none", tile, tile))
    assert [found[name].constants["GROUP"] for name in ("up", "down")] == [576, 192]


def test_columns_in_another_order_are_gathered() -> None:
    weights = absent_weights(CFG)
    assert isinstance(weights.w13, Int4Matrix)
    order = torch.empty(8, 528, dtype=torch.int32, device="meta")
    ordered = replace(weights, w13=replace(weights.w13, permutation=order))
    tile = Tile(1, 32, 64)
    choice = Choice("none", tile, tile)
    assert launches(CFG, choice, ordered)["up"].args["permutation_ptr"] is order
    assert launches(CFG, choice)["up"].args["permutation_ptr"] is None


def test_streams_are_compiled_for_strides() -> None:
    """16-bit weights lie anywhere; their shape says where, and what alternates."""
    cfg = replace(CFG, quant=None)
    weights = absent_weights(cfg, interleaved=True)
    found = launches(cfg, Choice("none", replace(STREAM, repeats=1), STREAM), weights)
    up, down = (found[name].constants["S"] for name in ("up", "down"))
    assert (up.w_e, up.w_n, down.w_e, down.w_n) == (336 * 528, 528, 528 * 168, 168)
    assert up.interleaved and not down.interleaved and not up.int4
    assert found["up"].num_warps == 8 and found["up"].num_stages == 1
