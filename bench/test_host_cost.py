"""Host time of one `forward`: the tensors of the last call, tensors at new addresses, a bare graph replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_timing import GPU, host_samples
from layer_chain import make_chain, make_layers
from matrix import Matrix

TOKENS = 8


@pytest.fixture(scope="module")
def runtime(matrix: Matrix) -> Iterator[Any]:
    """A quarter of the usual experts: the host does the same for any number."""
    cfg = replace(matrix.usual, num_experts=max(8, matrix.usual.num_experts // 4))
    (layer,) = make_layers(cfg, 1, tune="off", max_tokens=64, buckets=(1, 8))
    with layer:
        yield layer


def bare_replay(layer: Any) -> Callable[[], object]:
    """A captured call as torch replays it, nothing around it."""
    chain = make_chain([layer], TOKENS, seed=0)
    graph = torch.cuda.CUDAGraph()
    layer.forward(chain.rows[0], chain.topks[0], chain.rows[1])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chain.run()
    return graph.replay


@pytest.mark.parametrize("kind", ["same-addresses", "new-addresses", "bare-replay"])
def test_host_cost(
    kind: str, runtime: Any, matrix: Matrix, record: Callable[..., None], side_stream: None
) -> None:
    chains = [make_chain([runtime], TOKENS, seed=seed) for seed in range(2)]
    turn = [0]

    def alternate() -> None:
        turn[0] ^= 1
        chains[turn[0]].run()

    if kind == "bare-replay" and not GPU:
        pytest.skip("there are no graphs on a CPU")
    run = {
        "same-addresses": lambda: chains[0].run(),
        "new-addresses": alternate,
        "bare-replay": bare_replay(runtime) if GPU else alternate,
    }[kind]
    for _ in range(3):
        run()
    us = host_samples(run, count=20, rounds=5 if matrix.smoke else 50)
    plan = runtime.plan().for_tokens(TOKENS)
    # the host's clock is noisier than events on the device
    record(us, "host", tokens=TOKENS, plan=str(plan.choice), regression_percent=30)
