"""backend="auto" on ROCm: when Triton and AITER are timed against each other, and what follows."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_cases import CFG, MI300, assert_right, routing, rows
from aiter_stand_in import StandIn

from moert import ExpertWeights, MoERuntime
from moert.backends.aiter import AiterBackend
from moert.backends.registry import rival
from moert.backends.triton import TritonBackend
from moert.device import KNOWN_DEVICES
from moert.errors import UnsupportedError
from moert.plan import Choice, Plan
from moert.share import Options
from moert.tuning.contest import contest, mean_ratio

UNRELATED = ModuleType("aiter")


def plans(*times: float | None) -> tuple[Plan, ...]:
    return tuple(
        Plan(2**n, False, Choice("one_shot"), ("k",), (), us=us) for n, us in enumerate(times)
    )


@pytest.mark.parametrize(
    ("first", "other", "ratio"),
    [
        ((10.0, 10.0), (5.0, 20.0), 1.0),  # twice as fast here, half as fast there
        ((10.0, 40.0), (5.0, 20.0), 0.5),
        ((10.0,), (12.5,), 1.25),
        ((10.0, None), (5.0, 5.0), None),
        ((10.0, 10.0), (None, 5.0), None),
        ((0.0,), (5.0,), None),
    ],
)
def test_mean_ratio(first: tuple[Any, ...], other: tuple[Any, ...], ratio: float | None) -> None:
    assert mean_ratio(plans(*first), plans(*other)) == (
        None if ratio is None else pytest.approx(ratio)
    )


@pytest.mark.parametrize(
    ("times", "name", "note"),
    [
        ((10.0, 10.0), "triton", "backend aiter: takes 1.00 times as long as triton (mean of 2"),
        ((9.9, 9.9), "triton", "backend aiter: takes 0.99 times"),  # within the margin
        ((9.0, 9.0), "aiter", "backend triton: passed over, aiter takes 0.90 times as long"),
        ((5.0, None), "triton", "could not be timed at every size"),
    ],
)
def test_the_faster_one_is_taken(
    aiter: StandIn, times: tuple[Any, ...], name: str, note: str
) -> None:
    first = TritonBackend(CFG, ExpertWeights.random(CFG, seed=0), MI300)
    planned = {"triton": plans(10.0, 10.0), "aiter": plans(*times)}
    backend, chosen, notes = contest(first, AiterBackend, lambda b: planned[b.name])
    assert backend.name == name and chosen is planned[name]
    assert len(notes) == 1 and note in notes[0]


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("of the device"), "no memory for its copy of the weights"),
        (UnsupportedError("broken"), "not timed: broken"),
    ],
)
def test_a_rival_that_fails_is_no_error(aiter: StandIn, error: Exception, note: str) -> None:
    first = TritonBackend(CFG, ExpertWeights.random(CFG, seed=0), MI300)

    def planner(backend: Any) -> tuple[Plan, ...]:
        if backend is not first:
            raise error
        return plans(1.0)

    backend, _, notes = contest(first, AiterBackend, planner)
    assert backend is first and note in notes[0]


def test_without_a_rival_nothing_is_made_of_it(aiter: StandIn) -> None:
    first = TritonBackend(CFG, ExpertWeights.random(CFG, seed=0), MI300)
    for other, notes in ((None, ()), ("a reason", ("a reason",))):
        assert contest(first, other, lambda b: plans(1.0)) == (first, plans(1.0), notes)


@pytest.mark.parametrize(
    ("arch", "options", "found"),
    [
        ("gfx942", {}, AiterBackend),
        ("gfx942", {"graphs": "own"}, "not timed: graphs='own' (only graphs='host' times it"),
        ("gfx942", {"graphs": "off"}, "not timed: graphs='off'"),
        ("gfx942", {"tune": "off"}, "can serve this layer too, not timed: tune='off'"),
        ("gfx1151", {}, "backend aiter: AITER's GEMMs are for CDNA devices"),
        ("sm_90", {}, None),
    ],
)
def test_when_both_are_timed(
    aiter: StandIn, arch: str, options: dict[str, str], found: Any
) -> None:
    given = {"graphs": "host", "tune": "auto", **options}
    got = rival(TritonBackend, CFG, KNOWN_DEVICES[arch], **given)
    assert (found in (got or "")) if isinstance(found, str) else got is found


def test_the_reason_why_it_cannot_be_used_is_told(
    aiter: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiter", UNRELATED)
    said = rival(TritonBackend, CFG, MI300, graphs="host", tune="auto")
    assert isinstance(said, str) and "is not AMD's" in said


def test_ranks_do_not_time_apart(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    said = rival(TritonBackend, CFG, MI300, graphs="host", tune="auto")
    assert isinstance(said, str) and "torch.distributed" in said


def test_a_runtime_runs_on_the_winner(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from moert import build

    real = build.plan_buckets

    def planted(backend: Any, *args: Any, **options: Any) -> tuple[Plan, ...]:
        us = {"triton": 10.0, "aiter": 7.0}[backend.name]
        return tuple(replace(plan, us=us) for plan in real(backend, *args, **options))

    monkeypatch.setattr(build, "plan_buckets", planted)
    monkeypatch.setattr(
        build, "plan_options", lambda *_, **__: Options(4, (1, 4), "host", 0, "auto")
    )
    rt = MoERuntime(CFG, ExpertWeights.random(CFG, seed=1))
    report = rt.plan()
    assert report.backend == "aiter"
    assert any("triton: passed over, aiter takes 0.70 times" in note for note in report.notes)
    x, topk = rows(CFG, 3), routing(CFG, 3)
    assert_right(rt.forward(x, topk), x, topk, rt)
    assert aiter.calls
    layer = MoERuntime(CFG, ExpertWeights.random(CFG, seed=2), share=rt)
    assert layer.plan().backend == "aiter" and layer.plan().notes == report.notes
