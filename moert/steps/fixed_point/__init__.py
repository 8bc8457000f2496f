"""Activations as fixed-point numbers of 15 bits, for matrix instructions of 8-bit integers.

128 columns of a row share an exponent: an entry is q * 2^(e - 13), q a whole number of magnitude 2^14 at
most and 2^e the power of two at or below the largest magnitude of the 128. q is two signed bytes, 128 times
one and the other, and int4 codes are a third one, so that the matrix unit adds up products exactly, and twice
as many a cycle as of 16-bit numbers.

The rounding is half of 2^(e - 13): at most 2^-14 of the largest magnitude of the 128, where an entry of
bfloat16 is itself rounded to 2^-9 of its own. What is no number, or infinite, makes the unit NaN, and with
it all that the 128 add to.

What is here makes rows for sorted kernels (`moert/steps/specialised`); those through registers make the
numbers they need themselves (`moert/steps/registers/numbers.py`).

A row is stored as [2, columns] int8, both bytes of a column as far apart as the row is long, columns filled
up with zeros to whole steps of 128. The columns of each 16 stand in the order in which a lane finds int4
codes (`moert/quantization/int4_layout.py`): place 4 * c + i holds column 8 * (i % 2) + 2 * c + i // 2.

What it is for: products of bfloat16 want an instruction and a half, a subtraction and a multiplication by the
scale for each pair of codes; a signed byte is had for three eighths of an instruction, and the
scale is applied to sums of 128 products. What splitting x and h costs: 1.3 us a launch (E=128, K=8, H=2048,
I=768, T=64 on an H200), 2 to 5 where there are 4096 rows.
"""
