"""Graph updates on ROCm without a device: a runtime whose nodes lie as HIP's header lays them out."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moert import graph_nodes
from moert.errors import StateError
from moert.graph_nodes import GraphDriver, NodeUpdater, free_updates, loaded_library
from moert.graphs import CapturedPlan, argument_bytes

# hipKernelNodeParams (hip_runtime_api.h): dim3 blockDim, void** extra, void* func, dim3 gridDim,
# void** kernelParams, unsigned sharedMemBytes
LAYOUT = "3I4xQQ3I4xQI4x"
GRAPH, EXEC = 0x700, 0x800
KERNEL_NODE, MEMSET_NODE = 0, 2


class FakeHip:
    """libamdhip64 with one graph; whatever it is asked for and does not have, ROCm does not have either."""

    def __init__(self, kernels: list[list[int]], kinds: list[int] | None = None) -> None:
        self.kinds = kinds or [KERNEL_NODE] * len(kernels)
        self.values = [[ctypes.c_uint64(value) for value in row] for row in kernels]
        self.arrays = [
            (ctypes.c_void_p * len(row))(*map(ctypes.addressof, row)) for row in self.values
        ]
        # what the instantiated graph runs with: copies, as the real one makes
        self.exec = {node: [v.value for v in row] for node, row in enumerate(self.values)}
        self.told: list[tuple[Any, ...]] = []
        word, size = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
        functions = {
            "hipGraphGetNodes": (self._nodes, word, word, size),
            "hipGraphNodeGetType": (self._type, word, ctypes.POINTER(ctypes.c_int)),
            "hipGraphKernelNodeGetParams": (self._get, word, word),
            "hipGraphExecKernelNodeSetParams": (self._set, word, word, word),
            "hipGraphLaunch": (self._launch, word, word),
            "hipStreamCreateWithFlags": (lambda *_: 0, word, ctypes.c_uint),
            "hipStreamDestroy": (lambda *_: 0, word),
        }
        for name, (function, *types) in functions.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(function))

    def _nodes(self, graph: int, nodes: int | None, count: Any) -> int:
        assert graph == GRAPH
        count[0] = len(self.kinds)
        if nodes:
            places = (ctypes.c_void_p * len(self.kinds)).from_address(nodes)
            places[:] = [100 + index for index in range(len(self.kinds))]
        return 0

    def _type(self, node: int, kind: Any) -> int:
        kind[0] = self.kinds[node - 100]
        return 0

    def _get(self, node: int, params: int) -> int:
        function, arguments = 0x5000 + node, ctypes.addressof(self.arrays[node - 100])
        packed = struct.pack(LAYOUT, 256, 1, 1, 0, function, 7, 8, 9, arguments, 1024)
        ctypes.memmove(params, packed, len(packed))
        return 0

    def _set(self, graph: int, node: int, params: int) -> int:
        raw = ctypes.string_at(params, struct.calcsize(LAYOUT))
        *block, extra, function, x, y, z, arguments, shared = struct.unpack(LAYOUT, raw)
        assert (graph, block, extra, shared) == (EXEC, [256, 1, 1], 0, 1024)
        assert (function, x, y, z) == (0x5000 + node, 7, 8, 9)
        count = len(self.values[node - 100])
        places = (ctypes.c_void_p * count).from_address(arguments)
        self.exec[node - 100] = [ctypes.c_uint64.from_address(place).value for place in places]
        self.told.append(("set", node))
        return 0

    def _launch(self, graph: int, stream: int | None) -> int:
        self.told.append(("launch", graph, stream))
        return 0


def hip_driver(hip: FakeHip, monkeypatch: pytest.MonkeyPatch) -> GraphDriver:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: hip)
    return GraphDriver(hip=True)


def test_arguments_are_replaced_in_the_instantiated_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through HIP's own names and structures; what was captured stays, the caller's values go in."""
    hip = FakeHip([[10, 11, 12], [20, 21]])
    driver, value = hip_driver(hip, monkeypatch), ctypes.c_uint64(77)
    slots = [{1: ctypes.addressof(value)}, {0: ctypes.addressof(value)}]
    functions = [0x5000 + 100, 0x5000 + 101]
    updater = NodeUpdater(driver, GRAPH, EXEC, slots, [3, 2], functions)
    updater.apply()
    assert hip.exec == {0: [10, 77, 12], 1: [77, 21]}
    value.value = 78  # after the update: launches enqueued before keep what they were given
    assert hip.exec[0] == [10, 77, 12]
    assert [[v.value for v in row] for row in hip.values] == [[10, 11, 12], [20, 21]]
    assert driver.launch(ctypes.c_void_p(EXEC), 0) == 0  # the null stream, as torch on ROCm has it
    assert hip.told[-1] == ("launch", EXEC, None)


def test_anything_but_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = hip_driver(FakeHip([[1], [2]], [KERNEL_NODE, MEMSET_NODE]), monkeypatch)
    with pytest.raises(StateError, match="holds a node of type 2, need kernels only"):
        driver.kernel_nodes(GRAPH)


@pytest.mark.parametrize(
    ("sizes", "updates"),
    [([100], 512), ([256] * 4, 128), ([257], 256), ([300, 40, 0], 128), ([], 512)],
)
def test_updates_that_need_no_allocation(sizes: list[int], updates: int) -> None:
    """128 KiB are there for them, in slots of 256 bytes."""
    assert free_updates(sizes) == updates


def test_argument_bytes_are_read_off_the_assembly() -> None:
    kernel = SimpleNamespace(asm={"amdgcn": "    .kernarg_segment_size: 136\n"})
    assert argument_bytes(kernel) == 136


def limited(updates: int | None) -> CapturedPlan:
    plan = object.__new__(CapturedPlan)
    plan.updates_left, plan._asked = updates, None
    plan._updater = SimpleNamespace(apply=lambda: None)  # type: ignore[assignment]
    return plan


def test_updates_are_spent_on_addresses_that_come_again() -> None:
    plan = limited(2)
    asked = ["a", "b", "a", "a", "b", "b", "c", "c", "c"]
    taken = []
    for key in asked:
        taken.append(plan.takes(key))
        if taken[-1]:
            plan.update()
    #                a      b      a      a     b      b     c      c      c
    assert taken == [False, False, False, True, False, True, False, False, False]
    assert plan.updates_left == 0


def test_updates_are_not_counted_where_they_cost_nothing() -> None:
    plan = limited(None)
    assert all(plan.takes(key) for key in "abab")
    plan.update()
    assert plan.updates_left is None


def test_the_library_that_is_loaded_is_the_one_used(tmp_path: Path) -> None:
    """ROCm's wheels of torch bring their own, under a name with a version, in a folder of their own."""
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/libc.so.6\n"
        "7f02-7f03 r-xp 00000000 08:01 2 /my site/torch/lib/libamdhip64.so.7\n"
        "7f04-7f05 rw-p 00000000 00:00 0 \n"
    )
    found = loaded_library("libamdhip64.so", str(maps))
    assert found == "/my site/torch/lib/libamdhip64.so.7"
    assert loaded_library("libcuda.so.1", str(maps)) == "libcuda.so.1"
    assert loaded_library("libamdhip64.so", str(tmp_path / "none")) == "libamdhip64.so"


def test_the_driver_opens_that_library(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load(path: str) -> FakeHip:
        opened.append(path)
        return FakeHip([[1]])

    monkeypatch.setattr(graph_nodes, "loaded_library", lambda name: f"/torch/lib/{name}.7")
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert GraphDriver(hip=True).free_updates is free_updates
    assert opened == ["/torch/lib/libamdhip64.so.7"]


def test_graphs_are_touched_by_names_of_both_vendors_only() -> None:
    """The driver's functions are looked up in one place, by a prefix; conditional nodes nowhere."""
    package = Path(graph_nodes.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"begin_capture_to_if|conditional_node|cudaGraphCond", text), path
        if path.name != "graph_nodes.py":
            assert not re.search(r"[\"'](cu|cuda|hip)(Graph|Stream)", text), path
