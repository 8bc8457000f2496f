"""Kernels of a whole block: router logits from x, and the routing that a caller gave beside shared experts.

The router's matrix is small (0.1 to 7 MB) and comes from memory once: what counts at few tokens is latency.
So one or two tokens take a program for each expert, which has its whole row in flight at once, before it
waits for its predecessor; more tokens take matrix units, with H cut into parts so that all compute units
have work. The parts are added up, in their order, by the routing kernel: no atomics, the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor


@triton.jit
def _router_tile(
    router_ptr, gate_ptr, experts, columns,
    E: tl.constexpr, H: tl.constexpr, R_E: tl.constexpr, R_H: tl.constexpr, G_H: tl.constexpr,
):  # fmt: skip
    """Values at (experts, columns), two shapes that broadcast; row E is the shared experts' gate."""
    offset = experts.to(tl.int64) * R_E + columns.to(tl.int64) * R_H
    w = tl.load(router_ptr + offset, mask=(experts < E) & (columns < H), other=0.0)
    if gate_ptr is not None:
        at = columns.to(tl.int64) * G_H + tl.zeros_like(experts)
        gate = tl.load(gate_ptr + at, mask=(experts == E) & (columns < H), other=0.0)
        if gate_ptr.dtype.element_ty != router_ptr.dtype.element_ty:
            gate, w = gate.to(tl.float32), w.to(tl.float32)
        w = tl.where(experts == E, gate, w)
    return w


@triton.jit
def _router_bias(bias_ptr, experts, E: tl.constexpr):
    return tl.load(bias_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=CALL_INTS)
def router_logits_kernel(
    x_ptr, x_stride, num_valid_ptr, num_tokens, router_ptr, router_bias_ptr, gate_ptr, logits_ptr,
    E: tl.constexpr, COLUMNS: tl.constexpr, H: tl.constexpr,
    R_E: tl.constexpr, R_H: tl.constexpr, G_H: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [T, COLUMNS] fp32 = x [T, H] @ router [E, H].T (+ bias [E]); one value a program.

    COLUMNS is E, or E + 1 with a gate [H] of the shared experts.
    """
    expert = tl.program_id(0) % COLUMNS
    token = tl.program_id(0) // COLUMNS
    experts = expert + tl.zeros([BK], tl.int32)
    columns = tl.arange(0, BK)
    w = _router_tile(router_ptr, gate_ptr, experts, columns, E, H, R_E, R_H, G_H)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    if token < live_tokens(num_tokens, num_valid_ptr):
        row = x_ptr + token.to(tl.int64) * x_stride
        x = tl.load(row + columns, mask=columns < H, other=0.0)
        products = x.to(tl.float32) * w.to(tl.float32)
        for start in tl.static_range(BK, H, BK):
            here = start + columns
            w = _router_tile(router_ptr, gate_ptr, experts, here, E, H, R_E, R_H, G_H)
            x = tl.load(row + here, mask=here < H, other=0.0)
            products += x.to(tl.float32) * w.to(tl.float32)
        logit = tl.sum(products, axis=0)
        if router_bias_ptr is not None:
            logit += _router_bias(router_bias_ptr, expert, E)
        tl.store(logits_ptr + token.to(tl.int64) * COLUMNS + expert, logit)


@triton.jit(do_not_specialize=CALL_INTS)
def router_logits_tiled_kernel(
    x_ptr, x_stride, num_valid_ptr, num_tokens, router_ptr, router_bias_ptr, gate_ptr, logits_ptr,
    E: tl.constexpr, COLUMNS: tl.constexpr, H: tl.constexpr,
    R_E: tl.constexpr, R_H: tl.constexpr, G_H: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [PARTS, T, COLUMNS] fp32, the part of PART columns of H; BM tokens, BN experts a program.

    WIDE: x, router and gate are not all of one 16-bit dtype, and are multiplied in fp32.
    """
    TILES: tl.constexpr = (COLUMNS + BN - 1) // BN
    pid = tl.program_id(0)
    experts = pid % TILES * BN + tl.arange(0, BN)
    part = pid // TILES % PARTS
    row = pid // (TILES * PARTS) * BM + tl.arange(0, BM)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    live = live_tokens(num_tokens, num_valid_ptr)
    if pid // (TILES * PARTS) * BM < live:
        alive = row < live
        x_row = x_ptr + row.to(tl.int64)[:, None] * x_stride
        logits = tl.zeros([BM, BN], tl.float32)
        for start in tl.range(0, PART, BK):
            columns = part * PART + start + tl.arange(0, BK)
            mask = alive[:, None] & (columns < H)[None, :]
            x = tl.load(x_row + columns[None, :], mask=mask, other=0.0)
            w = _router_tile(
                router_ptr, gate_ptr, experts[None, :], columns[:, None], E, H, R_E, R_H, G_H
            )
            if WIDE:
                x, w = x.to(tl.float32), w.to(tl.float32)
                logits = tl.dot(x, w, acc=logits, input_precision="ieee")
            else:
                logits = tl.dot(x, w, acc=logits)
        if router_bias_ptr is not None:
            bias = _router_bias(router_bias_ptr, experts, E)
            logits += tl.where(part == 0, bias, 0.0)[None, :]
        at = (part.to(tl.int64) * num_tokens + row)[:, None] * COLUMNS + experts[None, :]
        tl.store(logits_ptr + at, logits, mask=alive[:, None] & (experts < COLUMNS)[None, :])


@triton.jit(do_not_specialize=CALL_INTS)
def routed_slots_kernel(
    ids_ptr, ids_stride, ids_words, weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
    num_valid_ptr, num_tokens, slot_ids_ptr, slot_weights_ptr,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """slot_ids int32 and slot_weights fp32 [T, SLOTS], without gaps, from a routing of K slots.

    The other slots are nobody's, -1, and so is an id outside 0..E-1. Tokens from the live count on are
    neither read nor written.
    """
    live = live_tokens(num_tokens, num_valid_ptr)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, slot = row // SLOTS, row % SLOTS
    routed = (token < live) & (slot < K)
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, routed, E)
    weight = load_routing_weight(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, routed
    )
    tl.store(slot_ids_ptr + row, expert, mask=token < live)
    tl.store(slot_weights_ptr + row, weight, mask=token < live)
