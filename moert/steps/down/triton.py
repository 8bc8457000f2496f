"""Down GEMM with fused bias and routing weight.

direct: out[t] = sum over slots k = 0..K-1, in that order, of weight[t, k] * (h[t*K+k] @
w2[expert].T + b2): one program per (token, BN columns of out) loops over the token's experts and
so combines without atomics, in a fixed order, straight into the caller's buffer. grouped: y[s] =
weight[s] * (h[s] @ w2[expert].T + b2) for blocks of BM sorted rows on matrix units, y [S, H] in
the model's dtype; the combine step adds the K rows of each token.

Tried on an H200 and lost: asking for the down weights before the wait of a dependent launch
(`prefetch.global.L2` for one or all experts of a token, or for the program's tile): 0.2 us
(direct, H=7168, T=1) to 12 us (grouped, T=64) slower, because the lines compete with loads of the
gate/up GEMM that are already under way. One loop over slots and steps with its loads pipelined,
instead of a loop over slots around one over steps: 26.1 us for 33.6 (both GEMMs, E=128, K=8,
H=2048, I=768, T=1), 19.7 for 31.1 (E=256, H=3072, I=384).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor


@triton.jit(do_not_specialize=CALL_INTS)
def down_direct_kernel(
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
    b2_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n: tl.constexpr = (H + BN - 1) // BN
    token = tl.program_id(0) // tiles_n
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    slots = tl.arange(0, KP)
    in_slots = alive & (slots < K)
    # the routing is older than the gate/up GEMM, so it may be read before that has finished
    experts = load_expert_id(ids_ptr, ids_stride, ids_words, token, slots, in_slots, E)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if token >= num_tokens:
        return
    inside = n < H
    out = out_ptr + token.to(tl.int64) * out_stride + n
    if not alive:
        tl.store(out, tl.zeros((BN,), out_ptr.dtype.element_ty), mask=inside & (pad_zero != 0))
        return
    weights = load_routing_weight(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slots, in_slots
    )
    # the weight of an id that no expert has may be anything, NaN included
    weights = tl.where(experts >= 0, weights, 0.0)
    k = tl.arange(0, BK)
    rows = n.to(tl.int64) * W_N
    acc = tl.zeros((BN, BK), tl.float32)
    # one loop over slots and reduction steps: the loads of the next expert are under way while this one ends
    STEPS: tl.constexpr = (I + BK - 1) // BK
    for step in tl.range(0, K * STEPS, num_stages=STAGES):
        slot = step // STEPS
        kk = (step % STEPS) * BK + k
        expert = tl.sum(tl.where(slots == slot, experts, 0), 0)
        weight = tl.sum(tl.where(slots == slot, weights, 0.0), 0)
        in_k = (kk < I) & (expert >= 0)
        h_row = h_ptr + (token * K + slot).to(tl.int64) * I
        h = tl.load(h_row + kk, mask=in_k, other=0.0).to(tl.float32) * weight
        offsets = expert.to(tl.int64) * W_E + rows[:, None] + kk[None, :].to(tl.int64) * W_K
        tile = tl.load(w2_ptr + offsets, mask=inside[:, None] & in_k[None, :], other=0.0)
        acc += tile.to(tl.float32) * h[None, :]
    total = tl.sum(acc, 1)
    if b2_ptr is not None:
        for slot in range(K):
            expert = tl.sum(tl.where(slots == slot, experts, 0), 0)
            weight = tl.sum(tl.where(slots == slot, weights, 0.0), 0)
            routed = inside & (expert >= 0)
            b = tl.load(b2_ptr + expert.to(tl.int64) * H + n, mask=routed, other=0.0)
            total += b.to(tl.float32) * weight
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def down_grouped_kernel(
    sorted_token_ids,
    sorted_weights,
    sorted_expert_ids,
    num_valid_ids,
    h_ptr,
    w2_ptr,
    b2_ptr,
    y_ptr,
    reduction,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n: tl.constexpr = (H + BN - 1) // BN
    block = tl.program_id(0) // tiles_n
    # the sort is older than the gate/up GEMM, so it may be read before that has finished
    live_block = block * BM < tl.load(num_valid_ids)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if not live_block:
        return
    expert = tl.load(sorted_expert_ids + block)
    sorted_rows = block * BM + tl.arange(0, BM)
    packed = tl.load(sorted_token_ids + sorted_rows)
    slot = packed >> 24
    live = slot < K  # padding slots carry K
    rows = tl.where(live, (packed & 0xFFFFFF) * K + slot, 0).to(tl.int64)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    inside = n < H
    w_cols = w2_ptr + expert.to(tl.int64) * W_E + n.to(tl.int64) * W_N
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    # I as an argument keeps LLVM from unrolling the loop, which spills where registers are few (RDNA)
    for start in range(0, I if reduction is None else reduction, BK):
        kk = start + k
        in_k = kk < I
        h = tl.load(
            h_ptr + rows[:, None] * I + kk[None, :], mask=live[:, None] & in_k[None, :], other=0.0
        )
        w = tl.load(
            w_cols[None, :] + kk[:, None].to(tl.int64) * W_K,
            mask=in_k[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(h, w, acc, input_precision="ieee")
    if b2_ptr is not None:
        b = tl.load(b2_ptr + expert.to(tl.int64) * H + n, mask=inside, other=0.0)
        acc += b.to(tl.float32)[None, :]
    weight = tl.load(sorted_weights + sorted_rows)
    y = (acc * weight[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * H + n[None, :], y, mask=live[:, None] & inside[None, :])
