"""The key of a call tells apart what must be told apart; the packed values are what the tensors say."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moert.call import NAMES, Call, call_key
from moert.steps.call_args import CALL_ARGS
from moert.topk import TopK

H, K, T = 32, 3, 4
NO_LIMIT = torch.tensor(2**31 - 1, dtype=torch.int32)
C_TYPES = {"i64": ctypes.c_int64, "i32": ctypes.c_int32}


def aligned(
    rows: int, columns: int, dtype: torch.dtype, row: int = 0, shift: int = 0
) -> torch.Tensor:
    """`row` elements a row (default: columns); `shift` elements past a multiple of 64 bytes."""
    row = row or columns
    size = dtype.itemsize
    buffer = torch.zeros(rows * row + 64 + shift, dtype=dtype)
    first = -buffer.data_ptr() // size % (64 // size) + shift
    return buffer[first : first + rows * row].view(rows, row)[:, :columns]


def make_args(**changes: Any) -> dict[str, Any]:
    args = {
        "x": aligned(T, H, torch.float16),
        "weights": aligned(T, K, torch.float32),
        "ids": aligned(T, K, torch.int32),
        "out": aligned(T, H, torch.float16),
        "num_valid": None,
        "pad": "keep",
    }
    return args | changes


def key_of(args: dict[str, Any]) -> Any:
    return call_key(
        args["x"], TopK(args["weights"], args["ids"]), args["out"], args["num_valid"], args["pad"]
    )


def set_call(args: dict[str, Any], row_multiple: int = 16) -> Call:
    call = Call(NO_LIMIT, row_multiple)
    topk = TopK(args["weights"], args["ids"])
    call.set(key_of(args), args["x"], topk, args["out"], args["num_valid"])
    return call


def test_the_key_is_no_object_identity() -> None:
    args = make_args(num_valid=torch.tensor([2], dtype=torch.int32))
    views = {name: v[:] if isinstance(v, torch.Tensor) else v for name, v in args.items()}
    assert all(
        views[name] is not args[name] for name in ("x", "weights", "ids", "out", "num_valid")
    )
    assert key_of(views) == key_of(args)


def restrided(tensor: torch.Tensor) -> torch.Tensor:
    rows, columns = tensor.shape
    return tensor.as_strided((rows, columns), (columns - 1, 1))


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "address": lambda t: aligned(*t.shape, t.dtype),
    "shape": lambda t: t[:-1],
    "columns": lambda t: t.as_strided((t.shape[0], t.shape[1] - 1), t.stride()),
    "stride": restrided,
    "inner stride": lambda t: t.as_strided((t.shape[0], t.shape[1]), (t.stride(0), 0)),
    "dtype": lambda t: t.view(torch.int16 if t.dtype.itemsize == 2 else torch.uint32),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["x", "weights", "ids", "out"])
def test_every_property_of_every_tensor_counts(name: str, change: str) -> None:
    args = make_args()
    changed = CHANGES[change](args[name])
    if change != "address":
        assert changed.data_ptr() == args[name].data_ptr()
    assert key_of(args | {name: changed}) != key_of(args)


@pytest.mark.parametrize("name", ["x", "weights", "out"])
def test_requires_grad_counts(name: str) -> None:
    args = make_args()
    assert key_of(args | {name: args[name].detach().requires_grad_()}) != key_of(args)


def test_num_valid_and_pad_count() -> None:
    two = torch.tensor([2, 2], dtype=torch.int32)
    keys = [
        key_of(make_args_at(**changes))
        for changes in (
            {},
            {"pad": "zero"},
            {"num_valid": two[:1]},
            {"num_valid": two[1:]},
            {"num_valid": two},
            {"num_valid": two[:1].view(torch.float32)},
        )
    ]
    assert len(set(keys)) == len(keys)
    # its value is the device's business
    before = key_of(make_args_at(num_valid=two[:1]))
    two.fill_(1)
    assert key_of(make_args_at(num_valid=two[:1])) == before


ARGS = make_args()


def make_args_at(**changes: Any) -> dict[str, Any]:
    """The same tensors each time."""
    return ARGS | changes


@pytest.mark.parametrize("name", ["x", "weights", "ids", "out", "num_valid"])
def test_what_is_no_tensor_has_no_key(name: str) -> None:
    with pytest.raises(AttributeError):
        key_of(make_args(**{name: [1, 2]}))


def expected_values(args: dict[str, Any]) -> dict[str, int]:
    x, weights, ids, out = (args[name] for name in ("x", "weights", "ids", "out"))
    words = ids.dtype.itemsize // 4
    limit = NO_LIMIT if args["num_valid"] is None else args["num_valid"]
    many = x.shape[0] > 1
    return {
        "x_ptr": x.data_ptr(),
        "x_stride": x.stride(0) if many else 0,
        "ids_ptr": ids.data_ptr(),
        "ids_stride": ids.stride(0) * words,
        "ids_words": words,
        "weights_f32_ptr": weights.data_ptr(),
        "weights_ptr": weights.data_ptr(),
        "weights_stride": weights.stride(0),
        "weights_are_f32": int(weights.dtype == torch.float32),
        "out_ptr": out.data_ptr(),
        "out_stride": out.stride(0) if many else 0,
        "num_valid_ptr": limit.data_ptr(),
        "num_tokens": x.shape[0],
        "pad_zero": int(args["pad"] == "zero"),
    }


CALLS = {
    "plain": {},
    "strided": {
        "x": aligned(T, H, torch.float16, row=48),
        "ids": aligned(T, K, torch.int32, row=7),
        "weights": aligned(T, K, torch.float32, row=5),
        "out": aligned(T, H, torch.float16, row=64),
    },
    "int64 ids": {"ids": aligned(T, K, torch.int64, row=5)},
    "weights of the model": {"weights": aligned(T, K, torch.float16)},
    "num_valid": {"num_valid": torch.tensor(3, dtype=torch.int32)},
    "pad": {"pad": "zero"},
    "one broadcast row": {
        "x": aligned(1, H, torch.float16).expand(T, H),
        "ids": aligned(1, K, torch.int64).expand(T, K),
    },
    "one row of any stride": {
        "x": aligned(1, H, torch.float16).as_strided((1, H), (7, 1)),
        "out": aligned(1, H, torch.float16).as_strided((1, H), (1, 1)),
        "ids": aligned(1, K, torch.int32),
        "weights": aligned(1, K, torch.float32),
    },
    "huge stride": {"x": torch.empty(2**33, dtype=torch.float16, device="meta").view(4, -1)[:, :H]},
}


@pytest.mark.parametrize("name", CALLS)
def test_packed_values(name: str) -> None:
    """What launches take and what graph nodes are rewritten from is the same, and is what the tensors say."""
    args = make_args(**CALLS[name])
    call = set_call(args)
    values = dict(zip(NAMES, call.values, strict=True))
    assert values == expected_values(args)
    assert values.keys() == CALL_ARGS.keys()
    for argument, kind in CALL_ARGS.items():
        # as wide as the parameter that the driver copies from there
        stored = C_TYPES.get(kind, ctypes.c_uint64).from_address(call.address(argument))
        assert stored.value == values[argument], argument
    assert call.tokens == args["x"].shape[0]
    assert call.pad_zero == (args["pad"] == "zero")


def test_the_address_of_a_value_never_changes() -> None:
    call = Call(NO_LIMIT, 16)
    before = [call.address(name) for name in NAMES]
    for args in (make_args(), make_args(pad="zero")):
        call.set(key_of(args), args["x"], TopK(args["weights"], args["ids"]), args["out"], None)
        assert [call.address(name) for name in NAMES] == before


@pytest.mark.parametrize(
    ("changes", "with_16", "with_1"),
    [
        ({}, True, True),
        ({"x": aligned(T, H, torch.float16, shift=8)}, True, True),  # 16 bytes
        ({"x": aligned(T, H, torch.float16, shift=1)}, False, False),
        ({"x": aligned(T, H, torch.float16, shift=4)}, False, False),  # 8 bytes are not enough
        ({"out": aligned(T, H, torch.float16, shift=4)}, False, False),
        ({"ids": aligned(T, K, torch.int32, shift=1)}, False, False),
        ({"ids": aligned(T, K, torch.int64, shift=1)}, False, False),
        ({"weights": aligned(T, K, torch.float32, shift=2)}, False, False),
        ({"x": aligned(T, H, torch.float16, row=40)}, False, True),
        ({"out": aligned(T, H, torch.float16, row=33)}, False, True),
        ({"ids": aligned(T, K, torch.int32, row=5)}, True, True),  # their strides are never wide
        ({"num_valid": torch.zeros(3, dtype=torch.int32)[1:2]}, True, True),
        (CALLS["one row of any stride"], True, True),
    ],
)
def test_alignment(changes: dict[str, Any], with_16: bool, with_1: bool) -> None:
    args = make_args(**changes)
    assert set_call(args, 16).aligned == with_16
    assert set_call(args, 1).aligned == with_1


@pytest.mark.parametrize(
    ("value", "live"), [(None, T), (0, 0), (3, 3), (T, T), (T + 5, T), (-1, 0), (-(2**31), 0)]
)
def test_live_on_host(value: int | None, live: int) -> None:
    limit = None if value is None else torch.tensor([value], dtype=torch.int32)
    assert set_call(make_args(num_valid=limit)).live_on_host() == live


def test_a_released_call_keeps_values_but_no_tensor() -> None:
    args = make_args(num_valid=torch.tensor(3, dtype=torch.int32))
    call = set_call(args)
    values = call.values
    assert call.x is args["x"] and call.out is args["out"] and call.num_valid is args["num_valid"]
    call.release()
    assert {id(t) for t in (call.x, call.out, call.num_valid, *call.topk)} == {id(NO_LIMIT)}
    assert call.values == values


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
def test_interpreter_values(ids: torch.dtype, weights: torch.dtype) -> None:
    args = make_args(ids=aligned(T, K, ids, row=4), weights=aligned(T, K, weights))
    args["ids"][2, 1] = 2**40 + 7 if ids == torch.int64 else 7
    values = set_call(args).interpreter_values()
    assert values.keys() == CALL_ARGS.keys()
    flat = torch.as_strided(values["ids_ptr"], (T * 8,), (1,))
    words = values["ids_words"]
    assert flat[2 * values["ids_stride"] + words] == 7
    assert values["weights_f32_ptr"].dtype == torch.float32
    assert values["weights_ptr"].dtype == torch.float16
    used = "weights_f32_ptr" if weights == torch.float32 else "weights_ptr"
    assert values[used] is args["weights"]
    assert values["x_ptr"] is args["x"] and values["out_ptr"] is args["out"]
