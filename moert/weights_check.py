"""Whether weights fit a description of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from moert.config import MoEConfig
from moert.errors import WeightsError
from moert.quantization.int4_layout import Int4Matrix, columns_per_group

if TYPE_CHECKING:
    from moert.weights import ExpertWeights

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def check_weights(weights: ExpertWeights, cfg: MoEConfig) -> None:
    """Refuse weights that do not fit the description; see `ExpertWeights.check`.

    Raises:
        WeightsError: the tensor, what it is and what is needed.
    """
    routed, hidden, rows = cfg.num_experts, cfg.hidden_size, cfg.w13_rows
    experts = routed + cfg.shared_experts
    shapes = {
        "w13": (experts, rows, hidden),
        "w2": (experts, hidden, cfg.intermediate_size),
        "b13": (experts, rows),
        "b2": (experts, hidden),
        "correction_bias": (routed,),
        "router_weight": (routed, hidden),
        "router_bias": (routed,),
        "shared_gate": (1, hidden),
    }
    parts = weights.parts()
    for name, wanted in (("b13", cfg.bias), ("b2", cfg.bias)):
        if wanted and name not in parts:
            raise WeightsError(f"{name}: missing, need {list(shapes[name])} because bias=True")
        if name in parts and not wanted:
            raise WeightsError(f"{name}: given, but the config says bias=False")
    if weights.correction_bias is not None and not cfg.routing.correction_bias:
        raise WeightsError(
            "correction_bias: given, but the config says routing.correction_bias=False"
        )
    if weights.shared_gate is not None and not cfg.shared_gate:
        raise WeightsError("shared_gate: given, but the config says shared_gate=False")
    if weights.interleaved and not cfg.gated:
        raise WeightsError(
            "interleaved: True, but the config says gated=False: there are no gate rows"
        )
    for name, part in parts.items():
        if tuple(part.shape) != shapes[name]:
            note = _about_shared(name, cfg)
            raise WeightsError(f"{name}: shape {list(part.shape)}, need {list(shapes[name])}{note}")
        if part.dtype not in _dtypes_of(name, cfg.torch_dtype):
            needed = " or ".join(str(dtype) for dtype in _dtypes_of(name, cfg.torch_dtype))
            raise WeightsError(f"{name}: dtype {part.dtype}, need {needed}")
        if part.device != weights.device:
            raise WeightsError(f"{name}: device {part.device}, need {weights.device}, where w13 is")
    for name in ("w13", "w2"):
        part = parts[name]
        if isinstance(part, Int4Matrix):
            _check_int4(name, part, cfg)
        elif cfg.quant is not None:
            raise WeightsError(
                f"{name}: not quantised, but the config says quant={cfg.quant}; make them with "
                "weights.quantize(...), or give a config with quant=None"
            )
        else:
            _check_strides(name, part)
    if weights.interleaved and isinstance(weights.w13, Int4Matrix):
        raise WeightsError("interleaved: True, but int4 weights have gate rows before up rows")


def _about_shared(name: str, cfg: MoEConfig) -> str:
    if not cfg.shared_experts or name not in ("w13", "w2", "b13", "b2"):
        return ""
    return (
        f": {cfg.num_experts} experts and shared_experts={cfg.shared_experts} behind them "
        "(ExpertWeights.append_shared)"
    )


def _dtypes_of(name: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    if name in ("w13", "w2"):
        return (dtype,)
    if name in ("b13", "b2"):
        return tuple(dict.fromkeys((dtype, torch.float32)))
    return (torch.float32,) if name == "correction_bias" else _FLOATS


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    dims = ((tensor.shape[1], tensor.stride(1)), (tensor.shape[2], tensor.stride(2)))
    if not any(stride == 1 or size == 1 for size, stride in dims):
        raise WeightsError(
            f"{name}: strides {list(tensor.stride())}, need stride 1 in dimension 1 or 2"
        )


def _check_int4(name: str, matrix: Int4Matrix, cfg: MoEConfig) -> None:
    if cfg.quant is None:
        raise WeightsError(
            f"{name}: int4, but the config says quant=None; give it quant=weights.quant"
        )
    if matrix.paired != (cfg.gated and name == "w13"):
        raise WeightsError(f"{name}: packed with paired={matrix.paired}, need {not matrix.paired}")
    group = columns_per_group(cfg.quant.group_size, matrix.columns)
    if matrix.group_size != group:
        raise WeightsError(
            f"{name}: groups of {matrix.group_size} columns, need {group} because "
            f"quant.group_size={cfg.quant.group_size}"
        )
    if (matrix.zeros is None) != cfg.quant.symmetric:
        raise WeightsError(
            f"{name}: {'no' if matrix.zeros is None else 'has'} zero points, but the config says "
            f"quant.symmetric={cfg.quant.symmetric}"
        )
    if name == "w2" and matrix.permutation is not None:
        raise WeightsError(
            "w2: has a permutation of its columns; need w13's rows stored in that order instead"
        )
    for part, tensor in matrix.tensors().items():
        if not tensor.is_contiguous():
            raise WeightsError(
                f"{name}.{part}: strides {list(tensor.stride())}, need a contiguous tensor"
            )
