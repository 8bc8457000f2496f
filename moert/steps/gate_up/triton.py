"""Gate/up GEMM with fused bias and activation: h[s] = act(x[token] @ w13[expert].T + b13[expert]).

h is [S, I] in the model's dtype, row s = token * K + slot, whatever the order of the work, so that
the rows that the down GEMM reads are the same for every strategy. Rows whose expert id is not in
0..E-1 are not written, and nobody reads them.

direct: one program per (row, BN columns of h); multiply-adds in fp32 without matrix units. No sort
precedes it. Right while a row is alone with its expert: the weights are read once per row.
grouped: one program per (block of BM sorted rows, BN columns of h); matrix units, x rows gathered
through the sort. Blocks past the live ones end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.activation.triton import activate
from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor


@triton.jit
def split_pairs(value, ROWS: tl.constexpr):
    """[2*ROWS] values alternating gate, up -> ([ROWS] gate, [ROWS] up)."""
    return tl.split(tl.reshape(value, (ROWS, 2)))


@triton.jit(do_not_specialize=CALL_INTS)
def gate_up_direct_kernel(
    x_ptr,
    x_stride,
    ids_ptr,
    ids_stride,
    ids_words,
    num_valid_ptr,
    num_tokens,
    w13_ptr,
    b13_ptr,
    h_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    tiles_n: tl.constexpr = (I + BN - 1) // BN
    tile_n = tl.program_id(0) % tiles_n
    row = tl.program_id(0) // tiles_n
    token, slot = row // K, row % K
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
    if expert < 0:
        return
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_row = x_ptr + token.to(tl.int64) * x_stride
    w = w13_ptr + expert.to(tl.int64) * W_E
    WIDE: tl.constexpr = 2 * BN if (GATED and INTERLEAVED) else BN
    # interleaved rows alternate gate, up: one tile of 2*BN neighbouring rows holds both halves
    rows = (tile_n * WIDE + tl.arange(0, WIDE)).to(tl.int64)
    ROWS: tl.constexpr = 2 * I if (GATED and INTERLEAVED) else I
    first = tl.zeros((WIDE, BK), tl.float32)
    second = tl.zeros((WIDE, BK), tl.float32)
    for start in tl.range(0, H, BK, num_stages=STAGES):
        kk = start + k
        in_k = kk < H
        x = tl.load(x_row + kk, mask=in_k, other=0.0).to(tl.float32)
        offsets = rows[:, None] * W_N + kk[None, :].to(tl.int64) * W_K
        mask = (rows < ROWS)[:, None] & in_k[None, :]
        first += tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32) * x[None, :]
        if GATED and not INTERLEAVED:
            up = tl.load(w + I * W_N + offsets, mask=mask, other=0.0)
            second += up.to(tl.float32) * x[None, :]
    if GATED and INTERLEAVED:
        gate, up = split_pairs(tl.sum(first, 1), BN)
    elif GATED:
        gate, up = tl.sum(first, 1), tl.sum(second, 1)
    else:
        up = tl.sum(first, 1)
        gate = up
    if b13_ptr is not None:
        gate, up = add_bias(
            gate,
            up,
            b13_ptr + expert.to(tl.int64) * (2 * I if GATED else I),
            n,
            I,
            GATED,
            INTERLEAVED,
        )
    h = activate(gate, up, ACTIVATION, GATED, LIMIT, ALPHA)
    tl.store(h_ptr + row.to(tl.int64) * I + n, h.to(h_ptr.dtype.element_ty), mask=n < I)


@triton.jit
def add_bias(
    gate,
    up,
    bias,
    n,
    I: tl.constexpr,  # noqa: E741
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    inside = n < I
    if GATED and INTERLEAVED:
        gate += tl.load(bias + 2 * n, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias + 2 * n + 1, mask=inside, other=0.0).to(tl.float32)
    elif GATED:
        gate += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias + I + n, mask=inside, other=0.0).to(tl.float32)
    else:
        up += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        gate = up
    return gate, up


@triton.jit(do_not_specialize=CALL_INTS)
def gate_up_grouped_kernel(
    x_ptr,
    x_stride,
    sorted_token_ids,
    sorted_expert_ids,
    num_valid_ids,
    w13_ptr,
    b13_ptr,
    h_ptr,
    reduction,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    W_E: tl.constexpr,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    tiles_n: tl.constexpr = (I + BN - 1) // BN
    block = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    if block * BM >= tl.load(num_valid_ids):
        return
    expert = tl.load(sorted_expert_ids + block)
    packed = tl.load(sorted_token_ids + block * BM + tl.arange(0, BM))
    token, slot = packed & 0xFFFFFF, packed >> 24
    live = slot < K  # padding slots carry K
    x_rows = x_ptr + tl.where(live, token, 0).to(tl.int64) * x_stride
    WIDE: tl.constexpr = 2 * BN if (GATED and INTERLEAVED) else BN
    ROWS: tl.constexpr = 2 * I if (GATED and INTERLEAVED) else I
    cols = (tile_n * WIDE + tl.arange(0, WIDE)).to(tl.int64)
    w_cols = w13_ptr + expert.to(tl.int64) * W_E + cols * W_N
    k = tl.arange(0, BK)
    first = tl.zeros((BM, WIDE), tl.float32)
    second = tl.zeros((BM, WIDE), tl.float32)
    # H as an argument keeps LLVM from unrolling the loop, which spills where registers are few (RDNA)
    for start in range(0, H if reduction is None else reduction, BK):
        kk = start + k
        in_k = kk < H
        x = tl.load(x_rows[:, None] + kk[None, :], mask=live[:, None] & in_k[None, :], other=0.0)
        w_tile = w_cols[None, :] + kk[:, None].to(tl.int64) * W_K
        mask = in_k[:, None] & (cols < ROWS)[None, :]
        w = tl.load(w_tile, mask=mask, other=0.0)
        # tf32 would cost float32 models three digits, and most AMD targets refuse it for any dtype
        first = tl.dot(x, w, first, input_precision="ieee")
        if GATED and not INTERLEAVED:
            w_up = tl.load(w_tile + I * W_N, mask=mask, other=0.0)
            second = tl.dot(x, w_up, second, input_precision="ieee")
    if GATED and INTERLEAVED:
        gate, up = tl.split(tl.reshape(first, (BM, BN, 2)))
    elif GATED:
        gate, up = first, second
    else:
        gate, up = first, first
    n = tile_n * BN + tl.arange(0, BN)
    if b13_ptr is not None:
        bias = b13_ptr + expert.to(tl.int64) * (2 * I if GATED else I)
        gate, up = add_bias(gate, up, bias, n[None, :], I, GATED, INTERLEAVED)
    h = activate(gate, up, ACTIVATION, GATED, LIMIT, ALPHA)
    rows = (token * K + slot).to(tl.int64)
    mask = live[:, None] & (n < I)[None, :]
    tl.store(h_ptr + rows[:, None] * I + n[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)
