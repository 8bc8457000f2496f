"""Checkpoints that cannot be loaded: which tensor, what it is, what is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resaving import Checkpoint, Tensors, fuse, resaved
from safetensors.torch import save_file

from moert.checkpoint.loader import load_layer
from moert.config import MoEConfig
from moert.errors import ConfigError, UnsupportedError, WeightsError
from moert.weights import ExpertWeights


def drop(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def replaced(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


def half_turned(tensors: Tensors) -> Tensors:
    out = fuse(False)(tensors)
    name = "model.layers.0.mlp.experts.down_proj"
    return {**out, name: out[name].transpose(1, 2)}


EXPERT = "model.layers.0.mlp.experts.7.up_proj.weight"
ERRORS: list[tuple[str, str, Callable[[Tensors], Tensors], int, type[Exception], list[str]]] = [
    # id, family, change, layer, error, words
    ("dense", "qwen3_moe", drop(), 1, WeightsError, ["layer=1", "dense", "0, 2"]),
    ("dense-first", "deepseek_v3", drop(), 0, WeightsError, ["layer=0", "dense", "experts: 1"]),
    ("too-high", "qwen3_moe", drop(), 3, WeightsError, ["layer=3", "layers 0-2", "0, 2"]),
    ("negative", "olmoe", drop(), -1, WeightsError, ["layer=-1", "layers 0-1"]),
    (
        "missing-expert",
        "qwen3_moe",
        drop(EXPERT),
        0,
        WeightsError,
        [EXPERT, "missing", "near", "experts.6.up_proj.weight"],
    ),
    # what a quantised checkpoint looks like when its config does not say so
    (
        "renamed",
        "qwen3_moe",
        lambda t: {
            name.replace("7.up_proj.weight", "7.up_proj.qweight"): v for name, v in t.items()
        },
        0,
        WeightsError,
        [EXPERT, "missing", "experts.7.up_proj.qweight"],
    ),
    (
        "missing-router",
        "mixtral",
        drop("model.layers.1.block_sparse_moe.gate.weight"),
        1,
        WeightsError,
        ["model.layers.1.block_sparse_moe.gate.weight", "missing"],
    ),
    (
        "missing-bias",
        "gpt_oss",
        drop("model.layers.0.mlp.experts.down_proj_bias"),
        0,
        WeightsError,
        ["experts.down_proj_bias", "missing", "gate_up_proj_bias"],
    ),
    (
        "missing-correction",
        "minimax_m2",
        drop("model.layers.0.block_sparse_moe.e_score_correction_bias"),
        0,
        WeightsError,
        ["e_score_correction_bias", "missing"],
    ),
    (
        "missing-half-of-fused",
        "gpt_oss",
        drop("model.layers.0.mlp.experts.gate_up_proj"),
        0,
        WeightsError,
        ["experts.gate_up_proj", "missing"],
    ),
    (
        "shape",
        "qwen3_moe",
        replaced(EXPERT, torch.zeros(64, 96)),
        0,
        WeightsError,
        [EXPERT, "[64, 96]", "[96, 64]"],
    ),
    (
        "fused-shape",
        "gpt_oss",
        replaced("model.layers.0.mlp.experts.down_proj", torch.zeros(8, 96, 65)),
        0,
        WeightsError,
        ["experts.down_proj", "[8, 96, 65]", "[8, 96, 64]"],
    ),
    ("half-transposed", "qwen3_moe", half_turned, 0, WeightsError, ["[8, 96, 64]", "transposed"]),
    (
        "router-shape",
        "olmoe",
        replaced("model.layers.0.mlp.gate.weight", torch.zeros(7, 64)),
        0,
        WeightsError,
        ["mlp.gate.weight", "[7, 64]", "[8, 64]"],
    ),
    (
        "fp8",
        "qwen3_moe",
        replaced(EXPERT, torch.zeros(96, 64).to(torch.float8_e4m3fn)),
        0,
        UnsupportedError,
        [EXPERT, "F8_E4M3", "bfloat16"],
    ),
    (
        "hash-routed",
        "qwen3_moe",
        replaced("model.layers.0.mlp.gate.tid2eid", torch.zeros(16, 2, dtype=torch.int64)),
        0,
        UnsupportedError,
        ["layer=0", "token id"],
    ),
    (
        "no-experts",
        "olmoe",
        lambda _: {"a": torch.zeros(1)},
        0,
        WeightsError,
        ["holds layers none"],
    ),
]


@pytest.mark.parametrize(
    ("family", "change", "layer", "kind", "words"),
    [c[1:] for c in ERRORS],
    ids=[c[0] for c in ERRORS],
)
def test_refuses(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    family: str,
    change: Callable[[Tensors], Tensors],
    layer: int,
    kind: type[Exception],
    words: list[str],
) -> None:
    path = resaved(tiny_checkpoint(family), tmp_path, change)
    with pytest.raises(kind) as error:
        ExpertWeights.from_checkpoint(path, layer)
    for word in words:
        assert word in str(error.value)


def test_too_many_experts_in_the_file(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    # fewer experts than the file has would otherwise load silently
    source = tiny_checkpoint("qwen3_moe")
    gate = "model.layers.0.mlp.gate.weight"
    path = resaved(source, tmp_path, lambda t: {**t, gate: t[gate][:4]}, num_experts=4)
    fields = json.loads((path / "config.json").read_text())
    fields.pop("num_local_experts", None)
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match=r"experts\.4\.down_proj\.weight.*num_experts=4"):
        load_layer(path, 0)


def test_file_errors(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("olmoe")
    with pytest.raises(ConfigError, match=r"nowhere.*config\.json"):
        ExpertWeights.from_checkpoint(tmp_path / "nowhere", 0)

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source / "config.json", bare)
    with pytest.raises(WeightsError, match=r"bare.*safetensors"):
        ExpertWeights.from_checkpoint(bare, 0)
    (bare / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable"):
        ExpertWeights.from_checkpoint(bare, 0)
    (bare / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="weight_map"):
        ExpertWeights.from_checkpoint(bare, 0)

    sharded = resaved(source, tmp_path / "sharded", shards=2)
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors: no such file"):
        ExpertWeights.from_checkpoint(sharded, 0)
    # a shard without a tensor that the index promises
    save_file({"other": torch.zeros(1)}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors"):
        ExpertWeights.from_checkpoint(sharded, 0)


def test_quantized_is_refused_even_with_a_config_at_hand(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("gpt_oss")
    cfg = MoEConfig.from_pretrained(str(source))
    path = resaved(source, tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedError, match="mxfp4"):
        ExpertWeights.from_checkpoint(path, 0, cfg=cfg)


def test_ungated_is_unsupported(tiny_checkpoint: Checkpoint) -> None:
    source = tiny_checkpoint("olmoe")
    cfg = MoEConfig(8, 2, 64, 96, activation="relu2", gated=False)
    with pytest.raises(UnsupportedError, match="gated=False"):
        ExpertWeights.from_checkpoint(source, 0, cfg=cfg)
