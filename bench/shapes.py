"""Layers of public models that figures are taken on: one dictionary, no code looks at a name."""

from __future__ import annotations

from moert.config import MoEConfig

SHAPES = {
    "mixtral-8x7b": MoEConfig(8, 2, 4096, 14336),
    "qwen3-30b-a3b": MoEConfig(128, 8, 2048, 768),
    "gpt-oss-120b": MoEConfig(128, 4, 2880, 2880),
    "deepseek-v3-tp8": MoEConfig(256, 8, 7168, 256),
    "minimax-m2.5-tp4": MoEConfig(256, 8, 3072, 384),
    "qwen3-next-80b": MoEConfig(512, 10, 2048, 512),
}
