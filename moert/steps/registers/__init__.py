"""int4 weights as a stream through registers: programs with one row of inputs, or one token's rows (NVIDIA,
written in Gluon).

A lane has `stages` steps of the codes it multiplies by on their way in registers, by plain loads; scales
and inputs of all steps are put into shared memory at the start. So warps do not wait for each other
between the start and the end, where a ring in shared memory (`moert/steps/streaming`) has two barriers a
step. Inputs become fixed-point numbers there, in the form of `moert/steps/fixed_point` but for the order
of their bytes and for exponents of 64 columns where a step has no more, and products are of bytes
(`operands.py`): 128 weights of a lane take 95 to 105 instructions, with groups of 128 and of 32, where
products of 16-bit floats from a ring take 219 to 324.

Figures of an H200 in microseconds a layer, int4, with the best pair of tiles that was timed, against the
best of the ring; in brackets one read of the same bytes. What plans take is in README.md.

    E, K, H, I                 T    registers  ring
    128, 8, 2048, 768          1          8.8  10.7  (6.8)
    128, 8, 2048, 768          2         14.3  16.8  (10.8)
    256, 8, 3072, 384          1          7.8   9.8  (5.4)
    256, 8, 3072, 384          4         18.3  21.2  (14.9)
    512, 10, 2048, 512         1          8.2  10.0  (5.9)
    128, 4, 2880, 2880, g32    1         23.6  29.3  (14.8)
    128, 4, 2880, 2880, g32    2         37.0  43.3  (27.0)
    256, 8, 7168, 256          2         15.5  18.0  (12.0)
    8, 2, 4096, 14336          1         51.5  50.0  (42.3)

The last has 28672 inputs for a down program to make numbers of.

Where the time of the ring's kernels goes, by leaving parts out, T=1: E=128 K=4 H=I=2880 in groups of 32
29.3 us, no products 26.3, no scales either 21.3, codes alone 20.1; E=128 K=8 H=2048 I=768 10.8, 9.2, 8.6,
7.9.

Tried and lost: products of bytes with the codes still in the ring, the same tiles with half the
instructions: E=256 K=8 H=3072 I=384, T=1 10.0 for 9.8; E=512 10.7 for 10.1; E=128 K=4 34.4 for 29.3; E=8
52.8 for 49.9: what counts is how long a step waits, not how much it does. Several row tiles a program, one
after the other, with the inputs staged once (2 to 8 tiles): 1% faster in one cell, 0 to 10% slower in the
others. The second GEMM's weights fetched into L2 by the first one's programs: level with one expert's, up
to a fifth slower with all, here and for 16-bit weights. 16-bit weights through registers: level at best
(E=128 K=8 H=2048 I=768, T=1 22.0 for 22.2; E=256 K=8 H=7168 I=256 26.3 for 24.4; E=8 K=2 H=4096 I=14336
188 for 163).
"""
