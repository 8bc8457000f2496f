"""int4 codes as signed bytes, in NVIDIA's instructions (layout: `moert/quantization/int4_layout.py`)."""

from __future__ import annotations

from triton.experimental import gluon


@gluon.constexpr_function
def signed_asm(v1):
    """The codes of rows 8 * v1 + g of word $1, less 8, in the upper halves of four signed bytes."""
    take = "mov.b32 t, $1; " if v1 else "shl.b32 t, $1, 4; "
    end = "mov.b32 m, 0x80808080; lop3.b32 $0, t, 0xF0F0F0F0, m, 0x6A;"
    return "{ .reg .b32 t, m; " + take + end + " }"
