"""Device time of a layer per format, shape and T: chained layers, cold weights, graph replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layer_chain import check, make_chain


def test_decode(layers: list[Any], tokens: int, chain_times: Callable[..., None]) -> None:
    chain = make_chain(layers, tokens, seed=tokens)
    error = check(chain)
    chain_times(chain, f"decode T={tokens}", error=error)
