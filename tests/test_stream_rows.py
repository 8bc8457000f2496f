"""Which rows a program of a stream takes: every routed row belongs to exactly one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gluon_on_cpu import Pointer, Value, bound

from moert.steps.streaming.rows import BEFORE, gathered_rows, taken_blocks
from moert.steps.streaming.shape import StreamShape

EXPERTS = 6


def shape(together: int = 1, bm: int = 8) -> StreamShape:
    return StreamShape(
        *(False, False, 64, 64, 64, False, False, 0, 0),
        bm=bm,
        row_tiles=1,
        row_warps=1,
        split=1,
        blocks=1,
        stages=2,
        together=together,
    )


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize(
    "counts", [[1], [1, 2, 3, 4, 5], [7, 1, 8], [int(BEFORE.value) + 5, 2], [300], [1] * 9]
)
def test_every_block_is_taken_once(counts: list[int], together: int) -> None:
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    # behind the last block there is anything
    ids = torch.tensor(experts + [experts[-1]] * 3, dtype=torch.int32)
    function, taken, programs = bound(taken_blocks), [], 0
    for block, expert in enumerate(experts):
        count = int(
            function(
                Pointer(ids), Value(block), Value(len(experts)), Value(expert), shape(together)
            ).data
        )
        assert 0 <= count <= together
        assert experts[block : block + count] == [expert] * count
        taken += range(block, block + count)
        programs += count > 0
    assert taken == list(range(len(experts)))
    # no more programs than there have to be, as far as a program looks
    if max(counts) <= int(BEFORE.value):
        assert programs == sum(-(-count // together) for count in counts)


def ids_of(case: str, tokens: int, slots: int) -> torch.Tensor:
    torch.manual_seed(tokens * 31 + slots)
    if case == "same":
        return torch.arange(slots, dtype=torch.int32).expand(tokens, -1).contiguous()
    ids = torch.randint(0, EXPERTS, (tokens, slots), dtype=torch.int32)  # the same twice, too
    if case == "strange":
        ids[torch.rand(tokens, slots) < 0.4] = -1
        ids[0, 0], ids[-1, -1] = EXPERTS, 1 << 30
    return ids


@pytest.mark.parametrize("case", ["random", "same", "strange"])
@pytest.mark.parametrize(("tokens", "slots", "live"), [(1, 1, 1), (5, 3, 5), (8, 4, 8), (8, 5, 3)])
def test_every_routed_row_is_gathered_once(case: str, tokens: int, slots: int, live: int) -> None:
    ids, function, found = ids_of(case, tokens, slots), bound(gathered_rows), []
    for row in range(tokens * slots):
        packed, expert = function(
            Pointer(ids), Value(slots), Value(1), Value(live), Value(row), EXPERTS, slots, shape()
        )
        if int(expert.data) < 0:
            continue
        for column, word in enumerate(packed.data.tolist()):
            slot, token = word >> 24, word & 0xFFFFFF
            if slot < slots:
                assert token == column and int(ids[token, slot]) == int(expert.data)
                found.append(token * slots + slot)
    routed = [
        row for row in range(live * slots) if 0 <= int(ids[row // slots, row % slots]) < EXPERTS
    ]
    assert sorted(found) == routed


def test_an_expert_of_all_tokens_is_one_programs() -> None:
    ids = torch.zeros(8, 1, dtype=torch.int32)
    function = bound(gathered_rows)
    leads = [
        int(
            function(
                *(Pointer(ids), Value(1), Value(1), Value(8), Value(row), EXPERTS, 1, shape())
            )[1].data
        )
        for row in range(8)
    ]
    assert leads == [0] + [-1] * 7
