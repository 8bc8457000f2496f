"""What the tuner makes of times where all tokens take the same experts, planted as in test_tuner.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_fakes import (
    CFG,
    DEFAULT,
    FAST,
    PHASED,
    FakeBackend,
    FakeProbes,
    fake_record,
    fake_store,
    tune,
)

from moert.arena import Arena
from moert.call import Call
from moert.plan import Choice, Tile
from moert.tuning.check import Check, new_call


@pytest.mark.parametrize(
    ("us", "skewed", "choice"),
    [
        # level, and steadier where all tokens take the same experts
        ({FAST: 50.0, PHASED: 50.9}, {FAST: 40.0, PHASED: 20.0}, PHASED),
        ({FAST: 50.0, PHASED: 50.9}, {FAST: 20.0, PHASED: 40.0}, FAST),
        # faster by more than the margin
        ({FAST: 50.0, PHASED: 51.5}, {FAST: 40.0, PHASED: 20.0}, FAST),
        # the default is protected as ever
        ({FAST: 99.0, PHASED: 99.5}, {FAST: 40.0, PHASED: 20.0, DEFAULT: 90.0}, DEFAULT),
        ({FAST: 97.5, PHASED: 98.5}, {FAST: 40.0, PHASED: 20.0, DEFAULT: 10.0}, FAST),
    ],
)
def test_of_what_is_level_the_steadiest_wins(
    us: dict[Choice, float], skewed: dict[Choice, float], choice: Choice, tmp_path: Path
) -> None:
    (plan,) = tune(tmp_path, FakeProbes(us, skewed=skewed), sizes=[(64, True)])
    # what is told is the time by even routing
    assert (plan.choice, plan.us) == (choice, us.get(choice, 100.0))


TALL = Tile(32, 16, 16), Tile(64, 16, 16)
CROWDS = [replace(FAST, crowded=(tile, tile)) for tile in TALL]


@pytest.mark.parametrize(
    ("us", "skewed", "chosen"),
    [
        # no slower by more than the margin, and faster by it where all tokens take the same experts
        ((50.0, 50.9, 51.5), (80.0, 40.0, 20.0), 1),
        ((50.0, 50.9, 50.9), (80.0, 40.0, 20.0), 2),
        ((50.0, 50.9, 50.9), (80.0, 79.0, 90.0), 0),
        # of what is level there the fastest
        ((50.0, 50.9, 50.2), (80.0, 40.0, 40.5), 2),
        # measured faster than without
        ((50.0, 49.0, 49.5), (80.0, 40.0, 30.0), 2),
    ],
)
def test_tiles_for_crowds_of_the_fastest(
    us: tuple[float, ...], skewed: tuple[float, ...], chosen: int, tmp_path: Path
) -> None:
    backend, all_three = FakeBackend(), (FAST, *CROWDS)
    backend.crowded[FAST] = CROWDS
    times, others = (dict(zip(all_three, values, strict=True)) for values in (us, skewed))
    (plan,) = tune(tmp_path, FakeProbes(times, skewed=others), backend, sizes=[(64, True)])
    assert (plan.choice, plan.us) == (all_three[chosen], us[chosen])
    # a record as any other
    (again,) = tune(tmp_path, FakeProbes(), backend, sizes=[(64, True)])
    assert (again.choice, again.source) == (plan.choice, "cache")


def test_the_next_bucket_finds_tiles_for_crowds_of_its_own(tmp_path: Path) -> None:
    """The neighbour's winner comes without those it had."""
    us, skewed = {FAST: 50.0, CROWDS[0]: 50.5}, {FAST: 80.0, CROWDS[0]: 20.0}
    crowds = {CROWDS[0]}

    class Once(FakeBackend):
        def crowded_choices(self, choice: Choice, tokens: int) -> list[Choice]:
            return CROWDS[:1] if choice == FAST and tokens == 64 else []

    once = Once()
    plans = tune(tmp_path, FakeProbes(us, skewed=skewed), once, sizes=[(64, True), (128, True)])
    assert [plan.choice for plan in plans] == [CROWDS[0], FAST]
    assert crowds & {choice for tokens, choice in once.made if tokens == 64}
    assert not crowds & {choice for tokens, choice in once.made if tokens == 128}


@pytest.mark.parametrize("wrong", [None, FAST, CROWDS[0]])
def test_a_record_of_another_version_is_checked_without_its_tiles_for_crowds_too(
    wrong: Choice | None, tmp_path: Path
) -> None:
    """Where even routing crowds, nothing else runs what serves all other calls."""
    backend = FakeBackend()
    store = fake_store(tmp_path, backend)
    store.add(64, 0, fake_record(CROWDS[0], moert="0"))
    if wrong is not None:
        backend.spoil[wrong] = lambda y, *_: y * 1.01
    (plan,) = tune(tmp_path, FakeProbes({PHASED: 1.0}), backend, sizes=[(64, True)], store=store)
    assert plan.choice == (CROWDS[0] if wrong is None else PHASED)


def test_tiles_for_crowds_of_the_default(tmp_path: Path) -> None:
    """They need not beat it by even routing; what others have does not count."""
    backend = FakeBackend()
    own = replace(DEFAULT, crowded=TALL[:1] * 2)
    backend.crowded = {DEFAULT: [own], FAST: CROWDS}
    probes = FakeProbes({FAST: 99.0, own: 101.0}, skewed={own: 50.0, CROWDS[0]: 1.0})
    (plan,) = tune(tmp_path, probes, backend, sizes=[(64, True)])
    assert plan.choice == own
    assert CROWDS[0] not in {choice for choice, _ in probes.timed}


def test_wrong_tiles_for_crowds_never_win(tmp_path: Path) -> None:
    """What is right by even routing may be wrong where rows crowd: that is looked at too."""
    backend = FakeBackend()
    backend.crowded[FAST] = CROWDS

    def spoil(y: torch.Tensor, call: Call, _: object) -> torch.Tensor:
        ids = call.topk.ids
        return y * 1.01 if (ids == ids[:1]).all() else y

    backend.spoil[CROWDS[0]] = spoil
    probes = FakeProbes({FAST: 50.0, **dict.fromkeys(CROWDS, 50.0)}, skewed={CROWDS[0]: 1.0})
    (plan,) = tune(tmp_path, probes, backend, sizes=[(64, True)])
    assert plan.choice == FAST
    assert CROWDS[1] in {choice for choice, _ in probes.timed}


def test_few_tokens_make_no_crowd(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.crowded[FAST] = CROWDS
    probes = FakeProbes({FAST: 50.0}, skewed={CROWDS[0]: 1.0})
    (plan,) = tune(tmp_path, probes, backend, sizes=[(8, True)])
    assert plan.choice == FAST and not {choice for choice, _ in probes.timed} & set(CROWDS)


def test_few_tokens_are_timed_by_even_routing_alone(tmp_path: Path) -> None:
    probes = FakeProbes({FAST: 50.0, PHASED: 50.5}, skewed={FAST: 40.0, PHASED: 20.0})
    (plan,) = tune(tmp_path, probes, sizes=[(8, True)])
    assert plan.choice == FAST and not any(repeated.skewed for repeated in probes.repeats)


@pytest.mark.parametrize(
    ("tokens", "crowded_bm", "live"),
    [(100, 64, 64), (128, 64, 128), (250, 64, 192), (48, 64, 48), (100, 0, 100)],
)
def test_a_crowd_is_as_many_rows_as_certainly_are_one(
    tokens: int, crowded_bm: int, live: int
) -> None:
    """All of them on one token's experts, whatever its ids; the others are neither read nor written."""
    backend = FakeBackend()
    check, call = Check(CFG, backend.weights, tokens), new_call(CFG, torch.device("cpu"))
    arena = Arena(torch.device("cpu"), 256)
    views = arena.views(backend.fields(tokens, DEFAULT))
    seen: list[tuple[int, bool]] = []

    def run(call: Call) -> None:
        ids = call.topk.ids
        seen.append((call.live_on_host(), bool((ids == ids[:1]).all())))
        backend.program(tokens, DEFAULT, views).run(call, 0)

    assert check.crowded_fault(run, call, arena, crowded_bm) is None
    assert seen == [(live, True)]
    wrong = FakeBackend(weights=backend.weights)
    wrong.spoil[DEFAULT] = lambda y, *_: y * 1.01
    fault = check.crowded_fault(
        lambda call: wrong.program(tokens, DEFAULT, views).run(call, 0), call, arena, crowded_bm
    )
    assert fault is not None and fault.startswith("all tokens on the same experts")
