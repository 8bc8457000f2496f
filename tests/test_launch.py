"""Launches as data: signatures, and that the interpreter runs what they say."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from launch_kernels import every_call_argument_kernel

from moert.call import NAMES, POSITION, Call, call_key
from moert.launch import CompiledLaunch, Launch, run_interpreted, signature
from moert.steps.call_args import CALL_ARGS, CALL_INTS
from moert.topk import TopK

E, K, H = 5, 2, 20
TABLE = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
LAUNCH = Launch(
    every_call_argument_kernel,
    lambda tokens: (tokens, 1, 1),
    {"table_ptr": TABLE, "absent_ptr": None, "scale": 0.5, "count": 0, "far": 2**40},
    {"E": E, "K": K, "H": H, "BH": 32, "ADD": 0.0},
)
ALIGNED = [["tt.divisibility", 16]]
NAMES_IN_ORDER = every_call_argument_kernel.arg_names


def divisible(launch: Launch, **options: Any) -> set[str]:
    attrs = signature(launch, torch.float16, **options)[2]
    assert all(value == ALIGNED for value in attrs.values())
    return {NAMES_IN_ORDER[index] for (index,) in attrs}


def test_the_kernel_above_takes_every_call_argument() -> None:
    assert set(NAMES_IN_ORDER) >= CALL_ARGS.keys() == POSITION.keys() == set(NAMES)
    assert set(CALL_INTS) == {name for name in CALL_ARGS if not name.endswith("_ptr")}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")],
)
def test_types(dtype: torch.dtype, name: str) -> None:
    sig, constants, _ = signature(LAUNCH, dtype, True, 16)
    assert list(sig) == NAMES_IN_ORDER
    types = {argument: kind.format(dtype=name) for argument, kind in CALL_ARGS.items()}
    assert {argument: sig[argument] for argument in CALL_ARGS} == types
    assert sig["table_ptr"] == "*fp32"
    assert (sig["scale"], sig["count"], sig["far"]) == ("fp32", "i32", "i64")
    compiled_in = {argument for argument, kind in sig.items() if kind == "constexpr"}
    assert compiled_in == {*LAUNCH.constants, "absent_ptr"} == constants.keys()
    assert constants == {**LAUNCH.constants, "absent_ptr": None}


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(16, dtype=torch.int64), "*i64"),
        (torch.zeros(16, dtype=torch.uint8), "*u8"),
        (torch.zeros(16, dtype=torch.bfloat16), "*bf16"),
        (torch.zeros(16, dtype=torch.int32), "*i32"),
    ],
)
def test_types_of_fixed_tensors(tensor: torch.Tensor, kind: str) -> None:
    launch = replace(LAUNCH, args={**LAUNCH.args, "absent_ptr": tensor})
    sig, constants, _ = signature(launch, torch.float16, True, 16)
    assert sig["absent_ptr"] == kind
    assert "absent_ptr" not in constants


POINTERS = {"x_ptr", "ids_ptr", "weights_f32_ptr", "weights_ptr", "out_ptr"}
FIXED = {"table_ptr", "count", "far"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"aligned": True, "row_multiple": 16}, FIXED | POINTERS | {"x_stride", "out_stride"}),
        ({"aligned": True, "row_multiple": 1}, FIXED | POINTERS),
        ({"aligned": False, "row_multiple": 16}, FIXED),
        ({"aligned": False, "row_multiple": 1}, FIXED),
    ],
)
def test_divisibility(options: dict[str, Any], expected: set[str]) -> None:
    """Never of num_valid_ptr (any scalar's address) nor of strides of ids and weights."""
    assert divisible(LAUNCH, **options) == expected


@pytest.mark.parametrize(
    ("name", "value"), [("table_ptr", torch.zeros(9)[1:]), ("count", 17), ("far", 2**40 + 8)]
)
def test_fixed_arguments_that_are_not_divisible(name: str, value: Any) -> None:
    launch = replace(LAUNCH, args={**LAUNCH.args, name: value})
    assert divisible(launch, aligned=False, row_multiple=16) == FIXED - {name}


def test_a_call_argument_can_be_a_constant() -> None:
    launch = replace(LAUNCH, constants={**LAUNCH.constants, "weights_are_f32": 1})
    sig, constants, _ = signature(launch, torch.float16, True, 16)
    assert sig["weights_are_f32"] == "constexpr"
    assert constants["weights_are_f32"] == 1


def test_what_a_launch_must_name() -> None:
    launch = replace(LAUNCH, args={k: v for k, v in LAUNCH.args.items() if k != "scale"})
    with pytest.raises(KeyError, match="scale"):
        signature(launch, torch.float16, True, 16)
    assert LAUNCH.name == "every_call_argument_kernel"


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("limit", "pad"), [(None, "keep"), (2, "keep"), (2, "zero"), (-3, "zero")])
def test_interpreted(
    id_dtype: torch.dtype, weight_dtype: torch.dtype, limit: int | None, pad: str
) -> None:
    """Every call argument reaches the kernel under its own name; strided rows, ids of nobody."""
    tokens = 4
    x = torch.randn(tokens, 2 * H).half()[:, :H]
    wide = torch.full((tokens, 7), 3, dtype=id_dtype)
    ids = wide[:, 2 : 2 + K]
    ids.copy_(torch.tensor([[0, 4], [-1, 2], [E, 1], [3, 3]]))
    if id_dtype == torch.int64:
        ids[1, 0] = 2**40 + 1  # its low word is somebody's id
    weights = torch.rand(tokens, 5).to(weight_dtype)[:, :K]
    out = torch.full((tokens, 3 * H), 7.0, dtype=torch.float16)
    num_valid = None if limit is None else torch.tensor([limit], dtype=torch.int32)
    topk = TopK(weights, ids)
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32), 1)
    call.set(
        call_key(x, topk, out[:, H : 2 * H], num_valid, pad), x, topk, out[:, H : 2 * H], num_valid
    )
    run_interpreted([LAUNCH], call.interpreter_values(), tokens)
    live = tokens if limit is None else max(0, limit)
    routed = (ids >= 0) & (ids < E)
    values = torch.where(routed, TABLE[ids.long().where(routed, 0)], 0.0)
    expected = x.float() * (weights.float() * values).sum(1, keepdim=True) * 0.5
    expected[live:] = 0.0 if pad == "zero" else 7.0
    torch.testing.assert_close(out[:, H : 2 * H].float(), expected, rtol=2e-3, atol=1e-3)
    assert (out[:, :H] == 7).all() and (out[:, 2 * H :] == 7).all()


def test_two_threads_that_load_one_kernel_both_get_its_function() -> None:
    """Triton sets a kernel's launcher before its function, as it loads."""

    class Loading:
        """A compiled kernel whose first look at `run` takes a while."""

        run_, function, packed_metadata = None, None, ()

        @property
        def run(self) -> object:
            if self.run_ is None:
                self.run_ = "launcher"
                started.set()
                time.sleep(0.05)
                self.function = "function"
            return self.run_

    started, compiled = threading.Event(), Loading()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(CompiledLaunch, LAUNCH, compiled)
        assert started.wait(10)
        second = pool.submit(CompiledLaunch, LAUNCH, compiled)
        assert [launch.result()._function for launch in (first, second)] == ["function"] * 2
