"""Names of what profilers see: the grammar, and traces of real calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_gpu import CFG as GPU_CFG
from fake_gpu import FakeGpu
from runtime_cases import CFG, make_case, make_runtime
from test_device_executor import Call
from torch.profiler import ProfilerActivity, profile

from moert import MoEConfig
from moert.config import Quant
from moert.labels import Labels, label, profiling, step_label
from moert.plan import Choice, Plan

QWEN = MoEConfig(128, 8, 2048, 768)
INT4 = re.compile(
    # the pattern by which tools find the int4 decode GEMMs of fused experts
    r"^fused_moe_wvsplitk_int4 (\d+)x(\d+)x(\d+) E=(\d+) top_k=(\d+)(?: .*)?$"
)
ANY = re.compile(r"fused_moe_(\w+) (\d+)x(\d+)x(\d+) E=(\d+) top_k=(\d+)")


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("gate_up_direct_kernel", "wvsplitk_bf16 4x1536x2048"),
        ("down_direct_kernel", "wvsplitk_bf16 4x2048x768"),
        ("gate_up_gathered_stream_kernel", "wvsplitk_bf16 4x1536x2048"),
        ("gate_up_grouped_kernel", "grouped_bf16 4x1536x2048"),
        ("down_grouped_kernel", "grouped_bf16 4x2048x768"),
        ("combine_kernel", "combine 4x2048x8"),
        ("split_x_kernel", "split_x 4x2048x2"),
        ("split_h_kernel", "split_h 4x768x2"),
        ("sort_one_shot_kernel", "sort_one_shot 4x8x128"),
        ("sort_place_kernel", "sort_place 4x8x128"),
        ("route", "route 4x8x128"),
    ],
)
def test_names(kernel: str, name: str) -> None:
    assert step_label(kernel, QWEN, "bf16", 4) == f"fused_moe_{name} E=128 top_k=8"


def test_int4_decode_is_found_by_the_tools_pattern() -> None:
    """GEMM1 is M x 2I x H, GEMM2 is M x H x I; without a gate GEMM1 has I columns."""
    for kernel, shape in (("gate_up", (1536, 2048)), ("down", (2048, 768))):
        found = INT4.match(step_label(f"{kernel}_direct_kernel", QWEN, "int4", 3))
        assert found and tuple(map(int, found.groups())) == (3, *shape, 128, 8)
    ungated = replace(QWEN, gated=False)
    assert "3x768x2048" in step_label("gate_up_direct_kernel", ungated, "int4", 3)


def test_the_format_is_that_of_the_weights() -> None:
    for cfg, word in (
        (QWEN, "bf16"),
        (replace(QWEN, dtype="float16"), "fp16"),
        (replace(QWEN, quant=Quant("int4")), "int4"),
    ):
        assert Labels(cfg)._step("down_direct_kernel", 1).startswith(f"fused_moe_wvsplitk_{word} ")


def test_names_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of plans at start, others when they are first seen."""
    made: list[str] = []

    def counted(*arguments: Any) -> str:
        made.append(label(*arguments))
        return made[-1]

    monkeypatch.setattr("moert.labels.label", counted)
    labels = Labels(CFG)
    kernels = ("gate_up_direct_kernel", "down_direct_kernel")
    labels.prepare(
        [Plan(4, True, Choice("none"), kernels, ()), Plan(8, False, Choice("none"), kernels, ())]
    )
    assert len(made) == 6
    for _ in range(2):
        for tokens in (4, 8):
            for kernel in kernels:
                labels.step(kernel, tokens)
        labels.replay(4)
    assert len(made) == 6
    for _ in range(2):
        labels.step(kernels[0], 5)
    assert len(made) == 7


def traced(run: Callable[[], Any]) -> list[str]:
    """Names of moert's ranges in a real trace, in order of their start."""
    assert not profiling()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        assert profiling()
        run()
    assert not profiling()
    events = [e for e in trace.events() if e.name.startswith("fused_moe_")]
    names = [e.name for e in sorted(events, key=lambda e: e.time_range.start)]
    assert all(ANY.fullmatch(name) for name in names)
    return names


def names(*parts: str, cfg: MoEConfig = CFG) -> list[str]:
    return [f"fused_moe_{part} E={cfg.num_experts} top_k={cfg.top_k}" for part in parts]


def test_a_trace_of_the_torch_backend() -> None:
    """M is the call's T; E=5 K=2 H=40 I=24."""
    rt = make_runtime("torch")
    for tokens in (3, 8):
        case = make_case(CFG, tokens)
        expected = case.call(rt).clone()
        found = traced(lambda case=case: case.call(rt))
        sorts, combine = f"sort {tokens}x2x5", f"combine {tokens}x40x2"
        gemms = [f"grouped_fp32 {tokens}x48x40", f"grouped_fp32 {tokens}x40x24"]
        assert found == names(sorts, *gemms, combine)
        assert torch.equal(case.out, expected)
    assert traced(lambda: rt.route(torch.zeros(3, 5))) == names("route 3x2x5")


def test_a_range_for_every_block_of_rows() -> None:
    """1100 rows of one expert: blocks of up to 512 rows are multiplied one after another."""
    cfg = MoEConfig(1, 1, 8, 8, dtype="float32")
    rt = make_runtime("torch", cfg, max_tokens=1100, buckets=(1100,))
    found = Counter(traced(lambda: make_case(cfg, 1100, strange=0.0).call(rt)))
    assert found[names("grouped_fp32 1100x16x8", cfg=cfg)[0]] == 3


@pytest.mark.parametrize(("tokens", "first"), [(1, "wvsplitk"), (7, "sort_one_shot")])
def test_a_trace_of_kernels_launched_one_by_one(tokens: int, first: str) -> None:
    rt = make_runtime("triton")
    case = make_case(CFG, tokens)
    found = traced(lambda: case.call(rt))
    assert len(found) == len(rt.plan().for_tokens(tokens).kernels)
    assert found[0].startswith(f"fused_moe_{first}")
    for name in names(f"{tokens}x48x40", f"{tokens}x40x24"):
        assert sum(name.removeprefix("fused_moe_") in text for text in found) == 1


def test_a_trace_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture pass names its GEMMs with the bucket, a replay is one range; T beyond buckets is named."""
    gpu = FakeGpu(monkeypatch)
    made: list[Any] = []
    start = Counter(traced(lambda: made.append(gpu.layer(gpu.group()))))
    (layer,) = made
    # warm-up, capture, and the launch that a replay is compared with; the second arena is warmed up too
    gemms = names("wvsplitk_fp32 3x16x16", "wvsplitk_fp32 3x16x8", cfg=GPU_CFG)
    assert [start[name] for name in gemms] == [4, 4]
    for tokens, expected in (
        (1, ["graph_fp32 1x16x8"]),
        (2, ["graph_fp32 3x16x8"]),
        (12, ["wvsplitk_fp32 12x16x16", "wvsplitk_fp32 12x16x8"]),
        (10, ["wvsplitk_fp32 10x16x16", "wvsplitk_fp32 10x16x8"]),
    ):
        call = Call(tokens)
        found = traced(lambda call=call: call.run(layer))
        assert found == names(*expected, cfg=GPU_CFG)
        call.check()
    topk = layer.group.results.next_topk(3)
    assert traced(lambda: layer.route(torch.zeros(3, 6), topk, None, False)) == names(
        "route 3x4x6", cfg=GPU_CFG
    )


def test_nothing_is_made_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a name nor a range, whichever way a call goes."""
    gpu = FakeGpu(monkeypatch)
    layer = gpu.layer(gpu.group())
    on_cpu = [make_runtime(backend) for backend in ("torch", "triton")]

    def fail(*_: object) -> None:
        raise AssertionError("no profiler is there")

    for name in ("step", "call", "replay", "steps_of", "_step", "_call"):
        monkeypatch.setattr(Labels, name, fail)
    for tokens in (1, 2, 12):
        Call(tokens).run(layer)
    for rt in on_cpu:
        make_case(CFG, 3).call(rt)
        rt.route(torch.zeros(3, 5))
