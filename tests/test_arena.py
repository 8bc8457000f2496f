"""The arena: where fields lie, and that the views never move."""

from __future__ import annotations

import random

import pytest
import torch

from moert.arena import ALIGNMENT, Arena, Field, layout

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8)


def random_fields(seed: int) -> list[Field]:
    rng = random.Random(seed)
    return [
        Field(f"f{i}", tuple(rng.randint(0, 9) for _ in range(rng.randint(1, 3))), dtype)
        for i, dtype in enumerate(rng.choices(DTYPES, k=rng.randint(1, 9)))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_fields_lie_in_order_aligned_and_apart(seed: int) -> None:
    fields = random_fields(seed)
    offsets, total = layout(fields)
    end = 0
    for field in fields:
        assert offsets[field.name] % ALIGNMENT == 0
        assert offsets[field.name] >= end
        end = offsets[field.name] + field.nbytes
    assert end <= total < end + ALIGNMENT
    assert total == sum(-(-f.nbytes // ALIGNMENT) * ALIGNMENT for f in fields)


@pytest.mark.parametrize("seed", range(20))
def test_writing_one_view_leaves_the_others(seed: int) -> None:
    fields = random_fields(seed)
    arena = Arena(CPU, layout(fields)[1])
    views = arena.views(fields)
    for number, view in enumerate(views.values()):
        view.fill_(number)
    for number, field in enumerate(fields):
        view = views[field.name]
        assert (view.shape, view.dtype) == (field.shape, field.dtype)
        assert view.is_contiguous()
        assert (view == number).all()


def test_the_same_fields_have_the_same_addresses() -> None:
    fields = random_fields(3)
    arena = Arena(CPU, layout(fields)[1])
    first, again = arena.views(fields), arena.views(iter(fields))
    assert [v.data_ptr() for v in first.values()] == [v.data_ptr() for v in again.values()]


def test_two_plans_overlay_each_other() -> None:
    """Every plan starts at offset zero, so the arena is as large as the largest, not as the sum."""
    small, large = [Field("a", (3,), torch.float32)], [Field("b", (1000,), torch.float32)]
    arena = Arena(CPU, layout(large)[1])
    arena.views(large)["b"].fill_(5)
    assert (arena.views(small)["a"] == 5).all()


def test_more_than_it_holds_is_a_bug_of_the_caller() -> None:
    arena = Arena(CPU, 512)
    assert arena.nbytes == 512
    with pytest.raises(ValueError, match="arena of 512 bytes asked for 1024"):
        arena.views([Field("a", (129,), torch.float32), Field("b", (1,), torch.uint8)])


def test_an_empty_arena_has_an_address() -> None:
    arena = Arena(CPU, 0)
    assert arena.nbytes == ALIGNMENT
    assert arena.views([]) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_is_nan_or_minus_one(dtype: torch.dtype) -> None:
    fields = [Field("a", (7, 3), dtype)]
    arena = Arena(CPU, layout(fields)[1])
    arena.poison()
    a = arena.views(fields)["a"]
    assert (
        a.isnan().all()
        if dtype.is_floating_point
        else (a == (255 if dtype is torch.uint8 else -1)).all()
    )


def test_contains() -> None:
    arena = Arena(CPU, 1024)
    view = arena.views([Field("a", (4,), torch.float32), Field("b", (8,), torch.int64)])["b"]
    assert arena.contains(view)
    assert arena.contains(view[7:])
    assert not arena.contains(torch.empty(4))
    assert not arena.contains(Arena(CPU, 1024).views([Field("a", (4,), torch.float32)])["a"])
