"""The steps before a whole block's experts as the host arranges them, on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import CFG, CPU, FakeGpu

from moert.block_rows import BlockRows
from moert.call import call_key
from moert.device_executor import DeviceExecutor


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def made(gpu: FakeGpu) -> DeviceExecutor:
    """A layer of a group that has rows for blocks, and others for captures."""
    group = gpu.group()
    backend = gpu.backend()
    group.make_block(backend)
    group.captured_block = BlockRows(CPU, 8, backend.block_fields(CFG, 8))
    return gpu.layer(group)


def run(layer: DeviceExecutor, tokens: int, routed: bool = False) -> None:
    """A call as `forward_block` makes it, every slot of expert 0 with a quarter of the weight."""
    group, capturing = layer.group, layer.capturing()
    x, out = torch.randn(tokens, CFG.hidden_size), torch.empty(tokens, CFG.hidden_size)
    slots = group.block_for(capturing).slots(tokens)
    slots.ids.zero_()
    slots.weights.fill_(0.25)
    key = call_key(x, slots, out, None, "keep")
    layer.fill_slots(key, x, slots, out, None, routed, capturing)
    layer.run(key, x, slots, out, None, capturing)
    if not capturing:
        torch.testing.assert_close(out, 2 * x)


def test_on_the_callers_stream_before_the_graph(gpu: FakeGpu) -> None:
    layer, other = made(gpu), gpu.stream("other", 0x5001)
    run(layer, 2)
    assert gpu.log == ["route 2 of 12 on null", "graph on blocking"]
    gpu.log.clear()
    with gpu.on(other):
        run(layer, 3, routed=True)
    waits = ["record null", "other waits for event of null"]
    assert gpu.log == [*waits, "take 3 of 12 on other", "graph on other"]


def test_a_capture_has_rows_of_its_own_and_waits_for_nothing(gpu: FakeGpu) -> None:
    layer, other = made(gpu), gpu.stream("other", 0x5001)
    run(layer, 2)
    gpu.log.clear()
    graph = gpu.graph_class(keep_graph=True)
    with gpu.on(other):
        graph.capture_begin(None, "")
        run(layer, 2)
        graph.capture_end()
    assert gpu.log == ["route 2 of 8 on other"] and len(graph.captured) == 2
    assert layer.counts["captured"] == 1
    group = layer.group
    own, foreign = (group.block_for(flag).slots(2) for flag in (False, True))
    assert own.ids.data_ptr() != foreign.ids.data_ptr()


def test_what_is_kept_for_blocks_goes_with_the_last_layer(gpu: FakeGpu) -> None:
    layer = made(gpu)
    group = layer.group
    rows = sum(block.nbytes for block in (group.block, group.captured_block) if block)
    assert group.memory()["block"] == rows > 0
    layer.close()
    group.leave(layer)
    assert group.block is None and group.memory()["block"] == 0
