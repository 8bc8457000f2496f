"""Warps that copy and warps that multiply: what the grouped GEMMs for many rows an expert share (Hopper,
written in Gluon).

One workgroup on each unit goes through its share of (block of BM sorted rows, tile of 64 to 256 weight rows),
live blocks alone. Four of its warps copy the rows of x and the weights of the next steps of 64 columns into a
ring in shared memory, across the end of a tile and into the next; the others multiply with `wgmma`, and never
compute an address of what they multiply. Two rows of barriers, full and empty, stand between them. Blocks of
one expert, which read the same weights, go through the tiles side by side.

16-bit weights: x [BM, 64] w^T [64, BN] out of shared memory by two partitions of four warps, which have 64
rows each, or half of the columns each where BM is 64; up to 128 fp32 accumulators a thread. Each waits for
copies and gives places back by itself, so that one may multiply while the other stores its results.

16-bit weights, tall blocks of 160 rows: where experts have 128 rows on average, about half of them have a
few more, and blocks of 128 would go through the weights twice for these. out^T = w x^T, both out of shared
memory; two partitions have half of the weight rows each. Rows of x are the columns of the instruction, and
tensors are of powers of two, so that a step is two products of the same weights, of 128 and of 32 columns,
which may be under way together; 160 fp32 accumulators a thread at most. A tile is compiled three times, for
blocks that need both products, the first, and half its columns. Gate and up rows alternate in groups of 8, so
that a thread has both of a column. Blocks of 80 rows, 64 and 16, were level at best (E=8 K=2 H=4096 I=14336,
T=256: 741 us for 732 of blocks of 128).

int4 weights: out^T = w x^T. Codes go from shared memory through a shift, an AND-OR, a subtraction of the zero
point and a multiplication by the scale into the registers that `wgmma` takes its first operand from; two
partitions of warps have half of the weight rows each, and widen a step while the matrix unit works on
the step before. The instruction has 16, 32, 64 or 128 columns: as many as a block has rows, rounded up, so
that blocks of 128, which widen a weight once for all of an expert's rows, cost no more than they hold. The
scaled weight is rounded to 16 bits once, where the portable kernels scale the product.

int4 weights, tall blocks of 160 and of 80 rows: a step is two products of the same widened weights, of 128
and 32 columns or of 64 and 16, which may be under way together, so that a weight is widened once where lower
blocks would do it again for a few rows more. Blocks of 160 rows go with 128 rows of weights: 80 sums a thread
in both. On an H200, E=8 K=2 H=4096 I=14336, T=512: 711 us for 984 of blocks of 128 by 256 rows of weights;
T=256: 444 for 558. Tried and lost: 192 rows of weights by three partitions (823 for 711, 521 for 444); blocks
of 128 by 128 rows of weights in long steps (870 for 711, 556 for 444), of 80 by 128 (491 for 444). With 16
rows an expert (T=64), or 32 (E=128 K=8 H=2048 I=768, T=512), neither won anything.

int4 weights and fixed-point inputs (`moert/steps/fixed_point`), where experts have few to some dozen rows:
codes are signed bytes after half an instruction, x is two of them, both rows of 2 n columns of the
instruction, and the sums of 128 columns, whole numbers, are scaled and added up in float32. 128 rows of
weights a partition, two products of 64, so that one is under way while the other is scaled; up to 16 rows two
steps together. What bounds them, by a profiler, E=8 K=2 H=4096 I=14336, T=64, gate/up: 62% of issue slots and
34% of the matrix unit, which hardly overlap; the memory is busy 64%. On an H200, us, before and with them:
that layer, T=16 182 and 176, T=32 244 and 183, T=64 282 and 214; E=128 K=8 H=2048 I=768, T=256 142 and 119;
E=256 K=8 H=7168 I=256, T=512 345 and 287. Tried and lost: a product at a time (T=64 above: 236 for 224); four
partitions of 64 rows of weights (228; E=256, T=512: 303 for 281); blocks of 64 rows in products of 32 (T=128
above: 348 for 328 of blocks of 64 without fixed point; E=128, T=512: 192 for 171); groups of 32 columns
(E=128 K=4 H=I=2880, T=128: 532 for 481); a product left under way from one iteration to the next (ptxas waits
for each); two steps together of 32 rows (spills, 3% more).

Blocks that go through the tiles side by side change their order from tile to tile: programs are a multiple of
4, and with eight blocks each had all its pieces of the same two, so that units with fuller blocks were busy a
third longer than others. E=8 K=2 H=4096 I=14336, us, before and after: bfloat16, T=512 835 and 784 to 806;
int4, T=128 346 and 328, T=256 437 and 428.

Figures of an H200 in microseconds a layer, sort and combine included, against the best of all other kernels;
what whole layers take is in README.md.

    weights    E, K, H, I                T   specialised   other
    int4       8, 2, 4096, 14336       128           328     396
    int4       8, 2, 4096, 14336       512           649    1070
    int4       128, 8, 2048, 768       512           180     211
    int4       256, 8, 7168, 256       512           340     382
    bfloat16   8, 2, 4096, 14336       256           695     752
    bfloat16   8, 2, 4096, 14336       512           807    1176
    bfloat16   8, 2, 4096, 14336      4096          4772    5518

Below 16 to 24 rows an expert (int4; 16 to 32 in 16 bits) others are ahead: E=128 K=8 H=2048 I=768 in int4 at
T=128, 8 rows: 141 for 98. Tried and lost: int4 blocks of 128 rows that always multiply 128 columns (T=512
above: 944 for 876); eight warps a partition instead of four on blocks of 64 and 128 rows (spills); the
portable kernel with gate and up in one product of 256 columns and four stages (16 bits, T=512: 1075 for
1171 of its own, no more than level).

16 bits, T=4096, one partition of eight warps that stores 4 bytes a lane, and the two of now, which store 16
(several machines, which differ by 5%): E=8 K=2 H=4096 I=14336: 4980 and 4826; E=128 K=8 H=2048 I=768: 724 and
635; E=256 K=8 H=7168 I=256: 1553 and 1187. In the first of these layers a profiler that holds the clock at
1.55 GHz finds the matrix units busy 90 to 94% of the time, the second-level cache 62 to 75%; the cycles that
it counts are 1.2 GHz in a chain of layers, where the clock falls under the load. Tried and lost: the second
partition without the tiles it has no rows of (T=1024 and 4096: 4 to 8% more; T=512: 3% less, where blocks of
64 are faster still); its first product one or two steps after the other's (level); 32 blocks side by side
instead of 8 (level, E=128 K=4 H=I=2880 4% more).

In rings of five stages and more two steps are copied together, 256 bytes of a row (16 bits, us, before and
after): E=128 K=8 H=2048 I=768, T=512, blocks of 64: 319 and 311; E=8 K=2 H=4096 I=14336, T=512, blocks of
64: 1133 and 1078, of 128 by 128 rows of weights: 1092 and 1033; T=256: 802 and 782, 737 and 730. Rings of
four have too few places: blocks of 128 by 256, 1019 and 1165. Tried and lost: weights of tall blocks through
registers, read from shared memory once for both products (by 128 rows of weights, T=512 above: 917 for 894;
T=4096, E=128 K=4 H=I=2880: 2073 for 2069); no copy of the second product's rows where a block has none (931,
2080).

Steps of int4 weights are of 64 columns or, with half the barriers, of two times 64, the second of which is
widened with the scales of the first where a group has both. On an H200, short and long steps: E=128 K=8
H=2048 I=768, T=512, blocks of 64: 182.0 and 175.3; E=8 K=2 H=4096 I=14336, T=64 and 128: 291.9 and 274.5,
355.2 and 338.9; E=128 K=4 H=I=2880 in groups of 32, T=512: 711.5 and 690.7.

Ways with the registers of `wgmma` (ptxas of CUDA 12.8): a loop that widens the next step into a
variable that is the current one in the next iteration is compiled to one instruction at a time, each waited
for (ptxas note C7513, "serialized"), 20% slower at T=4096 than without overlap; two variables in turn, two
steps an iteration, are not. A wait that leaves the newest product under way, with widening after it, is. And
arithmetic that the source has before a wait is moved behind it, so that nothing overlaps within a partition,
unless a branch stands between: kernels of long int4 steps have one that is never taken, where the instruction
has less than 128 columns and registers last for both. In short steps the same branch lost (T=512 as above:
189 for 182).
"""
