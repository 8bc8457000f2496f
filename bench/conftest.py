"""Benchmarks under pytest-benchmark: which cases there are here, how samples get in, what the JSON says.

    pytest bench                 everything, on the GPU at hand; without one, a smoke run on tiny layers
    pytest bench --smoke         tiny layers and few rounds, also on a GPU
    pytest bench -k "T8 and qwen3-30b-a3b" --benchmark-json=FILE

`python bench/regress.py` runs this, compares with the baseline of the device and judges.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from device_timing import GPU, replayable  # noqa: E402
from layer_chain import Chain, make_layers  # noqa: E402
from machine import facts, machine_info  # noqa: E402
from matrix import Matrix  # noqa: E402
from playback import PLAYBACK, play  # noqa: E402

from moert import UnsupportedError  # noqa: E402

# what is measured must not depend on what somebody tuned or set on this machine
for _name in ("MOERT_TUNE", "MOERT_BACKEND", "MOERT_SORT_POLICY"):
    os.environ.pop(_name, None)

MEMORY = pytest.StashKey[dict[str, dict[str, int]]]()
Recorder = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="tiny layers, few rounds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEMORY] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    matrix = Matrix.here(metafunc.config.getoption("smoke"))
    if "layers" in metafunc.fixturenames:
        cases = matrix.layers
        metafunc.parametrize("layers", cases, ids=map(str, cases), indirect=True, scope="module")
    for name, values in matrix.axes.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[matrix.label(name, v) for v in values])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=PLAYBACK))


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest) -> Matrix:
    return Matrix.here(request.config.getoption("smoke"))


@pytest.fixture(scope="module")
def layers(request: pytest.FixtureRequest, matrix: Matrix) -> Iterator[list[Any]]:
    """The runtimes of one format and shape, for all T of it."""
    case = request.param
    options = {"tune": "off", "max_tokens": max(matrix.tokens), "buckets": matrix.tokens}
    try:
        made = make_layers(case.cfg, case.count, **options)
    except UnsupportedError as reason:
        pytest.skip(str(reason))
    yield made
    for layer in made:
        layer.close()
    del made
    if GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def side_stream() -> Iterator[None]:
    """The test's current stream is not the null stream, which orders itself after all others."""
    if not GPU:
        yield
        return
    torch.cuda.synchronize()  # fixtures of the module have filled tensors on another stream
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@pytest.fixture
def record(benchmark: Any) -> Recorder:
    """`record(microseconds, group, **what a reader wants beside the time)`."""

    def take(microseconds: Sequence[float], group: str, **extra: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(extra)
        play(benchmark, microseconds)

    return take


@pytest.fixture
def record_bytes(request: pytest.FixtureRequest) -> Callable[[dict[str, int]], None]:
    """Bytes by purpose: they go into the same JSON, but not into tables of times."""

    def take(sizes: dict[str, int]) -> None:
        request.config.stash[MEMORY][request.node.nodeid] = sizes

    return take


@pytest.fixture
def chain_times(
    matrix: Matrix, record: Recorder, side_stream: None
) -> Callable[[Chain, str], None]:
    """Measure and record a chain of layers, one layer the unit."""
    from device_timing import device_samples

    def take(chain: Chain, group: str, **extra: Any) -> None:
        count = len(chain.layers)
        run = {"": replayable(chain.run)}
        us = [t / count for t in device_samples(run, matrix.group_ms, matrix.rounds)[""]]
        record(us, group, **chain.facts(statistics.median(us)), **extra)

    return take


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine_info()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"id": done.stdout.strip() or "unversioned"}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["bytes"] = config.stash[MEMORY]


def pytest_report_header() -> str:
    here = facts()
    return f"device: {here.name}, {'graph replay' if GPU else 'smoke run on the host'}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for where, sizes in config.stash[MEMORY].items():
        terminalreporter.section(f"bytes of {where.split('::')[-1]}")
        for purpose, nbytes in sizes.items():
            terminalreporter.write_line(f"{nbytes:>16,}  {purpose}")
