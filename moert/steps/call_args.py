"""The arguments of a kernel that the caller of `forward` provides, and how kernels read them.

Every kernel names these parameters alike, so that the launcher can tell them from the fixed ones
(weights, arena views, sizes) by name, compile one variant for all calls, and rewrite exactly them
before a replay.

Expert ids may be int32 or int64. Kernels read them as 32-bit words, `ids_words` words an id (1 or
2, low word first: all supported machines are little-endian), so that neither a conversion nor a
second variant is needed. Routing weights may be float32 or the model's dtype; both typed pointers
hold the same address.
"""

from __future__ import annotations

import triton
import triton.language as tl

# name -> type in a Triton signature; "{dtype}" is the model's dtype
CALL_ARGS: dict[str, str] = {
    "x_ptr": "*{dtype}",  # [T, H]
    "x_stride": "i64",  # elements between rows
    "ids_ptr": "*i32",  # [T, K] words of expert ids
    "ids_stride": "i64",  # words between rows
    "ids_words": "i32",  # words an id: 1 (int32) or 2 (int64)
    "weights_f32_ptr": "*fp32",  # [T, K] routing weights, read when weights_are_f32
    "weights_ptr": "*{dtype}",  # the same address, read otherwise
    "weights_stride": "i64",  # elements between rows
    "weights_are_f32": "i32",
    "out_ptr": "*{dtype}",  # [T, H]
    "out_stride": "i64",  # elements between rows
    "num_valid_ptr": "*i32",  # one int32: live rows, where smaller than num_tokens; null for none
    "num_tokens": "i32",  # rows of the caller's tensors
    "pad_zero": "i32",  # 1: rows live..num_tokens of out become zero; 0: they are not written
}
# never specialised on their value: one compiled variant serves every call
CALL_INTS = [name for name, kind in CALL_ARGS.items() if not kind.startswith("*")]


@triton.jit
def live_tokens(num_tokens, num_valid_ptr):
    """T: the number of rows to be computed, never negative.

    A null pointer stands for no count; then no load has to end before those of the ids can begin.
    """
    given = num_valid_ptr.to(tl.int64) != 0
    return tl.maximum(
        tl.minimum(num_tokens, tl.load(num_valid_ptr, mask=given, other=num_tokens)), 0
    )


@triton.jit
def load_expert_id(ids_ptr, ids_stride, ids_words, token, slot, mask, NUM_EXPERTS: tl.constexpr):
    """The expert of (token, slot), or -1 where masked off or outside 0..E-1 ("not routed here")."""
    word = ids_ptr + token.to(tl.int64) * ids_stride + slot * ids_words
    low = tl.load(word, mask=mask, other=-1)
    # an int64 id whose high word is not the sign of its low word does not fit 0..E-1 either
    high = tl.load(word + (ids_words - 1), mask=mask, other=-1)
    fits = (ids_words == 1) | (high == 0)
    valid = fits & (low >= 0) & (low < NUM_EXPERTS)
    return tl.where(valid, low, -1)


@triton.jit
def load_routing_weight(
    weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, token, slot, mask
):
    """The fp32 routing weight of (token, slot), 0 where masked off."""
    offset = token.to(tl.int64) * weights_stride + slot
    is_f32 = weights_are_f32 != 0
    wide = tl.load(weights_f32_ptr + offset, mask=mask & is_f32, other=0.0)
    narrow = tl.load(weights_ptr + offset, mask=mask & (weights_are_f32 == 0), other=0.0)
    return tl.where(is_f32, wide, narrow.to(tl.float32))
