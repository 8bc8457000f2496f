"""A GPU that is not there, for what the device executor does on the host.

Streams, captures, graphs whose nodes a driver rewrites, and two kernels that read and write the memory of CPU
tensors by address.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from moert import share
from moert.arena import Arena, Field
from moert.backends.base import Backend, BlockSteps, Program, Router, slot_fields
from moert.backends.triton import CompiledProgram
from moert.call import POSITION, Call
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.device_executor import DeviceExecutor
from moert.graph_nodes import _CudaKernelNodeParams
from moert.labels import Labels
from moert.plan import Choice
from moert.share import Options, ShareGroup
from moert.streams import StreamOrder
from moert.weights import ExpertWeights

CFG = MoEConfig(6, 4, 16, 8, dtype="float32")  # rows of 64 bytes: every call is aligned
FACTS = DeviceFacts("cuda", "Fake GPU", "sm_0", 4, 65536, 32, 1 << 20, 1 << 30)
CPU = torch.device("cpu")
BUCKETS, MAX_TOKENS = (1, 3, 8), 12


class FakeStream:
    """Writes down what waits for what."""

    def __init__(self, gpu: FakeGpu, name: str, raw: int) -> None:
        self.gpu, self.name, self.cuda_stream, self.stream_id = gpu, name, raw, raw % 64
        self.device = CPU

    def wait_stream(self, other: FakeStream) -> None:
        self.gpu.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Any) -> None:
        self.gpu.log.append(f"{self.name} waits for event of {event.at}")

    def synchronize(self) -> None:
        return


class FakeGraph:
    """Kernels with their arguments as they were captured, and as they are instantiated."""

    gpu: FakeGpu  # of the class that a `FakeGpu` makes

    def __init__(self, keep_graph: bool = False) -> None:
        assert keep_graph
        self.captured: list[tuple[FakeLaunch, list[Any]]] = []
        self.values: list[list[int]] = []
        self.gpu.graphs.append(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.gpu.captures[self.gpu.current.cuda_stream] = self

    def capture_end(self) -> None:
        del self.gpu.captures[self.gpu.current.cuda_stream]

    def instantiate(self) -> None:
        self.values = [[value.value for value in row] for _, row in self.captured]

    def raw_cuda_graph(self) -> int:
        return self.gpu.graphs.index(self)

    def raw_cuda_graph_exec(self) -> int:
        return 1000 + self.gpu.graphs.index(self)

    def reset(self) -> None:
        self.captured = []


class FakeLaunch:
    """`gate_up`: h = x * the sum of the routing weights. `down`: out = 2 h, of the live rows."""

    def __init__(self, gpu: FakeGpu, name: str, function: int, h: torch.Tensor) -> None:
        self.gpu, self.name, self.h = gpu, f"{name}_direct_kernel", h
        names = ["x_ptr", "weights_f32_ptr"] if name == "gate_up" else ["out_ptr", "num_valid_ptr"]
        self.call_args = [*names, "num_tokens"]
        self.parameters = ["h_ptr", *self.call_args]
        ptx = "".join(f"_param_{i}" for i in range(len(self.parameters)))
        self.compiled = SimpleNamespace(asm={"ptx": ptx}, function=function)

    def run(self, values: Sequence[int], tokens: int, stream: int) -> None:
        arguments = [self.h.data_ptr(), *(values[POSITION[name]] for name in self.call_args)]
        if stream in self.gpu.captures:
            row = [ctypes.c_uint64(value) for value in arguments]
            self.gpu.captures[stream].captured.append((self, row))
        else:
            self.gpu.log.append(f"{self.name} on {self.gpu.names[stream]}")
            self.execute(arguments)

    def execute(self, arguments: Sequence[int]) -> None:
        h_ptr, first, second, tokens = arguments
        width = CFG.hidden_size
        h, rows = floats(h_ptr, tokens * width), floats(first, tokens * width)
        if self.name.startswith("gate_up"):
            sums = floats(second, tokens * CFG.top_k).view(tokens, -1).sum(1)
            h.copy_((rows.view(tokens, -1) * sums[:, None]).view(-1))
        else:
            live = min(tokens, ctypes.c_int32.from_address(second).value) * width
            rows[:live] = 2 * h[:live]


def floats(address: int, count: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)


class FakeDriver:
    """Graphs by number, nodes by graph and place.

    Attributes of its `FakeGpu` spoil it: it `refuses` or `ignores` updates of graphs of these numbers, lists
    nodes `backwards`, has `other_handles` of functions than the launches.
    """

    free_updates = None

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.kept: list[Any] = []

    def kernel_nodes(self, raw_graph: int) -> list[ctypes.c_void_p]:
        count = len(self.gpu.graphs[raw_graph].captured)
        nodes = [ctypes.c_void_p(1 + 10 * raw_graph + place) for place in range(count)]
        return nodes[::-1] if self.gpu.backwards else nodes

    def node_params(self, node: ctypes.c_void_p) -> ctypes.Structure:
        graph, place = divmod((node.value or 0) - 1, 10)
        launch, values = self.gpu.graphs[graph].captured[place]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.kept.append(pointers)
        function = launch.compiled.function + (500 if self.gpu.other_handles else 0)
        params = _CudaKernelNodeParams(func=function)
        params.kernel_params = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        return params

    def set_params(self, raw_exec: ctypes.c_void_p, node: ctypes.c_void_p, params: Any) -> int:
        number, place = divmod((node.value or 0) - 1, 10)
        assert raw_exec.value == 1000 + number
        if number in self.gpu.refuses:
            return 801
        values = self.gpu.graphs[number].values[place]
        if number not in self.gpu.ignores:
            pointers = params._obj.kernel_params
            values[:] = [ctypes.c_uint64.from_address(p).value for p in pointers[: len(values)]]
            values[-1] &= 0xFFFFFFFF  # num_tokens has 4 bytes
        return 0

    def launch(self, raw_exec: ctypes.c_void_p, stream: int) -> int:
        graph = self.gpu.graphs[(raw_exec.value or 0) - 1000]
        self.gpu.log.append(f"graph on {self.gpu.names[stream]}")
        for (launch, _), values in zip(graph.captured, graph.values, strict=True):
            launch.execute(values)
        return 0

    def create_blocking_stream(self) -> int:
        self.gpu.blocking.append("open")
        return self.gpu.stream("blocking", 0x9000).cuda_stream

    def destroy_stream(self, stream: int) -> None:
        assert stream == 0x9000
        self.gpu.blocking.append("destroyed")


class FakeBackend(Backend):
    """Two launches for every bucket."""

    name, uses_graphs = "triton", True
    gpu: FakeGpu

    @staticmethod
    def supports(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        return None

    def default_choice(self, tokens: int) -> Choice:
        return Choice("none")

    def candidates(self, tokens: int, strategies: Sequence[str]) -> list[Choice]:
        return [Choice("none")]

    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        return (Field("h", (tokens, CFG.hidden_size), torch.float32),)

    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        return ("gate_up_direct_kernel", "down_direct_kernel")

    def program(
        self, tokens: int, choice: Choice, views: dict[str, torch.Tensor], **_: Any
    ) -> Program:
        launches = [
            FakeLaunch(self.gpu, name, function, views["h"])
            for name, function in (("gate_up", 11), ("down", 12))
        ]
        return CompiledProgram(launches)  # type: ignore[arg-type]

    def router(self, *_: Any) -> Router:
        return FakeRouter()

    def block_fields(self, cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
        return slot_fields(cfg, rows)

    def block_steps(self, cfg: MoEConfig, rows: int, *_: Any) -> BlockSteps:
        return FakeSteps(self.gpu, rows)


class FakeSteps(BlockSteps):
    """Notes in the log that it was called, and the stream; `rows`: for how many it was made."""

    def __init__(self, gpu: FakeGpu, rows: int) -> None:
        self.gpu, self.rows = gpu, rows

    def route(self, call: Call, stream: int, labels: Labels) -> None:
        self.gpu.log.append(f"route {call.tokens} of {self.rows} on {self.gpu.names[stream]}")

    def take(self, call: Call, stream: int, labels: Labels) -> None:
        self.gpu.log.append(f"take {call.tokens} of {self.rows} on {self.gpu.names[stream]}")


class FakeRouter(Router):
    """Expert 0 for everybody."""

    def run(self, logits: torch.Tensor, out: Any, num_valid: Any, stream: int) -> None:
        out.ids.zero_()


class FakeGpu:
    """What torch, Triton and the driver are asked is answered from here; see `FakeDriver` for its faults."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.captures: dict[int, Any] = {}
        self.blocking: list[str] = []
        self.names: dict[int, str] = {}
        self.refuses: set[int] = set()
        self.ignores: set[int] = set()
        self.backwards = self.other_handles = False
        self.current = self.null = self.stream("null", 0)
        self.graph_class = type("Graph", (FakeGraph,), {"gpu": self})
        patch.setattr(torch.cuda, "CUDAGraph", self.graph_class)
        patch.setattr(torch.cuda, "Event", self._event)
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 31))
        patch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("synchronize"))
        patch.setattr(
            torch.cuda,
            "is_current_stream_capturing",
            lambda: self.current.cuda_stream in self.captures,
        )
        patch.setattr(share, "GraphDriver", lambda hip: FakeDriver(self))
        driver = SimpleNamespace(get_current_stream=lambda index: self.current.cuda_stream)
        patch.setattr(triton.runtime.driver, "_active", driver)

    def stream(self, name: str, raw: int) -> FakeStream:
        self.names[raw] = name
        return FakeStream(self, name, raw)

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _event(self) -> Any:
        event = SimpleNamespace(at="nothing")

        def record(stream: FakeStream) -> None:
            assert stream.cuda_stream not in self.captures
            event.at = stream.name
            self.log.append(f"record {stream.name}")

        event.record = record
        return event

    def group(self, graphs: str = "own") -> ShareGroup:
        """As `moert.build` makes one."""
        group = ShareGroup(CFG, CPU, FACTS, Options(MAX_TOKENS, BUCKETS, graphs, 0, "off"))
        backend, own = self.backend(), graphs == "own"
        sizes = [*((bucket, own) for bucket in BUCKETS), (MAX_TOKENS, False)]
        group.plans = tuple(backend.plan(t, captured, Choice("none")) for t, captured in sizes)
        group.make_arenas()
        group.capture_arena = Arena(CPU, 1 << 12)
        group.order = StreamOrder(CPU)
        group.capture_stream = self.stream("capture", 0x7000)  # type: ignore[assignment]
        group.pool = None
        return group

    def backend(self) -> FakeBackend:
        backend = FakeBackend(CFG, ExpertWeights.random(CFG), FACTS)
        backend.gpu = self
        return backend

    def layer(self, group: ShareGroup) -> DeviceExecutor:
        executor = DeviceExecutor(group, self.backend())
        group.join(executor)
        self.log.clear()
        return executor
