"""Scales and zero points of all of a program's steps in shared memory, asked for at once."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def entries(S: gl.constexpr):
    """0 to staged * parts * split: by step, group and part."""
    return gl.arange(0, S.staged * S.parts * S.split, gl.SliceLayout(1, S.all_values))


@gluon.jit
def item_of_entries(S: gl.constexpr):
    """Which part of which step an entry is of: step * split + part."""
    q = entries(S)
    return q // (S.split * S.parts) * S.split + q % S.split


@gluon.jit
def _copy(values_ptr, expert, tile, S: gl.constexpr):
    L: gl.constexpr = S.all_values
    item = item_of_entries(S)
    if S.slots > 0:
        item = item % S.steps
    group = item * S.width // S.group + entries(S) // S.split % S.parts
    r = gl.arange(0, S.rows, gl.SliceLayout(0, L))
    offset = gl.expand_dims(expert.to(gl.int64) * (S.all_tiles * S.groups * 16) + group * 16, 1)
    offset = offset + gl.expand_dims((tile + r // 16) * (S.groups * 16) + r % 16, 0)
    mask = gl.expand_dims((group < S.groups) & (expert >= 0), 1)
    mask = mask & gl.expand_dims(tile + r // 16 < S.all_tiles, 0)
    DTYPE: gl.constexpr = values_ptr.dtype.element_ty
    ENTRIES: gl.constexpr = S.staged * S.parts * S.split
    stage = gl.allocate_shared_memory(DTYPE, [ENTRIES, S.rows], S.plain(2))
    async_copy.async_copy_global_to_shared(stage, values_ptr + offset, mask)
    return stage._reinterpret(DTYPE, [S.staged * S.scaled, S.sub, S.split, S.rows], S.plain(3))


@gluon.jit
def stage_values(scales_ptr, zeros_ptr, expert, tile, S: gl.constexpr):
    """Scales, and zero points where there are any, a tuple of [staged * scaled, sub, split, rows] in shared
    memory, that are there after `async_copy.wait_group(0)`.

    Args:
        expert: of each entry, [staged * parts * split] in the layout of `entries`; -1 has none.
    """
    values = (_copy(scales_ptr, expert, tile, S),)
    if S.zeros:
        values = values + (_copy(zeros_ptr, expert, tile, S),)  # type: ignore[assignment]
    async_copy.commit_group()
    return values
