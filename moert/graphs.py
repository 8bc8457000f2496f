"""Captured plans: one CUDA/HIP graph per bucket, replayed on whatever tensors the caller passes.

How a replay binds the caller's addresses was measured on an NVIDIA H200 (torch 2.11, CUDA 13.0;
two kernels a layer, E=32 K=8 H=2048 I=768 bf16, T=1, 48 layers):

    way                                host, new addresses   device, a layer in one graph
    kernel-node parameter updates      +1.4 us               30.6 us
    table read by the kernels          +6.1 us (a launch)    32.0 us, and x loads fall from 8 to 2 bytes
    one graph per address              +83 us (a capture)    30.6 us, 94 KB of device memory a graph

What an update costs follows the host: with new addresses in every call `forward` took 5.6, 9.6 and 19 us more
than with the last ones on three hosts of the same GPU, whose bare replays took 1.8, 2.8 and 2.3 us; 2.5 of it
is ours.

Updates win on NVIDIA: the kernels take plain arguments, so eager launches, captures by others and
replays run the very same machine code, and launches in flight keep the values they were enqueued
with (two streams never mix data). Where a driver has no such call, or the check at start-up fails,
calls are launched kernel by kernel. On ROCm, where each update uses memory up (`moert.graph_nodes`),
nodes are rewritten for addresses that come twice in a row, as long as that needs no allocation; calls
with others are launched kernel by kernel.

A graph launched into the legacy null stream cost 12 to 18 us more device time than in any other
stream (18.7 against 36.9 us for two 36 MB reads). The driver orders the null stream and every
*blocking* stream after each other, so calls made on the null stream launch their graphs into one
blocking stream of ours: 18.7 us.

48 chained replays against one graph of the same 48 layers (E=32), device time a layer over that graph's,
which is 25.7, 73.7 and 85.2 us:

    way                                            T=1    T=8   T=64   host us a call
    forward, a graph a layer                      +2.5   +3.9   +3.5    8
    the same graphs launched bare                 +1.8   +3.4   +3.0    3
    kernel by kernel, dependent across layers     +3.0   +1.5   +0.9   12 to 22
    the same, launched by one call of C           +2.9   +1.5   +0.8   7 to 14 *
    two layers a graph                            +1.5   +1.9   +1.4    1.5
    a graph a kernel                              +4.3  +10.6  +11.2    6 to 15
    first or last kernel beside the graph         +2.8   +4.7   +5.0    9
    plain instead of programmatic edges           +2.0   +6.3   +6.2    3

* on a host where a bare replay took 4 to 5: a launch costs it 3.4, four of them more than a graph and all
that `forward` does beside it.

It is the driver's gap between two graphs, and the overlap of one layer's first kernel with the last one's
last that only one graph, or dependent launches, can have: the more of that one graph has, the larger the
difference (at T=8 it was 2.9 when combine let no successor start). Node priorities, an upload beforehand, an
empty node in front or behind, two executables in turn, two streams with events: all within 0.4 us of the
bare graphs. A graph whose nodes have been updated takes 0.2 to 0.6 us more on the device from then on,
whether node by node or as a whole (`cuGraphExecUpdate`), uploaded afterwards or not. So this way is chosen
for its host time; who has whole models to capture gains by one graph over them.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import torch

from moert.backends.triton import CompiledProgram
from moert.call import Call
from moert.errors import StateError
from moert.graph_nodes import GraphDriver, NodeUpdater
from moert.labels import Labels
from moert.launch import CompiledLaunch

_NEEDED = ("instantiate", "raw_cuda_graph", "raw_cuda_graph_exec")


def parameter_count(compiled: Any) -> int:
    """How many arguments the machine code takes, hidden trailing ones included, read from its assembly."""
    if "ptx" in compiled.asm:
        return 1 + max(int(i) for i in re.findall(r"_param_(\d+)", compiled.asm["ptx"]))
    kinds = re.findall(r"\.value_kind:\s*(\w+)", compiled.asm["amdgcn"])
    return sum(not kind.startswith("hidden_") for kind in kinds)


def argument_bytes(compiled: Any) -> int:
    """Bytes of a kernel's arguments in memory, read from its AMD assembly."""
    found = re.search(r"\.kernarg_segment_size:\s*(\d+)", compiled.asm["amdgcn"])
    return int(found.group(1)) if found else 0


def new_graph() -> torch.cuda.CUDAGraph:
    """A graph that keeps what it was instantiated from, so that its nodes can be found.

    Raises:
        StateError: this torch gives no access to them.
    """
    missing = [name for name in _NEEDED if not hasattr(torch.cuda.CUDAGraph, name)]
    if not missing:
        try:
            return torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:
            missing = ["keep_graph"]
    raise StateError(
        f"torch {torch.__version__} gives no access to the nodes of its graphs: CUDAGraph has no "
        f"{', '.join(missing)}"
    )


class CapturedPlan:
    """The graph of one bucket.

    Args:
        program: the launches; captured as they are.
        bucket: B, the grid is captured for; any T <= B can be replayed.
        call: the share group's call, of B rows; from its packed values the nodes are updated.
        stream: the capture stream, on which the program has been warmed up.
        pool: memory pool handle shared by all graphs (they own nothing).
        driver: for parameter updates and launches.
        labels: names of what a profiler sees.

    Raises:
        StateError: torch or the driver cannot do it.
    """

    def __init__(
        self,
        program: CompiledProgram,
        bucket: int,
        call: Call,
        stream: torch.cuda.Stream,
        pool: Any,
        driver: GraphDriver,
        labels: Labels,
    ) -> None:
        self.program, self.bucket = program, bucket
        self.key: Any = None  # the checked call that the nodes hold
        self._graph = new_graph()
        with torch.cuda.stream(stream):
            # thread_local: other threads (another model loading) may allocate meanwhile
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                program.launch(call, stream.cuda_stream, labels)
            finally:
                self._graph.capture_end()
        self._graph.instantiate()
        self._exec = ctypes.c_void_p(self._graph.raw_cuda_graph_exec())
        self._updater = NodeUpdater(
            driver,
            self._graph.raw_cuda_graph(),
            self._graph.raw_cuda_graph_exec(),
            [self._addresses(launch, call) for launch in program.launches],
            [parameter_count(launch.compiled) for launch in program.launches],
            [launch.compiled.function for launch in program.launches],
        )
        self._launch = driver.launch
        self._asked: Any = None
        self.updates_left: int | None = None
        if driver.free_updates is not None:
            updated = [launch for launch in program.launches if launch.call_args]
            self.updates_left = driver.free_updates([argument_bytes(u.compiled) for u in updated])

    @staticmethod
    def _addresses(launch: CompiledLaunch, call: Call) -> dict[int, int]:
        parameters = launch.parameters
        return {parameters.index(name): call.address(name) for name in launch.call_args}

    def takes(self, key: Any) -> bool:
        """Whether the nodes are to be rewritten for a call with this key.

        Where the number of updates is limited, they are spent on calls that are made twice in a row.
        """
        if self.updates_left is None:
            return True
        again, self._asked = self._asked == key, key
        return again and self.updates_left > 0

    def update(self) -> None:
        """Rewrite the nodes' arguments from the call's packed values."""
        self.key = None
        if self.updates_left is not None:
            self.updates_left -= 1
        self._updater.apply()

    def launch(self, stream: int) -> None:
        """Enqueue one replay on a raw stream handle."""
        if code := self._launch(self._exec, stream):
            raise StateError(f"graph launch returned driver error {code}")

    def close(self) -> None:
        self._graph.reset()
