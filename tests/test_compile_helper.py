"""The process that compiles: real forks of it, on jobs that do something else in place of compiling."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from code_size import ROOT
from compile_deeds import deeds

from moert.compile_ahead import HelperProcess
from moert.compile_job import CompileJob

pytest.importorskip("triton")

DEADLINE_S = 30.0  # for what takes a second or two


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def group_is_gone(group: int) -> bool:
    """No process of it is left but what nobody has waited for."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            return False
    return True


@contextmanager
def helper(jobs: list[CompileJob], workers: int = 2) -> Iterator[HelperProcess]:
    process = HelperProcess(jobs, "target", workers, patience_s=DEADLINE_S)
    try:
        yield process
    finally:
        process.close()


def begun(folder: Path) -> list[str]:
    """Names of the jobs in the order in which they were begun."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    return sorted(names, key=lambda name: int((folder / name).read_text().split()[1]))


def test_jobs_are_begun_in_order_each_in_a_process(tmp_path: Path) -> None:
    jobs = deeds(tmp_path, *(f"go-{number}" for number in range(20)))
    with helper(jobs, workers=1) as process:
        process.wait(jobs[:3])
        assert begun(tmp_path)[:3] == ["go-0", "go-1", "go-2"]
        process.wait(jobs)
        assert begun(tmp_path) == [job.name for job in jobs]
        assert process._left == set()
    pids = {path.read_text().split()[0] for path in tmp_path.iterdir()}
    assert len(pids) == 20 and str(os.getpid()) not in pids


def test_what_fails_takes_nothing_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = deeds(tmp_path, "die-0", "fail-0", "go-0", "die-1", "go-1")
    with caplog.at_level(logging.DEBUG, "moert"), helper(jobs) as process:
        process.wait(jobs)
    assert len(begun(tmp_path)) == 5
    assert "fail-0: ValueError: no such layout" in caplog.text
    assert f"die-1: the compiler ended its process: -{signal.SIGKILL.value}" in caplog.text
    assert "go-" not in caplog.text and "given up" not in caplog.text


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the table of processes")
def test_closed_at_work(tmp_path: Path) -> None:
    """Forks, and what they started, end with it."""
    jobs = deeds(tmp_path, "hang-0", "hang-1", "go-0")
    with helper(jobs) as process:
        group = process._process.pid
        assert eventually(lambda: len(begun(tmp_path)) == 2)
        assert not group_is_gone(group)
        start = time.monotonic()
        process.close()
        assert time.monotonic() - start < DEADLINE_S
        process.wait(jobs)
    assert eventually(lambda: group_is_gone(group))
    assert len(begun(tmp_path)) == 2
    assert process._process.returncode is not None and not process._thread.is_alive()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the table of processes")
@pytest.mark.parametrize("victim", ["parent", "helper"])
def test_killed(victim: str, tmp_path: Path) -> None:
    """Without a word to anyone: the others end too."""
    code = f"from compile_deeds import hang_forever; hang_forever({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        assert eventually(lambda: len(begun(tmp_path)) == 2)
        forks = [int((tmp_path / name).read_text().split()[0]) for name in begun(tmp_path)]
        group = os.getpgid(forks[0])
        os.kill(parent.pid if victim == "parent" else group, signal.SIGKILL)
        # who waits for a helper that is gone goes on
        code = parent.wait(DEADLINE_S)
        assert code == (-signal.SIGKILL if victim == "parent" else 0)
        assert eventually(lambda: group_is_gone(group))
    finally:
        parent.kill()
        parent.wait()
