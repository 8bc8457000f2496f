"""Which calls show at start-up that a graph's nodes are the right ones.

Graphs themselves: test_hip_graphs.py, test_device_executor.py, and on a GPU test_gpu_contract.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from moert.capture import start_up_calls
from moert.plan import Choice, Plan, Tile
from moert.steps.sorting.layout import takes_crowded

TILE = Tile(16, 64, 64)


def calls(tokens: int, crowded_bm: int = 0) -> list[tuple[int, bool]]:
    crowd = Tile(crowded_bm, 64, 64)
    choice = Choice("one_shot", TILE, TILE, crowded=(crowd, crowd) if crowded_bm else None)
    return start_up_calls(Plan(tokens, True, choice, (), ()))


def test_one_call_where_one_pair_of_tiles_serves_all() -> None:
    assert calls(8) == [(8, False)]


@pytest.mark.parametrize(("tokens", "rows"), [(64, 64), (100, 64), (33, 33), (250, 192)])
def test_another_in_which_rows_crowd(tokens: int, rows: int) -> None:
    assert calls(tokens, 64) == [(tokens, False), (rows, True)]
    assert takes_crowded([rows] * 8, TILE.bm, 64)
