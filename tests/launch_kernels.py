"""Kernels whose arguments are of every kind, for test_launch."""

import triton
import triton.language as tl

from moert.steps.call_args import CALL_INTS, live_tokens, load_expert_id, load_routing_weight


@triton.jit(do_not_specialize=CALL_INTS)
def every_call_argument_kernel(
    x_ptr, x_stride, ids_ptr, ids_stride, ids_words, weights_f32_ptr, weights_ptr, weights_stride,
    weights_are_f32, out_ptr, out_stride, num_valid_ptr, num_tokens, pad_zero,
    table_ptr, absent_ptr, scale, count, far,
    E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[t] = x[t] * sum of weights[t, k] * table[ids[t, k]] over the slots with an expert."""
    token = tl.program_id(0)
    column = tl.arange(0, BH)
    out = out_ptr + token.to(tl.int64) * out_stride + column
    if token < live_tokens(num_tokens, num_valid_ptr):
        total = 0.0
        for slot in range(K):
            expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, True, E)
            weight = load_routing_weight(
                weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, True
            )
            value = tl.load(table_ptr + expert, mask=expert >= 0, other=0.0)
            total += tl.where(expert >= 0, weight * value, 0.0)
        x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=column < H).to(tl.float32)
        y = x * total * scale + ADD + (count + far - far)
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=column < H)
    elif pad_zero != 0:
        tl.store(out, tl.zeros([BH], out_ptr.dtype.element_ty), mask=column < H)
