"""The compile gate as it runs for every change: all kernels, for devices that need not be present."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
from dataclasses import asdict
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import moert.steps  # noqa: E402
from moert.cli.compile import QUICK, QUICK_BUCKETS  # noqa: E402
from moert.cli.compile_variants import BESIDE  # noqa: E402
from moert.cli.main import main  # noqa: E402
from moert.device import KNOWN_DEVICES  # noqa: E402

ASKED_FOR = {
    *("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201"),
    *("sm_80", "sm_90", "sm_100"),
}
GEMMS = ("gate_up_direct", "down_direct", "gate_up_grouped", "down_grouped")
# kernels on matrix units
TWINS = ("stream", "registers", "specialised")  # of portable kernels, on NVIDIA
MULTIPLIED = ("grouped", *TWINS)
# what every device has to run
PORTABLE = {
    *("routing_fwd_kernel", "gate_up_direct_kernel", "down_direct_kernel"),
    *("sort_one_shot_few_kernel", "sort_count_kernel", "sort_scan_kernel", "sort_place_kernel"),
    *("gate_up_grouped_kernel", "down_grouped_kernel", "combine_kernel"),
    *("gate_up_direct_int4_kernel", "down_direct_int4_kernel"),
    *("gate_up_grouped_int4_kernel", "down_grouped_int4_kernel"),
}

# what precedes a plan's kernels in a whole block: test_block_kernels.py compiles it for every device; what no
# plan of the quick buckets sorts by: test_sorting_kernels.py does; nor gathers or multiplies by:
# test_compile.py; nor splits its inputs by: test_fixed_point.py
ELSEWHERE = {
    *("router_logits_kernel", "router_logits_tiled_kernel", "routed_slots_kernel"),
    *("sort_one_shot_kernel", "gate_up_gathered_stream_kernel", "down_gathered_stream_kernel"),
    *("gate_up_specialised_tall_kernel", "down_specialised_tall_kernel"),
    *("gate_up_specialised_fixed_kernel", "down_specialised_fixed_kernel"),
    *("split_x_kernel", "split_h_kernel"),
}


def kernels_of_the_package() -> set[str]:
    """Every kernel that `moert.steps` defines: functions that are launched are named so."""
    found = set()
    for module in pkgutil.walk_packages(moert.steps.__path__, "moert.steps."):
        names = vars(importlib.import_module(module.name))
        found |= {name for name in names if name.endswith("_kernel")}
    return found


def test_every_device_asked_for_is_known() -> None:
    assert set(KNOWN_DEVICES) == ASKED_FOR


@pytest.mark.skipif(not triton.backends.backends.keys() >= {"amd", "nvidia"}, reason="no compilers")
def test_gate() -> None:
    """Registers, scratch, shared memory, hidden arguments, matrix instructions, widths of loads.

    One test for all devices: the processes that compile are started once.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["compile", "--quick", "--json"])
    answer = json.loads(out.getvalue())
    said = ("target", "kernel", "tile", "aligned", "problems")
    bad = [tuple(k[name] for name in said) for k in answer["kernels"] if k["problems"]]
    assert (code, answer["problems"], bad) == (0, 0, [])
    compiled = {kernel["kernel"] for kernel in answer["kernels"]}
    assert compiled == kernels_of_the_package() - ELSEWHERE
    for arch in KNOWN_DEVICES:
        check(arch, [kernel for kernel in answer["kernels"] if kernel["target"] == arch])


def check(arch: str, kernels: list[dict[str, Any]]) -> None:
    """That nothing is missing from what was compiled for a device, and what was found."""
    facts, every = KNOWN_DEVICES[arch], {kernel["kernel"] for kernel in kernels}
    assert every >= PORTABLE, arch
    assert (every >= BESIDE.keys()) == (facts.kind == "hip" and facts.warp_size == 64), arch
    gemms = [k for k in kernels if k["kernel"].startswith(("gate_up", "down"))]
    for cfg, (layout,) in QUICK:
        shape = [cfg.num_experts, cfg.top_k, cfg.hidden_size, cfg.intermediate_size]
        quant = None if cfg.quant is None else asdict(cfg.quant)
        layer = (shape, cfg.dtype, cfg.bias, layout, quant)
        said = ("shape", "dtype", "bias", "layout", "quant")
        own = [k for k in gemms if tuple(k[name] for name in said) == layer]
        # what reads nothing of the caller's is one kernel for both
        assert {k["aligned"] for k in own} == {True, False}, (arch, cfg)
        names = {k["kernel"] for k in own}
        twins = {n for n in names if any(word in n for word in TWINS)}
        portable = {f"{gemm}_{'int4_' if quant else ''}kernel" for gemm in GEMMS}
        assert names - twins == portable, (arch, cfg)
        if quant and facts.kind == "cuda":
            # what is aligned is streamed
            ways = [f"{gemm}_{'registers' if 'direct' in gemm else 'stream'}" for gemm in GEMMS]
            assert twins >= {f"{way}_kernel" for way in ways}, (arch, cfg)
    assert {k["tokens"] for k in gemms} == set(QUICK_BUCKETS), arch
    for kernel in kernels:
        found = kernel["resources"]
        assert found["spills"] == found["scratch"] == found["global_scratch"] == 0, kernel
        assert found["shared"] <= facts.shared_memory, kernel
        assert found["vgprs"] > 0 and found["occupancy"] > 0, kernel
        if kernel["dtype"] != "float32":
            units = any(word in kernel["kernel"] for word in MULTIPLIED)
            assert (found["matrix"] > 0) == units, kernel
        # portable int4 tiles may have fewer bytes than that for each lane
        direct = facts.kind == "hip" and "direct" in kernel["kernel"]
        copied = any(word in kernel["kernel"] for word in TWINS)
        if kernel in gemms and (not kernel["quant"] or direct or copied):
            assert found["widest_load"] >= 16, kernel
