"""Ranges of `moert.labels` in traces of a GPU: replays, launches one by one, somebody's capture, routing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_support import DEVICE, ODD, UPDATES_ARE_LIMITED, make_case, runtime
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu


def ranges(run: Callable[[], object]) -> list[str]:
    """In order of their start on the host."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    events = [
        event
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CPU
        and event.name.startswith("fused_moe_")
    ]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def names(*parts: str) -> list[str]:
    return [f"fused_moe_{part} E=20 top_k=3" for part in parts]


def test_ranges() -> None:
    """H=200, I=104, buckets 1, 2, 4, 8, 16, 64, at most 96 tokens a call."""
    with runtime(ODD) as rt:
        case = make_case(ODD, 3)
        found = ranges(lambda: rt.forward(case.x, case.topk, case.out))
        if not UPDATES_ARE_LIMITED:
            assert found == names("graph_bf16 4x200x104")
        large = make_case(ODD, 80)
        found = ranges(lambda: rt.forward(large.x, large.topk, large.out))
        assert len(found) == len(rt.plan().for_tokens(80).kernels)
        assert set(names("grouped_bf16 80x208x200", "grouped_bf16 80x200x104")) < {*found}
        logits = torch.randn(5, ODD.num_experts, device=DEVICE)
        assert ranges(lambda: rt.route(logits)) == names("route 5x3x20")

        def inside() -> None:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                rt.forward(case.x, case.topk, case.out)

        assert ranges(inside) == names("wvsplitk_bf16 3x208x200", "wvsplitk_bf16 3x200x104")


def test_the_capture_pass_names_its_gemms() -> None:
    made = []
    found = ranges(lambda: made.append(runtime(ODD)))
    for bucket in (1, 4):
        gemms = names(f"wvsplitk_bf16 {bucket}x208x200", f"wvsplitk_bf16 {bucket}x200x104")
        assert all(found.count(name) >= 2 for name in gemms)  # warmed up and captured
    made[0].close()
