"""Graph node updates without a driver: what it would be given, and what its refusals become."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from moert import graph_nodes
from moert.errors import StateError
from moert.graph_nodes import GraphDriver, NodeUpdater, launch_order
from moert.graphs import parameter_count

CUDA, HIP = graph_nodes._CudaKernelNodeParams, graph_nodes._HipKernelNodeParams


@pytest.mark.parametrize(
    ("struct", "size", "offsets"),
    [
        # cuda.h, CUDA_KERNEL_NODE_PARAMS_v2
        (CUDA, 72, {"func": 0, "grid": 8, "block": 20, "shared_bytes": 32, "kernel_params": 40, "extra": 48}),
        # hip_runtime_api.h, hipKernelNodeParams
        (HIP, 64, {"block": 0, "extra": 16, "func": 24, "grid": 32, "kernel_params": 48, "shared_bytes": 56}),
    ],
)  # fmt: skip
def test_structures_are_the_drivers(struct: Any, size: int, offsets: dict[str, int]) -> None:
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name in offsets} == offsets


class FakeDriver:
    """Two kernels, the first of three parameters, the second of two; remembers what it was told.

    `functions`: handles of both, as the driver has them.
    """

    def __init__(self, code: int = 0, functions: tuple[int, int] = (5, 6)) -> None:
        self.values = [[ctypes.c_uint64(v) for v in row] for row in ((10, 11, 12), (20, 21))]
        self.code, self.functions = code, functions
        self.told: list[tuple[int, list[int]]] = []

    def kernel_nodes(self, raw_graph: int) -> list[ctypes.c_void_p]:
        assert raw_graph == 7
        return [ctypes.c_void_p(100), ctypes.c_void_p(101)]

    def node_params(self, node: ctypes.c_void_p) -> ctypes.Structure:
        values = self.values[node.value - 100]  # type: ignore[operator]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        function = self.functions[node.value - 100]  # type: ignore[operator]
        params = CUDA(func=function, shared_bytes=6, grid=(1, 2, 3))
        params.kernel_params = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        self.keep = pointers
        return params

    def set_params(self, exec_: ctypes.c_void_p, node: ctypes.c_void_p, params: Any) -> int:
        params = params._obj
        count = len(self.values[node.value - 100])  # type: ignore[operator]
        read = [ctypes.c_uint64.from_address(params.kernel_params[i]).value for i in range(count)]
        function = self.functions[node.value - 100]  # type: ignore[operator]
        given = (exec_.value, params.func, params.shared_bytes, params.grid[:])
        assert given == (8, function, 6, [1, 2, 3])
        self.told.append((node.value, read))
        return self.code


def test_chosen_arguments_come_from_fixed_addresses() -> None:
    """The others stay what was captured; a kernel without chosen ones is not touched."""
    driver, value = FakeDriver(), ctypes.c_uint64(77)
    slots = [{1: ctypes.addressof(value)}, {}]
    updater = NodeUpdater(driver, 7, 8, slots, [3, 2], [5, 6])  # type: ignore[arg-type]
    assert driver.told == []
    updater.apply()
    value.value = 78
    updater.apply()
    assert driver.told == [(100, [10, 77, 12]), (100, [10, 78, 12])]


def test_nodes_are_told_apart_by_their_functions() -> None:
    """Listed the other way round than launched: the first launch is that of two parameters."""
    driver, value = FakeDriver(), ctypes.c_uint64(77)
    slots = [{1: ctypes.addressof(value)}, {}]
    NodeUpdater(driver, 7, 8, slots, [2, 3], [6, 5]).apply()  # type: ignore[arg-type]
    assert driver.told == [(101, [20, 77])]


@pytest.mark.parametrize(
    ("listed", "launched", "order"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([3, 1, 2], [1, 2, 3], [1, 2, 0]),
        # two launches of one function: as they are listed
        ([2, 1, 2], [1, 2, 2], [1, 0, 2]),
        # other handles than those launched: as they are listed
        ([7, 8, 9], [1, 2, 3], [0, 1, 2]),
        ([0, 0], [1, 2], [0, 1]),
        ([2, 1, 1], [1, 2, 2], [0, 1, 2]),
    ],
)
def test_launch_order(listed: list[int], launched: list[int], order: list[int]) -> None:
    assert launch_order(listed, launched) == order


def test_a_graph_with_other_kernels_than_its_plan() -> None:
    with pytest.raises(StateError, match="captured graph holds 2 kernels, its plan names 1"):
        NodeUpdater(FakeDriver(), 7, 8, [{}], [3], [5])  # type: ignore[arg-type]


def test_a_driver_that_hides_the_arguments() -> None:
    driver = FakeDriver()
    driver.node_params = lambda node: CUDA()  # type: ignore[method-assign]
    with pytest.raises(StateError, match="does not give a captured kernel's arguments"):
        NodeUpdater(driver, 7, 8, [{}, {}], [3, 2], [5, 6])  # type: ignore[arg-type]


def test_a_refused_update() -> None:
    driver, value = FakeDriver(code=1), ctypes.c_uint64(1)
    slots = [{0: ctypes.addressof(value)}, {}]
    updater = NodeUpdater(driver, 7, 8, slots, [3, 2], [5, 6])  # type: ignore[arg-type]
    with pytest.raises(StateError, match="GraphExecKernelNodeSetParams returned error 1"):
        updater.apply()


def fake_library(kinds: list[int], code: int = 0) -> GraphDriver:
    """A `GraphDriver` of a graph whose nodes are of these kinds."""

    def get_nodes(graph: ctypes.c_void_p, nodes: Any, count: Any) -> int:
        count._obj.value = len(kinds)
        for index in range(len(kinds) if nodes is not None else 0):
            nodes[index] = 100 + index
        return code

    def get_type(node: ctypes.c_void_p, kind: Any) -> int:
        kind._obj.value = kinds[node.value - 100]  # type: ignore[operator]
        return 0

    driver = object.__new__(GraphDriver)
    driver._get_nodes, driver._get_type = get_nodes, get_type
    return driver


def test_kernel_nodes() -> None:
    assert [node.value for node in fake_library([0, 0, 0]).kernel_nodes(1)] == [100, 101, 102]
    with pytest.raises(StateError, match="holds a node of type 1, need kernels only"):
        fake_library([0, 1]).kernel_nodes(1)
    with pytest.raises(StateError, match="GraphGetNodes returned error 3"):
        fake_library([0], code=3).kernel_nodes(1)


@pytest.mark.parametrize("hip", [True, False])
@pytest.mark.parametrize("error", [OSError("cannot open"), None])
def test_no_driver_or_an_old_one(
    hip: bool, error: OSError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def load(name: str) -> Any:
        names.append(name)
        if error is not None:
            raise error
        return SimpleNamespace()  # a library without these functions

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(StateError, match="kernel-node updates are not available"):
        GraphDriver(hip)
    assert names == ["libamdhip64.so" if hip else "libcuda.so.1"]


def test_parameters_are_counted_in_the_assembly() -> None:
    """`test_cross_compile` counts those of real kernels."""
    ptx = ".param .u64 k_param_0,\n.param .u32 k_param_1\nld.param.u32 %r1, [k_param_1];"
    assert parameter_count(SimpleNamespace(asm={"ptx": ptx})) == 2
    amdgcn = ".value_kind: global_buffer\n.value_kind:     by_value\n.value_kind: hidden_none\n"
    assert parameter_count(SimpleNamespace(asm={"amdgcn": amdgcn})) == 2
