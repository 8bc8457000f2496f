"""Models with int4 experts on disk, opened through moert: the same tokens as their dense twins."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from int4_checkpoints import Stored, Tensors, quantized_checkpoint
from safetensors.torch import load_file, save_file
from test_int4_checkpoints import FORMATS
from transformers import AutoModelForCausalLM

from moert import MoEConfig, UnsupportedError
from moert.checkpoint.families import FAMILIES
from moert.integrations.int4_module import Int4Tensors
from moert.integrations.transformers import load, prepare

PROMPT = torch.randint(2, 256, (3, 7), generator=torch.Generator().manual_seed(0))
Checkpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def reference_backend_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOERT_BACKEND", "torch")
    with torch.no_grad():
        yield


@pytest.fixture
def dynamo() -> Iterator[None]:
    """What tracing keeps goes with the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generated(model: Any) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    tokens = model.generate(
        PROMPT, attention_mask=mask, pad_token_id=1, max_new_tokens=10, do_sample=False
    )
    assert isinstance(tokens, torch.Tensor)
    return tokens


def int4_modules(model: torch.nn.Module) -> list[Int4Tensors]:
    return [module for module in model.modules() if isinstance(module, Int4Tensors)]


@pytest.mark.parametrize(
    ("family", "name", "layers"),
    [
        ("qwen3_moe", "gptq-act-order", 2),
        ("qwen3_moe", "ct-channel-asymmetric", 2),
        ("mixtral", "awq-32", 2),
        ("deepseek_v3", "ct-asymmetric", 1),  # a dense layer and shared experts, in int4 on disk
        ("qwen2_moe", "gptq-asymmetric", 2),
        ("gpt_oss", "ct-act-order", 2),  # biases
    ],
)
def test_same_tokens_as_the_dense_twin(
    family: str, name: str, layers: int, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    int4, twin = quantized_checkpoint(tiny_checkpoint(family), tmp_path, FORMATS[name])
    model = load(int4)
    dense = AutoModelForCausalLM.from_pretrained(twin)  # with its own experts
    assert not model.training and len(int4_modules(model)) == layers
    assert (model(PROMPT).logits - dense(PROMPT).logits).abs().max() < 1e-5
    tokens = generated(model)
    assert tokens.shape == (3, 17) and torch.equal(tokens, generated(dense))
    # the experts are int4 and nowhere else; what was packed beside them is what the twin has
    experts = {n for n, p in dense.named_parameters() if ".experts." in n}
    assert {n for n, _ in dense.named_parameters()} - experts == dict(
        model.named_parameters()
    ).keys()
    for parameter, tensor in model.named_parameters():
        assert torch.equal(tensor, dense.get_parameter(parameter)), parameter


def open_model(tiny_checkpoint: Checkpoint, path: Path, **options: Any) -> Any:
    int4, _ = quantized_checkpoint(
        tiny_checkpoint("qwen3_moe"), path, FORMATS["gptq-act-order-asymmetric"]
    )
    return load(int4, **options)


def test_prepare_and_copies(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = open_model(tiny_checkpoint, tmp_path)
    expected = model(PROMPT).logits
    layers = prepare(model, max_tokens=64, buckets=(1, 4))
    assert len(layers) == 2 and layers[0].cfg.quant is not None
    for runtime, module in zip(layers, int4_modules(model), strict=True):
        mine = {tensor.data_ptr() for tensor in module.tensors()}
        assert {t.data_ptr() for t in runtime.weights.tensors().values()} == mine
    assert layers.memory()["weights"] == sum(runtime.weights.nbytes for runtime in layers)
    assert torch.equal(model(PROMPT).logits, expected)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(PROMPT).logits, expected)
    with torch.no_grad():
        int4_modules(copied)[0].w13_scales.mul_(2)  # type: ignore[union-attr]
    assert not torch.equal(copied(PROMPT).logits, expected)
    assert torch.equal(model(PROMPT).logits, expected)


def test_another_dtype(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = open_model(tiny_checkpoint, tmp_path)
    half = load(tmp_path / "int4", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(PROMPT).logits.dtype is torch.bfloat16
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.randint(0, 8, (5, 2))
    expected = int4_modules(model)[0](x, ids, weights)
    model.to(torch.bfloat16)  # tensors that were replaced are noticed
    for module in (int4_modules(half)[0], int4_modules(model)[0]):
        assert module.dtype is torch.bfloat16
        got = module(x.bfloat16(), ids, weights)
        assert got.dtype is torch.bfloat16
        assert 0 < (got - expected).norm() / expected.norm() < 1e-2


def test_the_modules_own_activation_decides(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every other model: what the class computes, not what moert reads in the config."""
    expected = open_model(tiny_checkpoint, tmp_path)(PROMPT).logits
    monkeypatch.setitem(FAMILIES, "qwen3_moe", replace(FAMILIES["qwen3_moe"], activation="gelu"))
    assert MoEConfig.from_pretrained(str(tmp_path / "int4")).activation == "gelu"
    model = load(tmp_path / "int4")
    assert int4_modules(model)[0].cfg.activation == "silu"
    assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.usefixtures("dynamo")
def test_experts_inside_compiled_code(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    module = int4_modules(open_model(tiny_checkpoint, tmp_path))[0]
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.randint(0, 8, (5, 2))
    expected = module(x, ids, weights)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, ids, weights), expected)


def test_attention_and_some_experts_may_be_dense(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What the quantisation left alone is loaded as it is."""
    source = tiny_checkpoint("qwen3_moe")
    layer = "model.layers.0.mlp.experts."

    def first_layer_dense(tensors: Tensors) -> Tensors:
        dense = load_file(source / "model.safetensors")
        kept = {n: t for n, t in tensors.items() if not n.startswith(layer)}
        return kept | {n: t for n, t in dense.items() if n.startswith(layer)}

    int4, twin = quantized_checkpoint(
        source, tmp_path, FORMATS["gptq-32"], only_experts=True, change=first_layer_dense
    )
    save_file(
        first_layer_dense(load_file(twin / "model.safetensors")),
        twin / "model.safetensors",
        metadata={"format": "pt"},
    )
    model, dense = load(int4), AutoModelForCausalLM.from_pretrained(twin)
    assert len(int4_modules(model)) == 1 and len(prepare(model)) == 2
    assert (model(PROMPT).logits - dense(PROMPT).logits).abs().max() < 1e-5
    assert torch.equal(generated(model), generated(dense))


def test_generation_settings_of_the_checkpoint(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    int4, _ = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, FORMATS["gptq-32"])
    (int4 / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "top_k": 7}))
    model = load(str(int4), attn_implementation="eager")
    assert model.generation_config.max_new_tokens == 3 and model.generation_config.top_k == 7
    assert model.config.name_or_path == str(int4)
    assert model.config._attn_implementation == "eager"


def test_such_a_model_is_not_saved(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = open_model(tiny_checkpoint, tmp_path)
    with pytest.raises(ValueError, match="moert"):
        model.save_pretrained(tmp_path / "saved")


def test_refusals(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe")
    with pytest.raises(UnsupportedError, match=r"not quantised.*from_pretrained"):
        load(source)
    int4, _ = quantized_checkpoint(
        source, tmp_path, FORMATS["gptq-32"], quantization_config={"quant_method": "fp8"}
    )
    with pytest.raises(UnsupportedError, match="'fp8'"):
        load(int4)
    # attention of another width than the config tells
    stored = Stored("gptq", 32)
    name = "model.layers.0.self_attn.q_proj.qzeros"
    int4, _ = quantized_checkpoint(
        source, tmp_path / "b", stored, change=lambda t: {n: v for n, v in t.items() if n != name}
    )
    with pytest.raises(Exception, match=f"{name}: missing"):
        load(int4)
