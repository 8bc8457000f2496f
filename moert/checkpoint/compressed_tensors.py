"""compressed-tensors' pack-quantized int4 matrices: `weight_packed`, `weight_scale`, `weight_shape`, ...

weight_packed [N, ceil(K / 8)] int32: word i of a row holds columns 8i..8i+7, the first in the lowest bits,
each the signed value plus 8. weight_scale [N, GN]; one group a row for strategy "channel". weight_shape [2]:
N, K. weight_zero_point [ceil(N / 8), GN] int32, asymmetric only: word i holds rows 8i..8i+7, each the signed
zero point plus 8. weight_g_idx [K], with actorder "group": the group of every column, or -1s for their own
order.
Source: pack_quantized.py of github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import torch

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.packed import FLOATS, INTS, PackedFormat, Part, Parts
from moert.errors import WeightsError
from moert.quantization.nibbles import words_to_nibbles


class CompressedTensors(PackedFormat):
    """See the module docstring."""

    main = "weight_packed"
    group_index = "weight_g_idx"

    def parts(self, base: str, n: int, k: int) -> dict[str, Part]:
        groups = self.groups(k)
        parts = {
            "weight_packed": Part(("I32",), (n, -(-k // 8))),
            "weight_scale": Part(FLOATS, (n, groups)),
            "weight_shape": Part(INTS, (2,)),
        }
        if not self.packing.quant.symmetric:
            parts["weight_zero_point"] = Part(("I32",), (-(-n // 8), groups))
        return parts

    def shape(self, files: TensorFiles, base: str) -> tuple[int, int]:
        rows, columns = files.read(f"{base}.weight_shape", dtypes=INTS).tolist()
        return rows, columns

    def unpack(
        self, base: str, parts: Parts, n: int, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        shape = parts["weight_shape"].tolist()
        if shape != [n, k]:
            raise WeightsError(f"{base}.weight_shape: says {shape}, need {[n, k]}")
        codes = words_to_nibbles(parts["weight_packed"]).flatten(1)[:, :k]
        if self.packing.quant.symmetric:
            return codes, parts["weight_scale"], None
        zeros = words_to_nibbles(parts["weight_zero_point"]).transpose(1, 2).flatten(0, 1)[:n]
        return codes, parts["weight_scale"], zeros

    def order(self, base: str, parts: Parts, k: int) -> torch.Tensor | None:
        index = parts.get("weight_g_idx")
        if index is not None and bool((index == -1).any()):
            return None
        return super().order(base, parts, k)
