"""Every call of AITER's operators: buffers and order; whatever is left out or exchanged is noticed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import aiter_stand_in
import pytest
import torch
from aiter_cases import CFG, NAN, SEQUENCE, assert_right, make, poison, routing, rows
from aiter_stand_in import Broken, Called, StandIn
from torch.utils._python_dispatch import TorchDispatchMode

from moert import MoERuntime
from moert.backends.aiter import AiterBackend

SHAPES = {  # of a call of T=3 in the bucket of 4, K=2, blocks of 32: at most 5 experts, a block each
    "topk_ids": (3, 2),
    "topk_weights": (3, 2),
    "sorted_token_ids": (160,),
    "sorted_weights": (160,),
    "sorted_expert_ids": (5,),
    "num_valid_ids": (2,),
    "local_expert_mask": (6,),
    "hidden_states": (3, 128),
    "moe_buf": (3, 128),
    "w1": (5, 256, 128),
    "w2": (5, 128, 128),
    "inter_states": (3, 2, 128),
    "out": (3, 128),
}
DTYPES = dict.fromkeys(SHAPES, torch.int32) | dict.fromkeys(
    ("hidden_states", "moe_buf", "w1", "w2", "inter_states", "out"), torch.float16
)
DTYPES |= {"topk_weights": torch.float32, "sorted_weights": torch.float32, "workspace": torch.uint8}
# of a call that is not made as it should be
FAILURES = (Broken, AssertionError, IndexError, RuntimeError, ValueError)
SAME = ("sorted_token_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "w1", "w2")


@pytest.mark.parametrize("policy", [1, 2])
def test_shapes_dtypes_and_addresses(aiter: StandIn, policy: int) -> None:
    rt = make(sort_policy=policy)
    backend = rt._built.backend
    assert isinstance(backend, AiterBackend) and rt._group.arena is not None
    x, topk, out = rows(CFG, 3), routing(CFG, 3), rows(CFG, 3, NAN)
    rt.forward(x, topk, out)
    packed = backend.packed
    outside = {
        "hidden_states": x,
        "moe_buf": out,
        "w1": packed.w1,
        "w2": packed.w2,
        "local_expert_mask": packed.expert_mask,
    }
    seen: dict[str, int] = {}
    for call in aiter.calls:
        for name, value in call.args.items():
            if not isinstance(value, torch.Tensor):
                continue
            shape = SHAPES.get(name)
            if (call.name, name) == ("ck_moe_stage1_fwd", "out"):
                shape = (3, 2, 128)
                assert rt._group.arena.contains(value)
                intermediate = value.data_ptr()
            elif name == "out":
                assert value.data_ptr() == out.data_ptr()
            elif name in outside:
                assert value.data_ptr() == outside[name].data_ptr(), name
            else:
                assert rt._group.arena.contains(value), name
            if name in SAME:
                assert seen.setdefault(name, value.data_ptr()) == value.data_ptr(), name
            if name != "workspace":
                assert tuple(value.shape) == shape, (call.name, name)
            assert value.dtype == DTYPES[name], name
            assert value.is_contiguous()
    sort, stage1, stage2 = (call.args for call in aiter.calls)
    assert stage2["inter_states"].data_ptr() == intermediate
    assert (sort["num_experts"], sort["unit_size"], sort["dispatch_policy"]) == (6, 32, policy)
    assert sort["local_expert_mask"].tolist() == [1, 1, 1, 1, 1, 0]
    assert sort["num_local_tokens"] is None
    assert stage1["block_m"] == stage2["block_m"] == 32 and stage1["topk"] == stage2["topk"] == 2
    assert stage1["sorted_weights"] is None and stage2["sorted_weights"] is not None
    assert (sort["workspace"] is None) == (policy == 1)
    assert out.data_ptr() not in {p for n, p in seen.items() if n != "out"}


def test_buffers_of_a_call_do_not_overlap(aiter: StandIn) -> None:
    rt = make(sort_policy=2)
    rt.forward(rows(CFG, 6), routing(CFG, 6))
    places = {
        (v.data_ptr(), v.data_ptr() + v.numel() * v.element_size())
        for call in aiter.calls
        for v in call.args.values()
        if isinstance(v, torch.Tensor) and v.numel()
    }
    for (_, end), (start, _) in itertools.pairwise(sorted(places)):
        assert end <= start


class Operations(TorchDispatchMode):
    """Names of torch's operations while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_a_call_allocates_and_copies_nothing(
    aiter: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a call does itself: operators record only, and the kernels of ours are left out."""
    rt, x, topk = make(), rows(CFG, 3), routing(CFG, 3)
    for program in rt._executor._programs:
        for kernel in ("_check", "_clear"):
            monkeypatch.setattr(getattr(program, kernel), "run", lambda call, stream: None)
    aiter.inert = True
    with Operations() as first:
        rt.forward(x, topk)
    assert set(first.names) <= {"aten.slice", "aten.view", "aten.select"}
    with Operations() as again:
        rt.forward(x, topk)
        rt.forward(x, topk, num_valid=torch.tensor(2, dtype=torch.int32))
    # the test's own scalar, and its check
    assert set(again.names) <= {"aten.lift_fresh", "aten.view"}
    assert len(aiter.calls) == 9


def ordinary(aiter: StandIn, rt: MoERuntime) -> bool:
    """Whether a call on a poisoned arena gives the right numbers."""
    x, topk, out = rows(CFG, 4), routing(CFG, 4), rows(CFG, 4, NAN)
    poison(rt)
    try:
        rt.forward(x, topk, out)
        assert_right(out, x, topk, rt)
    except FAILURES:
        return False
    return True


@pytest.fixture(params=[1, 2], ids=["one-shot", "multi-phase"])
def runtime(aiter: StandIn, request: pytest.FixtureRequest) -> Iterator[MoERuntime]:
    rt = make(sort_policy=request.param)
    assert ordinary(aiter, rt)
    yield rt
    aiter.change = lambda call: [call]
    assert ordinary(aiter, rt)  # nothing of a mutation is left behind


@pytest.mark.parametrize("name", SEQUENCE)
def test_no_call_can_be_left_out(aiter: StandIn, runtime: MoERuntime, name: str) -> None:
    aiter.change = lambda call: [] if call.name == name else [call]
    assert not ordinary(aiter, runtime)


@pytest.mark.parametrize("name", SEQUENCE[2:])
def test_no_accumulating_call_can_be_made_twice(
    aiter: StandIn, runtime: MoERuntime, name: str
) -> None:
    aiter.change = lambda call: [call] * (1 + (call.name == name))
    assert not ordinary(aiter, runtime)


def reordered(
    aiter: StandIn, rt: MoERuntime, order: tuple[int, ...], patch: pytest.MonkeyPatch, **call: Any
) -> bool:
    """Whether a call gives the right numbers with its launches, ours among them, in another order."""
    held: list[Any] = []

    def hold(launch: Any) -> None:
        held.append(launch)
        if len(held) == len(order):  # within the call, whose addresses hold no longer
            for place in order:
                held[place]()

    def change(called: Called) -> list[Called]:
        hold(lambda: getattr(aiter_stand_in, called.name)(**called.args))
        return []

    aiter.change = change
    for program in rt._executor._programs:
        for own in (program._check, program._clear):
            real = own.run
            patch.setattr(own, "run", lambda *args, real=real: hold(lambda: real(*args)))
    x, topk, out = rows(CFG, 4), routing(CFG, 4), rows(CFG, 4, NAN)
    poison(rt)
    try:
        rt.forward(x, topk, out, **call)
        assert len(held) == len(order)
        assert_right(out, x, topk, rt)
    except FAILURES:
        return False
    finally:
        aiter.change = lambda called: [called]
    return True


def test_no_other_order(
    aiter: StandIn, runtime: MoERuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check, sort, stage 1, stage 2."""
    for order in itertools.permutations(range(4)):
        with monkeypatch.context() as patch:
            assert reordered(aiter, runtime, order, patch) == (order == (0, 1, 2, 3)), order


def test_no_other_order_where_live_rows_are_cleared(
    aiter: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check, clear, sort, stage 1, stage 2: clearing may come anywhere before what adds to the rows."""
    rt, live = make(), torch.tensor(4, dtype=torch.int32)
    for order in itertools.permutations(range(5)):
        rest = [place for place in order if place != 1]
        right = rest == sorted(rest) and order.index(1) < order.index(4)
        with monkeypatch.context() as patch:
            assert reordered(aiter, rt, order, patch, num_valid=live) == right, order


def test_the_check_of_ids_cannot_be_left_out(
    aiter: StandIn, runtime: MoERuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for program in runtime._executor._programs:
            patch.setattr(program._check, "run", lambda call, stream: None)
        assert not ordinary(aiter, runtime)


def test_the_clearing_of_live_rows_cannot_be_left_out(
    aiter: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    rt, x, topk, out = make(), rows(CFG, 4), routing(CFG, 4), rows(CFG, 4, 7.0)
    for program in rt._executor._programs:
        monkeypatch.setattr(program._clear, "run", lambda call, stream: None)
    rt.forward(x, topk, out, num_valid=torch.tensor(4, dtype=torch.int32))
    with pytest.raises(AssertionError):
        assert_right(out, x, topk, rt)


def test_no_two_buffers_can_be_exchanged(aiter: StandIn) -> None:
    """Any tensor of any call with any other, of the same call or another one."""
    rt = make(sort_policy=2)
    assert ordinary(aiter, rt)
    places = [
        (index, name)
        for index, call in enumerate(aiter.calls[-3:])
        for name, value in call.args.items()
        if isinstance(value, torch.Tensor)
    ]
    assert len(places) == 9 + 7 + 8
    passed, skipped = [], 0
    for one, other in itertools.combinations(places, 2):
        if not exchanged(aiter, rt, one, other):
            skipped += 1
        elif aiter.right:  # type: ignore[attr-defined]
            passed.append((one, other))
    assert passed == []
    # lists and weights that several calls are given, two pairs or three of each
    assert skipped == 14


def exchanged(aiter: StandIn, rt: MoERuntime, one: tuple[int, str], other: tuple[int, str]) -> bool:
    """Run with two tensors exchanged, `aiter.right` tells the outcome; False if they are the same one."""
    held: list[Called] = []
    different = True

    def change(call: Called) -> list[Called]:
        nonlocal different
        held.append(call)
        if len(held) < 3:
            return []
        first, second = held[one[0]].args, held[other[0]].args
        a, b = first[one[1]], second[other[1]]
        different = a.data_ptr() != b.data_ptr() or a.shape != b.shape
        first[one[1]], second[other[1]] = b, a
        return held

    aiter.change = change
    try:
        aiter.right = ordinary(aiter, rt)  # type: ignore[attr-defined]
    finally:
        aiter.change = lambda call: [call]
    return different
