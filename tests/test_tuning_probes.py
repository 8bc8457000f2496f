"""The tuner on the Triton backend itself: interpreted with planted times, and on a GPU with real ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_fakes import DEFAULT, MADE_WITH, FakeProbes, FakeRepeated

from moert.backends.base import Program
from moert.call import Call
from moert.config import MoEConfig
from moert.device import device_facts
from moert.plan import Choice
from moert.tuning import tuner
from moert.tuning.candidates import crossed
from moert.tuning.check import new_call, random_inputs, set_call
from moert.tuning.probes import DeviceProbes
from moert.tuning.store import Store, geometry
from moert.tuning.tuner import plan_buckets
from moert.weights import ExpertWeights

pytest.importorskip("triton")
from moert.backends.triton import TritonBackend

CUDA = torch.device("cuda", 0)


def store_of(backend: TritonBackend, folder: Path) -> Store:
    name = geometry(backend.cfg, backend.weights, backend.name)
    return Store(backend.facts, name, MADE_WITH, [(folder, "cache")])


class CountingProbes(FakeProbes):
    """Every candidate is as fast as the others; counts those that are right."""

    right = 0

    def repeat(self, calls: Sequence[Callable[[int], None]]) -> FakeRepeated:
        self.right += 1
        return FakeRepeated(DEFAULT, skewed=False)

    def time(self, entrants: Sequence[object], groups: int) -> list[list[float]]:
        return [[100.0] * groups for _ in entrants]


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_candidate_of_the_real_backend_is_right(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted: what is timed on a GPU is only what passes this very check."""
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    cfg = MoEConfig(4, 2, 32, 16, dtype="float32")
    facts = replace(device_facts(torch.device("cpu")), shared_memory=1 << 30)
    backend, probes = TritonBackend(cfg, ExpertWeights.random(cfg), facts), CountingProbes()
    pairs: list[Choice] = []

    def recorded(medians: Mapping[Choice, float]) -> list[Choice]:
        pairs[:] = crossed(medians)
        return pairs

    monkeypatch.setattr(tuner, "crossed", recorded)
    (plan,) = plan_buckets(
        backend, [(tokens, True)], policy=3, probes=probes, store=store_of(backend, tmp_path)
    )
    assert plan.source == "tuned"
    candidates = len(set(backend.candidates(tokens, ("none",))))
    # the best tiles of both GEMMs are tried together besides, next to the best candidate
    assert probes.right == candidates + len(pairs) + bool(pairs)
    assert candidates > 3


def gpu_backend(cfg: MoEConfig) -> TritonBackend:
    return TritonBackend(cfg, ExpertWeights.random(cfg, device=CUDA), device_facts(CUDA))


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: Path) -> None:
    backend = gpu_backend(MoEConfig(32, 4, 512, 256))
    sizes = [(1, True), (16, True), (128, False)]
    # the first product of a process keeps a workspace of the BLAS library
    _ = torch.ones(8, 8, device=CUDA) @ torch.ones(8, 8, device=CUDA)
    gc.collect()  # what earlier tests left must not be freed in between
    before = torch.cuda.memory_allocated(CUDA)
    plans = plan_buckets(backend, sizes, store=store_of(backend, tmp_path))
    assert torch.cuda.memory_allocated(CUDA) <= before
    for plan in plans:
        assert plan.source == "tuned"
        assert plan.us is not None and plan.default_us is not None
        assert 1.0 < plan.us <= plan.default_us < 1e4
    again = plan_buckets(backend, sizes, store=store_of(backend, tmp_path))
    for cold, warm in zip(plans, again, strict=True):
        assert (warm.source, warm.choice, warm.us) == ("cache", cold.choice, cold.us)


@pytest.mark.gpu
def test_tuning_on_a_nearly_full_device(tmp_path: Path) -> None:
    backend = gpu_backend(MoEConfig(32, 4, 512, 256))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(CUDA)[0]
    hoard = torch.empty(free - (192 << 20), dtype=torch.uint8, device=CUDA)
    plans = plan_buckets(backend, [(1, True), (512, True)], store=store_of(backend, tmp_path))
    assert len(plans) == 2
    del hoard
    torch.cuda.empty_cache()


class Fill(Program):
    """Writes so many bytes."""

    kernels = ("fill",)

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=CUDA)

    def run(self, call: Call, stream: int) -> None:
        self.buffer.fill_(1)


@pytest.mark.gpu
def test_times_of_a_device() -> None:
    """Twice the bytes take about twice the time, and the result is microseconds of one call."""
    cfg = MoEConfig(4, 2, 32, 16)
    probes, call = DeviceProbes(CUDA), new_call(cfg, CUDA)
    x, topk = random_inputs(cfg, 2, CUDA, 0)
    set_call(call, x, topk, torch.empty_like(x))
    fills = [Fill(n << 28) for n in (1, 2)]
    for fill in fills:
        probes.run(fill, call)
    graphs = [
        probes.repeat([lambda s, f=fill: f.run(call, s)] * 4)  # type: ignore[misc]
        for fill in fills
    ]
    small, large = (sorted(times)[2] for times in probes.time(graphs, 5))
    for graph in graphs:
        graph.close()
    assert 1.6 < large / small < 2.4
    # between 0.2 and 20 TB/s
    assert (1 << 28) / 20e6 < small < (1 << 28) / 0.2e6


@pytest.mark.gpu
def test_builds_go_on_after_a_failure() -> None:
    def fails() -> Program:
        raise RuntimeError("out of resource: shared memory")

    probes = DeviceProbes(CUDA)
    built = probes.build([lambda: Fill(16), fails, lambda: Fill(16)])
    assert [isinstance(result, Exception) for result in built] == [False, True, False]
    # nothing keeps the frames, and with them the arena, alive
    assert isinstance(built[1], RuntimeError) and built[1].__traceback__ is None
