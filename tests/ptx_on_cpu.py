"""The few PTX instructions that kernels have inline, in plain operations on tensors of words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

SHORT = torch.int16


def _halves(word: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both 16-bit floats of words, low half first."""
    return word.to(SHORT).view(dtype), (word >> 16).to(SHORT).view(dtype)


def _packed(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    halves = [half.view(SHORT).long() & 0xFFFF for half in (low, high)]
    return halves[0] | (halves[1] << 16)


_BITWISE: dict[str, Callable[..., torch.Tensor]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: (a << n) & 0xFFFFFFFF,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": lambda a, b, s: _prmt(a, b, int(s)),
}
# by pairs of 16-bit floats; results are exact in float32, or rounded once
_ARITHMETIC: dict[str, Callable[..., torch.Tensor]] = {
    "fma": lambda a, b, c: a.double() * b.double() + c.double(),
    "add": lambda a, b: a.double() + b.double(),
    "sub": lambda a, b: a.double() - b.double(),
    "mul": lambda a, b: a.double() * b.double(),
}
_PAIRS = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def _prmt(a: torch.Tensor, b: torch.Tensor, selector: int) -> torch.Tensor:
    """PTX ISA, "prmt": byte i is the one of b and a that nibble i of the selector says."""
    assert selector & 0x8888 == 0, "signs are not copied here"
    pool = a | (b << 32)
    picked = [(pool >> (8 * (selector >> 4 * i & 7)) & 0xFF) << (8 * i) for i in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def _lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """PTX ISA, "lop3": bit 4 a + 2 b + c of the table."""
    found = torch.zeros_like(a | b | c)
    for row in range(8):
        if (int(table) >> row) & 1:
            wanted = [v if row & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
            found |= wanted[0] & wanted[1] & wanted[2]
    return found & 0xFFFFFFFF


@cache
def _statements(assembly: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(instruction, what it writes, what it reads), in order."""
    found = []
    for statement in assembly.strip("{} ").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if name and name != ".reg":
            into, *sources = (part.strip() for part in rest.split(","))
            found.append((name, into, tuple(sources)))
    return tuple(found)


def execute(assembly: str, args: list[torch.Tensor]) -> torch.Tensor:
    """What a few PTX instructions make of words [..] given as $1, $2 and so on: $0, int64 from 0 to 2^32."""
    registers = {f"${i + 1}": arg.long() & 0xFFFFFFFF for i, arg in enumerate(args)}
    for name, into, sources in _statements(assembly):
        values = [
            registers[source] if source in registers else torch.tensor(int(source, 0))
            for source in sources
        ]
        kind = name.rsplit(".", 1)[-1]
        if name == "lop3.b32":
            registers[into] = _lop3(*values)
        elif kind in _PAIRS:
            halves = [_halves(value, _PAIRS[kind]) for value in values]
            operation = _ARITHMETIC[name.split(".")[0]]
            results = [operation(*(half[i] for half in halves)).to(_PAIRS[kind]) for i in (0, 1)]
            registers[into] = _packed(*torch.broadcast_tensors(*results))
        else:
            registers[into] = _BITWISE[name](*values)
    return registers["$0"]
