"""AWQ's int4 matrices in the gemm version (AutoAWQ): `qweight`, `qzeros`, `scales`.

qweight [K, N / 8] int32: word i of a column holds rows 8i..8i+7 in the order 0, 2, 4, 6, 1, 3, 5, 7, the
first in the lowest bits; so does qzeros [GN, N / 8]. scales [GN, N].
"""

from __future__ import annotations

import torch

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.packed import FLOATS, PackedFormat, Part, Parts, multiple_of_8
from moert.quantization.nibbles import words_to_nibbles

_PLACE_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(PackedFormat):
    """See the module docstring."""

    main = "qweight"

    def parts(self, base: str, n: int, k: int) -> dict[str, Part]:
        multiple_of_8(base, "AWQ", rows=n)
        groups = self.groups(k)
        return {
            "qweight": Part(("I32",), (k, n // 8)),
            "qzeros": Part(("I32",), (groups, n // 8)),
            "scales": Part(FLOATS, (groups, n)),
        }

    def shape(self, files: TensorFiles, base: str) -> tuple[int, int]:
        columns, words = files.shape(f"{base}.qweight")
        return 8 * words, columns

    def unpack(
        self, base: str, parts: Parts, n: int, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        def rows_first(words: torch.Tensor) -> torch.Tensor:
            return words_to_nibbles(words)[..., _PLACE_OF_ROW].flatten(1).t()

        return rows_first(parts["qweight"]), parts["scales"].t(), rows_first(parts["qzeros"])
