"""The ring between warps that copy and warps that multiply."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moert.steps.specialised.shape import COPY_WARPS, MULTIPLY_WARPS, STEP

COPY_THREADS = gl.constexpr(COPY_WARPS * 32)
MULTIPLY_THREADS = gl.constexpr(2 * MULTIPLY_WARPS * 32)
COLUMNS = gl.constexpr(STEP)


@gluon.jit
def make_ring(DTYPE: gl.constexpr, S: gl.constexpr):
    """Stages of rows and weights in shared memory, and the barriers that say which are full, which empty.

    Returns:
        The rows [stages, first, STEP], where S.second those [stages, second, STEP], the weights
        [stages, bn, STEP], full and empty.
    """
    xs = gl.allocate_shared_memory(DTYPE, [S.stages, S.first, COLUMNS], S.swizzled)
    ws = gl.allocate_shared_memory(DTYPE, [S.stages, S.bn, COLUMNS], S.swizzled)
    full = gl.allocate_shared_memory(gl.int64, [S.stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S.stages, 1], mbarrier.MBarrierLayout())
    STAGES: gl.constexpr = S.stages
    for i in gl.static_range(STAGES):
        # every copying thread says when its copies are done, every multiplying one when its products are
        mbarrier.init(full.index(i), count=COPY_THREADS)
        mbarrier.init(empty.index(i), count=MULTIPLY_THREADS)
    ring = (xs, ws, full, empty)
    if S.second:
        more = gl.allocate_shared_memory(DTYPE, [S.stages, S.second, COLUMNS], S.swizzled)
        ring = (xs, more, ws, full, empty)  # type: ignore[assignment]
    return ring


@gluon.jit
def block_and_tile(t, blocks, S: gl.constexpr):
    """(block, tile) of piece of work t: S.side blocks go through the tiles side by side.

    From tile to tile their order moves on by one, or a program, whose pieces are as far apart as there are
    programs, would have all of its pieces of one or two blocks: some more rows than others.
    """
    first = t // (S.side * S.tiles) * S.side
    side = gl.minimum(blocks - first, S.side)
    inside = t % (S.side * S.tiles)
    tile = inside // side
    return first + (inside + tile) % side, tile


@gluon.jit
def input_rows(
    sorted_token_ids,
    first,
    stride,
    ROWS: gl.constexpr,
    BY_TOKEN: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """Offsets [ROWS, STEP] of rows of inputs, `stride` elements apart, and whether they are read [ROWS, 1].

    Args:
        first: of the sorted slots.
        BY_TOKEN: a row for each token, else one for each slot of a token.
    """
    slots = first + gl.arange(0, ROWS, gl.SliceLayout(1, S.copies))
    return packed_rows(gl.load(sorted_token_ids + slots), stride, BY_TOKEN, K, S)


@gluon.jit
def input_row(packed, BY_TOKEN: gl.constexpr, K: gl.constexpr):
    """The rows of inputs of packed slots, and whether there is one; BY_TOKEN as for `input_rows`."""
    live = (packed >> 24) < K  # padding slots carry K
    row = packed & 0xFFFFFF
    if not BY_TOKEN:
        row = row * K + (packed >> 24)
    return gl.where(live, row, 0).to(gl.int64), live


@gluon.jit
def packed_rows(packed, stride, BY_TOKEN: gl.constexpr, K: gl.constexpr, S: gl.constexpr):
    """`input_rows` of packed slots."""
    row, live = input_row(packed, BY_TOKEN, K)
    rows = row * stride
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, S.copies))
    return gl.expand_dims(rows, 1) + gl.expand_dims(k, 0), gl.expand_dims(live, 1)


@gluon.jit
def block_rows(
    sorted_token_ids, block, stride, BY_TOKEN: gl.constexpr, K: gl.constexpr, S: gl.constexpr
):
    """`input_rows` of a block, for each of the ring's places for rows."""
    start = block * S.bm
    x = (input_rows(sorted_token_ids, start, stride, S.first, BY_TOKEN, K, S),)
    if S.second:
        start += S.first
        more = input_rows(sorted_token_ids, start, stride, S.second, BY_TOKEN, K, S)
        x = (x[0], more)  # type: ignore[assignment]
    return x


@gluon.jit
def _copy_steps(ring, it, step, x_ptr, x, w_ptr, w, live, k, S: gl.constexpr):
    """Copy S.abreast steps of a tile from `step` on, as soon as there is a place for all of them.

    Args:
        it: steps copied before; x: as for `_copy_tile`.
        w, live: offsets of the weights [bn, STEP], and whether they are read [bn, 1].
        k: columns of a step.
    """
    ws, full, empty = ring[-3], ring[-2], ring[-1]
    PARTS: gl.constexpr = len(x)
    COUNT: gl.constexpr = S.abreast
    for i in gl.static_range(COUNT):
        mbarrier.wait(empty.index((it + i) % S.stages), (((it + i) // S.stages) & 1) ^ 1)
    for i in gl.static_range(COUNT):
        in_k = gl.expand_dims(k < S.reduction - (step + i) * COLUMNS, 0)
        async_copy.async_copy_global_to_shared(
            ws.index((it + i) % S.stages), w_ptr + (step + i) * COLUMNS + w, live & in_k
        )
    for i in gl.static_range(COUNT):
        in_k = gl.expand_dims(k < S.reduction - (step + i) * COLUMNS, 0)
        for part in gl.static_range(PARTS):
            rows, read = x[part]
            async_copy.async_copy_global_to_shared(
                ring[part].index((it + i) % S.stages),
                x_ptr + (step + i) * COLUMNS + rows,
                read & in_k,
            )
    for i in gl.static_range(COUNT):
        async_copy.mbarrier_arrive(full.index((it + i) % S.stages), increment_count=False)


@gluon.jit
def _copy_tile(ring, it, x_ptr, x, w_ptr, expert, tile, S: gl.constexpr):
    """Copy all steps of one tile into the ring, as places become empty; returns the count of steps so far.

    Args:
        it: steps copied before.
        x: of each of the ring's places for rows, what `input_rows` says.
    """
    L: gl.constexpr = S.copies
    j = gl.arange(0, S.bn, gl.SliceLayout(1, L))
    if S.paired:
        n = tile * S.width + (j // (2 * S.group)) * S.group + j % S.group
        up = (j // S.group) % 2
        row = 2 * n + up if S.interleaved else n + up * S.columns
    else:
        n = tile * S.width + j
        row = n
    inside = n < S.columns
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, L))
    # 32 bits within an expert: half the registers of pointers
    w = gl.expand_dims(gl.where(inside, row, 0) * S.w_n, 1) + gl.expand_dims(k, 0)
    w_ptr += expert * S.w_e
    live = gl.expand_dims(inside, 1)
    for group in range(S.steps // S.abreast):
        step = group * S.abreast
        _copy_steps(ring, it, step, x_ptr, x, w_ptr, w, live, k, S)
        it += S.abreast
    return it


@gluon.jit
def copy_tiles(
    ring,
    rows,
    x_ptr,
    x_stride,
    w_ptr,
    BY_TOKEN: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
):
    """What the copying warps do: all tiles of this program, one after the other.

    Args:
        ring: of `make_ring`; rows: sorted_token_ids, sorted_expert_ids and the number of live blocks.
        x_stride, BY_TOKEN: as for `input_rows`.
    """
    sorted_token_ids, sorted_expert_ids, blocks = rows
    it = 0
    for t in range(gl.program_id(0), blocks * S.tiles, S.programs):
        block, tile = block_and_tile(t, blocks, S)
        expert = gl.load(sorted_expert_ids + block).to(gl.int64)
        x = block_rows(sorted_token_ids, block, x_stride, BY_TOKEN, K, S)
        it = _copy_tile(ring, it, x_ptr, x, w_ptr, expert, tile, S)


@gluon.jit
def await_copies(ring, it, S: gl.constexpr):
    """Step `it` of a ring is there, for the matrix unit too: the copies wrote through the generic proxy.

    Args:
        ring: a tuple that ends with the barriers full and empty.
    """
    mbarrier.wait(ring[-2].index(it % S.stages), (it // S.stages) & 1)
    fence_async_shared()


@gluon.jit
def give_back(ring, it, S: gl.constexpr):
    """This thread needs the place of step `it` in a ring no more: its products, and with them whatever was
    read of it, are done."""
    # each thread for itself, at once: it has no copies under way
    async_copy.mbarrier_arrive(ring[-1].index(it % S.stages), increment_count=False)


@gluon.jit
def _product(ring, it, acc, PARTITION: gl.constexpr, S: gl.constexpr):
    """acc + x w^T of step `it`, this partition's part, under way when this returns."""
    xs, ws, _, _ = ring
    await_copies(ring, it, S)
    slot = it % S.stages
    x = xs.index(slot)
    w = ws.index(slot)
    if S.by_rows:
        x = x.slice(PARTITION * S.part_rows, S.part_rows, 0)
    else:
        w = w.slice(PARTITION * S.part_columns, S.part_columns, 0)
    return warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)


@gluon.jit
def multiply_tile(ring, it, PARTITION: gl.constexpr, S: gl.constexpr):
    """x w^T [part_rows, part_columns] fp32, a partition's part of one tile, and the count of steps so far."""
    acc = gl.full([S.part_rows, S.part_columns], 0, gl.float32, S.mma)
    acc = warpgroup_mma_wait(1, deps=[_product(ring, it, acc, PARTITION, S)])
    for _ in range(S.steps - 1):
        acc = _product(ring, it + 1, acc, PARTITION, S)
        # the product before this one is done
        acc = warpgroup_mma_wait(1, deps=[acc])
        give_back(ring, it, S)
        it += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    give_back(ring, it, S)
    return acc, it + 1


@gluon.jit
def part_values(pointer, block, LAYOUT: gl.constexpr, PARTITION: gl.constexpr, S: gl.constexpr):
    """What a sort wrote of a partition's rows of a block, [part_rows] beside tensors of LAYOUT."""
    slots = block * S.bm + gl.arange(0, S.part_rows, gl.SliceLayout(1, LAYOUT))
    if S.by_rows:
        slots += PARTITION * S.part_rows
    return gl.load(pointer + slots)


@gluon.jit
def first_column(tile, PARTITION: gl.constexpr, S: gl.constexpr):
    """The first output column of this partition's part of a tile."""
    start = tile * S.width
    if not S.by_rows:
        start += PARTITION * S.part_width
    return start


@gluon.jit
def store_part(results, first, packed, out_ptr, K: gl.constexpr, S: gl.constexpr):
    """Store results [part_rows, columns], output columns from `first` on, to the rows of the packed slots."""
    values = gl.convert_layout(results.to(out_ptr.dtype.element_ty), S.out)
    n = gl.expand_dims(first + gl.arange(0, results.shape[1], gl.SliceLayout(0, S.out)), 0)
    row = ((packed & 0xFFFFFF) * K + (packed >> 24)).to(gl.int64)
    mask = gl.expand_dims((packed >> 24) < K, 1) & (n < S.columns)
    gl.store(gl.expand_dims(out_ptr + row * S.columns, 1) + n, values, mask=mask)
