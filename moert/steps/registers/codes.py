"""int4 codes on their way in registers: plain loads, some steps ahead of their use.

A lane is given the 16 bytes of a block that it multiplies by (`moert/quantization/int4_layout.py`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moert.steps.streaming.copies import code_pointers


@gluon.jit
def _load(codes_ptr, expert, tile, first, live, S: gl.constexpr):
    pointers, mask = code_pointers(codes_ptr, expert, tile, first, live, S)
    # up to 3% faster so at T=1 on an H200, about 1% at T=4
    return gl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@gluon.jit
def _parts(S: gl.constexpr):
    """0 to split, beside codes."""
    return gl.arange(0, S.split, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, S.codes))))


@gluon.jit
def hold(codes_ptr, step, expert, tile, S: gl.constexpr):
    """Codes of a step of one expert, from row tile `tile` on."""
    part = _parts(S)
    first = (step * S.split + part) * S.blocks
    live = (part >= 0) & (step < S.iterations)
    return _load(codes_ptr, expert.to(gl.int64), tile, first, live, S)


@gluon.jit
def hold_by_slot(codes_ptr, step, experts, tile, S: gl.constexpr):
    """Codes of a step through a token's slots.

    Args:
        experts: [asked, split] int32 in shared memory, the expert of each part; -1 asks for nothing.
    """
    part = _parts(S)
    expert = experts.index(step).load(part.type.layout)
    first = (step * S.split + part) % S.steps * S.blocks
    return _load(codes_ptr, expert.to(gl.int64), tile, first, expert >= 0, S)
