"""Kernel launches as data, and the two ways to run them: compiled on a GPU, interpreted on a CPU.

A `Launch` names a Triton kernel, its grid, its fixed arguments and its constants; the arguments of
the call (`steps/call_args.py`) are recognised by name and filled in at each launch. Kernels are
compiled ahead through `triton.compile` with an explicit signature, never by the just-in-time path,
so that what a call passes can never cause a compilation, and so that the very same code can be
compiled for a device that is absent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moert.call import POSITION
from moert.compile_job import Attributes, CompileJob, make_job
from moert.steps.call_args import CALL_ARGS

Grid = tuple[int, int, int]

_LOADING = threading.Lock()

_TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.uint32: "u32",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, before any token arrives.

    Args:
        kernel: a `triton.jit` function whose call arguments carry the names in `CALL_ARGS`.
        grid: from the number of rows T of a call (eager) or the bucket B (captured) to the grid.
        args: fixed arguments by parameter name: tensors (weights, arena views), ints, floats; None for an
            absent tensor.
        constants: values of the `tl.constexpr` parameters.
        num_warps, num_stages: launch options.
        options: further compile options, such as {"launch_pdl": True}.
    """

    kernel: Any
    grid: Callable[[int], Grid]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def in_a_row(launches: Sequence[Launch], dependent: bool) -> list[Launch]:
    """The launches with the constant PDL their kernels have, each dependent on the one before if asked.

    The first one too: it waits for whatever precedes it on the stream, as all of them do
    (`steps/dependent_launch.py`).
    """
    options = {"launch_pdl": True} if dependent else {}
    return [
        replace(
            launch,
            constants={**launch.constants, "PDL": dependent},
            options={**launch.options, **options},
        )
        for launch in launches
    ]


def signature(
    launch: Launch, dtype: torch.dtype, aligned: bool, row_multiple: int
) -> tuple[dict[str, str], dict[str, Any], Attributes]:
    """Triton's signature, constants and divisibility attributes of a launch.

    Args:
        dtype: the model's dtype.
        aligned: call pointers are multiples of 16 bytes and row strides of `row_multiple` elements.
        row_multiple: 16 if H is a multiple of 16, else 1.
    """
    sig: dict[str, str] = {}
    constants = dict(launch.constants)
    attrs: Attributes = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            sig[name] = "constexpr"
            continue
        if name in CALL_ARGS:
            sig[name] = CALL_ARGS[name].format(dtype=_TRITON_TYPES[dtype])
            wide = sig[name].startswith("*") or (
                name in ("x_stride", "out_stride") and row_multiple % 16 == 0
            )
            divisible = aligned and wide and name != "num_valid_ptr"
        else:
            value = launch.args[name]
            if value is None:
                sig[name] = "constexpr"
                constants[name] = None
                continue
            sig[name], divisible = _fixed_type(value)
        if divisible:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return sig, constants, attrs


def _fixed_type(value: Any) -> tuple[str, bool]:
    if isinstance(value, torch.Tensor):
        return "*" + _TRITON_TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def compile_job(
    launch: Launch, dtype: torch.dtype, aligned: bool = True, row_multiple: int = 16
) -> CompileJob:
    """What has to be compiled for a launch; arguments as for `signature`."""
    sig, constants, attrs = signature(launch, dtype, aligned, row_multiple)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **launch.options,
    }
    return make_job(launch.kernel, sig, constants, [index for (index,) in attrs], options)


def compile_launch(
    launch: Launch,
    dtype: torch.dtype,
    *,
    aligned: bool = True,
    row_multiple: int = 16,
    target: Any = None,
) -> Any:
    """Compile for the current device, or for `target` (a `GPUTarget`) that need not be present."""
    return compile_job(launch, dtype, aligned, row_multiple).compile(target, launch.kernel)


class CompiledLaunch:
    """A launch compiled for, and loaded on, the current device, with its fixed arguments bound."""

    def __init__(self, launch: Launch, compiled: Any) -> None:
        self.name = launch.name
        self.compiled = compiled
        self.grid = launch.grid
        self.arg_names: list[str] = list(launch.kernel.arg_names)
        self._args: list[Any] = [
            launch.constants.get(name, launch.args.get(name)) for name in self.arg_names
        ]
        self.call_args = [
            name for name in self.arg_names if name in CALL_ARGS and name not in launch.constants
        ]
        self._slots = [(self.arg_names.index(name), POSITION[name]) for name in self.call_args]
        # loads the binary onto the device; a later first launch then allocates nothing. One at a time: Triton
        # has a launcher before it has the function, and no other thread may meet the one without the other
        with _LOADING:
            self._run = compiled.run
            self._function = compiled.function
        self._metadata = compiled.packed_metadata
        self._tensors = [arg for arg in self._args if isinstance(arg, torch.Tensor)]  # kept alive
        self._args = [
            arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in self._args
        ]

    def run(self, values: Sequence[int], tokens: int, stream: int) -> None:
        """Launch on a raw stream handle with a `Call`'s values; allocates no device memory."""
        args = self._args
        for index, position in self._slots:
            args[index] = values[position]
        x, y, z = self.grid(tokens)
        self._run(x, y, z, stream, self._function, self._metadata, None, None, None, *args)

    @property
    def parameters(self) -> list[str]:
        """Names of the arguments that the machine code takes, in order (constants are folded away)."""
        sig = self.compiled.src.signature
        return [name for name in self.arg_names if sig[name] != "constexpr"]


def run_interpreted(launches: Sequence[Launch], values: Mapping[str, Any], tokens: int) -> None:
    """Run launches on CPU tensors under `TRITON_INTERPRET=1`; `values` holds tensors, not addresses."""
    for launch in launches:
        kernel = launch.kernel
        call = {name: values[name] for name in kernel.arg_names if name in CALL_ARGS}
        call = {name: value for name, value in call.items() if name not in launch.constants}
        fixed = dict(launch.args)
        kernel[launch.grid(tokens)](**call, **fixed, **launch.constants)
