"""Weights as a stream through shared memory: what the streaming GEMMs share (NVIDIA, written in Gluon).

A program keeps a ring of stages in shared memory and asks for a stage's bytes, by asynchronous copies, as
many steps ahead as the ring is long; the copies of the down kernels begin before they wait for the gate/up
kernel, so that the weights of the second GEMM are under way while the first one drains. Weights are the first
operand of the matrix instruction, out^T = W x^T: their rows fill its 16, tokens its 8 columns. Warps are laid
out over the reduction (SPLIT) and over rows (ROW_WARPS); one warp's step is BLOCKS blocks of 64 columns of as
many tiles of 16 rows as it has.

int4 codes lie in memory as the instruction wants them in registers (`moert/quantization/int4_layout.py`): a
lane reads back the 16 bytes it copied and widens them by a magic exponent, a shift and an AND-OR for two
weights. 16-bit weights are read as they are, through `ldmatrix`.

Measured on an H200 (int4, group 128; both GEMMs; microseconds a layer, the floor in brackets), against plain
Triton kernels that feed `wgmma` from registers: E=128 K=8 H=2048 I=768, T=8: 43 for 54 (28), T=64: 90 for 114
(67); E=256 K=8 H=7168 I=256, T=32: 132 for 230 (103); E=8 K=2 H=4096 I=14336, T=8: 176 for 223 (134). bf16,
against `gate_up/triton.py` and `down/triton.py`: E=128 K=8 H=2048 I=768, T=1: 22.5 for 26.0; E=256 K=8 H=3072
I=384, T=1: 16.7 for 19.7; from T=2 on those are as fast or faster. What bounds them there: the gate/up kernel
alone reads 3.9 TB/s of the 4.2 it reads without any arithmetic. Tried and lost: a warp's whole slice of the
reduction in flight at once (7% slower: fewer programs fit), tiles of fewer rows, subtracting the zero point
from every pair where one sum of the inputs does (20% more instructions).
"""
