"""Sorts to try, with the reason for each, and what must come out of them."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch

from moert.steps.sorting import SortBuffers, SortedRows

POISON = -12345


class Case(NamedTuple):
    """Arguments of a sort, and why it is tried."""

    tokens: int
    experts: int
    top_k: int
    block: int
    why: str
    live: int | None = None
    ids: str = "uniform"
    masked: bool = False
    dtype: torch.dtype = torch.float32
    wide: bool = False  # int64 ids
    strided: bool = False

    def __str__(self) -> str:
        return f"T{self.tokens}-E{self.experts}-K{self.top_k}-BM{self.block}-{self.why.replace(' ', '-')}"


CASES = [
    Case(0, 8, 2, 16, "no tokens"),
    Case(1, 1, 1, 1, "smallest of all"),
    Case(1, 128, 8, 16, "one token"),
    Case(5, 1, 1, 4, "one expert"),
    Case(7, 60, 4, 16, "E no power of two"),
    Case(9, 384, 6, 32, "more experts than rows"),
    Case(3, 1000, 32, 16, "large E and K"),
    Case(33, 16, 8, 16, "several rows an expert"),
    Case(13, 8, 2, 5, "block no power of two"),
    Case(45, 3, 2, 80, "block no power of two, one and two of an expert", ids="hot"),
    Case(45, 8, 4, 160, "block no power of two, larger than all rows", live=40),
    Case(17, 8, 3, 64, "block larger than all rows", live=11),
    Case(40, 32, 4, 16, "one expert takes all", ids="same"),
    Case(40, 32, 4, 16, "one hot expert", ids="hot"),
    Case(16, 64, 4, 16, "every expert once", ids="permutation"),
    Case(21, 5, 8, 8, "a token names experts twice", ids="few"),
    Case(19, 24, 3, 16, "ids outside", ids="outside"),
    Case(19, 24, 3, 16, "wide ids outside", ids="outside", wide=True),
    Case(12, 24, 3, 16, "no id inside", ids="none"),
    Case(20, 32, 4, 16, "experts masked", masked=True),
    Case(20, 32, 4, 16, "masked and outside and dead", masked=True, ids="outside", live=13),
    Case(23, 16, 4, 16, "no live token", live=0),
    Case(23, 16, 4, 16, "a negative live count", live=-3),
    Case(23, 16, 4, 16, "a live count too large", live=99),
    Case(23, 16, 4, 16, "dead rows hold garbage", live=10),
    Case(15, 16, 4, 16, "half weights", dtype=torch.float16),
    Case(15, 16, 4, 16, "row strides", strided=True, wide=True, dtype=torch.float16),
]
# more rows than one tile of a kernel holds
LARGE = [
    Case(75, 40, 4, 32, "several tiles"),
    Case(130, 12, 2, 16, "last tile short", live=129, masked=True),
]


class Inputs(NamedTuple):
    ids: torch.Tensor
    weights: torch.Tensor
    live: int
    mask: torch.Tensor | None


def make_ids(case: Case, rng: random.Random) -> list[int]:
    rows, experts = case.tokens * case.top_k, case.experts
    if case.ids == "same":
        return [experts // 2] * rows
    if case.ids == "hot":
        return [3 if rng.random() < 0.8 else rng.randrange(experts) for _ in range(rows)]
    if case.ids == "permutation":
        return rng.sample(range(experts), experts)[:rows]
    if case.ids == "few":
        return [rng.randrange(min(3, experts)) for _ in range(rows)]
    outside = [-1, -2, experts, experts + 1, 2**30, -(2**31)]
    if case.wide:
        outside += [2**40, 2**32 + 1, -(2**32) + 1, 2**63 - 1]
    if case.ids == "none":
        return [rng.choice(outside) for _ in range(rows)]
    if case.ids == "outside":
        return [rng.choice([*outside, *range(experts)]) for _ in range(rows)]
    return [rng.randrange(experts) for _ in range(rows)]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (case.tokens, case.top_k)
    ids = torch.tensor(make_ids(case, rng), dtype=torch.int64 if case.wide else torch.int32)
    ids, weights = ids.view(shape), torch.rand(shape, generator=generator).to(case.dtype)
    live = case.tokens if case.live is None else case.live
    dead = slice(max(live, 0), None)
    weights[dead] = torch.nan
    ids[dead] = 0  # a valid expert: reading it would show
    if case.strided:
        more = (case.tokens, case.top_k + 3)
        ids = torch.full(more, 1, dtype=ids.dtype)[:, : case.top_k].copy_(ids)
        weights = torch.full(more, torch.nan, dtype=weights.dtype)[:, : case.top_k].copy_(weights)
    mask = None
    if case.masked:
        mask = torch.tensor([rng.randrange(2) for _ in range(case.experts)], dtype=torch.int32)
    return Inputs(ids, weights, live, mask)


def plain_sort(inputs: Inputs, experts: int, block: int) -> tuple[list[Any], ...]:
    """The definition in plain Python: bins in the order of arrival."""
    ids, weights = inputs.ids.tolist(), inputs.weights.tolist()
    tokens, top_k = inputs.ids.shape
    mask = inputs.mask.tolist() if inputs.mask is not None else [1] * experts
    live = max(0, min(tokens, inputs.live))
    bins: dict[int, list[tuple[int, float]]] = {}
    for t in range(live):
        for k in range(top_k):
            if 0 <= ids[t][k] < experts and mask[ids[t][k]]:
                bins.setdefault(ids[t][k], []).append((k * 2**24 + t, weights[t][k]))
    packed: list[int] = []
    sorted_weights: list[float] = []
    sorted_experts: list[int] = []
    for expert in sorted(bins):
        rows = bins[expert]
        while len(rows) % block:
            rows.append((top_k * 2**24 + tokens, 0.0))
        packed += [row for row, _ in rows]
        sorted_weights += [weight for _, weight in rows]
        sorted_experts += [sum(mask[:expert])] * (len(rows) // block)
    return packed, sorted_weights, sorted_experts, [len(packed), live]


def poisoned(case: Case, spare: int = 3) -> SortBuffers:
    sizes = (case.tokens, case.top_k, case.experts, case.block)
    empty = SortBuffers.empty(*sizes, "cpu")
    longer = [torch.full((t.numel() + spare,), POISON, dtype=t.dtype) for t in empty.rows]
    return SortBuffers(SortedRows(*longer), torch.full_like(empty.scratch, POISON))


def assert_sorted(rows: SortedRows, case: Case, inputs: Inputs, poison: bool = True) -> None:
    packed, weights, experts, num_valid = plain_sort(inputs, case.experts, case.block)
    rows = SortedRows(*(tensor.cpu() for tensor in rows))
    assert rows.num_valid_ids[:2].tolist() == num_valid
    assert rows.sorted_token_ids[: len(packed)].tolist() == packed
    assert rows.sorted_weights[: len(packed)].tolist() == weights
    assert rows.sorted_expert_ids[: len(experts)].tolist() == experts
    if poison:
        for tensor, used in zip(rows, (len(packed), len(packed), len(experts), 2), strict=True):
            assert (tensor[used:] == POISON).all(), "written past the rows in use"
