"""Bytes that layers which share take, by purpose, as the runtime tells and beside what their plans need."""

from __future__ import annotations

from collections.abc import Callable

from layer_chain import make_layers
from matrix import Matrix


def test_memory_use(matrix: Matrix, record_bytes: Callable[[dict[str, int]], None]) -> None:
    layers = make_layers(matrix.usual, 2, tune="off", max_tokens=512)
    first = layers[0]
    sizes = {name: nbytes for name, nbytes in first.memory().items() if name != "total"}
    needed = max(plan.scratch_bytes for plan in first.plan())
    for layer in layers:
        layer.close()
    assert sizes["arena"] <= 1.1 * needed
    record_bytes({**sizes, "largest plan needs": needed})
