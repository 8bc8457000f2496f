"""Kernel-node parameter updates of an instantiated CUDA/HIP graph, through the driver's C interface.

A replayed graph keeps the argument values it was captured with. The driver lets one kernel node of an
*instantiated* graph have its arguments replaced; launches already enqueued keep the old ones, later
launches see the new ones (CUDA Driver API, section "Graph Management", `cuGraphExecKernelNodeSetParams`;
HIP's twin is `hipGraphExecKernelNodeSetParams`). HIP's takes memory for the new arguments and gives none
back before the graph is destroyed (github.com/ROCm/rocm-systems/issues/10713), so there a graph is updated
a limited number of times: see `free_updates`. torch exposes the raw handles and nothing more, so the two
structures and few functions needed are declared here.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Sequence

from moert.errors import StateError

_KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL and hipGraphNodeTypeKernel


class _CudaKernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 (cuda.h, CUDA 12 and later)."""

    _fields_ = [
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("kernel_params", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class _HipKernelNodeParams(ctypes.Structure):
    """hipKernelNodeParams (hip_runtime_api.h, ROCm 6)."""

    _fields_ = [
        ("block", ctypes.c_uint * 3),
        ("extra", ctypes.c_void_p),
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("kernel_params", ctypes.POINTER(ctypes.c_void_p)),
        ("shared_bytes", ctypes.c_uint),
    ]


# kernel-argument memory that an instantiated HIP graph has to spare, and what an update of a node takes of
# it at least (kKernArgChunkSize and GraphKernelArgManager in ROCm/clr, hipamd/src/hip_graph_internal.cpp)
_SPARE_BYTES, _SLOT_BYTES = 128 << 10, 256


def free_updates(argument_bytes: Sequence[int]) -> int:
    """How often the kernels of a HIP graph can be updated before the driver has to allocate.

    Args:
        argument_bytes: of the arguments of each kernel that is updated.
    """
    taken = sum(-(-max(size, 1) // _SLOT_BYTES) * _SLOT_BYTES for size in argument_bytes)
    return _SPARE_BYTES // max(taken, _SLOT_BYTES)


def loaded_library(name: str, maps: str = "/proc/self/maps") -> str:
    """The path of a library that this process has loaded, else its name.

    ROCm's torch brings a HIP runtime of its own. Another file of that runtime would be another runtime, which
    knows nothing of torch's graphs and streams.
    """
    try:
        with open(maps, encoding="utf-8") as lines:
            paths = [line.split(maxsplit=5)[-1].strip() for line in lines if "/" in line]
    except OSError:
        return name
    return next((path for path in paths if path.rpartition("/")[2].startswith(name)), name)


class GraphDriver:
    """The entry points, for CUDA (`libcuda`) or HIP (`libamdhip64`).

    Attributes:
        free_updates: of a graph, from its kernels' argument bytes; None where updates use nothing up.
    """

    def __init__(self, hip: bool) -> None:
        self.free_updates = free_updates if hip else None
        try:
            self._lib = ctypes.CDLL(loaded_library("libamdhip64.so") if hip else "libcuda.so.1")
            prefix, version = ("hip", "") if hip else ("cu", "_v2")
            self._get_nodes = getattr(self._lib, f"{prefix}GraphGetNodes")
            self._get_type = getattr(self._lib, f"{prefix}GraphNodeGetType")
            self._get_params = getattr(self._lib, f"{prefix}GraphKernelNodeGetParams{version}")
            self.set_params = getattr(self._lib, f"{prefix}GraphExecKernelNodeSetParams{version}")
            self.launch = getattr(self._lib, f"{prefix}GraphLaunch")
            self._create_stream = getattr(
                self._lib, "hipStreamCreateWithFlags" if hip else "cuStreamCreate"
            )
            self._destroy_stream = getattr(
                self._lib, f"{prefix}StreamDestroy" + ("" if hip else "_v2")
            )
        except (OSError, AttributeError) as error:
            raise StateError(
                f"graph driver: kernel-node updates are not available ({error})"
            ) from None
        self.set_params.argtypes = [ctypes.c_void_p] * 3
        self.launch.argtypes = [ctypes.c_void_p] * 2
        self.params_type = _HipKernelNodeParams if hip else _CudaKernelNodeParams

    def kernel_nodes(self, raw_graph: int) -> list[ctypes.c_void_p]:
        """The kernel nodes of a captured graph, in the order the driver lists them.

        Raises:
            StateError: the graph holds anything but kernels.
        """
        graph, count = ctypes.c_void_p(raw_graph), ctypes.c_size_t(0)
        self._check(self._get_nodes(graph, None, ctypes.byref(count)), "GraphGetNodes")
        nodes = (ctypes.c_void_p * count.value)()
        self._check(self._get_nodes(graph, nodes, ctypes.byref(count)), "GraphGetNodes")
        for node in nodes:
            kind = ctypes.c_int(-1)
            self._check(
                self._get_type(ctypes.c_void_p(node), ctypes.byref(kind)), "GraphNodeGetType"
            )
            if kind.value != _KERNEL_NODE:
                raise StateError(
                    f"captured graph holds a node of type {kind.value}, need kernels only"
                )
        return [ctypes.c_void_p(node) for node in nodes]

    def node_params(self, node: ctypes.c_void_p) -> ctypes.Structure:
        params = self.params_type()
        self._check(self._get_params(node, ctypes.byref(params)), "GraphKernelNodeGetParams")
        return params

    def create_blocking_stream(self) -> int:
        """A stream that the legacy null stream waits for and that waits for the null stream."""
        stream = ctypes.c_void_p()
        self._check(self._create_stream(ctypes.byref(stream), ctypes.c_uint(0)), "StreamCreate")
        assert stream.value is not None
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        self._check(self._destroy_stream(ctypes.c_void_p(stream)), "StreamDestroy")

    @staticmethod
    def _check(code: int, what: str) -> None:
        if code:
            raise StateError(f"graph driver: {what} returned error {code}")


def launch_order(listed: Sequence[int], launched: Sequence[int]) -> list[int]:
    """Where each launch is among the listed nodes, told by the functions of both.

    Drivers promise no order of a graph's nodes; the ones known list them as they were captured. That is taken
    for launches of one function, and where a driver names functions by other handles: whichever node is
    taken for which, `moert.capture` compares a replay of every graph with an eager launch.
    """
    if Counter(listed) != Counter(launched):
        return list(range(len(listed)))
    places: dict[int, deque[int]] = {}
    for place, function in enumerate(listed):
        places.setdefault(function, deque()).append(place)
    return [places[function].popleft() for function in launched]


class NodeUpdater:
    """Rewrites chosen arguments of all kernel nodes of one instantiated graph from fixed addresses.

    Args:
        driver: the entry points.
        raw_graph, raw_exec: `CUDAGraph.raw_cuda_graph()` and `.raw_cuda_graph_exec()`.
        slots: for each kernel in launch order, {index of the argument among the compiled kernel's
            parameters: address of its value}; the memory must outlive this object.
        param_counts: how many parameters each compiled kernel takes.
        functions: the driver's handle of each compiled kernel.
    """

    def __init__(
        self,
        driver: GraphDriver,
        raw_graph: int,
        raw_exec: int,
        slots: Sequence[dict[int, int]],
        param_counts: Sequence[int],
        functions: Sequence[int],
    ) -> None:
        nodes = driver.kernel_nodes(raw_graph)
        if len(nodes) != len(slots):
            raise StateError(
                f"captured graph holds {len(nodes)} kernels, its plan names {len(slots)}"
            )
        self._set_params = driver.set_params
        self._exec = ctypes.c_void_p(raw_exec)
        self._calls = []
        listed = [driver.node_params(node) for node in nodes]
        order = launch_order([params.func or 0 for params in listed], functions)
        for place, addresses, count in zip(order, slots, param_counts, strict=True):
            node, params = nodes[place], listed[place]
            if not params.kernel_params:
                raise StateError("graph driver: does not give a captured kernel's arguments")
            pointers = (ctypes.c_void_p * count)(*[params.kernel_params[i] for i in range(count)])
            for index, address in addresses.items():
                pointers[index] = address
            params.kernel_params = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
            if addresses:
                self._calls.append((node, ctypes.byref(params), params, pointers))

    def apply(self) -> None:
        """Push the present values into the instantiated graph."""
        for node, params, *_ in self._calls:
            if code := self._set_params(self._exec, node, params):
                raise StateError(
                    f"graph driver: GraphExecKernelNodeSetParams returned error {code}"
                )
