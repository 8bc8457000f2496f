"""Every call of AITER's operators: buffers and order; whatever is left out or exchanged is noticed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

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
    except (Broken, AssertionError, IndexError, RuntimeError, ValueError):
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


@pytest.mark.parametrize(
    "order", [order for order in itertools.permutations(range(3)) if order != (0, 1, 2)], ids=str
)
def test_no_other_order(aiter: StandIn, runtime: MoERuntime, order: tuple[int, ...]) -> None:
    held: list[Called] = []

    def change(call: Called) -> list[Called]:
        held.append(call)
        if len(held) < 3:
            return []
        calls = [held[i] for i in order]
        held.clear()
        return calls

    aiter.change = change
    assert not ordinary(aiter, runtime)


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


def pairs_of_buffers() -> list[tuple[str, str, str]]:
    tensors = {
        "moe_sorting_opus_fwd": [
            *("topk_ids", "topk_weights", "sorted_token_ids", "sorted_weights"),
            *("sorted_expert_ids", "num_valid_ids", "moe_buf", "local_expert_mask"),
        ],
        "ck_moe_stage1_fwd": [
            *("hidden_states", "w1", "w2", "sorted_token_ids", "sorted_expert_ids"),
            *("num_valid_ids", "out"),
        ],
        "ck_moe_stage2_fwd": [
            *("inter_states", "w1", "w2", "sorted_token_ids", "sorted_expert_ids"),
            *("num_valid_ids", "out", "sorted_weights"),
        ],
    }
    return [
        (name, *pair) for name, all_ in tensors.items() for pair in itertools.combinations(all_, 2)
    ]


@pytest.mark.parametrize(("name", "one", "other"), pairs_of_buffers())
def test_no_two_buffers_can_be_exchanged(aiter: StandIn, name: str, one: str, other: str) -> None:
    rt = make()

    def change(call: Called) -> list[Called]:
        if call.name == name:
            call.args[one], call.args[other] = call.args[other], call.args[one]
        return [call]

    aiter.change = change
    assert not ordinary(aiter, rt)
