"""Tensor names on disk: where each family keeps the experts, the router and the biases of a layer.

Source: `conversion_mapping.py` of transformers 5.23 (source patterns) and the models it saves.
A full name is `<prefix><layer>.<block>.<rest>`, as `model.layers.3.mlp.experts.0.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

# in order of preference: a multimodal checkpoint can hold other stacks of layers too
PREFIXES: Final = (
    "model.layers.",
    "model.language_model.layers.",
    "language_model.model.layers.",
    "language_model.layers.",
    "thinker.model.layers.",
    "layers.",
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one family below `<prefix><layer>.`.

    Args:
        blocks: the module that holds router and experts.
        gate, up, down: one expert's matrices [I, H], [I, H], [H, I] below `<block>.experts.<e>.`.
        router, router_bias, correction_bias: [E, H], [E], [E] below `<block>.`; alternatives, first
            found wins; empty where the family has none.
        fused_interleaved: a fused gate_up alternates gate and up (even = gate) instead of gate, then up.
    """

    blocks: tuple[str, ...] = ("mlp",)
    gate: str = "gate_proj.weight"
    up: str = "up_proj.weight"
    down: str = "down_proj.weight"
    router: tuple[str, ...] = ("gate.weight",)
    router_bias: tuple[str, ...] = ()
    correction_bias: tuple[str, ...] = ()
    fused_interleaved: bool = False


# what an expert's matrix ends in: floating, or the codes of a packed one (GPTQ and AWQ, compressed-tensors)
MATRICES: Final = ("weight", "qweight", "weight_packed")
# fused tensors of all experts, [E, 2I, H] and [E, H, I] or both transposed; biases [E, 2I], [E, H]
FUSED_W13: Final = "experts.gate_up_proj"
FUSED_W2: Final = "experts.down_proj"
FUSED_B13: Final = "experts.gate_up_proj_bias"
FUSED_B2: Final = "experts.down_proj_bias"
# a shared expert's matrices, named like an expert's, below one of these; and its sigmoid gate [1, H]
SHARED: Final = ("shared_experts.", "shared_expert.")
SHARED_GATE: Final = ("shared_expert_gate.weight",)
# a router that looks experts up by token id instead of choosing them (DeepSeek-V4's first layers)
HASH_TABLE: Final = "gate.tid2eid"

_QWEN: Final = Names()
_MIXTRAL: Final = Names(
    blocks=("block_sparse_moe", "mlp"), gate="w1.weight", up="w3.weight", down="w2.weight"
)
_DEEPSEEK: Final = replace(_QWEN, correction_bias=("gate.e_score_correction_bias",))

NAMES: Final[dict[str, Names]] = {
    "mixtral": _MIXTRAL,
    "minimax_m2": replace(
        _MIXTRAL, correction_bias=("e_score_correction_bias", "gate.e_score_correction_bias")
    ),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN,
    "qwen3_omni_moe_text": _QWEN,
    "qwen3_vl_moe_text": _QWEN,
    "qwen3_5_moe_text": _QWEN,
    "olmoe": _QWEN,
    "flex_olmo": _QWEN,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "glm4v_moe_text": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "deepseek_v4": Names(
        blocks=("ffn", "mlp"),
        gate="w1.weight",
        up="w3.weight",
        down="w2.weight",
        correction_bias=("gate.bias", "gate.e_score_correction_bias"),
    ),
    "gpt_oss": Names(
        router=("router.weight",), router_bias=("router.bias",), fused_interleaved=True
    ),
}


@dataclass(frozen=True, slots=True)
class Located:
    """What a checkpoint's names tell: which layers it has, and where those with experts keep them.

    layers: every layer of the chosen stack, ascending. blocks: layer -> `<prefix><layer>.<block>.`.
    names: the family's names that matched.
    """

    layers: tuple[int, ...]
    blocks: dict[int, str]
    names: Names


def locate(keys: Iterable[str], model_type: str) -> Located:
    """Find the experts among tensor names; an unknown model_type tries every family's names.

    Nothing found is a `Located` without blocks.
    """
    keys = list(keys)
    known = NAMES.get(model_type)
    found = Located((), {}, known or _QWEN)
    for names in [known] if known else dict.fromkeys(NAMES.values()):
        for prefix in PREFIXES:
            blocks = _blocks(keys, prefix, names)
            if blocks:
                return Located(_layers(keys, prefix), blocks, names)
        found = found if found.layers else replace(found, layers=_any_layers(keys))
    return found


def _blocks(keys: list[str], prefix: str, names: Names) -> dict[int, str]:
    bases = (re.escape(leaf.removesuffix(".weight")) for leaf in (names.gate, names.up, names.down))
    leaves = f"(?:{'|'.join(bases)})\\.(?:{'|'.join(MATRICES)})$"
    block = "|".join(re.escape(name) for name in names.blocks)
    pattern = re.compile(
        rf"{re.escape(prefix)}(\d+)\.({block})\.experts\.(?:\d+\.{leaves}|gate_up_proj$|down_proj$)"
    )
    matches = (pattern.match(key) for key in keys)
    found = {int(m[1]): f"{prefix}{m[1]}.{m[2]}." for m in matches if m}
    return dict(sorted(found.items()))


def _layers(keys: list[str], prefix: str) -> tuple[int, ...]:
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return tuple(sorted({int(m[1]) for m in map(pattern.match, keys) if m}))


def _any_layers(keys: list[str]) -> tuple[int, ...]:
    return next((layers for prefix in PREFIXES if (layers := _layers(keys, prefix))), ())
