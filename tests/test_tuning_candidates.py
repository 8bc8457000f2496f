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
