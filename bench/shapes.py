"""Layers of public models that figures are taken on, and the formats: no code looks at a name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moert.config import MoEConfig, Quant

SHAPES = {
    "mixtral-8x7b": MoEConfig(8, 2, 4096, 14336),
    "qwen3-30b-a3b": MoEConfig(128, 8, 2048, 768),
    "gpt-oss-120b": MoEConfig(128, 4, 2880, 2880),
    "deepseek-v3-tp8": MoEConfig(256, 8, 7168, 256),
    "minimax-m2.5-tp4": MoEConfig(256, 8, 3072, 384),
    "qwen3-next-80b": MoEConfig(512, 10, 2048, 512),
}

# what a format changes of a shape
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "int4": {"dtype": "bfloat16", "quant": Quant("int4", group_size=128)},
}


def in_format(cfg: MoEConfig, name: str) -> MoEConfig:
    """A shape in a format of FORMATS; int4 in groups of 32 where rows are no whole groups of 128."""
    changed = replace(cfg, **FORMATS[name])
    if changed.quant is not None and (cfg.hidden_size % 128 or cfg.intermediate_size % 128):
        changed = replace(changed, quant=replace(changed.quant, group_size=32))
    return changed
