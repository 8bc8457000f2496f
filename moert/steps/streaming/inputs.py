"""Inputs of a program that stages all it multiplies by: one row, or the rows of a token's slots.

Both are [staged, split, width] in the layout `S.line`, zero past a row's end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _items(S: gl.constexpr):
    """Which part of which step a value is of, step * split + part, [staged, split]."""
    it = gl.arange(0, S.staged, gl.SliceLayout(1, gl.SliceLayout(2, S.line)))
    part = gl.arange(0, S.split, gl.SliceLayout(0, gl.SliceLayout(2, S.line)))
    return gl.expand_dims(it * S.split, 1) + gl.expand_dims(part, 0)


@gluon.jit
def load_row(row_ptr, there, S: gl.constexpr):
    """One row.

    Args:
        there: zeros, unless it holds; None where the row is there.
    """
    start = _items(S) * S.width
    k = gl.arange(0, S.width, gl.SliceLayout(0, gl.SliceLayout(0, S.line)))
    k = gl.expand_dims(start, 2) + gl.expand_dims(gl.expand_dims(k, 0), 0)
    mask = k < S.reduction
    if there is not None:
        mask = mask & there
    return gl.load(row_ptr + k, mask=mask, other=0.0)


@gluon.jit
def load_slots(h_ptr, token, experts, K: gl.constexpr, S: gl.constexpr):
    """The rows of a token's slots, one after the other; zeros where a slot has no expert.

    Args:
        experts: [asked, split or more] in shared memory, the expert of each part; -1 for none.
    """
    item = gl.expand_dims(_items(S), 2)
    k = gl.arange(0, S.width, gl.SliceLayout(0, gl.SliceLayout(0, S.line)))
    k = (item % S.steps) * S.width + gl.expand_dims(gl.expand_dims(k, 0), 0)
    routed = experts.slice(0, S.staged, 0).slice(0, S.split, 1).load(gl.SliceLayout(2, S.line))
    row = (token * K + item // S.steps).to(gl.int64)
    mask = (k < S.reduction) & (gl.expand_dims(routed, 2) >= 0)
    return gl.load(h_ptr + row * S.reduction + k, mask=mask, other=0.0)
