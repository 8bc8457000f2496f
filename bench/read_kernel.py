"""The plain read kernel that layers are compared with: R."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_kernel(data, sink, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.int32)
    lane = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK * UNROLL
    start = tl.program_id(0).to(tl.int64) * BLOCK * UNROLL
    for base in range(start, size, step):
        for part in tl.static_range(UNROLL):
            at = base + part * BLOCK + lane
            acc ^= tl.load(data + at, mask=at < size, other=0)
    # practically never true, but the compiler cannot know
    if tl.sum(acc, 0) == 0x1234567:
        tl.store(sink, 1)
