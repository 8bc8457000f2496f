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

One launch for both GEMMs of few tokens was tried: programs of the second behind those of the first in the
grid's order, their weights asked for before they wait for a count of the token's programs that are done.
It is slower; two launches and one, the same tiles and the best of five pairs, bfloat16: E=256 K=8 H=3072
I=384, T=1 17.7 and 18.9, T=4 53.5 and 54.4; E=128 K=8 H=2048 I=768, T=1 22.3 and 25.1, T=2 36.9 and 39.2;
E=8 K=2 H=4096 I=14336, T=1 168 and 193. Once it was faster, E=256 K=8 H=7168 I=256, T=4 83.6 and 82.7,
where portable kernels take 80.5. int4, T=1: 10.1 and 12.2, 13.7 and 16.4, 66.9 and 77.7. A fence and a
count for each program cost more than the launch, and programs that wait take the places of those that
read.

Rows that an expert has beyond one block, in the sorted kernels: a program takes up to four blocks of 8 rows
of its expert together (`rows.py`), with instructions for 8, 16 or 32 rows as there are. Where every expert
has one block that costs nothing in bfloat16 (E=128 K=8 H=2048 I=768, T=64: 279.5 us together and one by one)
and 1 to 2% in int4, for registers; where all tokens take the same experts it saves reading: 56.3 us to 44.5
there. int4 at T=32 with E=8 K=2 H=4096 I=14336, 8 rows an expert: 262 to 218.

Up to 8 tokens need no sort to read a weight once: column c of the instruction is token c. bfloat16, T=8,
against a sort: E=128 K=8 H=2048 I=768 116.4 for 118.1 (int4 39.4 for 41.6), E=512 K=10 H=2048 I=512 112.7
for 116.4, E=128 K=4 H=I=2880 312.7 for 320.6; T=4, against a program a row: the last 171.7 for 183.1, others
level or behind. With blocks of 16 for 16 tokens it lost (int4, E=256 K=8 H=3072 I=384: 69 for 57): programs
of rows whose expert another one has are too many.

Instructions count: a warp's step of two row tiles and 128 columns took 307 in sorted plans while the zero
point was subtracted from every pair of weights, 271 since the matrix unit adds up the inputs of a group (a
row of ones) and the sum takes it from the product, 223 in steps of 256 columns. With four groups of 32 in a
step instead of two, E=128 K=4 H=I=2880 at T=1: 30.4 for 34.4. Blocks of 16 tokens pay once a warp has four
row tiles (E=128 K=8 H=2048 I=768, T=128: 97.7 for 111.8 in blocks of 8): with two, the inputs that every
program reads again are as many bytes as the weights.
"""
