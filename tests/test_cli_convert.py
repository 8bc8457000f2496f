"""`moert convert`: what a runtime reads back is the very layer, from every format it is written of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import make_inputs
from int4_checkpoints import Stored, quantized_checkpoint
from safetensors.torch import load_file

from moert import ConfigError, ExpertWeights, MoEConfig, MoERuntime, Quant
from moert.checkpoint.loader import expert_layers
from moert.cli import convert
from moert.cli.main import main
from moert.quantization.int4_layout import Int4Matrix, dequantize

Capture = pytest.CaptureFixture[str]
Checkpoint = Callable[..., Path]


def answer(capsys: Capture, *words: object, code: int = 0) -> Any:
    assert main(["convert", *map(str, words), "--device", "cpu", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def same_matrix(a: Any, b: Any) -> None:
    """Codes, scales, zero points and the order of columns, all of them."""
    assert isinstance(a, Int4Matrix) and isinstance(b, Int4Matrix)
    assert a.tensors().keys() == b.tensors().keys()
    assert all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "quant", [Quant("int4", 32), Quant("int4", 64, False), Quant("int4", -1)], ids=repr
)
def test_floating_experts(
    family: str, quant: Quant, capsys: Capture, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A runtime on what was written gives the bits of one on weights rounded in memory."""
    source, out = tiny_checkpoint(family), tmp_path / "out"
    words = ["--group-size", quant.group_size, *([] if quant.symmetric else ["--zero-points"])]
    found = answer(capsys, source, out, *words)
    layers = expert_layers(out)
    assert layers == expert_layers(source)
    assert found["layers"] == len(layers)
    assert 0 < found["after"] < found["before"]
    cfg = MoEConfig.from_pretrained(str(out))
    # shared experts stay dense, and so out of the layer
    assert cfg == replace(MoEConfig.from_pretrained(str(source)), quant=quant, shared_experts=0)
    layer = layers[-1]
    rounded = ExpertWeights.from_checkpoint(source, layer, cfg=replace(cfg, quant=quant))
    loaded = ExpertWeights.from_checkpoint(out, layer)
    same_matrix(loaded.w13, rounded.w13)
    same_matrix(loaded.w2, rounded.w2)
    x, topk = make_inputs(cfg, 5)
    with MoERuntime(str(out), layer=layer) as written, MoERuntime(cfg, rounded) as memory:
        got = written.forward(x, topk).clone()
        assert torch.equal(got, memory.forward(x, topk))
        assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize(
    "stored",
    [
        Stored("gptq", 32),
        Stored("gptq", 64, symmetric=False, act_order=True),
        Stored("awq", 32, symmetric=False),
        Stored("compressed-tensors", -1),
        Stored("compressed-tensors", 32, act_order=True),
    ],
    ids=repr,
)
def test_int4_experts_keep_their_codes(
    stored: Stored, capsys: Capture, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, _ = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, stored)
    out = tmp_path / "out"
    answer(capsys, source, out)
    cfg = MoEConfig.from_pretrained(str(out))
    assert cfg == MoEConfig.from_pretrained(str(source))
    for layer in expert_layers(source):
        there, here = (ExpertWeights.from_checkpoint(path, layer) for path in (source, out))
        for a, b in ((there.w13, here.w13), (there.w2, here.w2)):
            assert isinstance(a, Int4Matrix) and isinstance(b, Int4Matrix)
            # an activation order that is no order need not be written
            assert torch.equal(dequantize(a), dequantize(b))
        x, topk = make_inputs(cfg, 3)
        with MoERuntime(cfg, there) as one, MoERuntime(cfg, here) as two:
            assert torch.equal(one.forward(x, topk).clone(), two.forward(x, topk))


def test_everything_else_is_copied(
    capsys: Capture, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint("gpt_oss").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("not this")
    out = tmp_path / "deep" / "out"
    assert main(["convert", str(source), str(out), "--device", "cpu"]) == 0
    assert "layers with experts" in capsys.readouterr().out
    before, after = tensors_of(source), tensors_of(out)
    others = {name for name in before if ".experts." not in name}
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert {name for name in after if ".experts." not in name} == others
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == after.keys()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["format"] == "pack-quantized"
    assert config == json.loads((source / "config.json").read_text())
    assert (out / "tokenizer.json").is_file()
    assert not (out / "pytorch_model.bin").exists()
    assert list(out.parent.iterdir()) == [out]


def test_refusals_leave_nothing(
    capsys: Capture,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = str(tiny_checkpoint("mixtral")), tmp_path / "out"

    def refused(*words: str) -> str:
        assert main(["convert", *words, "--device", "cpu"]) == 1
        return capsys.readouterr().err

    assert "group_size=7" in refused(source, str(out), "--group-size", "7")
    assert f"{tmp_path}: exists already" in refused(source, str(tmp_path))
    int4, _ = quantized_checkpoint(Path(source), tmp_path / "made", Stored("gptq", 32))
    said = refused(str(int4), str(out), "--group-size", "64")
    assert "keep their codes" in said

    def broken(*_: object) -> None:
        raise ConfigError("in the middle of it")

    monkeypatch.setattr(convert, "write_rest", broken)
    assert "in the middle of it" in refused(source, str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
