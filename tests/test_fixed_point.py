"""Rows as fixed-point numbers: the reference against what it is for, the kernels against the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from fixed_point_cases import checked_splits, rows

from moert.device import KNOWN_DEVICES
from moert.steps.fixed_point.layout import STEP, padded_columns
from moert.steps.fixed_point.reference import join, split

COMPILE = """
import json, torch
from triton.backends.compiler import GPUTarget
from moert.arena import absent_views
from moert.backends.fixed_launches import fixed_fields
from moert.device import KNOWN_DEVICES
from moert.launch import compile_launch
from fixed_point_cases import CFG, splits
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


@pytest.mark.parametrize("columns", [16, 127, 128, 200, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_half_of_a_unit(columns: int, dtype: torch.dtype) -> None:
    x = rows(5, columns, dtype)
    planes, worth, sums = split(x)
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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("live", [None, 2])
def test_kernels(symmetric: bool, live: int | None) -> None:
    assert checked_splits(symmetric, live) == ["split_x_kernel", "split_h_kernel"]


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
