"""Int4 checkpoints written from the definitions of their formats, and the dense twins of what they hold.

Nothing of moert is used here: words are summed up code by code.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LINEAR = re.compile(r".*\.layers\.\d+\..*(proj|w1|w2|w3)\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Stored:
    """A format: method, columns of a group (-1: one a row), and what varies within it."""

    method: str
    group: int
    symmetric: bool = True
    act_order: bool = False
    version: str = "gptq"  # of GPTQ
    scales: torch.dtype = torch.float16

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        if self.method == "gptq":
            return {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": self.group,
                "sym": self.symmetric,
                "desc_act": self.act_order,
                "checkpoint_format": self.version,
            }
        if self.method == "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group,
                "zero_point": True,
                "version": "gemm",
            }
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group == -1 else "group",
            "group_size": None if self.group == -1 else self.group,
            "actorder": "group" if self.act_order else None,
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"],
        }


def words(codes: torch.Tensor, order: Iterable[int] = range(8)) -> torch.Tensor:
    """[..., 8n] codes as [..., n] int32: code order[i] of each eight in bits 4i, the last eight filled up."""
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    total = sum(codes[..., column] << 4 * bit for bit, column in enumerate(order))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def encode(
    weight: torch.Tensor, stored: Stored, order: torch.Tensor | None = None
) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a matrix [N, K] by suffix, and what they mean in float32.

    Args:
        order: [K] the columns sorted by group, for an activation order.
    """
    n, k = weight.shape
    size = k if stored.group == -1 else stored.group
    group = torch.arange(k) // size  # of every column
    if order is not None:
        group = torch.empty_like(group).scatter_(0, order, group)
    count = -(-k // size)
    scales, zeros = torch.empty(n, count), torch.full((n, count), 8)
    for g in range(count):
        part = weight[:, group == g].float()
        if stored.symmetric and stored.method != "awq":
            scales[:, g] = part.abs().amax(1) / 7
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / 15
            # GPTQ's first format cannot store a zero point of 0 (minus one)
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, 15)
    scales = scales.to(stored.scales)
    spread = scales.float()[:, group]
    codes = ((weight.float() / spread).round() + zeros[:, group]).clamp(0, 15).long()
    meaning = (codes - zeros[:, group]) * spread
    if stored.method == "gptq":
        less = 1 if stored.version == "gptq" else 0
        tensors = {
            "qweight": words(codes).t(),
            "qzeros": words((zeros - less).t()),
            "scales": scales.t(),
            "g_idx": group.to(torch.int32),
        }
    elif stored.method == "awq":
        tensors = {
            "qweight": words(codes.t(), AWQ_ORDER),
            "qzeros": words(zeros.t(), AWQ_ORDER),
            "scales": scales.t(),
        }
    else:
        tensors = {
            "weight_packed": words(codes),
            "weight_scale": scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not stored.symmetric:
            tensors["weight_zero_point"] = words(zeros.t()).t()
        if order is not None:
            tensors["weight_g_idx"] = group.to(torch.int32)
    return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}, meaning


def input_order(name: str, k: int) -> torch.Tensor:
    """An activation order: one for all matrices that read the same input."""
    where = re.sub(r"(gate_proj|up_proj|w1|w3|q_proj|k_proj|v_proj)\.weight$", "input", name)
    return torch.randperm(k, generator=torch.Generator().manual_seed(zlib.crc32(where.encode())))


def split_fused(tensors: Tensors) -> Tensors:
    """gpt-oss' fused, transposed, interleaved experts as one linear layer for each matrix."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        base, _, leaf = name.rpartition(".")
        if not base.endswith(".experts"):
            out[name] = tensor
            continue
        kind = "bias" if leaf.endswith("_bias") else "weight"
        for e, each in enumerate(tensor):
            rows = each if kind == "bias" else each.t()
            if leaf.startswith("gate_up"):
                out[f"{base}.{e}.gate_proj.{kind}"] = rows[0::2]
                out[f"{base}.{e}.up_proj.{kind}"] = rows[1::2]
            else:
                out[f"{base}.{e}.down_proj.{kind}"] = rows
    return out


def quantized_checkpoint(
    source: Path,
    target: Path,
    stored: Stored,
    *,
    only_experts: bool = False,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    **fields: Any,
) -> tuple[Path, Path]:
    """Two directories: the linear layers of a dense checkpoint in int4, and what those mean, dense.

    Args:
        only_experts: everything else stays as it is.
        change: of the int4 checkpoint's tensors.
        fields: of its config.json.
    """
    int4, twin = target / "int4", target / "twin"
    dense = load_file(source / "model.safetensors")
    fused = any(name.endswith("experts.down_proj") for name in dense)
    packed, meant = dict[str, torch.Tensor](), dict(dense)
    for name, tensor in (split_fused(dense) if fused else dense).items():
        expert = ".experts." in name
        if not LINEAR.match(name) or (only_experts and not expert) or (fused and not expert):
            packed[name] = tensor
            continue
        order = input_order(name, tensor.shape[1]) if stored.act_order else None
        parts, meaning = encode(tensor, stored, order)
        packed |= {f"{name.removesuffix('weight')}{suffix}": t for suffix, t in parts.items()}
        if fused:
            base, e, leaf, _ = name.rsplit(".", 3)
            first = leaf != "down_proj"
            whole = meant[f"{base}.gate_up_proj" if first else f"{base}.down_proj"]
            columns = slice(int(leaf == "up_proj"), None, 2) if first else slice(None)
            whole[int(e), :, columns] = meaning.t().to(whole.dtype)
        else:
            meant[name] = meaning.to(tensor.dtype)
    config = json.loads((source / "config.json").read_text())
    packed = {name: tensor.contiguous() for name, tensor in change(packed).items()}
    for place, tensors, more in (
        (int4, packed, {"quantization_config": stored.config(), **fields}),
        (twin, meant, {}),
    ):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return int4, twin
