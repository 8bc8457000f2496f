"""What tuning needs of a device: free memory, programs built side by side, runs, times of repeated calls."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import torch

from moert.backends.base import Program
from moert.call import Call
from moert.compile_ahead import Ahead, compile_ahead
from moert.compile_job import CompileJob

Maker = Callable[[], Program]
# one call of a timed graph: sets up the call object, then enqueues a program on a raw stream handle
Enqueue = Callable[[int], None]

# what was not compiled ahead: compilation holds Python's lock most of the time, 0.11 s a kernel alone, 0.06 s
# with 8 threads, more with 16
COMPILE_THREADS: Final = 8
GROUP_US: Final = 1500.0  # time of one group of replays: long against an event's resolution
MAX_REPLAYS: Final = 50  # in a group
WARM_UP_S: Final = 0.03  # until the clocks are up


class Repeated(Protocol):
    """Successive calls that can be replayed together."""

    def close(self) -> None:
        """Free what it holds on the device."""


class Probes(Protocol):
    """The device, or what stands in for it in tests."""

    def versions(self) -> dict[str, str]:
        """Of triton, torch and driver."""

    def capturing(self) -> bool:
        """The current stream is being captured."""

    def free_bytes(self) -> int:
        """Device memory that could be allocated now."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""

    def compile_ahead(self, jobs: Sequence[CompileJob]) -> Ahead:
        """Start to compile in the order given, elsewhere; `build` then finds what is done."""

    def build(self, makers: Sequence[Maker]) -> list[Program | Exception]:
        """Compile and bind; what a maker raised stands in its place."""

    def run(self, program: Program, call: Call) -> None:
        """Run to the end, on the stream that `repeat` captures."""

    def repeat(self, calls: Sequence[Enqueue]) -> Repeated:
        """Make the calls replayable, one after another."""

    def time(self, entrants: Sequence[Repeated], groups: int) -> list[list[float]]:
        """Microseconds of one call, for each entrant and group; the entrants take turns."""

    def release(self) -> None:
        """Give cached memory back to the device."""


class DeviceProbes:
    """A CUDA or ROCm device.

    Args:
        device: where the weights are; also the current device while this object is used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def versions(self) -> dict[str, str]:
        """Of triton (empty where there is none), torch and the driver, or ROCm's runtime."""
        try:
            import triton

            triton_version = str(triton.__version__)
        except ImportError:
            triton_version = ""
        driver = torch.version.hip
        if driver is None:
            # 13000 is 13.0: the newest CUDA that the driver serves
            number = ctypes.c_int(0)
            with contextlib.suppress(OSError):
                ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
            driver = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
        return {"triton": triton_version, "torch": torch.__version__, "driver": driver}

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def free_bytes(self) -> int:
        """What the driver has free, and what torch's allocator holds without using it."""
        free = torch.cuda.mem_get_info(self._device)[0]
        held = torch.cuda.memory_reserved(self._device)
        return int(free + held - torch.cuda.memory_allocated(self._device))

    def now(self) -> float:
        return time.perf_counter()

    def compile_ahead(self, jobs: Sequence[CompileJob]) -> Ahead:
        with torch.cuda.device(self._device):
            return compile_ahead(jobs)

    def build(self, makers: Sequence[Maker]) -> list[Program | Exception]:
        def build_one(maker: Maker) -> Program | Exception:
            # the current device belongs to a thread, and kernels are loaded onto it
            try:
                with torch.cuda.device(self._device):
                    return maker()
            except Exception as error:
                # without the frames, which would keep the arena's views alive
                return error.with_traceback(None)

        if len(makers) < 2:
            return [build_one(maker) for maker in makers]
        with ThreadPoolExecutor(COMPILE_THREADS, "moert-compile") as pool:
            try:
                return list(pool.map(build_one, makers))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def run(self, program: Program, call: Call) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            program.run(call, self._stream.cuda_stream)
        self._stream.synchronize()

    def repeat(self, calls: Sequence[Enqueue]) -> RepeatedGraph:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return RepeatedGraph(calls, self._stream)

    def time(self, entrants: Sequence[Any], groups: int) -> list[list[float]]:
        with torch.cuda.stream(self._stream):
            self._warm_up(entrants[0])
            times: list[list[float]] = [[] for _ in entrants]
            for _ in range(groups):
                events = [entrant.enqueue_group() for entrant in entrants]
                self._stream.synchronize()
                for entrant, (start, stop), found in zip(entrants, events, times, strict=True):
                    calls = entrant.calls * entrant.replays
                    found.append(1000.0 * start.elapsed_time(stop) / calls)
        return times

    def _warm_up(self, entrant: RepeatedGraph) -> None:
        end = self.now() + WARM_UP_S
        while self.now() < end:
            entrant.enqueue_group()
            self._stream.synchronize()

    def release(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class RepeatedGraph:
    """Calls captured in one graph, and how often it has to be replayed for one reliable time.

    Args:
        calls: on kernels that have run before on this stream.
        stream: for capture and replays.
    """

    def __init__(self, calls: Sequence[Enqueue], stream: torch.cuda.Stream) -> None:
        self.calls, self.replays = len(calls), 1
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # thread_local: other threads (another model loading) may allocate meanwhile
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                for enqueue in calls:
                    enqueue(stream.cuda_stream)
            finally:
                self._graph.capture_end()
            self._graph.replay()
            start, stop = self.enqueue_group()
            stream.synchronize()
        us = 1000.0 * start.elapsed_time(stop)
        self.replays = max(1, min(MAX_REPLAYS, round(GROUP_US / max(us, 1.0))))

    def enqueue_group(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue one group of replays on the current stream between two events."""
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.replays):
            self._graph.replay()
        stop.record()
        return start, stop

    def close(self) -> None:
        self._graph.reset()
