"""Which choices are timed for a bucket."""

from __future__ import annotations

import pytest
from tuning_fakes import CHOICES, DIRECT, PHASED, FakeBackend

from moert.errors import ConfigError
from moert.plan import STRATEGIES, Choice, Tile
from moert.tuning.candidates import allowed_candidates, crossed, strategies_for

A, B, C = (Tile(16, bn, 16) for bn in (16, 32, 64))


def test_crossed_pairs_differ_from_the_best_in_tiles_alone() -> None:
    pairs = {
        Choice("one_shot", A, A): 3.0,
        Choice("one_shot", B, A): 1.0,
        Choice("one_shot", A, C): 2.0,
    }
    others = {
        Choice("multi_phase", C, B): 1.5,
        Choice("one_shot", Tile(32, 16, 16), B): 1.6,
        Choice("one_shot", C, B, dependent=True): 1.7,
    }
    assert crossed(pairs | others) == [Choice("one_shot", B, C)]
    assert (
        crossed({})
        == crossed({Choice("none"): 1.0})
        == crossed({Choice("one_shot", A, A): 1.0})
        == []
    )


def test_unsorted_kinds_of_kernels_are_crossed() -> None:
    """What is best of each kind, however far behind its partner put it; more than of sorted ones."""
    first, second, third = (Tile(8, bn, 64, 4, 3, "stream", 4) for bn in (16, 32, 64))
    plain = {Choice("none", A, A): 5.0, Choice("none", B, A): 4.0}
    rings = {
        Choice("none", first, first): 1.0,
        Choice("none", second, first): 2.0,
        Choice("none", third, first): 3.0,
    }
    found = crossed(plain | rings)
    assert found == [
        *(Choice("none", up, A) for up in (first, second, third)),
        *(Choice("none", up, first) for up in (B, A)),
    ]
    many = {Choice("none", Tile(8, n, 64, kernel="stream"), first): n for n in range(1, 9)}
    ups = {c.gate_up for c in crossed(plain | {choice: n / 10 for choice, n in many.items()})}
    assert ups == {*(c.gate_up for c in list(many)[:6]), B}
    assert not any(c.strategy == "none" for c in crossed(plain | {PHASED: 0.5}))


def test_default_of_a_policy() -> None:
    backend = FakeBackend()
    assert strategies_for(0) == STRATEGIES
    assert allowed_candidates(backend, 8, 0) == list(CHOICES)
    assert allowed_candidates(backend, 8, 2) == [PHASED]
    # a backend that has nothing to choose offers its default under every policy
    assert allowed_candidates(FakeBackend(choices=[DIRECT]), 8, 1) == [DIRECT]


def test_a_policy_that_cannot_serve_a_bucket_is_refused() -> None:
    backend = FakeBackend()
    backend.infeasible = lambda strategy, tokens: "too many rows" if tokens > 8 else None
    assert allowed_candidates(backend, 8, 1)
    with pytest.raises(
        ConfigError, match=r"sort_policy=1 \(one-shot\) cannot serve 9 tokens: too many"
    ):
        allowed_candidates(backend, 9, 1)
    assert allowed_candidates(backend, 9, 0)
