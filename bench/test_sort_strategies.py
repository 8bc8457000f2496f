"""Device time of each sorting strategy over E and T; on a CPU, of the one sort that there is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from device_timing import DEVICE, GPU, device_samples, replayable
from layer_chain import uniform_ids
from matrix import Matrix

from moert.steps.sorting import sort

TOP_K, BLOCK_M = 8, 16


@cache
def times(experts: int, tokens: int, matrix_key: bool) -> dict[str, list[float]]:
    """Microseconds of one sort by every strategy that can do it, interleaved."""
    matrix = Matrix.here(matrix_key)
    if not GPU:
        ids = uniform_ids(tokens, experts, TOP_K)
        weights = torch.rand(tokens, TOP_K, device=DEVICE)
        runs = {"one_shot": lambda: sort(ids, weights, experts, BLOCK_M)}
        return device_samples(runs, matrix.group_ms, matrix.rounds)
    from bench_sort import REPEATS, sort_runs

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(REPEATS):
                run()

        return many

    runs = {n: replayable(repeated(run)) for n, run in sort_runs(experts, tokens).items()}
    samples = device_samples(runs, matrix.group_ms, matrix.rounds)
    return {name: [us / REPEATS for us in values] for name, values in samples.items()}


@pytest.mark.parametrize("strategy", ["one_shot", "multi_phase"])
def test_sort(
    strategy: str,
    sort_experts: int,
    sort_tokens: int,
    matrix: Matrix,
    record: Callable[..., None],
    side_stream: None,
) -> None:
    found = times(sort_experts, sort_tokens, matrix.smoke)
    if strategy not in found:
        pytest.skip(f"{strategy} cannot sort T={sort_tokens}, E={sort_experts} here")
    record(
        found[strategy],
        f"sort E={sort_experts}",
        tokens=sort_tokens,
        experts=sort_experts,
        top_k=TOP_K,
    )
