"""The routing kernel: one warp a token, K arg-max steps on integer keys.

An fp32 logit becomes an int32 of the same order, because hardware reduces integers across a warp in one
instruction (`redux.sync` on NVIDIA from sm_80) where a float, or a value with its index, takes five
dependent shuffles. For the same reason the softmax over the chosen logits is summed up as they are found.
fp16 and bf16 logits leave the low 13 bits of that key unused, which then hold the expert id: one reduction
a step gives both; other keys need a second one for the id.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moert.config import MoEConfig
from moert.errors import UnsupportedError
from moert.steps.call_args import live_tokens
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.topk import TopK

MAX_EXPERTS = 1024

LOWEST = tl.constexpr(-(2**31))  # below the key of every float: padding, and what is already taken
MINUS_INF = tl.constexpr(0x807FFFFF - 2**32)  # the key of -inf
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
ID_MASK = tl.constexpr(0x1FFF)


@triton.jit
def _to_key(x):
    # -0.0 becomes 0.0 so that the two tie
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key, PACKED: tl.constexpr):
    if PACKED:
        key = key & ~ID_MASK
        bits = key ^ ((key >> 31) & 0x7FFFE000)
    else:
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _no_nan(x):
    # the comparison is false for NaN, which so becomes -inf
    return tl.where(x >= -FLOAT_MAX, x, float("-inf"))


@triton.jit
def _load_sum(ptr, mask, other, part_stride, PARTS: tl.constexpr):
    """The sum of PARTS fp32 values, part_stride apart, in their order."""
    x = tl.load(ptr, mask=mask, other=other).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(ptr + part * part_stride, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _load_logits(ptr, mask, part_stride, PARTS: tl.constexpr):
    x = _load_sum(ptr, mask, float("-inf"), part_stride, PARTS)
    return tl.minimum(_no_nan(x), FLOAT_MAX)


@triton.jit
def _score(x, peak, total, SCORING: tl.constexpr):
    """Scores of logits x; peak and total, of a shape that fits x, belong to the softmax over E."""
    if SCORING == "softmax_topk":
        return x
    if SCORING == "softmax":
        return tl.exp(x - peak) / total
    # sigmoid and softplus from exp(-|x|), which cannot overflow
    e = tl.exp(-tl.abs(x))
    if SCORING == "sigmoid":
        return tl.where(x >= 0, 1.0, e) / (1.0 + e)
    # log(1 + e) = 2 atanh(e / (2 + e)): the series keeps full relative precision for small e, which
    # the hardware's logarithm does not; at the worst e = 1 the first dropped term is 2e-10 of the sum
    s = e / (2.0 + e)
    z = s * s
    p = z * (1.0 / 17) + 1.0 / 15
    p = p * z + 1.0 / 13
    p = p * z + 1.0 / 11
    p = p * z + 1.0 / 9
    p = p * z + 1.0 / 7
    p = p * z + 1.0 / 5
    p = p * z + 1.0 / 3
    p = p * z + 1.0
    return tl.sqrt_rn(tl.maximum(x, 0.0) + 2.0 * s * p)


@triton.jit
def _max12(x):
    # the group axis first: it lies in registers, the other one across the warp
    return tl.max(tl.max(x, axis=1), axis=1)


@triton.jit
def _choose(key, experts, slot, K: tl.constexpr, PACKED: tl.constexpr, SUM: tl.constexpr):
    """The K best keys of key [BT, G, P] and their experts, in slot order, [BT, KP].

    SUM: the keys are of logits; also the best logit [BT], and the sum of the powers of all K relative to it,
    while the steps that find them are under way: after them, six dependent exchanges of a warp would.
    """
    chosen_key = tl.full([key.shape[0], slot.shape[1]], MINUS_INF, tl.int32)
    chosen = tl.zeros_like(chosen_key)
    first = tl.full([key.shape[0]], -FLOAT_MAX, tl.float32)
    total = tl.zeros_like(first)
    for k in range(K):
        best = _max12(key)
        if SUM:
            x = _from_key(best, PACKED)
            first = tl.maximum(first, x)  # the first is the best
            total += tl.exp(x - first)
        if PACKED:
            expert = ID_MASK - (best & ID_MASK)
            key = tl.where(key == best[:, None, None], LOWEST, key)
        else:
            held = tl.where(key == best[:, None, None], experts, 0x7FFFFFFF)
            expert = tl.min(tl.min(held, axis=1), axis=1)
            key = tl.where(experts == expert[:, None, None], LOWEST, key)
        chosen_key = tl.where(slot == k, best[:, None], chosen_key)
        chosen = tl.where(slot == k, expert[:, None], chosen)
    return chosen_key, chosen, first, total


@triton.jit
def _group_keys(
    key, experts, peak, total,
    SCORING: tl.constexpr, BY_LOGIT: tl.constexpr, PACKED: tl.constexpr, TOP2_SUM: tl.constexpr,
):  # fmt: skip
    """Keys [BT, G] of the groups' scores; peak and total [BT] belong to the softmax over E."""
    best = tl.max(key, axis=2)
    if not TOP2_SUM:
        return best
    holder = tl.min(tl.where(key == best[:, :, None], experts, 0x7FFFFFFF), axis=2)
    second = tl.max(tl.where(experts == holder[:, :, None], LOWEST, key), axis=2)
    a = _from_key(best, PACKED)
    b = _from_key(tl.maximum(second, MINUS_INF), PACKED)
    if BY_LOGIT:
        a = _score(a, peak[:, None], total[:, None], SCORING)
        b = _score(b, peak[:, None], total[:, None], SCORING)
    return _to_key(_no_nan(a + b))


@triton.jit
def _keep_groups(key, group_key, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """key [BT, G, P] with the experts outside the TOP_GROUPS best groups lowered below all others."""
    group = tl.arange(0, key.shape[1])[None, :]
    group_key = tl.where(group < NUM_GROUPS, group_key, LOWEST)
    kept = tl.zeros(group_key.shape, tl.int1)
    for _ in range(TOP_GROUPS):
        best = tl.max(group_key, axis=1)
        winner = tl.min(tl.where(group_key == best[:, None], group, 0x7FFFFFFF), axis=1)
        won = group == winner[:, None]
        kept = kept | won
        group_key = tl.where(won, LOWEST, group_key)
    return tl.where(kept[:, :, None], key, LOWEST)


@triton.constexpr_function
def _relative_to_chosen(scoring, renormalize):
    """Whether weights are the softmax over the chosen logits, of which the others make no part."""
    return scoring == "softmax_topk" or (scoring == "softmax" and renormalize)


@triton.jit
def _weigh(
    x, mask, peak, total, best, sum_of_chosen,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Weights [BT, KP] of the chosen logits x; peak and total belong to the softmax over E.

    Args:
        best, sum_of_chosen: with SUM, what `_choose` gives.
    """
    if _relative_to_chosen(SCORING, RENORMALIZE):
        if not SUM:
            best = tl.maximum(tl.max(x, axis=1), -FLOAT_MAX)
        w = tl.exp(x - best[:, None])
        if not SUM:
            sum_of_chosen = tl.sum(w, axis=1)
        # nothing but -inf has a smaller sum than the best one's own 1
        return w / tl.maximum(sum_of_chosen, 1.0)[:, None]
    w = _score(x, peak[:, None], total[:, None], SCORING)
    if RENORMALIZE:
        w = w / (tl.sum(tl.where(mask, w, 0.0), axis=1) + 1e-20)[:, None]
    return w


_RUNTIME_VALUES = [
    "logits_ptr", "correction_bias_ptr", "routed_weights_ptr", "routed_ids_ptr", "num_valid_ptr",
    "num_tokens", "logits_stride",
]  # fmt: skip


# nothing is specialised on a caller's value: one binary serves every address, stride and count
@triton.jit(do_not_specialize=_RUNTIME_VALUES)
def routing_fwd_kernel(
    logits_ptr, correction_bias_ptr, routed_weights_ptr, routed_ids_ptr, num_valid_ptr,
    num_tokens, logits_stride,
    E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2_SUM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr, GATE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Route BLOCK_T tokens; rows from min(num_tokens, *num_valid_ptr) on are not written.

    logits [PARTS, num_tokens, E] with a row stride, to be added up; bias [E] or None; weights fp32 and ids
    int32 [num_tokens, K + SHARED], contiguous; num_valid int32 scalar or None. The experts lie as
    [GROUPS, GROUP], both padded. The last SHARED slots are of experts E, E + 1, ... with weight 1, or, with
    GATE, the sigmoid of the logit in column E.
    """
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    BY_LOGIT: tl.constexpr = correction_bias_ptr is None
    PACKED: tl.constexpr = BY_LOGIT and logits_ptr.dtype.element_ty.primitive_bitwidth == 16
    live = num_tokens
    if num_valid_ptr is not None:
        live = live_tokens(num_tokens, num_valid_ptr)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    part_stride = logits_stride.to(tl.int64) * num_tokens

    group = tl.arange(0, GROUPS)[None, :, None]
    # said to start anywhere, so that no load takes neighbours at once: that would put an axis on fewer
    # lanes than a warp has, and cost the one-instruction reductions
    place = tl.multiple_of(tl.arange(0, GROUP), 1)[None, None, :]
    experts = group * (E // NUM_GROUPS) + place
    real = (group < NUM_GROUPS) & (place < E // NUM_GROUPS)
    # by the tensor's size, not by the live count, which is still on its way
    inside = (row < num_tokens)[:, None, None] & real
    x = _load_logits(row_ptr[:, None, None] + experts, inside, part_stride, PARTS)

    peak = tl.zeros([BLOCK_T], tl.float32)
    total = peak
    # only a choice or a weight that is relative to all E experts needs their sum
    if SCORING == "softmax" and (not BY_LOGIT or not RENORMALIZE or (NUM_GROUPS > 1 and TOP2_SUM)):
        peak = tl.maximum(_from_key(_max12(_to_key(x)), False), -FLOAT_MAX)
        # the peak's own term is 1, so only a row of -inf has a smaller sum: 0
        powers = tl.exp(x - peak[:, None, None])
        total = tl.maximum(tl.sum(tl.sum(powers, axis=1), axis=1), 1.0)
    choice = x
    if not BY_LOGIT:
        bias = tl.load(correction_bias_ptr + experts, mask=real, other=0.0).to(tl.float32)
        scores = _score(x, peak[:, None, None], total[:, None, None], SCORING)
        choice = _no_nan(scores + bias)
    key = _to_key(choice)
    if PACKED:
        key = (key & ~ID_MASK) | (ID_MASK - experts)
    key = tl.where(real, key, LOWEST)
    if NUM_GROUPS > 1:
        group_key = _group_keys(key, experts, peak, total, SCORING, BY_LOGIT, PACKED, TOP2_SUM)
        key = _keep_groups(key, group_key, NUM_GROUPS, TOP_GROUPS)

    slot = tl.arange(0, BLOCK_K)[None, :]
    SUM: tl.constexpr = BY_LOGIT and _relative_to_chosen(SCORING, RENORMALIZE)
    chosen_key, chosen, best, sum_of_chosen = _choose(key, experts, slot, K, PACKED, SUM)
    mask = (row < live)[:, None] & (slot < K)
    if BY_LOGIT:
        picked = _from_key(chosen_key, PACKED)
    else:
        picked = _load_logits(row_ptr[:, None] + chosen, mask, part_stride, PARTS)
    weights = (
        _weigh(picked, mask, peak, total, best, sum_of_chosen, SCORING, RENORMALIZE, SUM) * SCALE
    )
    if SHARED > 0:
        shared = tl.full([BLOCK_T], 1.0, tl.float32)
        if GATE:
            shared = tl.sigmoid(_load_sum(row_ptr + E, row < num_tokens, 0.0, part_stride, PARTS))
        weights = tl.where(slot < K, weights, shared[:, None])
        chosen = tl.where(slot < K, chosen, E + slot - K)
        mask = (row < live)[:, None] & (slot < K + SHARED)
    at = tl.multiple_of(row.to(tl.int64)[:, None] * (K + SHARED) + slot, (1, 1))  # as above
    tl.store(routed_ids_ptr + at, chosen, mask=mask)
    tl.store(routed_weights_ptr + at, weights, mask=mask)


def routing_launch(
    cfg: MoEConfig, tokens: int, dependent: bool = False, *, shared: bool = False, parts: int = 1
) -> tuple[tuple[int], dict[str, Any], int]:
    """Grid, constexpr arguments in the kernel's order, and warps, for up to `tokens` rows (B, or T).

    Args:
        dependent: the next kernel may start while this one drains, if it is launched so.
        shared: the config's shared experts get slots of their own.
        parts: how many partial logits are to be added up.

    Raises:
        UnsupportedError: more than 1024 experts.
    """
    if cfg.num_experts > MAX_EXPERTS:
        raise UnsupportedError(
            f"routing: num_experts={cfg.num_experts}, the triton kernel handles up to {MAX_EXPERTS}; "
            "the torch backend has no limit"
        )
    rule = cfg.routing
    count = cfg.shared_experts if shared else 0
    group = cfg.num_experts // rule.num_groups
    # always one warp: more have to meet in shared memory at each of the K steps (0.2 to 1.3 us a launch
    # on an H200 for E 128 to 512). Two tokens a warp halve the workgroups, whose start is the limit from
    # about 2048 tokens on (E=128, T=4096: 2.9 us for 3.9), but cost up to 1.4 us at T=512
    block_t = 1 if tokens <= 1024 else 2
    constexprs = {
        "E": cfg.num_experts,
        "K": cfg.top_k,
        "SCORING": rule.scoring,
        "RENORMALIZE": rule.renormalize,
        "NUM_GROUPS": rule.num_groups,
        "TOP_GROUPS": rule.top_groups,
        "TOP2_SUM": rule.group_score == "top2_sum",
        "SCALE": rule.scaling_factor,
        "BLOCK_T": block_t,
        "GROUPS": triton.next_power_of_2(rule.num_groups),
        # the warp instruction reduces whole warps only (32 lanes on NVIDIA, up to 64 on AMD)
        "GROUP": max(triton.next_power_of_2(group), 64 if rule.num_groups == 1 else 1),
        "BLOCK_K": triton.next_power_of_2(cfg.top_k + count),
        "SHARED": count,
        "GATE": shared and cfg.shared_gate,
        "PARTS": parts,
        "PDL": dependent,
    }
    return ((tokens + block_t - 1) // block_t,), constexprs, 1


def route_triton(
    logits: torch.Tensor,
    cfg: MoEConfig,
    correction_bias: torch.Tensor | None,
    out: TopK,
    num_valid: torch.Tensor | None = None,
) -> None:
    """Launch the kernel on the current stream; the arguments are taken as checked.

    Args:
        logits: [T, E] fp32, bf16 or fp16, unit inner stride.
        correction_bias: [E] where the rule has one, else ignored.
        out: TopK(weights [T, K] fp32, ids [T, K] int32), contiguous; written.
        num_valid: int32 scalar on the device; rows from there on are not written.

    Raises:
        UnsupportedError: more than 1024 experts.
    """
    grid, constexprs, num_warps = routing_launch(cfg, logits.shape[0])
    if not cfg.routing.correction_bias:
        correction_bias = None
    if grid[0]:
        routing_fwd_kernel[grid](
            logits, correction_bias, out.weights, out.ids, num_valid,
            logits.shape[0], logits.stride(0),
            **constexprs, num_warps=num_warps,
        )  # fmt: skip
