"""Gluon kernels on a CPU: the kernels' own source, with stand-ins for the operations they are written in.

Triton's interpreter does not know Gluon. What is here runs a kernel program by program on torch tensors:
layouts mean nothing, matrix instructions are products in float32, copies happen at once, specialised warps
are threads that wait for each other at barriers with counts and phases. Every load and store is checked to
be inside its tensor; shared memory begins as NaN.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ptx_on_cpu import execute

SHORT, WORD = torch.int16, torch.int32
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "int8", "int16", "int32", "int64")
}
_HERE = threading.local()


class Value:
    """A tensor or scalar in registers."""

    def __init__(self, data: Any) -> None:
        self.data = data if isinstance(data, torch.Tensor) else torch.tensor(data)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        if bitcast:
            return Value(self.data.contiguous().view(dtype))
        return Value(self.data.to(dtype))

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)


def _binary(name: str) -> Callable[[Value, Any], Value]:
    def operation(left: Value, right: Any) -> Any:
        if isinstance(right, Pointer):
            return NotImplemented
        found = getattr(left.data, name)(_data(right))
        return found if found is NotImplemented else Value(found)

    return operation


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "lshift", "rshift"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Value, _form, _binary(_form))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(f"__{_name}__"))
Value.__neg__ = lambda self: Value(-self.data)  # type: ignore[attr-defined]
Value.__hash__ = None  # type: ignore[assignment]


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


class Pointer:
    """Addresses of elements of a tensor, from its first one on."""

    def __init__(self, tensor: torch.Tensor | None, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    @property
    def dtype(self) -> Any:
        assert self.tensor is not None
        return types.SimpleNamespace(element_ty=self.tensor.dtype)

    def to(self, dtype: torch.dtype) -> Value:
        """Null or not."""
        return Value(int(self.tensor is not None))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, _data(self.offset) + _data(offset))

    __radd__ = __add__

    def resolve(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The elements of the whole storage, offsets into it, and the mask, of one shape."""
        offset = torch.as_tensor(_data(self.offset))
        wanted = torch.as_tensor(True if mask is None else _data(mask))
        offset, wanted = torch.broadcast_tensors(offset, wanted)
        if self.tensor is None:
            assert not wanted.any(), "a null pointer is read"
            return torch.zeros(1), torch.zeros_like(offset), wanted
        span = (
            sum((n - 1) * s for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True))
            + 1
        )
        whole = self.tensor.as_strided((span,), (1,))
        reached = offset[wanted]
        assert ((reached >= 0) & (reached < span)).all(), "outside the tensor"
        return whole, torch.where(wanted, offset, 0).long(), wanted


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Value:
    whole, offset, wanted = pointer.resolve(mask)
    found = whole[offset]
    if mask is None:
        return Value(found)
    instead = torch.as_tensor(_data(0 if other is None else other)).to(found.dtype)
    return Value(torch.where(wanted, found, instead))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    whole, offset, wanted = pointer.resolve(mask)
    data = torch.as_tensor(_data(value)).to(whole.dtype).broadcast_to(offset.shape)
    whole[offset[wanted]] = data[wanted]


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: tuple(self.data.shape))

    def index(self, at: Any) -> Shared:
        return Shared(self.data[int(_data(at))])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(_data(start)), length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any = None) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.data.copy_(value.data)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.data.view(shape))


class Barrier:
    """Counts arrivals; a phase ends with the last of them."""

    def __init__(self) -> None:
        self.changed, self.count, self.pending, self.phase = threading.Condition(), 0, 0, 0

    def arrive(self, count: int) -> None:
        with self.changed:
            self.pending -= count
            assert self.pending >= 0, "more arrive than are counted"
            if self.pending == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase != int(_data(parity)), 20)
        assert over, "nobody arrives"


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, at: Any) -> Barrier:
        return self.all[int(_data(at))]


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _copy(stage: Shared, pointer: Pointer, mask: Any = None) -> None:
    stage.data.copy_(load(pointer, mask, 0).data)


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    words = 0x5A5A5A5A if dtype.itemsize >= 4 else 0x5A
    fill = float("nan") if dtype.is_floating_point else words
    return Shared(torch.full(tuple(shape), fill, dtype=dtype))


def _product(a: Any, b: Any, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    # whole numbers up to 2^24 are exact in float32; those of bytes stay far below
    product = (a.data.float() @ b.data.float()).to(acc.dtype)
    return Value(acc.data + product if use_acc else product)


def _done(outstanding: int, deps: list[Any]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def _specialize(parts: Any, warps: list[int], registers: list[int]) -> None:
    """Every partition is a thread that counts for as many as it has warps."""
    failures: list[BaseException] = []
    program, own = _HERE.program, _HERE.threads

    def work(function: Any, args: tuple[Any, ...], threads: int) -> None:
        _HERE.program, _HERE.threads = program, threads
        try:
            function(*args)
        except BaseException as error:
            failures.append(error)

    counts = [own, *(32 * n for n in warps)]
    running = [
        threading.Thread(target=work, args=(function, args, n), daemon=True)
        for (function, args), n in zip(parts, counts, strict=True)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def _broadcast(left: Value, right: Value) -> tuple[Value, Value]:
    return tuple(Value(t) for t in torch.broadcast_tensors(left.data, right.data))  # type: ignore[return-value]


def _inline(
    assembly: Any, constraints: str, args: list[Any], dtype: Any, pure: bool, pack: int
) -> Value:
    text = str(getattr(assembly, "value", assembly))
    words = [t.contiguous() for t in torch.broadcast_tensors(*(_data(a) for a in args))]
    if pack == 1:
        return Value(execute(text, words).to(WORD))
    # as many neighbours as a word has bytes go in, and as many bytes come out
    assert pack == 4 and dtype == torch.int8 and words[0].shape[-1] == 4
    first = execute(text, [word[..., 0] for word in words])
    return Value(torch.stack([(first >> shift).to(torch.int8) for shift in (0, 8, 16, 24)], -1))


def _exact(value: Any) -> Any:
    return getattr(value, "value", value)


def _where(condition: Any, one: Any, other: Any) -> Value:
    both = [torch.as_tensor(_data(v)) for v in (one, other)]
    return Value(torch.where(torch.as_tensor(_data(condition)), *both))


def _expand_dims(value: Any, axis: int) -> Any:
    if isinstance(value, Pointer):
        return Pointer(value.tensor, value.offset.unsqueeze(axis))
    return Value(value.data.unsqueeze(axis))


def _language() -> types.SimpleNamespace:
    """What `gl` and `tl` are to a kernel."""

    def unary(operation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
        return lambda value: Value(operation(value.data))

    def pairwise(operation: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Value]:
        return lambda a, b: Value(operation(*(torch.as_tensor(_data(v)) for v in (a, b))))

    names: dict[str, Any] = {
        **_DTYPES,
        "uint16": SHORT,
        "constexpr": object,
        "static_range": range,
        "static_assert": lambda *_: None,
        "program_id": lambda axis: Value(_HERE.program[0]),
        "num_programs": lambda axis: Value(_HERE.program[1]),
        "arange": lambda start, end, layout=None: Value(torch.arange(start, end, dtype=WORD)),
        "full": lambda shape, value, dtype, layout=None: Value(
            torch.full(tuple(shape), value, dtype=dtype)
        ),
        "full_like": lambda like, value: Value(torch.full_like(like.data, value)),
        "expand_dims": _expand_dims,
        "reshape": lambda value, shape: Value(value.data.reshape(tuple(shape))),
        "permute": lambda value, order: Value(value.data.permute(tuple(order))),
        "join": lambda a, b: Value(torch.stack((a.data, b.data), -1)),
        "split": lambda value: tuple(Value(part) for part in value.data.unbind(-1)),
        "broadcast": _broadcast,
        "convert_layout": lambda value, *_, **__: value,
        "sum": lambda value, axis: Value(value.data.sum(axis)),
        "min": lambda value, axis: Value(value.data.amin(axis)),
        "max": lambda value, axis: Value(value.data.amax(axis)),
        "abs": unary(torch.abs),
        "where": _where,
        "minimum": pairwise(torch.minimum),
        "maximum": pairwise(torch.maximum),
        "exp": unary(torch.exp),
        "erf": unary(torch.erf),
        "load": load,
        "store": store,
        "allocate_shared_memory": _allocate,
        "warp_specialize": _specialize,
        "inline_asm_elementwise": _inline,
        "SliceLayout": lambda *_: None,
        "BlockedLayout": lambda *_: None,
    }
    return types.SimpleNamespace(**names)


_LANGUAGE = _language()
_BARRIERS = types.SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=_init,
    wait=lambda barrier, phase: barrier.wait(phase),
)
_COPIES = types.SimpleNamespace(
    async_copy_global_to_shared=_copy,
    commit_group=lambda: None,
    wait_group=lambda outstanding: None,
    mbarrier_arrive=lambda barrier, increment_count: barrier.arrive(_HERE.threads),
)
_STAND_INS: dict[str, Any] = {
    "gl": _LANGUAGE,
    "tl": _LANGUAGE,
    "mbarrier": _BARRIERS,
    "async_copy": _COPIES,
    "mma_v2": _product,
    "warpgroup_mma": _product,
    "warpgroup_mma_wait": _done,
    "compute_before_wait": lambda dependent: None,
    "fence_async_shared": lambda: None,
    # launches come one after the other
    "wait_for_predecessor": lambda dependent: None,
    "let_successor_start": lambda dependent: None,
}


_BOUND: dict[Any, Any] = {}


def bound(function: Any) -> Any:
    """A kernel or a function of one as a Python function over stand-ins."""
    source = function.fn
    while hasattr(source, "fn"):
        source = source.fn
    if source not in _BOUND:
        names = dict(source.__globals__)
        made = types.FunctionType(
            source.__code__, names, source.__name__, source.__defaults__, source.__closure__
        )
        _BOUND[source] = made
        for name in source.__code__.co_names:
            if name in _STAND_INS:
                names[name] = _STAND_INS[name]
            elif name in names and type(names[name]).__module__.startswith("triton"):
                known = names[name]
                names[name] = bound(known) if hasattr(known, "fn") else _exact(known)
    return _BOUND[source]


def run(kernel: Any, grid: int, args: Mapping[str, Any], num_warps: int) -> None:
    """All programs of a launch, one after the other.

    Args:
        args: tensors, numbers and None by parameter name; a tensor is passed by its address.
    """
    function = bound(kernel)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = {
        name: Pointer(args[name]) if isinstance(args[name], torch.Tensor) else args[name]
        for name in names
    }
    for program in range(grid):
        _HERE.program, _HERE.threads = (program, grid), 32 * num_warps
        function(**values)
