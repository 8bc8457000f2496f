"""The tuner as a whole on planted times: what it picks, refuses and keeps, and when it does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fakes import (
    CFG,
    CHOICES,
    DEFAULT,
    DIRECT,
    FAST,
    PHASED,
    SIZES,
    FakeBackend,
    FakeProbes,
    fake_record,
    fake_store,
    tune,
)

from moert.device import device_facts
from moert.env import SORT_POLICIES
from moert.errors import StateError
from moert.plan import Choice, Tile
from moert.tuning import layer as layer_module
from moert.tuning import trial as trial_module
from moert.tuning.candidates import strategies_for
from moert.tuning.tuner import plan_buckets
from moert.weights import ExpertWeights


def test_the_fastest_wins_and_says_so(tmp_path: Path) -> None:
    probes = FakeProbes({FAST: 50.0, PHASED: 60.0})
    plans = tune(tmp_path, probes)
    assert [(p.tokens, p.captured) for p in plans] == SIZES
    for plan in plans:
        assert (plan.choice, plan.source) == (FAST, "tuned")
        assert (plan.us, plan.default_us, plan.margin) == (50.0, 100.0, 0.5)
        assert plan.kernels == ("fake_one_shot",) and plan.fields[0].name == "h"
    # nothing timed is left on the device
    assert probes.repeats and not any(repeated.open for repeated in probes.repeats)


A, B, C = (Tile(16, bn, 16) for bn in (16, 32, 64))


def test_best_tiles_of_both_gemms_are_timed_together(tmp_path: Path) -> None:
    # candidates vary one GEMM at a time: no list holds the pair of both winners
    varied = [Choice("one_shot", A, A), Choice("one_shot", B, A), Choice("one_shot", A, C)]
    both = Choice("one_shot", B, C)
    times = {varied[1]: 70.0, varied[2]: 80.0, both: 50.0}
    plans = tune(tmp_path, FakeProbes(times), FakeBackend(choices=varied))
    assert {plan.choice for plan in plans} == {both}
    assert {(plan.us, plan.default_us) for plan in plans} == {(50.0, 100.0)}


@pytest.mark.parametrize(("us", "choice"), [(98.5, DEFAULT), (97.0, FAST)])
def test_margin_protects_the_default(us: float, choice: Choice, tmp_path: Path) -> None:
    plans = tune(tmp_path, FakeProbes({FAST: us}))
    assert {plan.choice for plan in plans} == {choice}
    assert {plan.default_us for plan in plans} == {100.0}


def test_a_wrong_candidate_never_wins(tmp_path: Path) -> None:
    backend, probes = FakeBackend(), FakeProbes({FAST: 1.0, PHASED: 50.0})
    backend.spoil[FAST] = lambda y, *_: y * 1.01
    plans = tune(tmp_path, probes, backend)
    assert {plan.choice for plan in plans} == {PHASED}
    assert FAST not in {choice for choice, _ in probes.timed}


@pytest.mark.parametrize(
    "error", [RuntimeError("out of shared memory"), AssertionError(), KeyError("ptx")]
)
def test_a_candidate_that_does_not_compile_is_dropped(error: Exception, tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.broken[FAST] = error
    plans = tune(tmp_path, FakeProbes({FAST: 1.0, PHASED: 50.0}), backend)
    assert {plan.choice for plan in plans} == {PHASED}


def test_a_candidate_that_does_not_launch_is_dropped(tmp_path: Path) -> None:
    backend = FakeBackend()

    def crash(*_: object) -> torch.Tensor:
        raise RuntimeError("invalid configuration argument")

    backend.spoil[FAST] = crash
    plans = tune(tmp_path, FakeProbes({FAST: 1.0}), backend)
    assert {plan.choice for plan in plans} == {DEFAULT}


def test_a_broken_default_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend()
    backend.spoil[DEFAULT] = lambda y, *_: 2 * y
    plans = tune(tmp_path, FakeProbes({FAST: 150.0, PHASED: 140.0, DIRECT: 160.0}), backend)
    assert {(plan.choice, plan.us, plan.default_us) for plan in plans} == {(PHASED, 140.0, None)}
    assert "rejected" in caplog.text


def test_nothing_works(tmp_path: Path) -> None:
    backend, notes = FakeBackend(), list[str]()
    for choice in CHOICES:
        backend.spoil[choice] = lambda y, *_: 2 * y
    store = fake_store(tmp_path)
    plans = tune(tmp_path, FakeProbes(), backend, notes=notes, store=store)
    assert {(plan.choice, plan.source) for plan in plans} == {(DEFAULT, "heuristic")}
    assert any("not tuned" in note for note in notes)
    assert not store.path.exists()


def test_warm_cache_does_nothing_and_gives_the_same_plans(tmp_path: Path) -> None:
    first = tune(tmp_path, FakeProbes({FAST: 50.0}))
    starts = []
    for _ in range(2):
        backend, probes = FakeBackend(), FakeProbes({PHASED: 1.0})
        starts.append(tune(tmp_path, probes, backend))
        assert probes.timed == [] and backend.made == []
    assert starts[0] == starts[1]
    for cold, warm in zip(first, starts[0], strict=True):
        assert warm.source == "cache"
        assert (warm.choice, warm.us, warm.default_us) == (cold.choice, cold.us, cold.default_us)


def test_only_missing_buckets_are_measured(tmp_path: Path) -> None:
    tune(tmp_path, FakeProbes({FAST: 50.0}), sizes=SIZES[:2])
    backend = FakeBackend()
    plans = tune(tmp_path, FakeProbes({PHASED: 50.0}), backend)
    assert [plan.source for plan in plans] == ["cache", "cache", "tuned"]
    assert {tokens for tokens, _ in backend.made} == {64}


def test_modes(tmp_path: Path) -> None:
    probes = FakeProbes({FAST: 50.0})
    off = tune(tmp_path, probes, mode="off")
    assert {(p.choice, p.source, p.us) for p in off} == {(DEFAULT, "heuristic", None)}
    assert probes.timed == []
    tune(tmp_path, probes)
    # "off" never measures, but what is known is used
    assert {p.source for p in tune(tmp_path, FakeProbes(), mode="off")} == {"cache"}
    forced = tune(tmp_path, FakeProbes({PHASED: 20.0}), mode="force")
    assert {(p.choice, p.source) for p in forced} == {(PHASED, "tuned")}
    assert {p.choice for p in tune(tmp_path, FakeProbes())} == {PHASED}


@pytest.mark.parametrize("policy", SORT_POLICIES)
def test_policy(policy: int, tmp_path: Path) -> None:
    probes = FakeProbes({DIRECT: 10.0, PHASED: 20.0, FAST: 30.0})
    plans = tune(tmp_path, probes, policy=policy)
    chosen = {0: DIRECT, 1: FAST, 2: PHASED, 3: DIRECT}[policy]
    assert {plan.choice for plan in plans} == {chosen}
    assert {choice.strategy for choice, _ in probes.timed} <= set(strategies_for(policy))
    # a policy's records are its own
    others = {other for other in SORT_POLICIES if other != policy}
    assert all(fake_store(tmp_path).find(8, other) == [] for other in others)


def test_a_record_of_a_forbidden_strategy_is_not_used(tmp_path: Path) -> None:
    fake_store(tmp_path).add(8, 2, fake_record(DIRECT))
    (plan,) = tune(tmp_path, FakeProbes(), sizes=[(8, True)], policy=2, mode="off")
    assert (plan.choice, plan.source) == (PHASED, "heuristic")


def test_a_record_that_these_weights_cannot_be_read_by_is_not_used(tmp_path: Path) -> None:
    fake_store(tmp_path).add(8, 0, fake_record(FAST))
    for able in (True, False):
        backend = FakeBackend()
        backend.can_run = lambda choice, tokens, able=able: able or choice != FAST
        (plan,) = tune(tmp_path, FakeProbes(), backend, sizes=[(8, True)], mode="off")
        expected = (FAST, "cache") if able else (DEFAULT, "heuristic")
        assert (plan.choice, plan.source) == expected


@pytest.mark.parametrize("able", [True, False])
def test_a_neighbours_winner_is_tried_where_it_can_serve(able: bool, tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.can_run = lambda choice, tokens: able or tokens <= 8 or choice != FAST
    slow = Choice("one_shot", PHASED.gate_up, PHASED.down)
    backend.candidates = lambda tokens, strategies: [DEFAULT, FAST if tokens == 8 else slow]
    tune(tmp_path, FakeProbes({FAST: 50.0}), backend, sizes=[(8, True), (64, True)])
    assert ((64, FAST) in backend.made) == able


@pytest.mark.parametrize("wrong", [False, True])
def test_record_of_other_versions(
    wrong: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_store(tmp_path).add(8, 0, fake_record(PHASED, triton="1"))
    backend, probes, notes = FakeBackend(), FakeProbes({FAST: 50.0}), list[str]()
    if wrong:
        backend.spoil[PHASED] = lambda y, *_: 2 * y
    (plan,) = tune(tmp_path, probes, backend, sizes=[(8, True)], notes=notes)
    assert (8, PHASED) in backend.made  # it was run
    if wrong:
        assert (plan.choice, plan.source) == (FAST, "tuned")
        assert "could not be confirmed" in caplog.text
    else:
        assert (plan.choice, plan.source, plan.us) == (PHASED, "cache", 10.0)
        assert probes.timed == [] and backend.made == [(8, PHASED)]
        assert notes == ["8 tokens: cache record made with moert 1 triton 1, checked here"]


def test_interruption_keeps_what_is_measured(tmp_path: Path) -> None:
    probes = FakeProbes({FAST: 50.0})

    def interrupt() -> None:
        if any(tokens == 8 for tokens, _ in backend.made):
            raise KeyboardInterrupt

    backend, probes.before_time = FakeBackend(), interrupt
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, probes, backend)
    assert not any(repeated.open for repeated in probes.repeats)
    store = fake_store(tmp_path)
    assert [len(store.find(tokens, 0)) for tokens, _ in SIZES] == [1, 0, 0]
    # and the lock is free again
    second = FakeBackend()
    plans = tune(tmp_path, FakeProbes({FAST: 50.0}), second)
    assert [plan.source for plan in plans] == ["cache", "tuned", "tuned"]
    assert 1 not in {tokens for tokens, _ in second.made}


def test_a_neighbours_winner_is_a_candidate(tmp_path: Path) -> None:
    extra = Choice("one_shot", PHASED.gate_up, PHASED.down)

    class Growing(FakeBackend):
        def candidates(self, tokens: int, strategies: Any) -> list[Choice]:
            return [*super().candidates(tokens, strategies), *([extra] if tokens == 1 else [])]

    plans = tune(tmp_path, FakeProbes({extra: 30.0}), Growing())
    assert {plan.choice for plan in plans} == {extra}


def test_little_memory_drops_candidates(tmp_path: Path) -> None:
    backend, probes = FakeBackend(), FakeProbes({FAST: 1.0, PHASED: 50.0}, free=100_000)
    backend.scratch[FAST] = 200_000
    plans = tune(tmp_path, probes, backend)
    assert {plan.choice for plan in plans} == {PHASED}
    assert FAST not in {choice for _, choice in backend.made}


@pytest.mark.parametrize("everything", [False, True])
def test_out_of_memory_after_all(
    everything: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own figure was too high: the allocation is tried again without the largest."""
    backend, real = FakeBackend(), trial_module.Arena
    backend.scratch[FAST] = 200_000

    def arena(device: torch.device, nbytes: int) -> Any:
        if everything or nbytes >= 200_000:
            raise torch.OutOfMemoryError
        return real(device, nbytes)

    monkeypatch.setattr(trial_module, "Arena", arena)
    notes: list[str] = []
    plans = tune(tmp_path, FakeProbes({FAST: 1.0, PHASED: 50.0}), backend, notes=notes)
    if everything:
        assert {(plan.choice, plan.source) for plan in plans} == {(DEFAULT, "heuristic")}
        assert len(notes) == len(SIZES)
    else:
        assert {plan.choice for plan in plans} == {PHASED}


def test_copies_of_small_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = ExpertWeights.random(CFG)
    layer_bytes = weights.w13.nbytes + weights.w2.nbytes
    monkeypatch.setattr(layer_module, "cache_bytes", lambda facts: layer_bytes)
    copies: list[int] = []
    real = layer_module.copied
    monkeypatch.setattr(layer_module, "copied", lambda w: copies.append(1) or real(w))
    plain: list[str] = []
    tune(tmp_path / "a", FakeProbes(free=1 << 30), notes=plain)
    assert len(copies) == 3  # made once for all buckets, four with the layer's own
    assert plain == []
    short: list[str] = []
    tune(tmp_path / "b", FakeProbes(free=20 * layer_bytes), notes=short)
    assert len(copies) == 3
    assert short == ["timed on warm weights: the layer is too small to be read from memory"]
    assert [r.cold for r in fake_store(tmp_path / "b").find(8, 0)] == [False]


def test_unfilled_weights_are_not_tuned(tmp_path: Path) -> None:
    backend, notes = FakeBackend(), list[str]()
    backend.weights.w2.fill_(float("nan"))
    plans = tune(tmp_path, FakeProbes(), backend, notes=notes)
    assert {plan.source for plan in plans} == {"heuristic"}
    assert notes == ["not tuned: the weights hold values that are not finite"]


def test_refused_inside_a_capture(tmp_path: Path) -> None:
    backend, probes = FakeBackend(), FakeProbes()
    probes.is_capturing = True
    with pytest.raises(StateError, match="stream is capturing"):
        tune(tmp_path, probes, backend)
    assert backend.made == []


def test_bounded_time(tmp_path: Path) -> None:
    probes = FakeProbes({FAST: 50.0})

    def slow() -> None:
        probes.seconds += 100.0

    probes.before_time = slow
    plans = tune(tmp_path, probes)
    assert {plan.choice for plan in plans} == {FAST}
    assert len({groups for _, groups in probes.timed}) == 1  # one stage a bucket


def test_a_cpu_takes_the_heuristic() -> None:
    facts = device_facts(torch.device("cpu"))
    backend = FakeBackend(facts=facts)
    notes: list[str] = []
    plans = plan_buckets(backend, SIZES, policy=3, mode="force", notes=notes)
    assert {(plan.choice, plan.source) for plan in plans} == {(DIRECT, "heuristic")}
    assert backend.made == [] and notes == []
