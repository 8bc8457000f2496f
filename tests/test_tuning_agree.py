"""Several processes: one decides, the others are told or read what it kept."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from tuning_fakes import FAST, PHASED, FakeBackend, FakeProbes, fake_store, fresh_processes, tune

from moert.errors import StateError


class SlowProbes(FakeProbes):
    """Long enough for a second process to meet the lock."""

    def time(self, entrants: Any, groups: int) -> list[list[float]]:
        time.sleep(0.1)
        return super().time(entrants, groups)


def start_up(folder: Path, barrier: Any, results: Any) -> None:
    backend, probes = FakeBackend(), SlowProbes({FAST: 50.0})
    store = fake_store(folder)
    barrier.wait(60)
    plans = tune(folder, probes, backend, store=store)
    results.put([plan.source for plan in plans])


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_two_processes_at_once_measure_once(tmp_path: Path) -> None:
    context = fresh_processes()
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=start_up, args=(tmp_path, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    sources = sorted(results.get(timeout=60) for _ in processes)
    finish(processes)
    assert sources == [["cache"] * 3, ["tuned"] * 3]


def rank(number: int, folder: Path, results: Any) -> None:
    """Each rank has its own directory and its own idea of what is fast; rank 0's counts."""
    dist = torch.distributed
    init = f"file://{folder}/rendezvous"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init, rank=number, world_size=2, timeout=timeout)
    probes = FakeProbes({(FAST, PHASED)[number]: 50.0})
    notes: list[str] = []
    plans = tune(folder / str(number), probes, notes=notes)
    answers: dict[str, Any] = {"plans": plans, "timed": len(probes.timed), "notes": notes}
    # another layer of a pipeline: rank 1 must not take over what rank 0 decided for another geometry
    sizes = [(number + 1, True)]
    answers["other"] = tune(folder / f"other{number}", probes, sizes=sizes)[0].choice
    # rank 0 fails: rank 1 hears of it instead of waiting for ever
    probes.before_time = raise_disk_full
    try:
        tune(folder / f"failed{number}", probes)
    except (StateError, OSError) as error:
        answers["error"] = repr(error)
    results.put((number, answers))
    dist.destroy_process_group()


def raise_disk_full() -> None:
    raise OSError("disk full")


def test_rank_0_decides(tmp_path: Path) -> None:
    context = fresh_processes()
    results = context.Queue()
    processes = [
        context.Process(target=rank, args=(number, tmp_path, results)) for number in (0, 1)
    ]
    for process in processes:
        process.start()
    answers = dict(results.get(timeout=90) for _ in processes)
    finish(processes)
    assert answers[0]["plans"] == answers[1]["plans"]
    assert {plan.choice for plan in answers[1]["plans"]} == {FAST}
    assert answers[0]["timed"] > 0 and answers[1]["timed"] == 0
    assert answers[0]["notes"] == answers[1]["notes"]
    assert (answers[0]["other"], answers[1]["other"]) == (FAST, PHASED)
    assert answers[0]["error"] == "OSError('disk full')"
    assert answers[1]["error"].startswith("StateError") and "disk full" in answers[1]["error"]


def test_waiting_for_the_lock_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fcntl = pytest.importorskip("fcntl")
    store = fake_store(tmp_path)
    with store.lock():
        pass
    caplog.set_level(logging.INFO, "moert")
    with store.path.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with store.lock():
            assert "waiting for another process" in caplog.text
