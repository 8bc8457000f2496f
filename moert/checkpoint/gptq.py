"""GPTQ's int4 matrices (GPTQModel, AutoGPTQ): `qweight`, `qzeros`, `scales`, `g_idx`.

qweight [K / 8, N] int32: row i holds columns 8i..8i+7, the first in the lowest bits. qzeros [GN, N / 8]
int32: word i holds rows 8i..8i+7. scales [GN, N]. g_idx [K]: the group of every column; "act-order"
(desc_act) groups columns by importance, so that those of a group lie apart. In checkpoint_format "gptq" zero
points are stored minus one, in "gptq_v2" as they are.
"""

from __future__ import annotations

import torch

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.packed import FLOATS, PackedFormat, Part, Parts, multiple_of_8
from moert.errors import WeightsError
from moert.quantization.nibbles import words_to_nibbles


class Gptq(PackedFormat):
    """See the module docstring."""

    main = "qweight"
    group_index = "g_idx"

    def parts(self, base: str, n: int, k: int) -> dict[str, Part]:
        multiple_of_8(base, "GPTQ", rows=n, columns=k)
        groups = self.groups(k)
        return {
            "qweight": Part(("I32",), (k // 8, n)),
            "qzeros": Part(("I32",), (groups, n // 8)),
            "scales": Part(FLOATS, (groups, n)),
        }

    def shape(self, files: TensorFiles, base: str) -> tuple[int, int]:
        words, rows = files.shape(f"{base}.qweight")
        return rows, 8 * words

    def unpack(
        self, base: str, parts: Parts, n: int, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        codes = words_to_nibbles(parts["qweight"]).transpose(0, 1).reshape(n, k)
        zeros = words_to_nibbles(parts["qzeros"]).flatten(1).t() + self.packing.zero_offset
        name, highest = f"{base}.qzeros", int(zeros.max())
        if highest > 15:
            raise WeightsError(
                f"{name}: a stored zero point of 15 would mean 16, need 0..15; is checkpoint_format "
                "'gptq' right, or is it 'gptq_v2'?"
            )
        if not self.packing.quant.symmetric:
            return codes, parts["scales"].t(), zeros
        if bool((zeros != 8).any()):
            other = int(zeros[zeros != 8][0])
            raise WeightsError(
                f"{name}: a zero point of {other}, but sym=True means 8; are sym and checkpoint_format right?"
            )
        return codes, parts["scales"].t(), None
