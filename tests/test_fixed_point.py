"""Rows as fixed-point numbers: the reference against what it is for, the kernels against the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from moert import MoEConfig, Quant
from moert.arena import Arena, absent_views, layout
from moert.backends.fixed_launches import fixed_fields
from moert.backends.fixed_tiles import every_tile
from moert.backends.triton import TritonBackend
from moert.call import Call, call_key
from moert.cli.absent import absent_weights
from moert.device import KNOWN_DEVICES
from moert.launch import Launch, run_interpreted
from moert.plan import Choice
from moert.steps.fixed_point.layout import STEP, padded_columns
from moert.steps.fixed_point.reference import join, split
from moert.topk import TopK

COMPILE = """
import json, torch
from triton.backends.compiler import GPUTarget
from moert.arena import absent_views
from moert.backends.fixed_launches import fixed_fields
from moert.device import KNOWN_DEVICES
from moert.launch import compile_launch
from test_fixed_point import CFG, splits
compiled, views = {}, absent_views(fixed_fields(CFG, 4))
for arch, facts in sorted(KNOWN_DEVICES.items()):
    name = arch if facts.kind == "hip" else facts.compute_capability
    target = GPUTarget(facts.kind, name, facts.warp_size)
    compiled[arch] = [
        launch.name
        for launch in splits(CFG, 4, views)
        if compile_launch(launch, torch.bfloat16, target=target).asm
    ]
print(json.dumps(compiled))
"""
H200 = KNOWN_DEVICES["sm_90"]
CFG = MoEConfig(4, 3, 1168, 144, dtype="float16", quant=Quant("int4", 128))
CPU = torch.device("cpu")


def rows(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal, of all magnitudes; a group of zeros, one of a single large entry."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(count, columns, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, (count, 1), generator=generator))
    x[0, : min(STEP, columns)] = 0.0
    x[1, 3] = 300.0
    return x.to(dtype)


@pytest.mark.parametrize("columns", [16, 127, 128, 200, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_half_of_a_unit(columns: int, dtype: torch.dtype) -> None:
    x = rows(5, columns, dtype)
    planes, worth, sums = split(
        x,
    )
    padded = padded_columns(columns)
    assert planes.shape == (5, 2, padded) and worth.shape == sums.shape == (5, padded // STEP)
    again = join(planes, worth)
    assert (again[:, columns:] == 0).all()
    wide = torch.zeros(5, padded)
    wide[:, :columns] = x.float()
    error = (again - wide).abs().view(5, -1, STEP)
    assert (error <= 0.5 * worth[:, :, None]).all()
    largest = wide.abs().view(5, -1, STEP).amax(2)
    assert (worth <= 2.0**-13 * largest + (largest == 0)).all()
    torch.testing.assert_close(sums, again.view(5, -1, STEP).sum(2), rtol=1e-5, atol=1e-6)


def test_places_are_those_of_int4_codes() -> None:
    """Place 4 c + i of 16 holds column 8 (i % 2) + 2 c + i // 2."""
    x = torch.arange(1, STEP + 1, dtype=torch.float16).view(1, -1)
    planes, worth, _ = split(x)
    numbers = (planes[0, 0].int() * 128 + planes[0, 1].int()) * worth[0, 0]
    for place in range(STEP):
        c, i = place % 16 // 4, place % 4
        assert numbers[place] == x[0, place // 16 * 16 + 8 * (i % 2) + 2 * c + i // 2]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_spoils_its_group_alone(odd: float) -> None:
    x = torch.ones(2, 2 * STEP, dtype=torch.bfloat16)
    x[0, 7] = odd
    _, worth, _ = split(x)
    assert worth[0].isnan().tolist() == [True, False] and not worth[1].isnan().any()


def splits(cfg: MoEConfig, tokens: int, views: dict[str, torch.Tensor]) -> tuple[Launch, Launch]:
    """The launches that split x and h."""
    backend = TritonBackend(cfg, absent_weights(cfg), H200)
    tile = every_tile(cfg, H200)[0]
    choice = Choice("one_shot", tile, tile)
    rest = absent_views(f for f in backend.fields(tokens, choice) if f.name not in views)
    launches = backend.launches(tokens, choice, {**rest, **views})
    x, h = (launch for launch in launches if launch.name.startswith("split"))
    return x, h


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("live", [None, 2])
def test_kernels(symmetric: bool, live: int | None) -> None:
    """What they write is the reference's, for rows that are alive; nothing else is written."""
    assert CFG.quant is not None
    cfg = replace(CFG, quant=replace(CFG.quant, symmetric=symmetric))
    tokens, alive = 3, 3 if live is None else live
    fields = fixed_fields(cfg, tokens)
    assert len(fields) == (2 if symmetric else 3)
    storage = rows(tokens, cfg.hidden_size + 8, torch.float16)
    x = storage[:, : cfg.hidden_size]
    x[1, 200] = float("nan")
    h = rows(tokens * cfg.top_k, cfg.intermediate_size, torch.float16)
    topk = TopK(torch.zeros(tokens, 3), torch.zeros(tokens, 3, dtype=torch.int32))
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32), 1)
    count = None if live is None else torch.tensor(live, dtype=torch.int32)
    call.set(call_key(x, topk, torch.empty_like(x), count, "keep"), x, topk, x, count)
    call.tokens = tokens
    for step, given, written in ((0, x, alive), (1, h, alive * cfg.top_k)):
        arena = Arena(CPU, layout(fields)[1])
        arena.poison()
        views = arena.views(fields)
        launch = splits(cfg, tokens, {"h": h, **views})[step]
        run_interpreted([launch], call.interpreter_values(), tokens)
        planes, worth, sums = split(given)
        for name, expected in (("planes", planes), ("worth", worth), ("sums", sums)):
            if name in views:
                flat = views[name].view(torch.uint8)
                assert (flat[expected[:written].nbytes :] == 0xFF).all()
        found = views["planes"][: planes.numel()].view(planes.shape)[:written]
        units = views["worth"][: worth.numel()].view(worth.shape)[:written]
        assert torch.equal(units.isnan(), worth[:written].isnan())
        # the unit of a group of zeros may be any
        torch.testing.assert_close(
            join(found, units), join(planes, worth)[:written], rtol=0, atol=0, equal_nan=True
        )
        if not symmetric:
            known = views["sums"][: sums.numel()].view(sums.shape)[:written][~units.isnan()]
            torch.testing.assert_close(known, sums[:written][~units.isnan()])


def test_every_device_compiles_them() -> None:
    """Without the interpreter, which cannot be left again in a process that has begun with it."""
    if "amd" not in triton.backends.backends:
        pytest.skip("no compiler")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert compiled == {
        arch: ["split_x_kernel", "split_h_kernel"] for arch in sorted(KNOWN_DEVICES)
    }
