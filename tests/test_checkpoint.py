"""Checkpoints of every family as transformers saves them: each layer loads to the model's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resaving import Checkpoint, Tensors, fuse, resaved
from safetensors.torch import load_file, save_file

from moert.checkpoint.loader import expert_layers
from moert.checkpoint.names import NAMES, locate
from moert.config import MoEConfig
from moert.weights import ExpertWeights

# family -> the layers with experts in its tiny model
LAYERS = {
    "mixtral": (0, 1),
    "qwen2_moe": (0, 1),
    "qwen3_moe": (0, 2),
    "qwen3_next": (0, 1),
    "deepseek_v3": (1,),
    "olmoe": (0, 1),
    "minimax_m2": (0, 1),
    "gpt_oss": (0, 1),
}
ALL = sorted(LAYERS)


def expected(model: Any, family: str, layer: int) -> Tensors:
    """The tensors of a model's own modules, in moert's layout."""
    block = model.model.layers[layer].mlp
    experts, router = block.experts, block.router if family == "gpt_oss" else block.gate
    found = {
        "w13": experts.gate_up_proj,
        "w2": experts.down_proj,
        "router_weight": router.weight,
    }
    if family == "gpt_oss":
        w13, b13 = experts.gate_up_proj, experts.gate_up_proj_bias
        found["w13"] = torch.cat((w13[..., 0::2], w13[..., 1::2]), -1).transpose(1, 2)
        found["w2"] = experts.down_proj.transpose(1, 2)
        found["b13"] = torch.cat((b13[:, 0::2], b13[:, 1::2]), -1)
        found["b2"] = experts.down_proj_bias
        found["router_bias"] = router.bias
    if family == "deepseek_v3":
        found["correction_bias"] = router.e_score_correction_bias
    if family == "minimax_m2":
        found["correction_bias"] = block.e_score_correction_bias
    shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    if shared is not None:
        # smaller than an expert, or as large
        inner = experts.down_proj.shape[2]
        rows = (shared.gate_proj.weight, shared.up_proj.weight)
        missing = inner - rows[0].shape[0]
        padded = torch.cat([torch.nn.functional.pad(w, (0, 0, 0, missing)) for w in rows])
        found["w13"] = torch.cat((found["w13"], padded[None]))
        down = torch.nn.functional.pad(shared.down_proj.weight, (0, missing))
        found["w2"] = torch.cat((found["w2"], down[None]))
    if hasattr(block, "shared_expert_gate"):
        found["shared_gate"] = block.shared_expert_gate.weight
    return {name: tensor.detach() for name, tensor in found.items()}


def assert_same(weights: ExpertWeights, wanted: Tensors) -> None:
    given = weights.tensors()
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert given[name].dtype == tensor.dtype, name
        assert torch.equal(given[name], tensor), name


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that a row that is never filled shows."""
    empty = torch.empty

    def nan_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_empty)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL)
def test_every_layer_of_every_family(
    tiny_model: Callable[..., Any], tiny_checkpoint: Checkpoint, family: str, dtype: str
) -> None:
    path = tiny_checkpoint(family, dtype)
    cfg = MoEConfig.from_pretrained(str(path))
    assert cfg.dtype == dtype
    assert expert_layers(path) == LAYERS[family]
    for layer in LAYERS[family]:
        weights = ExpertWeights.from_checkpoint(path, layer)
        weights.check(cfg)
        assert not weights.interleaved
        assert weights.w13.is_contiguous() and weights.w2.is_contiguous()
        assert_same(weights, expected(tiny_model(family, dtype), family, layer))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_converts_to_the_dtype_asked_for(
    tiny_model: Callable[..., Any], tiny_checkpoint: Checkpoint, family: str
) -> None:
    path = tiny_checkpoint(family, "float32")
    fields = {**json.loads((path / "config.json").read_text()), "dtype": "float16"}
    cfg = MoEConfig.from_hf(fields)
    layer = LAYERS[family][0]
    weights = ExpertWeights.from_checkpoint(path, layer, cfg=cfg)
    weights.check(cfg)
    # what decides the choice of experts keeps its precision
    exact = ("router_weight", "router_bias", "correction_bias")
    wanted = expected(tiny_model(family, "float32"), family, layer)
    assert_same(weights, {k: v if k in exact else v.half() for k, v in wanted.items()})


# the layouts that transformers 5 state dicts, Qwen3-VL-MoE and multimodal checkpoints have
VARIANTS = {
    "sharded": (lambda tensors: tensors, 3),
    "fused": (fuse(False), 1),
    "fused-sharded": (fuse(False), 2),
    "fused-transposed": (fuse(True), 1),
    "nested": (fuse(True, "model.language_model.layers."), 1),
    "outer": (fuse(False, "language_model.model.layers."), 1),
    "bare": (fuse(False, "layers."), 1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_variants(
    tiny_model: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path, variant: str
) -> None:
    change, shards = VARIANTS[variant]
    path = resaved(tiny_checkpoint("qwen3_moe"), tmp_path, change, shards=shards)
    assert expert_layers(path) == (0, 2)
    for layer in (0, 2):
        weights = ExpertWeights.from_checkpoint(path, layer)
        assert_same(weights, expected(tiny_model("qwen3_moe"), "qwen3_moe", layer))


def test_a_single_file_of_another_name(
    tiny_model: Callable[..., Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = resaved(tiny_checkpoint("olmoe"), tmp_path)
    (path / "model.safetensors").rename(path / "weights.safetensors")
    weights = ExpertWeights.from_checkpoint(path, 1)
    assert_same(weights, expected(tiny_model("olmoe"), "olmoe", 1))


def test_correction_bias_is_raised_to_float32(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    path = resaved(
        tiny_checkpoint("deepseek_v3"), tmp_path, lambda t: {**t, name: t[name].bfloat16()}
    )
    bias = ExpertWeights.from_checkpoint(path, 1).correction_bias
    assert bias is not None
    assert bias.dtype is torch.float32
    assert torch.equal(bias, load_file(path / "model.safetensors")[name].float())


def test_result_outlives_the_files(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    # a tensor that still maps the file would change, or fault, when the file does
    path = resaved(tiny_checkpoint("minimax_m2"), tmp_path)
    weights = ExpertWeights.from_checkpoint(path, 0)
    before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    file = path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(b"\xff" * (file.stat().st_size // 2))
    assert_same(weights, before)


def test_reads_only_the_layer_asked_for(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    # every shard but the one with this layer's tensors is gone
    source = tiny_checkpoint("olmoe")
    shutil.copy(source / "config.json", tmp_path)
    tensors = load_file(source / "model.safetensors")
    layer = {name: value for name, value in tensors.items() if name.startswith("model.layers.1.")}
    save_file(layer, tmp_path / "one.safetensors")
    file_of = dict.fromkeys(tensors, "gone.safetensors") | dict.fromkeys(layer, "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": file_of}))
    ExpertWeights.from_checkpoint(tmp_path, 1)


def test_locate_prefers_the_language_model_and_tries_all_families() -> None:
    talker = "talker.model.layers.0.mlp.experts.0.up_proj.weight"
    thinker = "thinker.model.layers.4.mlp.experts.0.up_proj.weight"
    assert locate([talker, thinker], "qwen3_omni_moe_text").blocks == {
        4: "thinker.model.layers.4.mlp."
    }
    # a multi-token-prediction stack is not a layer of the model
    assert locate(["mtp.layers.0.mlp.experts.0.up_proj.weight"], "qwen3_next").blocks == {}
    unknown = locate(["layers.3.ffn.experts.0.w1.weight"], "brand_new")
    assert unknown.names is NAMES["deepseek_v4"] and unknown.blocks == {3: "layers.3.ffn."}
