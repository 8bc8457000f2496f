"""The sort kernels: a counting sort, stable by construction, without atomics whose order could matter.

A row's place is the start of its expert, plus the number of earlier rows of that expert. Earlier rows at hand
are found by comparing each with each, which suits registers better than a scan over [rows, experts] and does
not grow with E; the others by counting per expert.

One-shot is one launch, though not one workgroup: every one counts all rows and places a share of them, so
that none waits for another. On an H200 (E=128, K=8, T=64, launch included) that takes 2.0 us, one workgroup
that places all rows 4.3 us.

Few rows have a one-shot kernel of their own, `moert.steps.sorting.few_rows`.

EP is E padded to a power of two. Expert -1 means no row. Integer loops with bounds from the device are
`while` loops: the interpreter of Triton 3.6 cannot `range` over them with numpy 2.4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.steps.call_args import live_tokens, load_expert_id, load_routing_weight
from moert.steps.dependent_launch import let_successor_start, wait_for_predecessor
from moert.steps.sorting.block_size import block_size, blocks_before, crowds, whole_blocks


@triton.jit
def _local_experts(expert_mask_ptr, E: tl.constexpr, EP: tl.constexpr):
    """[EP]: the place of each expert among those whose mask is set, -1 for the others."""
    expert = tl.arange(0, EP)
    kept = (tl.load(expert_mask_ptr + expert, mask=expert < E, other=0) != 0).to(tl.int32)
    return tl.where(kept != 0, tl.cumsum(kept, 0) - 1, -1)


@triton.jit
def _load_experts(
    ids_ptr, ids_stride, ids_words, num_tokens, live, local, row,
    E: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Experts of the rows, -1 where there is none."""
    token = row // K
    # masked by the tensor's size, not by the live count, which is still on its way
    expert = load_expert_id(ids_ptr, ids_stride, ids_words, token, row % K, token < num_tokens, E)
    expert = tl.where(token < live, expert, -1)
    if MASKED:
        expert = tl.where(expert >= 0, tl.gather(local, tl.maximum(expert, 0), 0), -1)
    return expert


@triton.jit
def _load_weights(
    weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, num_tokens, row, K: tl.constexpr
):
    token = row // K
    return load_routing_weight(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
        token, row % K, token < num_tokens,
    )  # fmt: skip


@triton.jit
def _earlier(experts, rows, expert, row):
    """How many of `experts` [A] at `rows` [A] equal each `expert` [B] and come before its `row` [B]."""
    same = (experts[:, None] == expert[None, :]) & (rows[:, None] < row[None, :])
    return tl.sum(same.to(tl.int32), 0)


@triton.jit
def _count(expert, EP: tl.constexpr):
    """Rows of each expert [EP]."""
    return tl.histogram(expert, EP, mask=expert >= 0)


@triton.jit
def _crowded(total, CROWDED_BM: tl.constexpr, REACH: tl.constexpr):
    """Whether blocks are of CROWDED_BM rows, from the experts' row counts [EP]."""
    if CROWDED_BM == 0:
        return False
    return crowds(tl.sum(whole_blocks(total, REACH), 0), tl.sum(whole_blocks(total, CROWDED_BM), 0))


@triton.jit
def _starts(total, crowded, BM: tl.constexpr, CROWDED_BM: tl.constexpr):
    """First output rows of the experts [EP], whole blocks, from their row counts."""
    size = block_size(crowded, BM, CROWDED_BM)
    blocks = blocks_before(total + (size - 1), crowded, BM, CROWDED_BM)
    return (tl.cumsum(blocks, 0) - blocks) * size


@triton.jit
def _store_rows(
    sorted_token_ids_ptr, sorted_weights_ptr, sorted_expert_ids_ptr,
    at, expert, weight, row, crowded,
    K: tl.constexpr, BM: tl.constexpr, CROWDED_BM: tl.constexpr,
):  # fmt: skip
    there = expert >= 0
    tl.store(sorted_token_ids_ptr + at, ((row % K) << 24) | (row // K), mask=there)
    tl.store(sorted_weights_ptr + at, weight, mask=there)
    # experts start at whole blocks
    block = blocks_before(at, crowded, BM, CROWDED_BM)
    leads = there & (at == block * block_size(crowded, BM, CROWDED_BM))
    tl.store(sorted_expert_ids_ptr + block, expert, mask=leads)


@triton.jit
def _store_padding(
    sorted_token_ids_ptr, sorted_weights_ptr, behind, wanted, num_tokens, crowded,
    K: tl.constexpr, BM: tl.constexpr, CROWDED_BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where `wanted`, fill from the output row `behind` [N] to the end of its block.

    WIDTH: the larger block as a power of two.
    """
    size = block_size(crowded, BM, CROWDED_BM)
    end = blocks_before(behind + (size - 1), crowded, BM, CROWDED_BM) * size
    at = behind[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = wanted[:, None] & (at < end[:, None])
    tl.store(sorted_token_ids_ptr + at, tl.zeros_like(at) + ((K << 24) | num_tokens), mask=inside)
    tl.store(sorted_weights_ptr + at, tl.zeros_like(at).to(tl.float32), mask=inside)


@triton.jit
def _store_num_valid(
    num_valid_ids_ptr, crowded_valid_ids_ptr, total, live, crowded,
    BM: tl.constexpr, CROWDED_BM: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        rows = tl.sum(whole_blocks(total, BM), 0) * BM
        tl.store(num_valid_ids_ptr, tl.where(crowded, 0, rows))
        tl.store(num_valid_ids_ptr + 1, live)
        if CROWDED_BM:
            rows = tl.sum(whole_blocks(total, CROWDED_BM), 0) * CROWDED_BM
            tl.store(crowded_valid_ids_ptr, tl.where(crowded, rows, 0))
            tl.store(crowded_valid_ids_ptr + 1, live)


@triton.jit
def sort_one_shot_kernel(
    ids_ptr, ids_stride, ids_words, weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
    num_valid_ptr, num_tokens,
    expert_mask_ptr, sorted_token_ids_ptr, sorted_weights_ptr, sorted_expert_ids_ptr, num_valid_ids_ptr,
    crowded_valid_ids_ptr,
    E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, CROWDED_BM: tl.constexpr, REACH: tl.constexpr,
    EP: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every program counts all rows, C at a time, and places SHARE of them; nobody waits for anybody.

    expert_mask [E] int32 or None; outputs as `SortedRows` says; CROWDED_BM, REACH and
    crowded_valid_ids: `moert.steps.sorting.block_size`. ONE_TILE: all rows fit one tile.
    """
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    MASKED: tl.constexpr = expert_mask_ptr is not None
    live = live_tokens(num_tokens, num_valid_ptr)
    local = live
    if MASKED:
        local = _local_experts(expert_mask_ptr, E, EP)
    row = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    expert = _load_experts(
        ids_ptr, ids_stride, ids_words, num_tokens, live, local, row, E, K, MASKED
    )
    weight = _load_weights(
        weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, num_tokens, row, K
    )
    rows = tl.arange(0, C)
    experts = _load_experts(
        ids_ptr, ids_stride, ids_words, num_tokens, live, local, rows, E, K, MASKED
    )
    rank = _earlier(experts, rows, expert, row)
    total = _count(experts, EP)
    if not ONE_TILE:
        first = C
        while first < live * K:
            rows = first + tl.arange(0, C)
            experts = _load_experts(
                ids_ptr, ids_stride, ids_words, num_tokens, live, local, rows, E, K, MASKED
            )
            rank += _earlier(experts, rows, expert, row)
            total += _count(experts, EP)
            first += C
    crowded = _crowded(total, CROWDED_BM, REACH)
    start = _starts(total, crowded, BM, CROWDED_BM)
    at = tl.gather(start, tl.maximum(expert, 0), 0) + rank
    _store_rows(
        sorted_token_ids_ptr, sorted_weights_ptr, sorted_expert_ids_ptr,
        at, expert, weight, row, crowded, K, BM, CROWDED_BM,
    )  # fmt: skip
    # the last row of an expert sees to the padding behind it
    behind = tl.gather(start + total, tl.maximum(expert, 0), 0)
    last = (expert >= 0) & (at + 1 == behind)
    _store_padding(
        sorted_token_ids_ptr, sorted_weights_ptr, behind, last, num_tokens, crowded,
        K, BM, CROWDED_BM, WIDTH,
    )  # fmt: skip
    _store_num_valid(num_valid_ids_ptr, crowded_valid_ids_ptr, total, live, crowded, BM, CROWDED_BM)


@triton.jit
def _num_shares(live, K: tl.constexpr, C: tl.constexpr, SHARES: tl.constexpr):
    """How many programs have rows: a tile each, or SHARES of them several. A grid may be larger."""
    return tl.minimum((live * K + (C - 1)) // C, SHARES)


@triton.jit
def _share(live, K: tl.constexpr, C: tl.constexpr, SHARES: tl.constexpr):
    """Rows [first, end) of this program, the same in all kernels of a sort; empty past the shares."""
    shares = tl.maximum(_num_shares(live, K, C, SHARES), 1)
    tiles = (live * K + (C - 1)) // C
    rows = (tiles + shares - 1) // shares * C
    first = tl.program_id(0) * rows
    return first, tl.minimum(first + rows, live * K)


@triton.jit
def sort_count_kernel(
    ids_ptr, ids_stride, ids_words, num_valid_ptr, num_tokens, expert_mask_ptr, counts_ptr,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, SHARES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """counts [programs, EP] int32: rows of each expert in each program's share."""
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    MASKED: tl.constexpr = expert_mask_ptr is not None
    live = live_tokens(num_tokens, num_valid_ptr)
    local = live
    if MASKED:
        local = _local_experts(expert_mask_ptr, E, EP)
    first, end = _share(live, K, C, SHARES)
    total = tl.zeros([EP], tl.int32)
    while first < end:
        experts = _load_experts(
            ids_ptr, ids_stride, ids_words, num_tokens, live, local, first + tl.arange(0, C),
            E, K, MASKED,
        )  # fmt: skip
        total += _count(experts, EP)
        first += C
    tl.store(counts_ptr + tl.program_id(0) * EP + tl.arange(0, EP), total)


@triton.jit
def sort_scan_kernel(
    num_valid_ptr, num_tokens, counts_ptr, totals_ptr,
    K: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, SHARES: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts [shares, EP] becomes, in place, the sum of the counts above; totals [EP] of all.

    One program takes COLUMNS experts. DEPTH: a power of two, no less than the shares.
    """
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    shares = _num_shares(live_tokens(num_tokens, num_valid_ptr), K, C, SHARES)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.arange(0, DEPTH)[:, None]
    at = counts_ptr + share * EP + column[None, :]
    counts = tl.load(at, mask=share < shares, other=0)
    tl.store(at, tl.cumsum(counts, 0) - counts, mask=share < shares)
    tl.store(totals_ptr + column, tl.sum(counts, 0))


@triton.jit
def sort_place_kernel(
    ids_ptr, ids_stride, ids_words, weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32,
    num_valid_ptr, num_tokens,
    expert_mask_ptr, counts_ptr, totals_ptr,
    sorted_token_ids_ptr, sorted_weights_ptr, sorted_expert_ids_ptr, num_valid_ids_ptr,
    crowded_valid_ids_ptr,
    E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, CROWDED_BM: tl.constexpr, REACH: tl.constexpr,
    EP: tl.constexpr, C: tl.constexpr, SHARES: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Place the program's share of rows, C at a time; counts and totals as `sort_scan_kernel` left them."""
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    MASKED: tl.constexpr = expert_mask_ptr is not None
    live = live_tokens(num_tokens, num_valid_ptr)
    local = live
    if MASKED:
        local = _local_experts(expert_mask_ptr, E, EP)
    total = tl.load(totals_ptr + tl.arange(0, EP))
    before = tl.load(counts_ptr + tl.program_id(0) * EP + tl.arange(0, EP))
    crowded = _crowded(total, CROWDED_BM, REACH)
    start = _starts(total, crowded, BM, CROWDED_BM)
    following = start + before
    first, end = _share(live, K, C, SHARES)
    while first < end:
        row = first + tl.arange(0, C)
        expert = _load_experts(
            ids_ptr, ids_stride, ids_words, num_tokens, live, local, row, E, K, MASKED
        )
        weight = _load_weights(
            weights_f32_ptr, weights_ptr, weights_stride, weights_are_f32, num_tokens, row, K
        )
        at = tl.gather(following, tl.maximum(expert, 0), 0) + _earlier(expert, row, expert, row)
        _store_rows(
            sorted_token_ids_ptr, sorted_weights_ptr, sorted_expert_ids_ptr,
            at, expert, weight, row, crowded, K, BM, CROWDED_BM,
        )  # fmt: skip
        following += _count(expert, EP)
        first += C
    # shared out by expert: few programs see an expert's last row, and those may see many
    first = tl.program_id(0) * EXPERTS
    while first < EP:
        behind = tl.gather(start + total, first + tl.arange(0, EXPERTS), 0)
        every = behind >= 0
        _store_padding(
            sorted_token_ids_ptr, sorted_weights_ptr, behind, every, num_tokens, crowded,
            K, BM, CROWDED_BM, WIDTH,
        )  # fmt: skip
        first += tl.num_programs(0) * EXPERTS
    _store_num_valid(num_valid_ids_ptr, crowded_valid_ids_ptr, total, live, crowded, BM, CROWDED_BM)
