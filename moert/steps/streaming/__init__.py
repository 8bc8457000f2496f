"""Weights as a stream through shared memory: what the streaming GEMMs share (NVIDIA, written in
Gluon).

A program keeps a ring of stages in shared memory and asks for a stage's bytes, by asynchronous copies, as
many steps ahead as the ring is long; the copies of the down kernels begin before they wait for the
gate/up kernel, so that the weights of the second GEMM are under way while the first one drains. Weights
are the first operand of the matrix instruction, out^T = W x^T: their rows fill its 16, tokens its 8
columns. Warps are laid out over the reduction (split) and over rows (row_warps); a warp's step is some
blocks of 64 columns of its row tiles.

int4 codes lie in memory as the instruction wants them in registers (`moert/quantization/int4_layout.py`):
a lane reads back the 16 bytes it copied and widens them by a shift and an AND-OR for two weights;
compiled for sm_90 no byte of a weight moves between lanes. 16-bit weights are read as they are, through
`ldmatrix`.

Figures of an H200 in microseconds a layer; what whole layers take is in README.md.

int4, group 128, both GEMMs and the combine, against the portable kernels (`gate_up/int4.py`), which feed
`wgmma` from registers out of the same packed copy; in brackets the floor:

    E, K, H, I                T    stream   portable
    128, 8, 2048, 768         8      43.1       54.1   (27.6)
    128, 8, 2048, 768        64      90.4      114.4   (66.8)
    256, 8, 7168, 256        32     131.9      234.8   (102.6)
    8, 2, 4096, 14336         8     175.8      223.2   (133.9)
    128, 8, 2048, 768       256     174.8      151.0   (68.5; sort included)

bfloat16, sort included, against `gate_up/triton.py` and `down/triton.py`: E=128 K=8 H=2048 I=768, T=1:
22.7 for 26.3, T=2: 38.2 for 41.3, T=8: 122.6 for 126.3; E=256 K=8 H=3072 I=384, T=1: 17.8 for 20.9, T=2:
31.8 either way.

What bounds them: at E=8 K=2 H=4096 I=14336 T=2 the gate/up kernel alone reads 3.9 TB/s of the 4.2 that it
reads when it does no arithmetic. At T=1 the rest is the step from one kernel to the other, about 3.5 us
over a plain read. Tried and lost: a warp's whole slice of the reduction in flight at once (7% slower:
fewer programs fit); several row tiles a program in the portable kernels (62 for 54 at T=8); loads of
inputs without a mask, which read a row for every padding slot (88 for 54); scales multiplied into the
weights instead of the products (a quarter slower, through shared memory).

Instructions count: a warp's step of two row tiles and 128 columns took 307 in sorted plans while the zero
point was subtracted from every pair of weights, 271 since the matrix unit adds up the inputs of a group (a
row of ones) and the sum takes it from the product, 223 in steps of 256 columns. With four groups of 32 in a
step instead of two, E=128 K=4 H=I=2880 at T=1: 30.4 for 34.4. Blocks of 16 tokens pay once a warp has four
row tiles (E=128 K=8 H=2048 I=768, T=128: 97.7 for 111.8 in blocks of 8): with two, the inputs that every
program reads again are as many bytes as the weights.
"""
