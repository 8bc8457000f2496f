"""Combine: out[t] = y[t*K] + ... + y[t*K+K-1], in that order, in fp32, into the caller's buffer.

A slot whose id is outside 0..E-1 has no row in y and is skipped. Rows from the live count on are
left alone, or become zero where the call says so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor


@triton.jit(do_not_specialize=CALL_INTS)
def combine_kernel(
    ids_ptr,
    ids_stride,
    ids_words,
    out_ptr,
    out_stride,
    num_valid_ptr,
    num_tokens,
    pad_zero,
    y_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_n: tl.constexpr = (H + BN - 1) // BN
    token = tl.program_id(0) // tiles_n
    alive = token < live_tokens(num_tokens, num_valid_ptr)
    # ids are older than the GEMMs: read before the wait, a bit a slot as far as a word reaches
    routed = token * 0
    for slot in tl.static_range(min(K, 31)):
        expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E)
        routed |= (expert >= 0).to(tl.int32) << slot
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if token >= num_tokens:
        return
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    inside = n < H
    acc = tl.zeros((BN,), tl.float32)
    for slot in tl.static_range(K):
        if slot < 31:
            there = ((routed >> slot) & 1) != 0
        else:
            there = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, alive, E) >= 0
        row = (token * K + slot).to(tl.int64)
        y = tl.load(y_ptr + row * H + n, mask=inside & there, other=0.0)
        acc += y.to(tl.float32)
    out = out_ptr + token.to(tl.int64) * out_stride + n
    write = inside & (alive | (pad_zero != 0))
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=write)
