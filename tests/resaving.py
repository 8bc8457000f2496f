"""Checkpoints derived from the tiny ones: other layouts, other prefixes, damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Checkpoint = Callable[..., Path]


def resaved(
    source: Path,
    target: Path,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    *,
    shards: int = 1,
    **fields: Any,
) -> Path:
    """A copy of a checkpoint with its tensors and config fields changed."""
    target.mkdir(exist_ok=True)
    config = {**json.loads((source / "config.json").read_text()), **fields}
    (target / "config.json").write_text(json.dumps(config))
    tensors = {
        k: v.contiguous() for k, v in change(load_file(source / "model.safetensors")).items()
    }
    if shards == 1:
        save_file(tensors, target / "model.safetensors")
        return target
    names, files = (
        sorted(tensors),
        [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(shards)],
    )
    file_of = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if file_of[name] == file}, target / file)
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def fuse(transposed: bool, prefix: str = "model.layers.") -> Callable[[Tensors], Tensors]:
    """Per-expert tensors -> fused ones, and another prefix."""

    def change(tensors: Tensors) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            if ".experts." not in name:
                out[name.replace("model.layers.", prefix)] = tensor
        for layer in (0, 2):
            base = f"model.layers.{layer}.mlp.experts."
            get = lambda leaf, base=base: torch.stack(  # noqa: E731
                [tensors[f"{base}{e}.{leaf}_proj.weight"] for e in range(8)]
            )
            w13, w2 = torch.cat((get("gate"), get("up")), 1), get("down")
            base = base.replace("model.layers.", prefix)
            out[base + "gate_up_proj"] = w13.transpose(1, 2) if transposed else w13
            out[base + "down_proj"] = w2.transpose(1, 2) if transposed else w2
        return out

    return change
