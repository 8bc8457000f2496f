"""The one-shot sort of few rows, whose sums stay inside a warp.

A row's place is the number of rows less than it (by expert, then row), plus the padding behind the experts
before its own: both are sums of comparisons, with no scan and nothing to look up. Tensors lie as
[N, SHARE, 32]: the compiler puts the last axis on a warp's lanes, the middle one on its warps and the first
one into registers, so that a sum over first and last is one warp's, in one instruction on NVIDIA. Warps meet
only to count the rows of each expert and to hand the rows round: 4 barriers on sm_90, where the kernel for
more rows has 20.

On an H200 (E=128, K=8, BM=16; launches in a graph, dependent), in brackets the kernel for more rows: T=1
0.85 (1.45), T=16 0.95 (1.46), T=32 1.35 (1.54), T=64 1.63 us (1.98); with routing before it 2.30, 2.5, 2.72
and 3.10. Shares of 4 or 16 rows and as many warps at T=64: 3.41 and 3.31. Rows handed round after the count
instead of before it: 3.15.

E, EP, the number of no row, and what is written are as `moert.steps.sorting.triton` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import live_tokens, load_routing_weight
from moert.steps.dependent_launch import (
    compute_before_wait,
    let_successor_start,
    wait_for_predecessor,
)
from moert.steps.sorting.block_size import block_size, blocks_before, crowds, whole_blocks

ROW_BITS = 10  # of a key
PLACE_BITS = 20  # of an output row; the bits above count rows
MAX_ROWS = 512
MAX_PLACES = 1 << PLACE_BITS

_ROW_BITS = tl.constexpr(ROW_BITS)
_PLACE_BITS = tl.constexpr(PLACE_BITS)
_PLACE = tl.constexpr(MAX_PLACES - 1)
_NO_PLACE = tl.constexpr(-MAX_PLACES)
_ONE_BEFORE = tl.constexpr(1 - MAX_PLACES)  # what a row that is less adds to both sums
_NOBODY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _id_words(ids_ptr, ids_stride, ids_words, row, K: tl.constexpr):
    """Token and slot of each row, and where the low word of its expert id is."""
    # unsigned: rows are never negative, which the compiler does not know
    unsigned = row.to(tl.uint32)
    token = (unsigned // K).to(tl.int32)
    slot = (unsigned % K).to(tl.int32)
    return token, slot, ids_ptr + token.to(tl.int64) * ids_stride + slot * ids_words


@triton.jit
def _load_keys(
    word, token, ids_words, num_tokens, live, expert_mask_ptr, row, E: tl.constexpr
):  # fmt: skip
    """Expert and key of each row: `expert << ROW_BITS | row`, in the order of the output; NOBODY for none."""
    # masked by the tensor's size, not by the live count, which is still on its way
    inside = token < num_tokens
    low = tl.load(word, mask=inside, other=-1)
    # high words are fetched only where there are any; then they are 0 in an id inside 0..E-1
    high = tl.load(word + 1, mask=inside & (ids_words == 2), other=0)
    there = (low.to(tl.uint32) < E) & (high == 0) & (token < live)
    if expert_mask_ptr is not None:
        there = there & (tl.load(expert_mask_ptr + low, mask=there, other=0) != 0)
    return low, tl.where(there, (low << _ROW_BITS) | row, _NOBODY)


@triton.jit
def sort_one_shot_few_kernel(
    ids_ptr, ids_stride, ids_words, weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
    num_valid_ptr, num_tokens,
    expert_mask_ptr, sorted_token_ids_ptr, sorted_weights_ptr, sorted_expert_ids_ptr, num_valid_ids_ptr,
    crowded_valid_ids_ptr,
    E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, CROWDED_BM: tl.constexpr, REACH: tl.constexpr,
    EP: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every program counts all rows, at most C <= 512, and places SHARE of them; nobody waits for anybody.

    expert_mask [E] int32 or None; outputs as `SortedRows` says; CROWDED_BM, REACH and
    crowded_valid_ids: `moert.steps.sorting.block_size`. The programs reach past the last row by one:
    that row of nobody has its place behind all others, and so tells how many there are. EP: at least 32.
    """
    lane = tl.arange(0, 32)
    mine = (tl.program_id(0) * SHARE + tl.arange(0, SHARE))[None, :, None]
    my_token, my_slot, my_word = _id_words(ids_ptr, ids_stride, ids_words, mine, K)
    row = tl.arange(0, C // 32)[:, None] * 32 + lane[None, :]
    token, _, word = _id_words(ids_ptr, ids_stride, ids_words, row, K)
    compute_before_wait(PDL)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    live = live_tokens(num_tokens, num_valid_ptr)
    my_expert, my_key = _load_keys(
        my_word, my_token, ids_words, num_tokens, live, expert_mask_ptr, mine, E
    )
    my_weight = load_routing_weight(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
        my_token, my_slot, my_token < num_tokens,
    )  # fmt: skip
    _, key = _load_keys(word, token, ids_words, num_tokens, live, expert_mask_ptr, row, E)
    less = tl.sum((key[:, None, :] < my_key).to(tl.int32), 0)  # [SHARE, 32], to be summed
    flat = tl.reshape(key, [C], can_reorder=True)
    count = tl.histogram(flat >> _ROW_BITS, EP, mask=flat != _NOBODY)

    # two sums in one: padding of the experts before in the low bits, above it rows up to this expert's last
    # less the rows before this one: 1 for the last row of an expert
    counts = tl.reshape(count, [EP // 32, 32])[:, None, :]
    crowded = False
    if CROWDED_BM:
        # by every warp for itself
        counts = tl.broadcast_to(counts, [EP // 32, SHARE, 32])
        # two numbers in one: there are no more blocks than rows
        blocks = whole_blocks(counts, REACH) | (whole_blocks(counts, CROWDED_BM) << 16)
        blocks = tl.sum(tl.sum(blocks, 0), 1)[None, :, None]
        crowded = crowds(blocks & 0xFFFF, blocks >> 16)
    size = block_size(crowded, BM, CROWDED_BM)
    padding = blocks_before(counts + (size - 1), crowded, BM, CROWDED_BM) * size - counts
    both = padding | (counts << _PLACE_BITS)
    other = (tl.arange(0, EP // 32)[:, None] * 32 + lane[None, :])[:, None, :]
    own = my_key >> _ROW_BITS
    before = tl.sum(tl.where(other < own, both, 0), 0)
    before += tl.sum(tl.where(other == own, both & _NO_PLACE, 0), 0)
    place = tl.sum(before + less * _ONE_BEFORE, 1)[None, :, None]
    at = place & _PLACE
    there = my_key != _NOBODY
    last = (place >> _PLACE_BITS) == 1

    # of the 32 lanes the first one stores the row, the others the padding behind an expert's last row
    ahead = lane[None, None, :]
    first = ahead == 0
    block = blocks_before(at, crowded, BM, CROWDED_BM)
    end = block * size + size
    padded = tl.zeros_like(mine + ahead) + ((K << 24) | num_tokens)
    write = there & (first | (last & (at + ahead < end)))
    entry = tl.where(first, (my_slot << 24) | my_token, padded)
    tl.store(sorted_token_ids_ptr + (at + ahead), entry, mask=write)
    tl.store(sorted_weights_ptr + (at + ahead), tl.where(first, my_weight, 0.0), mask=write)
    for further in tl.static_range(32, BM if BM > CROWDED_BM else CROWDED_BM, 32):
        write = there & last & (at + ahead + further < end)
        tl.store(sorted_token_ids_ptr + (at + ahead) + further, padded, mask=write)
        zero = tl.zeros_like(padded).to(tl.float32)
        tl.store(sorted_weights_ptr + (at + ahead) + further, zero, mask=write)

    name = my_expert
    if expert_mask_ptr is not None:
        kept = tl.load(expert_mask_ptr + other, mask=other < E, other=0) != 0
        name = tl.sum(tl.sum((kept & (other < own)).to(tl.int32), 0), 1)[None, :, None]
    # experts start at whole blocks
    leads = there & (at == block * size) & first
    tl.store(sorted_expert_ids_ptr + (block + ahead), name, mask=leads)
    behind_all = (mine == live * K) & (ahead < 2)
    # one place for all SHARE rows, of which at most one stores
    valid_ptr = num_valid_ids_ptr + (ahead + mine * 0)
    tl.store(valid_ptr, tl.where(first, tl.where(crowded, 0, at), live), mask=behind_all)
    if CROWDED_BM:
        valid_ptr = crowded_valid_ids_ptr + (ahead + mine * 0)
        tl.store(valid_ptr, tl.where(first, tl.where(crowded, at, 0), live), mask=behind_all)
