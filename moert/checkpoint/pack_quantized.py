"""Writing int4 experts as compressed-tensors' pack-quantized matrices, with the very codes and scales.

What is read back (`moert.checkpoint.compressed_tensors`, where the layout and its source are described) is
the same `Int4Matrix`, so results are the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from moert.checkpoint.names import Names
from moert.config import Quant
from moert.errors import UnsupportedError
from moert.quantization.int4_layout import Int4Matrix, get_expert
from moert.quantization.nibbles import nibbles_to_words
from moert.weights import ExpertWeights

Tensors = dict[str, torch.Tensor]


def quantization_config(quant: Quant, names: Names, act_order: bool) -> dict[str, Any]:
    """What config.json says of experts that `expert_tensors` has written; nothing else is quantised.

    Args:
        act_order: some matrices have their columns in an order of their own.
    """
    leaves = "|".join(_base(name) for name in (names.gate, names.up, names.down))
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": quant.symmetric,
        "strategy": "channel" if quant.group_size == -1 else "group",
        "group_size": None if quant.group_size == -1 else quant.group_size,
        "actorder": "group" if act_order else None,
        "dynamic": False,
    }
    scheme = {
        "targets": [f"re:.*\\.experts\\.\\d+\\.({leaves})$"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [],
    }


def expert_tensors(weights: ExpertWeights, block: str, names: Names) -> Tensors:
    """All of a layer's expert tensors by their names in a checkpoint: matrices, and biases if it has any.

    Args:
        weights: int4, on any device; gate rows before up rows.
        block: what the names start with, as `model.layers.3.mlp.`.

    Raises:
        UnsupportedError: no gate matrix: no family keeps such experts.
    """
    w13, w2 = weights.w13, weights.w2
    assert isinstance(w13, Int4Matrix) and isinstance(w2, Int4Matrix)
    if not w13.paired:
        raise UnsupportedError("experts without a gate matrix: no checkpoint layout has them")
    found: Tensors = {}
    inner = w13.rows // 2
    for e in range(w13.shape[0]):
        first, both = f"{block}experts.{e}.", _rows(w13, e)
        for leaf, rows in ((names.gate, slice(0, inner)), (names.up, slice(inner, None))):
            found |= _stored(first + _base(leaf), w13, e, both, rows)
        found |= _stored(first + _base(names.down), w2, e, _rows(w2, e), slice(None))
        for bias, leaf, rows in (
            (weights.b13, names.gate, slice(0, inner)),
            (weights.b13, names.up, slice(inner, None)),
            (weights.b2, names.down, slice(None)),
        ):
            if bias is not None:
                found[f"{first}{_base(leaf)}.bias"] = bias[e, rows].cpu().clone()
    return found


def _base(leaf: str) -> str:
    return leaf.removesuffix(".weight")


def _rows(matrix: Int4Matrix, e: int) -> tuple[torch.Tensor | None, ...]:
    """(codes [N, K], scales [N, GN], zeros or None) of one expert on the CPU, in the columns' own order."""
    codes, scales, zeros = (None if t is None else t.cpu() for t in get_expert(matrix, e))
    assert codes is not None
    if matrix.permutation is not None:
        own = torch.empty_like(codes)
        own[:, matrix.permutation[e].long().cpu()] = codes
        codes = own
    return codes, scales, zeros


def _stored(
    base: str,
    matrix: Int4Matrix,
    e: int,
    parts: tuple[torch.Tensor | None, ...],
    rows: slice,
) -> Tensors:
    """Some rows of a matrix as tensors `<base>.<suffix>`."""
    codes, scales, zeros = (None if part is None else part[rows] for part in parts)
    assert codes is not None and scales is not None
    found = {
        f"{base}.weight_packed": _words(codes),
        f"{base}.weight_scale": scales.contiguous(),
        f"{base}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zeros is not None:
        # eight rows a word
        found[f"{base}.weight_zero_point"] = _words(zeros.to(torch.uint8).t()).t().contiguous()
    if matrix.permutation is not None:
        order = matrix.permutation[e].long().cpu()
        index = torch.empty(matrix.columns, dtype=torch.int32)
        index[order] = torch.arange(matrix.columns, dtype=torch.int32) // matrix.group_size
        found[f"{base}.weight_g_idx"] = index
    return found


def _words(codes: torch.Tensor) -> torch.Tensor:
    """[N, K] uint8 as [N, ceil(K / 8)] int32; what fills up the last word is 8, the zero of signed codes."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8), value=8)
    return nibbles_to_words(padded.unflatten(1, (-1, 8)))
