"""Down GEMM of one token a program, weights streamed through registers (`moert/steps/registers`): int4,
NVIDIA.

The portable twin is `down/int4.py`; what is written is the same, up to the rounding of h to 15 bits and
the order of sums, which is fixed here too. A program goes through the token's experts, warps side by side,
and so combines without atomics. The routing is older than the gate/up GEMM: weights are asked for before
the wait for h.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.down.streaming import add_biases
from moert.steps.registers.codes import hold_by_slot
from moert.steps.registers.numbers import stage_numbers
from moert.steps.registers.products import add, in_rows, nothing, total
from moert.steps.registers.values import item_of_entries, stage_values
from moert.steps.streaming.inputs import load_slots


@gluon.jit(do_not_specialize=CALL_INTS)
def down_direct_registers_kernel(
    ids_ptr,
    ids_stride,
    ids_words,
    weights_f32_ptr,
    weights_ptr,
    weights_stride,
    weights_are_f32,
    out_ptr,
    out_stride,
    num_valid_ptr,
    num_tokens,
    pad_zero,
    h_ptr,
    w2_ptr,
    scales_ptr,
    zeros_ptr,
    b2_ptr,
    E: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    DTYPE: gl.constexpr = h_ptr.dtype.element_ty
    STAGES: gl.constexpr = S.stages
    # one for each part of the reduction
    experts = gl.allocate_shared_memory(gl.int32, [S.asked, S.split], S.plain(2))
    factors = gl.allocate_shared_memory(gl.float32, [S.asked, S.split], S.plain(2))
    token = gl.program_id(0) // S.tiles
    tile = (gl.program_id(0) % S.tiles) * S.row_tiles
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    it = gl.arange(0, S.asked, gl.SliceLayout(1, S.table))
    part = gl.arange(0, S.split, gl.SliceLayout(0, S.table))
    slot = (gl.expand_dims(it * S.split, 1) + gl.expand_dims(part, 0)) // S.steps
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive & (slot < K), E)
    experts.store(expert)
    experts_by_step = experts._reinterpret(gl.int32, [S.asked, S.split], S.plain(1))
    held = ()
    for i in gl.static_range(STAGES):
        held = held + (hold_by_slot(w2_ptr, i, experts_by_step, tile, S),)  # type: ignore[assignment]
    its = item_of_entries(S) // S.steps
    theirs = load_expert_id(ids_ptr, ids_stride, ids_words, token, its, alive & (its < K), E)
    values = stage_values(scales_ptr, zeros_ptr, theirs, tile, S)
    # the weight of an id that no expert has may be anything, NaN included
    factor = load_routing_weight(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, expert >= 0
    )
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if token >= num_tokens:
        return
    n = tile * 16 + gl.arange(0, S.rows, S.flat)
    out = out_ptr + token.to(gl.int64) * out_stride + n
    if not alive:
        gl.store(out, gl.full([S.rows], 0, DTYPE, S.flat), mask=(n < S.columns) & (pad_zero != 0))
        return
    factors.store(factor)
    h = load_slots(h_ptr, token, experts, K, S)
    staged = stage_numbers(h, S)
    async_copy.wait_group(0)
    weights = factors._reinterpret(gl.float32, [S.asked, S.split], S.plain(1))
    sums = nothing(S)
    for turn in range(S.turns):
        for i in gl.static_range(STAGES):
            step = turn * STAGES + i
            if step < S.iterations:
                weight = weights.index(step).load(S.acc_parts)
                sums = add(sums, held[i], values, staged, step, weight, S)
            following = hold_by_slot(w2_ptr, step + STAGES, experts_by_step, tile, S)
            held = held[:i] + (following,) + held[i + 1 :]
    low, high = total(sums, S)
    all_rows = gl.convert_layout(in_rows(low, high, S), S.flat)
    if b2_ptr is not None:
        ids = (ids_ptr, ids_stride, ids_words)
        weights = (weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32)
        all_rows = add_biases(all_rows, b2_ptr, ids, weights, token, alive, n, E, K, S)
    gl.store(out, all_rows.to(DTYPE), mask=n < S.columns)
