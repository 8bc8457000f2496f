"""Down GEMM with fused bias and routing weight.

direct: out[t] = sum over slots k = 0..K-1, in that order, of weight[t, k] * (h[t*K+k] @
w2[expert].T + b2): one program per (token, BN columns of out) loops over the token's experts and
so combines without atomics, in a fixed order, straight into the caller's buffer. grouped: y[s] =
weight[s] * (h[s] @ w2[expert].T + b2) for blocks of BM sorted rows on matrix units, y [S, H] in
the model's dtype; the combine step adds the K rows of each token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight


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
):
    tiles_n: tl.constexpr = (H + BN - 1) // BN
    token = tl.program_id(0) // tiles_n
    if token >= num_tokens:
        return
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    inside = n < H
    out = out_ptr + token.to(tl.int64) * out_stride + n
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    if not alive:
        tl.store(out, tl.zeros((BN,), out_ptr.dtype.element_ty), mask=inside & (pad_zero != 0))
        return
    k = tl.arange(0, BK)
    rows = n.to(tl.int64) * W_N
    acc = tl.zeros((BN, BK), tl.float32)
    bias = tl.zeros((BN,), tl.float32)
    for slot in range(K):
        expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
        if expert >= 0:
            weight = load_routing_weight(
                weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, alive
            )
            w = w2_ptr + expert.to(tl.int64) * W_E
            h_row = h_ptr + (token * K + slot).to(tl.int64) * I
            for start in tl.static_range(0, I, BK):
                kk = start + k
                in_k = kk < I
                h = tl.load(h_row + kk, mask=in_k, other=0.0).to(tl.float32) * weight
                offsets = rows[:, None] + kk[None, :].to(tl.int64) * W_K
                tile = tl.load(w + offsets, mask=inside[:, None] & in_k[None, :], other=0.0)
                acc += tile.to(tl.float32) * h[None, :]
            if b2_ptr is not None:
                b = tl.load(b2_ptr + expert.to(tl.int64) * H + n, mask=inside, other=0.0)
                bias += b.to(tl.float32) * weight
    tl.store(out, (tl.sum(acc, 1) + bias).to(out_ptr.dtype.element_ty), mask=inside)


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
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_n: tl.constexpr = (H + BN - 1) // BN
    block = tl.program_id(0) // tiles_n
    if block * BM >= tl.load(num_valid_ids):
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
    for start in range(0, I, BK):
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
