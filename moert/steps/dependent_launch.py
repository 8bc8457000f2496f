"""Programmatic dependent launch: a kernel starts while its predecessor drains (NVIDIA, sm_90 and
later).

A kernel launched so may do anything that its predecessor does not write before it waits; the wait
ends when the predecessor has completed and its writes are visible. Two rules keep a chain of such
kernels safe. Every program waits, also one that has nothing to do: otherwise a kernel could
complete before its predecessor, and the next one would wait for the wrong thing. And a kernel lets
its successor start only after its own wait: what was written two kernels ago (the sort, the
routing) is then complete, and the successor may read it before it waits.

Measured on an H200: the four kernels of a sorted plan 1.2 us faster a layer at T=8 and 1.9 at T=64
(E=32, K=8, H=2048, I=768); the direct pair 4 us slower at T=1 there (its down programs take
registers and bandwidth from gate/up programs still at work), 0.5 us faster with H=7168, I=256. So
it is for the tuner to choose.

What can be done before a wait should be: a sorted plan (E=128, K=8, H=2048, I=768, T=8) went from 122.7 to
120.1 us a layer, 0.6 of it by a faster sort, once combine let its successor start and read its ids before its
own wait. Not so for ids of the first kernel: fetched into the cache ahead of its wait (`prefetch.global.L2`)
they cost 1.5 us, and 13 us in kernels of thousands of programs.

Nor for weights: sorts that asked for the first 4 or 8 MiB of them before their wait
(`cp.async.bulk.prefetch.L2`) left layers as they were within 0.5 us, 16 MiB cost 1 us and 32 MiB 3 us (E=128,
K=8, H=2048, I=768 in bfloat16 and int4, T=16 to 256). What follows reads what is there little faster than
memory delivers, and meanwhile asks for nothing else.

The compiler moves arithmetic behind the wait all the same, where it delays the first loads: ptxas of CUDA
12.8 does with addresses of a sort, but past no branch. `compute_before_wait` is one that is never taken; a
sort after routing (E=128, K=8) took 2.35 us with it and 2.43 without at T=1, 2.42 and 2.52 at T=8, both of
them.

Elsewhere (PDL = False) all calls compile to nothing and launches are ordered by the stream.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def compute_before_wait(PDL: tl.constexpr):
    """What stands before this in the source is done before the wait behind it."""
    if PDL:
        tl.inline_asm_elementwise(
            "{ .reg .pred never; mov.u32 $0, %nctaid.z; setp.eq.u32 never, $0, 77777; "
            "again: @never nanosleep.u32 20; @never bra again; }",
            "=r",
            [],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def let_successor_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
