"""Gate/up GEMM of one row a program, weights streamed through registers (`moert/steps/registers`): int4,
NVIDIA.

The portable twin is `gate_up/int4.py`; what is written is the same, up to the rounding of x to 15 bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.gate_up.streaming import activated
from moert.steps.registers.codes import hold
from moert.steps.registers.numbers import stage_numbers
from moert.steps.registers.products import add, in_rows, nothing, total
from moert.steps.registers.values import entries, stage_values
from moert.steps.streaming.inputs import load_row


@gluon.jit(do_not_specialize=CALL_INTS)
def gate_up_direct_registers_kernel(
    x_ptr,
    x_stride,
    ids_ptr,
    ids_stride,
    ids_words,
    num_valid_ptr,
    num_tokens,
    w13_ptr,
    scales_ptr,
    zeros_ptr,
    b13_ptr,
    h_ptr,
    E: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LIMIT: gl.constexpr,
    ALPHA: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    STAGES: gl.constexpr = S.stages
    tile = (gl.program_id(0) % S.tiles) * S.row_tiles
    row = gl.program_id(0) // S.tiles
    token, slot = row // K, row % K
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    # before anybody knows the expert: products wait for what is made of these
    x = load_row(x_ptr + token.to(gl.int64) * x_stride, alive, S)
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
    if expert < 0:
        return
    held = ()
    for i in gl.static_range(STAGES):
        held = held + (hold(w13_ptr, i, expert, tile, S),)  # type: ignore[assignment]
    values = stage_values(scales_ptr, zeros_ptr, entries(S) * 0 + expert, tile, S)
    staged = stage_numbers(x, S)
    async_copy.wait_group(0)
    sums = nothing(S)
    for turn in range(S.turns):
        for i in gl.static_range(STAGES):
            step = turn * STAGES + i
            if step < S.iterations:
                sums = add(sums, held[i], values, staged, step, None, S)
            following = hold(w13_ptr, step + STAGES, expert, tile, S)
            held = held[:i] + (following,) + held[i + 1 :]
    gate, up = total(sums, S)
    if S.paired:
        gate, up = gl.reshape(gate, (S.rows // 2, 1)), gl.reshape(up, (S.rows // 2, 1))
    else:
        up = gl.reshape(in_rows(gate, up, S), (S.rows, 1))
        gate = up
    n, h = activated(gate, up, expert, tile, b13_ptr, ACTIVATION, LIMIT, ALPHA, S)
    pointers = h_ptr + row.to(gl.int64) * S.columns + gl.expand_dims(n, 1)
    gl.store(pointers, h.to(h_ptr.dtype.element_ty), mask=gl.expand_dims(n < S.columns, 1))
