"""Device timing for all benchmarks: graph replays, events around groups of them, medians, cold
weights.

How a figure is taken: every layer of a chain has its own weights and its own random routing, each
layer's out is the next one's x, and one replay of the chain touches several times the last-level
cache. Replays run back to back; an event pair encloses a group of them; the median group counts.
Variants are interleaved in rounds. On a machine without a GPU the same functions time the same work on the
host's clock, without graphs: enough to see that a benchmark runs, not what a GPU would take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

Run = Callable[[], object]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """`run` as a graph, after one warm-up on the capture stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def replayable(run: Run) -> Run:
    """What repeats `run` as cheaply as the device can: the replay of a graph on a GPU."""
    return captured(run).replay if GPU else run


def side_stream() -> AbstractContextManager[object]:
    """Makes another stream current than the null stream, which orders itself after all others."""
    return torch.cuda.stream(torch.cuda.Stream()) if GPU else nullcontext()


def device_samples(
    variants: Mapping[str, Run], target_ms: float = 8.0, rounds: int = 9
) -> dict[str, list[float]]:
    """Device times of one run of each variant in microseconds, one a round, interleaved.

    Args:
        variants: enqueue work on the current stream, which must not be the legacy null stream.
        target_ms: device time of one group of runs between two events.
        rounds: groups of each variant.
    """
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for name, run in variants.items():
        run()
        counts[name] = max(2, int(target_ms * 1e3 / max(_group_us(run, 3), 1.0)))
    for _ in range(rounds):
        for name, run in variants.items():
            samples[name].append(_group_us(run, counts[name]))
    return samples


def device_us(
    variants: Mapping[str, Run], target_ms: float = 8.0, rounds: int = 9
) -> dict[str, float]:
    """Medians of `device_samples`."""
    samples = device_samples(variants, target_ms, rounds)
    return {name: statistics.median(values) for name, values in samples.items()}


def _group_us(run: Run, count: int) -> float:
    if not GPU:
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begin) * 1e6 / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # the host gets ahead of the device, so that no launch is waited for
    torch.cuda._sleep(400_000)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def host_samples(run: Run, count: int = 20, rounds: int = 25) -> list[float]:
    """Host times of one run in microseconds; few enough runs at a time that no queue fills up."""
    samples = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        samples.append((time.perf_counter() - start) * 1e6 / count)
    synchronize()
    return samples


def host_us(run: Run, count: int = 20, rounds: int = 25) -> float:
    """Median of `host_samples`."""
    return statistics.median(host_samples(run, count, rounds))


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


READ_CONFIGS = (
    (1024, 4, 8, 4),
    (2048, 4, 4, 8),
    (1024, 4, 4, 4),
    (1024, 2, 16, 4),
    (512, 4, 16, 4),
)


def read_us(nbytes: int, layers: int) -> float:
    """R: the best of a few plain read kernels over `nbytes`, cold, microseconds a kernel, in one graph.

    Args:
        nbytes: of one read.
        layers: reads in a row, each of its own memory.
    """
    from read_kernel import read_kernel

    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    words = nbytes // 4
    data = torch.randint(0, 1 << 30, (layers, words), dtype=torch.int32, device="cuda")
    units = torch.cuda.get_device_properties(0).multi_processor_count
    graphs = {}
    for block, unroll, waves, warps in READ_CONFIGS:

        def run(
            block: int = block, unroll: int = unroll, waves: int = waves, warps: int = warps
        ) -> None:
            for row in data:
                read_kernel[(units * waves,)](row, sink, words, block, unroll, num_warps=warps)

        graphs[f"{block}x{unroll}x{waves}"] = captured(run).replay
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return min(device_us(graphs, rounds=5).values()) / layers
