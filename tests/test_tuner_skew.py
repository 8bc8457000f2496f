"""What the tuner makes of times where all tokens take the same experts, planted as in test_tuner.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_fakes import DEFAULT, FAST, PHASED, FakeBackend, FakeProbes, tune

from moert.call import Call
from moert.plan import Choice, Tile


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
