"""The sort: bounds, the torch versions, the public function on a CPU, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sorting_cases import CASES, LARGE, Case, Inputs, assert_sorted, make_inputs, poisoned

from moert.errors import InputError, UnsupportedError
from moert.steps.sorting import SortedRows, max_blocks, padded_rows, sort, sort_reference


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_reference(case: Case) -> None:
    inputs = make_inputs(case)
    args = (case.experts, case.block, inputs.live, inputs.mask)
    rows = sort_reference(inputs.ids, inputs.weights, *args)
    assert_sorted(rows, case, inputs)
    assert [t.numel() for t in rows[:2]] == [int(rows.num_valid_ids[0])] * 2


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_public_function_on_the_cpu(case: Case) -> None:
    inputs, buffers = make_inputs(case), poisoned(case)
    live = torch.tensor(inputs.live, dtype=torch.int32)
    args = (inputs.ids, inputs.weights, case.experts, case.block)
    rows = sort(*args, num_valid=live, expert_mask=inputs.mask, out=buffers)
    assert rows is buffers.rows
    assert_sorted(rows, case, inputs)
    # a plain SortedRows, and none at all
    again = poisoned(case).rows
    assert_sorted(sort(*args, num_valid=live, expert_mask=inputs.mask, out=again), case, inputs)
    fresh = sort(*args, num_valid=live, expert_mask=inputs.mask, policy=2)
    assert_sorted(fresh, case, inputs, poison=False)


@st.composite
def sorts(draw: st.DrawFn) -> tuple[Case, Inputs]:
    tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    experts, block = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    some = st.integers(-2, experts + 1)
    ids = draw(st.lists(some, min_size=tokens * top_k, max_size=tokens * top_k))
    mask = draw(st.none() | st.lists(st.integers(0, 1), min_size=experts, max_size=experts))
    weights = torch.arange(tokens * top_k, dtype=torch.float32).view(tokens, top_k)
    inputs = Inputs(
        torch.tensor(ids, dtype=torch.int64).view(tokens, top_k),
        weights,
        draw(st.integers(-1, 13)),
        None if mask is None else torch.tensor(mask, dtype=torch.int32),
    )
    return Case(tokens, experts, top_k, block, "any"), inputs


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sorts())
def test_any_sort_on_the_cpu(drawn: tuple[Case, Inputs]) -> None:
    case, inputs = drawn
    live = torch.tensor([inputs.live], dtype=torch.int32)
    rows = sort(
        inputs.ids, inputs.weights, case.experts, case.block,
        num_valid=live, expert_mask=inputs.mask, out=poisoned(case),
    )  # fmt: skip
    assert_sorted(rows, case, inputs)


def most_blocks(rows: int, experts: int, block: int) -> int:
    """The maximum over all ways to spread rows over experts, by dynamic programming."""
    best = [0] + [-1] * rows
    for _ in range(experts):
        best = [
            max(best[r - c] + -(-c // block) for c in range(r + 1) if best[r - c] >= 0)
            for r in range(rows + 1)
        ]
    return best[rows]


def test_bounds_are_tight() -> None:
    for rows in range(14):
        for experts in range(1, 6):
            for block in (1, 2, 3, 4, 16):
                exact = most_blocks(rows, experts, block)
                assert max_blocks(rows, 1, experts, block) == exact, (rows, experts, block)
                assert padded_rows(rows, 1, experts, block) == exact * block
    # never above the bound that users of AITER know: M*topk + E*unit - topk
    assert padded_rows(64, 8, 128, 32) <= 64 * 8 + 128 * 32 - 8


GOOD = {
    "topk_ids": torch.zeros(4, 2, dtype=torch.int32),
    "topk_weights": torch.zeros(4, 2),
    "num_experts": 8,
    "block_size": 16,
}
BAD = [
    ({"policy": 3}, InputError, "nothing to do; need 0, 1 or 2"),
    ({"policy": 4}, InputError, "got 4, need one of 0 .*1 .one-shot.*2 .multi-phase.*3 .no sort"),
    ({"policy": True}, InputError, "policy: got True"),
    ({"num_experts": 0}, InputError, "num_experts: got 0"),
    ({"block_size": 16.0}, InputError, "block_size: got 16.0"),
    ({"topk_ids": torch.zeros(8, dtype=torch.int32)}, InputError, r"got .*\[8\], need a tensor \[T, K\]"),
    ({"topk_ids": torch.zeros(4, 2)}, InputError, "float32, need torch.int32 or torch.int64"),
    ({"topk_ids": torch.zeros(2, 4, dtype=torch.int32).t()}, InputError, "need 1 between neighbours"),
    ({"topk_weights": torch.zeros(4, 3)}, InputError, r"got shape \[4, 3\], need \[4, 2\]"),
    ({"topk_weights": torch.zeros(4, 2, dtype=torch.float64)}, InputError, "got torch.float64"),
    ({"topk_weights": torch.zeros(4, 2, device="meta")}, InputError, "tensor on meta, need cpu"),
    ({"num_valid": 3}, InputError, "num_valid: got int"),
    ({"num_valid": torch.zeros(2, dtype=torch.int32)}, InputError, "got 2 values"),
    ({"num_valid": torch.zeros(1, dtype=torch.int64)}, InputError, "need torch.int32"),
    ({"expert_mask": torch.ones(7, dtype=torch.int32)}, InputError, r"got shape \[7\], need \[8\]"),
    ({"expert_mask": torch.ones(8, dtype=torch.bool)}, InputError, "bool, need torch.int32"),
    ({"out": torch.zeros(4)}, InputError, "out: got Tensor, need SortBuffers"),
    ({"out": SortedRows.empty(3, 2, 8, 16, "cpu")}, InputError, "need at least 128 contiguous"),
    (
        {"topk_ids": torch.zeros(1, 1, dtype=torch.int32).expand(2**24, 1),
         "topk_weights": torch.zeros(1, 1).expand(2**24, 1)},
        UnsupportedError, "T=16777216, supported is T < 2.24",
    ),
    (
        {"topk_ids": torch.zeros(1, 128, dtype=torch.int32), "topk_weights": torch.zeros(1, 128)},
        UnsupportedError, "K=128, supported is K <= 127",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=lambda value: None)
def test_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sort(**(GOOD | wrong))


def test_gradients_are_not_followed() -> None:
    args = GOOD | {"topk_weights": torch.rand(4, 2, requires_grad=True)}
    assert not sort(**args).sorted_weights.requires_grad
