"""What is compiled ahead of a bucket, when it is waited for, when it is stopped; what time goes into."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tuning_fakes import (
    CHOICES,
    DEFAULT,
    FAST,
    FakeBackend,
    FakeProbes,
    fake_job,
    fake_record,
    fake_store,
    tune,
)

from moert.plan import Choice
from moert.tuning.layer import Layer


def kernels_of(tokens: int, choice: Choice) -> tuple[str, ...]:
    """One for all buckets, one of the bucket, one of the candidate."""
    return "shared", f"stream_{tokens}", f"candidate_{CHOICES.index(choice)}"


def logging_pair() -> tuple[FakeBackend, FakeProbes]:
    backend, probes = FakeBackend(), FakeProbes({FAST: 50.0})
    backend.kernels_of, backend.log = kernels_of, probes.log
    return backend, probes


def short(log: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Without repetitions, and without the names that are waited for."""
    told = [(what, arg if what in ("ahead", "build") else None) for what, arg in log]
    return [entry for i, entry in enumerate(told) if i == 0 or entry != told[i - 1]]


CANDIDATES = ("candidate_0", "candidate_1", "candidate_2", "candidate_3")


def test_all_buckets_are_begun_at_once_and_each_waits_for_its_own(tmp_path: Path) -> None:
    backend, probes = logging_pair()
    tune(tmp_path, probes, backend, sizes=[(64, True), (1, True), (8, True)])
    # every kernel once, in the order of the buckets, what takes long first in each
    first = ("stream_1", "shared", *CANDIDATES, "stream_8", "stream_64")
    told = short(probes.log)
    assert told[:3] == [("ahead", first), ("wait", None), ("build", 1)]
    assert [entry for entry in told if entry[0] == "ahead"] == told[:1]
    assert told[-1] == ("close", None) and told.count(("close", None)) == 1
    for tokens in (1, 8, 64):
        at = probes.log.index(("build", tokens))
        assert probes.log[at - 1] == ("wait", ("shared", f"stream_{tokens}", *CANDIDATES))


def test_nothing_is_begun_for_what_is_known(tmp_path: Path) -> None:
    tune(tmp_path, FakeProbes({FAST: 50.0}))
    backend, probes = logging_pair()
    tune(tmp_path, probes, backend)
    assert probes.log == []
    # nor for a bucket that another process measured, nor where tuning is off
    tune(tmp_path, probes, backend, sizes=[(16, True)], mode="off")
    assert probes.log == []
    tune(tmp_path, probes, backend, sizes=[(8, True), (16, True)])
    assert probes.log[0] == ("ahead", ("stream_16", "shared", *CANDIDATES))


def test_nothing_is_begun_where_nothing_is_compiled(tmp_path: Path) -> None:
    probes = FakeProbes()
    tune(tmp_path, probes)
    assert probes.log == []


def test_a_record_on_trial_waits_for_nothing(tmp_path: Path) -> None:
    fake_store(tmp_path).add(8, 0, fake_record(FAST, triton="1"))
    backend, probes = logging_pair()
    tune(tmp_path, probes, backend, sizes=[(8, True)])
    assert probes.log == [("build", 8)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_stopped_whatever_happens(error: type[BaseException], tmp_path: Path) -> None:
    backend, probes = logging_pair()

    def fail() -> None:
        raise error

    probes.before_time = fail
    with pytest.raises(error):
        tune(tmp_path, probes, backend)
    assert probes.log[-1] == ("close", ())


def test_what_cannot_be_told_is_left_out() -> None:
    backend, probes = logging_pair()

    def kernels(tokens: int, choice: Choice) -> tuple[str, ...]:
        if choice == DEFAULT:
            raise ValueError("no such tile")
        return kernels_of(tokens, choice)

    backend.kernels_of = kernels
    layer = Layer(backend, probes)
    layer.kernel_cache[fake_job("candidate_3")] = "compiled for a record"
    layer.compile_ahead({8: CHOICES})
    assert probes.log == [("ahead", ("stream_8", "shared", "candidate_1", "candidate_2"))]
    layer.close()


def test_seconds_of_a_bucket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend, probes = logging_pair()
    real = backend.program

    def program(*args: Any, **options: Any) -> Any:
        probes.seconds += 0.25
        return real(*args, **options)

    def slow() -> None:
        probes.seconds += 1.0

    backend.program, probes.before_time = program, slow
    with caplog.at_level(logging.DEBUG, "moert"):
        tune(tmp_path, probes, backend, sizes=[(1, True), (8, True)])
    told = [record for record in caplog.records if hasattr(record, "spent")]
    assert [record.getMessage().split(", ")[0] for record in told] == [
        f"tuning {tokens} tokens: {len(CHOICES)} candidates" for tokens in (1, 8)
    ]
    for record in told:
        spent = record.spent
        assert (spent["waiting"], spent["checking"]) == (0.0, 0.0)
        assert spent["building"] >= 0.25 * len(CHOICES) and spent["timing"] >= 3.0
