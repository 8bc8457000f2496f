"""What a call of the CPU experts may cost: no allocation, no more time than transformers takes."""

from __future__ import annotations

import importlib.util
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from expert_cases import CFG, make_experts, make_inputs, make_weights
from torch.profiler import ProfilerActivity, profile

ALLOCATION_LAYERS = {
    "float32": replace(CFG, top_k=7),
    "bfloat16-oai": replace(CFG, dtype="bfloat16", activation="swiglu_oai", bias=True),
    "float16": replace(CFG, dtype="float16", activation="gelu_tanh", activation_limit=1.0),
    "float16-ungated": replace(CFG, dtype="float16", activation="relu2", gated=False),
}
TOKENS = [*range(1, 41), 128, 512]


def tensor_allocations(function: Any) -> list[int]:
    """Bytes of every allocation that torch's allocator served during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def allocation_calls(name: str, storage: str) -> list[Any]:
    cfg = ALLOCATION_LAYERS[name]
    experts = make_experts(cfg, make_weights(cfg, storage), TOKENS[-1])
    calls = []
    for tokens in TOKENS:
        x, topk = make_inputs(cfg, tokens)
        x, out = torch.empty(2, tokens + 1, 70, dtype=x.dtype)[..., :66].unbind()
        ids = topk.ids.to(torch.int32 if tokens % 2 else torch.int64)
        ids[tokens // 2 :, 0] = -1
        weights = topk.weights.to(x.dtype if tokens % 3 else torch.float32)
        arguments = (x, weights, ids, out, tokens, True)
        calls.append(lambda arguments=arguments: experts.run(*arguments))
    return calls


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        *((name, "plain") for name in ALLOCATION_LAYERS),
        *((name, "transposed") for name in ALLOCATION_LAYERS),
        ("float32", "interleaved"),
        ("float16", "interleaved-transposed"),
        ("bfloat16-oai", "bias-float32"),
    ],
)
def test_no_tensor_is_allocated(name: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    for function in (torch.mm, torch.addmm):
        if name.startswith("bfloat16"):
            # oneDNN's own scratchpad would be seen: see torch_linear
            monkeypatch.setattr(torch, function.__name__, lambda *_, out: products.append(out))
    calls = allocation_calls(name, storage)
    assert tensor_allocations(lambda: torch.empty(100)) == [400]  # the profiler sees them
    assert tensor_allocations(lambda: [call() for call in calls]) == []
    assert bool(products) == name.startswith("bfloat16")


def test_a_scratchpad_of_onednn_is_all_that_a_bfloat16_product_takes() -> None:
    calls = allocation_calls("bfloat16-oai", "plain")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for call in calls:
            call()
    events = trace.events()
    assert events is not None
    # an operator's memory is counted when it is done: what it gave back does not appear
    assert [(e.name, e.cpu_memory_usage) for e in events if e.cpu_memory_usage] == []


@pytest.mark.parametrize("name", ALLOCATION_LAYERS)
def test_no_array_is_allocated(name: str) -> None:
    """numpy reports to tracemalloc; the Python objects of a call are small and few."""
    call = allocation_calls(name, "plain")[-1]
    call()
    array = 8 * TOKENS[-1] * ALLOCATION_LAYERS[name].top_k  # the smallest array a call could want
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < array - 1000


def load_bench() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "bench_torch_experts.py"
    spec = importlib.util.spec_from_file_location("bench_torch_experts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_not_slower_than_transformers(tokens: int, dtype: str) -> None:
    pytest.importorskip("transformers")
    bench = load_bench()
    cfg = replace(bench.LAYERS["qwen-like"], dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other
    try:
        for _attempt in range(3):
            times = bench.measure(cfg, tokens, 0.3)
            ratio = times.pop("moert") / min(times.values())
            if ratio <= 1.15:
                return
    finally:
        torch.set_num_threads(threads)
    pytest.fail(f"{ratio:.2f} times as long as transformers' fastest")
