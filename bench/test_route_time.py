"""Device time of routing: logits [T, E] to ids and weights [T, K]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device_timing import DEVICE, device_samples, replayable
from layer_chain import make_layers
from matrix import Matrix

REPEATS = 20


@pytest.fixture(scope="module")
def runtime(matrix: Matrix) -> Iterator[Any]:
    (layer,) = make_layers(matrix.usual, 1, tune="off", max_tokens=512, buckets=(512,))
    with layer:
        yield layer


def test_routing(
    sort_tokens: int, runtime: Any, matrix: Matrix, record: Callable[..., None], side_stream: None
) -> None:
    cfg = runtime.cfg
    logits = torch.randn(sort_tokens, cfg.num_experts, device=DEVICE).to(cfg.torch_dtype)

    def many() -> None:
        for _ in range(REPEATS):
            runtime.route(logits)

    samples = device_samples({"": replayable(many)}, matrix.group_ms, matrix.rounds)[""]
    record(
        [us / REPEATS for us in samples],
        "routing",
        tokens=sort_tokens,
        experts=cfg.num_experts,
        top_k=cfg.top_k,
        backend=runtime.plan().backend,
    )
