"""The GEMM kernels as machine code for devices that need not be present."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton

from moert.device import KNOWN_DEVICES

ARCHS = ("sm_90", "gfx90a", "gfx942", "gfx950", "gfx1151")
CASES = ("T=1", "T=16", "T=4096", "unaligned", "gpt-oss", "largest")
pytestmark = [
    pytest.mark.parametrize("arch", ARCHS),
    pytest.mark.skipif(
        not triton.backends.backends.keys() >= {"amd", "nvidia"}, reason="no compilers"
    ),
]


@cache
def kernels(arch: str) -> list[dict[str, Any]]:
    """What `cross_compile` says about every kernel."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("cross_compile.py")
    run = subprocess.run(
        [sys.executable, script, arch], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def test_everything_compiles(arch: str) -> None:
    found = kernels(arch)
    direct = {"gate_up_direct_kernel", "down_direct_kernel"}
    grouped = {"gate_up_grouped_kernel", "down_grouped_kernel", "combine_kernel"}
    for case in CASES:
        names = {kernel["kernel"] for kernel in found if kernel["case"] == case}
        assert names == (direct if case in ("T=1", "unaligned") else grouped), case


def test_shared_memory_fits(arch: str) -> None:
    for kernel in kernels(arch):
        assert kernel["shared"] <= KNOWN_DEVICES[arch].shared_memory, kernel


def test_no_scratch_and_no_spills(arch: str) -> None:
    """Scratch that the launcher would have to allocate breaks captures, spilled registers the speed."""
    for kernel in kernels(arch):
        assert kernel["global_scratch"] == 0, kernel
        if kernel["case"] != "largest":
            assert kernel["spills"] == kernel["scratch"] == 0, kernel


def test_grouped_kernels_use_matrix_units(arch: str) -> None:
    for kernel in kernels(arch):
        assert (kernel["matrix"] > 0) == ("grouped" in kernel["kernel"]), kernel


def test_weights_come_in_16_bytes(arch: str) -> None:
    """Also where nothing is known about the caller's addresses: the weights are ours."""
    for kernel in kernels(arch):
        if kernel["kernel"] != "combine_kernel":
            assert kernel["widest_load"] >= 16, kernel


def test_parameters_are_the_visible_ones_and_tritons_own(arch: str) -> None:
    """Graph nodes are updated by position, all of them: two hidden pointers to scratch come last."""
    for kernel in kernels(arch):
        assert kernel["parameters"] == kernel["visible"] + 2, kernel
