"""moert's layer beside those of other projects: same weights, routing and chain, taking turns in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from device_timing import GPU, Run, device_samples, replayable, synchronize
from layer_chain import Chain, layer_count, make_chain, make_layers
from matrix import Matrix
from peers import PEERS, AbsentError, Call

from moert.steps.experts_reference import experts_reference

# they round more often than moert does
MAX_ERROR = 1e-2
Measured = tuple[dict[str, list[float]], dict[str, str], dict[str, Any]]


def chained(calls: list[Call], chain: Chain) -> Run:
    def run() -> None:
        x = chain.rows[0]
        for call, topk in zip(calls, chain.topks, strict=True):
            x = call(x, topk)

    return run


def prepared(name: str, chain: Chain) -> Run | str:
    """One peer's chain, checked and ready to be repeated; or why not: absent, wrong, not capturable."""
    x, topk, first = chain.rows[0], chain.topks[0], chain.layers[0]
    try:
        calls = [PEERS[name](layer.cfg, layer.weights, x.shape[0]) for layer in chain.layers]
        got = calls[0](x, topk).float()
        expected = experts_reference(x, topk, first.weights, first.cfg)
        error = float((got - expected).norm() / expected.norm())
        if not error <= MAX_ERROR:
            return f"relative error {error:.1e} against the reference"
        return replayable(chained(calls, chain))
    except AbsentError as reason:
        return str(reason)
    except Exception as problem:  # whatever another project raises is its reason
        lines = str(problem).strip().splitlines() or [""]
        return f"{type(problem).__name__}: {lines[0]}"
    finally:
        synchronize()


@pytest.fixture(scope="module")
def versus(matrix: Matrix) -> Iterator[Callable[[int], Measured]]:
    """`versus(tokens)`: samples by name, reasons of the absent, facts about moert's own."""
    cfg = replace(matrix.usual, dtype="bfloat16")
    count = 2 if matrix.smoke else layer_count(cfg)
    buckets = matrix.versus_tokens
    layers = make_layers(cfg, count, tune="off", max_tokens=max(buckets), buckets=buckets)

    @cache
    def measure(tokens: int) -> Measured:
        chain = make_chain(layers, tokens, seed=tokens)
        found = {name: prepared(name, chain) for name in PEERS}
        reasons = {name: reason for name, reason in found.items() if isinstance(reason, str)}
        runs = {"moert": replayable(chain.run)}
        runs |= {name: run for name, run in found.items() if not isinstance(run, str)}
        samples = device_samples(runs, matrix.group_ms, matrix.rounds)
        per_layer = {name: [us / count for us in values] for name, values in samples.items()}
        return per_layer, reasons, chain.facts(statistics.median(per_layer["moert"]))

    # closures over cached graphs would keep the weights alive
    with torch.inference_mode():
        yield measure
    measure.cache_clear()
    for layer in layers:
        layer.close()
    if GPU:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ["moert", *PEERS])
def test_versus(
    name: str,
    versus_tokens: int,
    versus: Callable[[int], Measured],
    record: Callable[..., None],
    side_stream: None,
) -> None:
    samples, reasons, facts = versus(versus_tokens)
    if name in reasons:
        pytest.skip(reasons[name])
    ours, this = (statistics.median(samples[n]) for n in ("moert", name))
    extra = facts if name == "moert" else {"tokens": versus_tokens, "reference": True}
    group = f"versus T={versus_tokens}"
    record(samples[name], group, **extra, times_moert=round(this / ours, 3))
