"""What `quantization_config` of a config.json says of the experts' matrices.

Sources: the configuration classes of transformers 5.23 (utils/quantization_config.py), GPTQModel and
AutoAWQ for the older names of fields, compressed-tensors (quantization/quant_config.py, quant_args.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from moert.config import Quant
from moert.errors import ConfigError, UnsupportedError

QUANTIZED: Final = ("quantization_config", "compression_config")
LOADABLE: Final = (
    "bfloat16, float16 and float32 tensors; int4 as gptq, awq (gemm) and compressed-tensors "
    "(pack-quantized)"
)
# modules whose scheme is asked for where compressed-tensors has several
_EXPERTS: Final = tuple(
    f"model.layers.0.{block}.experts.0.{leaf}"
    for block, leaves in (("mlp", "gate_proj up_proj down_proj"), ("block_sparse_moe", "w1 w2 w3"))
    for leaf in leaves.split()
)

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint stores int4 matrices.

    Args:
        method: "gptq", "awq" or "compressed-tensors".
        quant: what the matrices become.
        zero_offset: added to stored zero points: GPTQ's first format stores them minus one.
        act_order: columns of one group may lie apart.
    """

    method: str
    quant: Quant
    zero_offset: int = 0
    act_order: bool = False

    def __str__(self) -> str:
        size = self.quant.group_size
        words = ["int4", "one group a row" if size == -1 else f"groups of {size}"]
        words.append("symmetric" if self.quant.symmetric else "with zero points")
        words += ["act-order"] if self.act_order else []
        return f"{self.method}: {', '.join(words)}"


def packing_of(fields: Fields) -> Packing | None:
    """The packing of a config.json's experts; None where it says nothing of quantisation.

    Raises:
        UnsupportedError: any other format, width or layout, named.
    """
    for key in QUANTIZED:
        given = fields.get(key)
        if not given:
            continue
        if not isinstance(given, Mapping):
            given = getattr(given, "__dict__", {"quant_method": given})
        method = given.get("quant_method") or given.get("quant_type") or given.get("fmt")
        method = str(getattr(method, "value", method or "unnamed"))
        if key == "compression_config" and method == "unnamed":
            method = "compressed-tensors"
        read = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}.get(method)
        source = _Source(key, method, given)
        return read(source) if read else source.refuse("a format that moert does not read")
    return None


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a description was found, for errors."""

    key: str
    method: str
    fields: Fields

    def refuse(self, why: str) -> NoReturn:
        names = ("fmt", "format", "bits", "weight_block_size")
        details = [f"{k}={self.fields[k]!r}" for k in names if self.fields.get(k)]
        raise UnsupportedError(
            f"{self.key}: the checkpoint is quantised as {self.method!r}"
            f"{' (' + ', '.join(details) + ')' if details else ''}: {why}; what can be loaded: {LOADABLE}"
        )

    def first(self, *names: str, default: Any = None) -> Any:
        found = (self.fields[name] for name in names if self.fields.get(name) is not None)
        return next(found, default)

    def quant(self, bits: Any, group_size: Any, symmetric: Any) -> Quant:
        if bits != 4:
            self.refuse(f"{bits!r} bits, need 4")
        try:
            return Quant("int4", group_size, symmetric)
        except ConfigError as error:
            self.refuse(str(error))


def _gptq(source: _Source) -> Packing:
    version = str(source.first("checkpoint_format", "format", default="gptq")).lower()
    if version not in ("gptq", "gptq_v2") or source.fields.get("is_marlin_format"):
        source.refuse(
            f"checkpoint_format={version!r}, packed for one kernel; need 'gptq' or 'gptq_v2'"
        )
    group_size = source.first("group_size", default=128)
    quant = source.quant(source.first("bits"), group_size, source.first("sym", default=True))
    act_order = bool(source.first("desc_act", default=False))
    return Packing("gptq", quant, 1 if version == "gptq" else 0, act_order)


def _awq(source: _Source) -> Packing:
    version = source.first("version", "format", default="gemm")
    version = str(getattr(version, "value", version)).lower()
    if version != "gemm":
        source.refuse(f"version={version!r}, need 'gemm'")
    if source.first("zero_point", default=True) is not True:
        source.refuse("zero_point=False, need the zero points of the gemm version")
    bits = source.first("bits", "w_bit", default=4)
    return Packing(
        "awq", source.quant(bits, source.first("group_size", "q_group_size", default=128), False)
    )


def _compressed_tensors(source: _Source) -> Packing:
    groups = source.first("config_groups", default={})
    schemes = [s for s in groups.values() if isinstance(s, Mapping)] if groups else []
    if not schemes:
        source.refuse("no config_groups")
    found = [_packed_scheme(source, scheme) for scheme in _schemes_of_experts(schemes)]
    if len(set(found)) != 1:
        source.refuse(f"{len(set(found))} schemes for the experts, need one")
    return found[0]


def _schemes_of_experts(schemes: list[Fields]) -> list[Fields]:
    """Those whose targets name experts' modules, else those that target all linear layers, else all."""

    def matches(target: str) -> bool:
        if target.startswith("re:"):
            return any(re.match(target[3:], name) for name in _EXPERTS)
        return any(name == target or name.endswith("." + target) for name in _EXPERTS)

    def targets(scheme: Fields) -> list[str]:
        return [str(target) for target in scheme.get("targets") or ()]

    by_name = [s for s in schemes if any(matches(target) for target in targets(s))]
    return by_name or [s for s in schemes if "Linear" in targets(s)] or schemes


def _packed_scheme(source: _Source, scheme: Fields) -> Packing:
    layout = scheme.get("format") or source.first("format", default="unnamed")
    if layout != "pack-quantized":
        source.refuse(f"format={layout!r} of the experts, need 'pack-quantized'")
    sparsity = source.first("sparsity_config", default={})
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        source.refuse(f"sparsity_config.format={sparsity.get('format')!r}, need 'dense'")
    weights = scheme.get("weights") or {}
    if scheme.get("input_activations"):
        source.refuse("quantised input_activations, need weights alone")
    if weights.get("type", "int") != "int":
        source.refuse(f"weights of type {weights.get('type')!r}, need 'int'")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        source.refuse(f"strategy={strategy!r}, need 'group' or 'channel'")
    size = weights.get("group_size") if strategy == "group" else -1
    quant = source.quant(weights.get("num_bits"), size, weights.get("symmetric", True))
    order = weights.get("actorder")
    order = str(getattr(order, "value", order)).lower() if order else "none"
    # with "weight" (static) the columns of a group stay together
    return Packing(source.method, quant, 0, order in ("group", "dynamic", "true"))
