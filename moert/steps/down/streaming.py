"""Down GEMM as a stream of weights (`moert/steps/streaming`): int4 and 16-bit, NVIDIA.

The portable twins are `down/triton.py` (16-bit) and `down/int4.py`; what is written is the same, up to the
order of sums, which is fixed here too.

direct: one program per (token, row tiles of w2) goes through the token's experts, warps side by side, and so
combines without atomics. The routing is older than the gate/up GEMM: weights are asked for before the wait
for h. Where a program has several rows of one expert: `down/streaming_grouped.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.streaming.inputs import load_slots
from moert.steps.streaming.products import add, group_sums, one_row
from moert.steps.streaming.stages import ask_by_slot, rings, take


@gluon.jit
def bias(b2_ptr, expert, weight, n, S: gl.constexpr):
    """weight * b2[expert, n], fp32; zero where the expert is none."""
    b = gl.load(
        b2_ptr + expert.to(gl.int64) * S.columns + n,
        mask=(n < S.columns) & (expert >= 0),
        other=0.0,
    )
    return b.to(gl.float32) * weight


@gluon.jit
def add_biases(
    total, b2_ptr, ids, weights, token, alive, n, E: gl.constexpr, K: gl.constexpr, S: gl.constexpr
):
    """total, fp32, and the weighted biases of a token's experts, of columns n.

    Args:
        ids, weights: the pointers, strides and kinds that `load_expert_id` and `load_routing_weight` take.
    """
    for slot in range(K):
        expert = load_expert_id(ids[0], ids[1], ids[2], token, slot, alive, E)
        weight = load_routing_weight(
            weights[0], weights[1], weights[2], weights[3], token, slot, expert >= 0
        )
        total += bias(b2_ptr, expert, weight, n, S)
    return total


@gluon.jit(do_not_specialize=CALL_INTS)
def down_direct_stream_kernel(
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
    ring, w = rings(DTYPE, S), (w2_ptr, scales_ptr, zeros_ptr)
    hs = gl.allocate_shared_memory(DTYPE, [S.staged, S.split, S.width], S.plain(3))
    # one for each part of the reduction, as often as there are groups with scales of their own
    experts = gl.allocate_shared_memory(gl.int32, [S.asked, S.parts * S.split], S.plain(2))
    factors = gl.allocate_shared_memory(gl.float32, [S.asked, S.parts * S.split], S.plain(2))
    token = gl.program_id(0) // S.tiles
    tile = (gl.program_id(0) % S.tiles) * S.row_tiles
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    it = gl.arange(0, S.asked, gl.SliceLayout(1, S.table))
    part = gl.arange(0, S.parts * S.split, gl.SliceLayout(0, S.table)) % S.split
    slot = (gl.expand_dims(it * S.split, 1) + gl.expand_dims(part, 0)) // S.steps
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive & (slot < K), E)
    experts.store(expert)
    by_iteration = experts._reinterpret(gl.int32, [S.asked, S.parts * S.split], S.plain(1))
    for i in gl.static_range(S.stages - 1):
        ask_by_slot(ring, i, tile, w, by_iteration, S)
        async_copy.commit_group()
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
    hs.store(h)
    sums = None
    if S.int4:
        sums = group_sums(h, S)
    inputs = hs._reinterpret(DTYPE, [S.staged, S.split, S.width], S.plain(2))
    factors_by_iteration = factors._reinterpret(
        gl.float32, [S.asked, S.parts * S.split], S.plain(1)
    )
    acc = gl.full([S.split, S.rows, S.bm], 0, gl.float32, S.mma)
    for step in range(S.iterations):
        async_copy.wait_group(S.stages - 2)
        taken = take(ring, step, S)
        nxt = step + S.stages - 1
        ask_by_slot(ring, nxt, tile, w, by_iteration, S)
        async_copy.commit_group()
        weight = factors_by_iteration.index(step).slice(0, S.split).load(S.acc_parts)
        x = one_row(inputs.index(step), S)
        acc = add(acc, taken, x, sums, step, weight, S)
    # all columns are the same token: their mean is each of them, exactly, for powers of two
    total = gl.convert_layout(gl.sum(gl.sum(acc, 2), 0) * (1.0 / S.bm), S.flat)
    if b2_ptr is not None:
        ids = (ids_ptr, ids_stride, ids_words)
        weights = (weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32)
        total = add_biases(total, b2_ptr, ids, weights, token, alive, n, E, K, S)
    gl.store(out, total.to(DTYPE), mask=n < S.columns)
