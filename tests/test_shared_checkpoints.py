"""Shared experts of checkpoints: whole blocks against transformers' own, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from expert_cases import relative_error
from int4_checkpoints import Stored, quantized_checkpoint
from safetensors.torch import load_file, save_file

from moert import (
    ConfigError,
    ExpertWeights,
    MoEConfig,
    MoERuntime,
    Quant,
    UnsupportedError,
    WeightsError,
)
from moert.checkpoint.files import TensorFiles
from moert.checkpoint.hf_config import config_from_hf, read_config
from moert.checkpoint.loader import layer_problems
from moert.checkpoint.names import locate
from moert.quantization.int4_layout import Int4Matrix

Checkpoint = Callable[..., Path]


FIELDS = {
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 96,
    "intermediate_size": 160,
}
# n of size I and whether they have a gate, where the config says nothing else
PARTS = {
    "DeepseekV2Config": 2,
    "DeepseekV3Config": 1,
    "DeepseekV32Config": 1,
    "DeepseekV4Config": 1,
    "Dots1Config": 0,
    "Glm4MoeConfig": 1,
    "Glm4MoeLiteConfig": 1,
    "Glm4vMoeTextConfig": 1,
    "GlmMoeDsaConfig": 1,
    "Qwen2MoeConfig": 4,
    "Qwen3NextConfig": 1,
    "Qwen3_5MoeTextConfig": 1,
    "Qwen3MoeConfig": 0,
    "MixtralConfig": 0,
}


@pytest.mark.parametrize("name", PARTS)
def test_config_classes(name: str) -> None:
    routed = {"num_experts_per_tok": 6, "n_routed_experts": 128}
    routed = routed if name in ("Dots1Config", "DeepseekV2Config") else {}
    cfg = MoEConfig.from_hf(getattr(transformers, name)(**routed))
    assert cfg.shared_experts == PARTS[name]
    assert cfg.shared_gate == (name.startswith("Qwen") and PARTS[name] > 0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shared_expert_intermediate_size": 96}, (1, True)),
        ({"shared_expert_intermediate_size": 97}, (2, True)),  # the second one is mostly zeros
        ({"shared_expert_intermediate_size": 1}, (1, True)),
        ({"shared_expert_intermediate_size": 0}, (0, False)),
        ({"shared_expert_intermediate_size": None}, (0, False)),
        ({}, (59, True)),  # the class's default of 5632 in parts of 96
        ({"model_type": "deepseek_v3", "n_shared_experts": 3}, (3, False)),
        ({"model_type": "glm4_moe", "n_shared_experts": None}, (0, False)),
        ({"model_type": "qwen3_moe", "n_shared_experts": 1}, (0, False)),  # not in its blocks
    ],
)
def test_fields(fields: dict[str, Any], expected: tuple[int, bool]) -> None:
    cfg = config_from_hf({**FIELDS, "n_group": 1, **fields})
    assert (cfg.shared_experts, cfg.shared_gate) == expected


@pytest.mark.parametrize("value", [-1, 1.5, "2", True])
def test_fields_that_are_no_count(value: Any) -> None:
    with pytest.raises(ConfigError, match="shared_experts"):
        config_from_hf(
            {**FIELDS, "model_type": "deepseek_v3", "n_group": 1, "n_shared_experts": value}
        )


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "deepseek_v3", "qwen3_moe"])
def test_the_block_of_a_checkpoint(
    family: str, tiny_model: Callable[..., Any], tiny_checkpoint: Checkpoint
) -> None:
    """Router, routing rule, experts and shared experts against the module that transformers makes of it."""
    with MoERuntime(
        str(tiny_checkpoint(family, "float32")),
        layer=2 if family == "qwen3_moe" else 1,
        max_tokens=8,
    ) as rt:
        layer = tiny_model(family, "float32").model.layers[2 if family == "qwen3_moe" else 1]
        x = torch.randn(7, rt.cfg.hidden_size)
        with torch.no_grad():
            expected = layer.mlp(x[None])[0]
        assert relative_error(rt.forward_block(x), expected) < 2e-6
        assert bool(rt.cfg.shared_experts) == (family != "qwen3_moe")


def changed(source: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, to / "model.safetensors")
    return to


SHARED = "model.layers.1.mlp.shared_expert."
# id, the tensor, what becomes of it, words of the message
DAMAGED: list[tuple[str, str, Any, list[str]]] = [
    ("missing-up", f"{SHARED}up_proj.weight", None, ["up_proj.weight", "missing"]),
    ("missing-gate", "model.layers.1.mlp.shared_expert_gate.weight", None, ["missing"]),
    ("gate-shape", "model.layers.1.mlp.shared_expert_gate.weight", (2, 64), ["[2, 64]", "[1, 64]"]),
    # one size for all three
    ("rows", f"{SHARED}gate_proj.weight", (40, 64), ["up_proj", "[32, 64]", "[40, 64]"]),
    (
        "too-large",
        f"{SHARED}gate_proj.weight",
        (97, 64),
        ["97 rows", "1 to 96", "shared_experts=1"],
    ),
    ("down", f"{SHARED}down_proj.weight", (32, 64), ["down_proj", "[32, 64]", "[64, 32]"]),
]


@pytest.mark.parametrize(
    ("name", "shape", "words"), [d[1:] for d in DAMAGED], ids=[d[0] for d in DAMAGED]
)
def test_damaged(
    name: str, shape: Any, words: list[str], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors.pop(name)
        if shape is not None:
            tensors[name] = old.new_zeros(shape)

    path = changed(tiny_checkpoint("qwen2_moe"), tmp_path / "model", damage)
    cfg = MoEConfig.from_pretrained(str(path))
    with pytest.raises(WeightsError) as error:
        ExpertWeights.from_checkpoint(path, 1)
    assert all(word in str(error.value) for word in words), error.value
    # those who do not want them load what is there, and the others are told what is wrong
    routed = replace(cfg, shared_experts=0, shared_gate=False)
    ExpertWeights.from_checkpoint(path, 1, cfg=routed).check(routed)
    files = TensorFiles(path)
    located = locate(files.names(), str(read_config(path)["model_type"]))
    problems = layer_problems(files, located.blocks[1], located.names, cfg)
    assert problems and all(word in problems[0] for word in words), problems
    files.close()


def test_another_size_of_the_shared_expert(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """config.json tells how many parts; the checkpoint, how many columns the last one has."""
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen2_moe"), path)
    fields = json.loads((path / "config.json").read_text())
    fields["shared_expert_intermediate_size"] = 2 * fields["moe_intermediate_size"]
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match="32 rows, need 97 to 192 because shared_experts=2"):
        ExpertWeights.from_checkpoint(path, 1)


def test_rounded_at_load(tiny_checkpoint: Checkpoint) -> None:
    """A dense checkpoint whose experts are asked for as int4: the shared ones are rounded like the others."""
    path = tiny_checkpoint("deepseek_v3")
    cfg = replace(MoEConfig.from_pretrained(str(path)), quant=Quant("int4", 32))
    weights = ExpertWeights.from_checkpoint(path, 1, cfg=cfg)
    weights.check(cfg)
    assert isinstance(weights.w13, Int4Matrix) and weights.w13.shape[0] == 17
    dense = ExpertWeights.from_checkpoint(path, 1)
    assert relative_error(weights.w13[16], dense.w13[16]) < 0.2


def test_shared_experts_of_an_int4_checkpoint_are_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    awq = Stored("awq", 32, symmetric=False)
    path, _ = quantized_checkpoint(tiny_checkpoint("qwen2_moe"), tmp_path, awq)
    cfg = MoEConfig.from_pretrained(str(path))
    assert cfg.shared_experts == 0
    with pytest.raises(UnsupportedError, match=r"shared_experts=1: .* need shared_experts=0"):
        ExpertWeights.from_checkpoint(path, 0, cfg=replace(cfg, shared_experts=1))
