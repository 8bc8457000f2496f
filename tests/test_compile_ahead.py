"""Which jobs are compiled ahead, by how many processes, and what comes of it; stand-ins for the helper."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from code_size import ROOT
from tuning_fakes import fake_job

triton = pytest.importorskip("triton")

from moert import compile_ahead as module  # noqa: E402
from moert.compile_ahead import (  # noqa: E402
    HelperProcess,
    NothingAhead,
    able,
    compile_ahead,
    compile_together,
    in_order,
    usable_cores,
    worker_count,
)
from moert.compile_job import CompileJob  # noqa: E402

JOBS = [fake_job(f"job_{number}") for number in range(12)]


def test_order() -> None:
    names = [
        ["sort", "down_stream", "up_specialised", "combine", "up_specialised_int4"],
        ["sort", "down_stream", "up_grouped", "up_stream"],
    ]
    buckets = [[fake_job(name) for name in bucket] for bucket in names]
    assert [job.name for job in in_order(buckets, [fake_job("combine")])] == [
        *("up_specialised_int4", "up_specialised", "down_stream", "sort"),
        *("up_stream", "up_grouped"),
    ]


@pytest.mark.parametrize(
    ("jobs", "cores", "workers"),
    [
        *((160, 16, 14), (160, 4, 2), (12, 4, 2), (160, 192, 16)),
        # not worth it
        *((160, 3, 0), (160, 1, 0), (11, 16, 0), (0, 16, 0)),
    ],
)
def test_number_of_workers(jobs: int, cores: int, workers: int) -> None:
    assert worker_count(jobs, cores) == workers


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", 8), ("400000 100000\n", 4), ("50000 100000\n", 1), ("", 8), (None, 8)],
)
def test_cores_of_a_container(
    text: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(module, "CGROUP_LIMIT", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert usable_cores() == cores


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of 16 cores with a device, where kernels are compiled."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", False)
    monkeypatch.setattr(module, "usable_cores", lambda: 16)
    driver = SimpleNamespace(get_current_target=lambda: "target")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.mark.usefixtures("compiling")
def test_where_no_helper_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert able()
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", True)
        assert not able() and isinstance(compile_ahead(JOBS), NothingAhead)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.compilation, "always_compile", True)
        assert not able()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "frozen", True, raising=False)
        assert not able()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")
        assert not able()
    assert isinstance(compile_ahead(JOBS[:3]), NothingAhead)


def stand_in(code: str) -> Callable[[], subprocess.Popen[bytes]]:
    """In place of `start_helper`: a Python that runs the code."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    return start


def is_over(process: HelperProcess) -> bool:
    """No zombie, no thread, no pipe is left."""
    popen = process._process
    pipes = (popen.stdin, popen.stdout)
    closed = all(pipe is not None and pipe.closed for pipe in pipes)
    return popen.returncode is not None and closed and not process._thread.is_alive()


STAND_INS = {
    "does all": "for i in range(12): print([i, 'x' * i].__repr__().replace(\"'\", '\"'), flush=True)",
    "ends at once": "",
    "reads nothing": "import time; time.sleep(60)",
    "dies half-way": "for i in range(6): print([i, ''].__repr__().replace(\"'\", '\"'), flush=True)",
    "talks nonsense": "print('Welcome to Python!', flush=True)",
    "counts wrongly": "print('[99, \"\"]', flush=True)",
}


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("name", STAND_INS)
def test_whatever_a_helper_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wait` returns, and `close` leaves nothing behind."""
    monkeypatch.setattr(module, "start_helper", stand_in(STAND_INS[name]))
    # more than a pipe holds
    jobs = [*JOBS, *(fake_job(f"{n} {'x' * 1000}") for n in range(1000))]
    process = HelperProcess(jobs, "target", 2, patience_s=0.3 if name == "reads nothing" else 20.0)
    start = time.monotonic()
    process.wait(jobs)
    assert time.monotonic() - start < 20.0
    process.close()
    process.close()
    assert is_over(process)
    process.wait(jobs)


def test_no_result_for_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs = "print('[0, \"\"]', flush=True)\nimport sys; sys.stdin.buffer.read()"
    monkeypatch.setattr(module, "start_helper", stand_in(hangs))
    process = HelperProcess(JOBS, "target", 2, patience_s=0.3)
    with caplog.at_level(logging.DEBUG, "moert"):
        process.wait(JOBS[:1])
        assert not is_over(process)
        process.wait(JOBS)
    assert "given up" in caplog.text and is_over(process)


@pytest.mark.usefixtures("compiling")
def test_no_helper_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise PermissionError("no more processes")

    monkeypatch.setattr(module, "start_helper", refuse)
    assert isinstance(compile_ahead(JOBS), NothingAhead)


@pytest.mark.usefixtures("compiling")
def test_a_job_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is started for the others then."""
    started: list[bool] = []
    monkeypatch.setattr(module, "start_helper", lambda: started.append(True))
    job = CompileJob("", "", (), (("a lambda", lambda: None),), (), ())
    assert isinstance(compile_ahead([job, *JOBS]), NothingAhead)
    assert started == []


def write_to_nobody() -> None:
    """A helper that ends before it has read all, in a process that ends at a broken pipe."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    module.start_helper = stand_in("")
    jobs = [fake_job(f"{n} {'x' * 1000}") for n in range(1000)]
    process = HelperProcess(jobs, "target", 2)
    process.wait(jobs)
    process.close()
    print("went on")


def test_a_broken_pipe_ends_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    words = [sys.executable, "-c", f"import {__name__} as tests; tests.write_to_nobody()"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_cores_are_shared_with_the_other_processes_of_a_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(module, "CGROUP_LIMIT", tmp_path / "none")
    for text, cores in (("8", 8), ("1", 64), ("", 64), ("many", 64), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
        assert usable_cores() == cores


@pytest.mark.usefixtures("compiling")
def test_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(stand_in("import time; time.sleep(60)")())
        return started[-1]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "start_helper", start)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert isinstance(compile_ahead(JOBS), NothingAhead)
    assert [popen.returncode is not None for popen in started] == [True]


def compile_twice() -> None:
    """Two kernels by the helper, then as a program does it; what was found on standard output.

    Run in a process where kernels are not interpreted.
    """
    from triton.backends.compiler import GPUTarget

    from moert.arena import absent_views
    from moert.backends.triton import TritonBackend
    from moert.cli.absent import absent_weights
    from moert.config import MoEConfig
    from moert.device import KNOWN_DEVICES
    from moert.launch import compile_launch
    from moert.plan import STRATEGIES

    cfg, target = MoEConfig(8, 2, 512, 512), GPUTarget("cuda", 90, 32)
    backend = TritonBackend(cfg, absent_weights(cfg), KNOWN_DEVICES["sm_90"])
    launches = {}
    for choice in backend.candidates(512, STRATEGIES):
        views = absent_views(backend.fields(512, choice))
        found = backend.launches(512, choice, views)
        for job, launch in zip(backend.compile_jobs(512, choice), found, strict=True):
            if launch.name in ("combine_kernel", "down_specialised_kernel"):
                launches.setdefault(launch.name, (job, launch))
    jobs = [job for job, _ in launches.values()]
    known = [[job.cached(target) for job in jobs]]
    helper = HelperProcess(jobs, target, workers=2)
    helper.wait(jobs)
    helper.close()
    known.append([job.cached(target) for job in jobs])
    # of another device nothing is known
    known.append([job.cached(GPUTarget("cuda", 80, 32)) for job in jobs])

    def files() -> int:
        return sum(path.is_file() for path in Path(triton.knobs.cache.dir).rglob("*"))

    hits, before = [], files()
    triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    for _, launch in launches.values():
        compile_launch(launch, cfg.torch_dtype, target=target)
    gluon = [launch.kernel.is_gluon() for _, launch in launches.values()]
    counts = [before, files()]
    print(json.dumps({"hits": hits, "files": counts, "gluon": sorted(gluon), "known": known}))


@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends, reason="no compiler for NVIDIA's GPUs"
)
def test_the_helpers_kernels_are_found(tmp_path: Path) -> None:
    """One of Triton's, one of Gluon's, for a device that is not there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    words = [sys.executable, "-c", f"import {__name__} as tests; tests.compile_twice()"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert found["gluon"] == [False, True] and found["hits"] == [True, True]
    assert found["files"][0] == found["files"][1] > 10
    assert found["known"] == [[False] * 2, [True] * 2, [False] * 2]


class Known(CompileJob):
    """Of which Triton's cache is said to have every second one, or nothing can be said."""

    __slots__ = ()

    def cached(self, target: Any) -> bool | None:
        assert target == "target"
        number = int(self.name)
        return None if number < 2 else number % 2 == 0


def known(count: int) -> list[CompileJob]:
    return [Known("", str(number), (), (), (), ()) for number in range(count)]


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What helpers were asked for, and for which jobs they were waited."""
    asked: list[Any] = []

    class Recorded:
        def __init__(self, jobs: list[CompileJob], target: Any, workers: int) -> None:
            asked.append(("start", [job.name for job in jobs]))

        def wait(self, jobs: Collection[CompileJob]) -> None:
            asked.append(("wait", len(jobs)))

        def close(self) -> None:
            asked.append(("close",))

    monkeypatch.setattr(module, "HelperProcess", Recorded)
    return asked


@pytest.mark.usefixtures("compiling")
def test_what_is_cached_is_not_compiled_ahead(helpers: list[Any]) -> None:
    jobs = known(40)
    compile_together([*jobs, *jobs])
    missing = ["0", "1", *(str(number) for number in range(3, 40, 2))]
    assert helpers == [("start", missing), ("wait", 40), ("close",)]
    helpers.clear()
    # too few are left
    compile_together(known(20))
    compile_together(())
    assert helpers == []


@pytest.mark.usefixtures("compiling")
def test_a_helper_is_closed_when_waiting_ends_early(
    helpers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.HelperProcess, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_together(known(40))
    assert helpers[-1] == ("close",)
