"""GPTQ, AWQ and compressed-tensors experts: the same layer as the dense twin, packed once, little memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_cases import make_inputs, relative_error
from int4_checkpoints import Stored, quantized_checkpoint
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from moert import MoEConfig, MoERuntime, Quant
from moert.checkpoint.loader import expert_layers
from moert.cli.check import examine
from moert.cli.main import main
from moert.quantization.int4_layout import Int4Matrix, dequantize
from moert.steps.experts_reference import experts_reference
from moert.weights import ExpertWeights

GPTQ, AWQ, CT = "gptq", "awq", "compressed-tensors"
FORMATS = {
    "gptq-32": Stored(GPTQ, 32),
    # I = 96 and H = 64: the last group is shorter, or one group is longer than a row
    "gptq-64": Stored(GPTQ, 64),
    "gptq-128": Stored(GPTQ, 128),
    "gptq-row": Stored(GPTQ, -1),
    "gptq-asymmetric": Stored(GPTQ, 32, symmetric=False),
    "gptq-v2": Stored(GPTQ, 32, symmetric=False, version="gptq_v2"),
    "gptq-v2-symmetric": Stored(GPTQ, 32, version="gptq_v2"),
    "gptq-act-order": Stored(GPTQ, 32, act_order=True),
    "gptq-act-order-asymmetric": Stored(GPTQ, 64, symmetric=False, act_order=True),
    "awq-32": Stored(AWQ, 32, symmetric=False),
    "awq-64": Stored(AWQ, 64, symmetric=False),
    "ct-32": Stored(CT, 32, scales=torch.bfloat16),
    "ct-64": Stored(CT, 64),
    "ct-channel": Stored(CT, -1),
    "ct-asymmetric": Stored(CT, 32, symmetric=False),
    "ct-channel-asymmetric": Stored(CT, -1, symmetric=False),
    "ct-act-order": Stored(CT, 32, act_order=True, scales=torch.float32),
    "ct-act-order-asymmetric": Stored(CT, 32, symmetric=False, act_order=True),
}
Checkpoint = Callable[..., Path]


def check_layer(int4: Path, twin: Path, layer: int, stored: Stored) -> ExpertWeights:
    """Both give the same results in float32, and the packed ones a rounded float32 scale's in 16 bits."""
    cfg = MoEConfig.from_pretrained(str(int4))
    assert cfg.quant == Quant("int4", stored.group, stored.symmetric) and cfg.dtype == "float32"
    dense = MoEConfig.from_pretrained(str(twin))
    # shared experts stay out of a layer whose routed ones are int4
    routed = {"shared_experts": 0, "shared_gate": False}
    assert (
        replace(dense, **routed) == replace(cfg, quant=None) == replace(cfg, **routed, quant=None)
    )
    weights = ExpertWeights.from_checkpoint(int4, layer)
    weights.check(cfg)
    plain = ExpertWeights.from_checkpoint(twin, layer)
    x, topk = make_inputs(cfg, 9)
    expected = experts_reference(x, topk, plain, dense)
    assert relative_error(experts_reference(x, topk, weights, cfg), expected) < 1e-6
    for name in ("router_weight", "router_bias", "correction_bias"):
        given, wanted = getattr(weights, name), getattr(plain, name)
        assert (given is None and wanted is None) or torch.equal(given, wanted), name
    half = replace(cfg, dtype="bfloat16")
    rounded = ExpertWeights.from_checkpoint(int4, layer, cfg=half)
    rounded.check(half)
    # nine bits of a scale
    assert relative_error(experts_reference(x, topk, rounded, half), expected) < 6e-3
    return weights


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    stored = FORMATS[name]
    int4, twin = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, stored)
    assert expert_layers(int4) == (0, 2)
    weights = check_layer(int4, twin, 2, stored)
    assert isinstance(weights.w13, Int4Matrix) and isinstance(weights.w2, Int4Matrix)
    # with one group a row there is nothing to sort
    assert (weights.w13.permutation is not None) == (stored.act_order and stored.group < 64)
    if not stored.act_order:  # not only the layer: every weight is the twin's
        plain = ExpertWeights.from_checkpoint(twin, 2)
        assert torch.equal(dequantize(weights.w13), plain.w13)  # type: ignore[arg-type]
        assert torch.equal(dequantize(weights.w2), plain.w2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [
        ("mixtral", 1, "gptq-act-order-asymmetric"),  # w1, w3, w2
        ("mixtral", 0, "awq-32"),
        ("deepseek_v3", 1, "ct-asymmetric"),
        ("minimax_m2", 0, "gptq-asymmetric"),
        ("qwen2_moe", 1, "ct-act-order"),
        # biases, one for each matrix, in the order of act-order's rows
        ("gpt_oss", 1, "gptq-act-order"),
        ("gpt_oss", 0, "ct-32"),
    ],
)
def test_families(
    family: str, layer: int, name: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    stored = FORMATS[name]
    int4, twin = quantized_checkpoint(tiny_checkpoint(family), tmp_path, stored)
    check_layer(int4, twin, layer, stored)


def test_fused_biases_beside_packed_experts(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """gpt-oss' own biases: all experts in one tensor, gate and up alternating."""
    stored, source = FORMATS["gptq-act-order"], tiny_checkpoint("gpt_oss")
    own = {}

    def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {n: t for n, t in tensors.items() if not n.endswith("_proj.bias") or "attn" in n}
        return {**kept, **own}

    own |= {n: t for n, t in load_file(source / "model.safetensors").items() if n.endswith("_bias")}
    assert len(own) == 4
    int4, twin = quantized_checkpoint(source, tmp_path, stored, change=fused)
    check_layer(int4, twin, 0, stored)


def test_an_order_of_their_own_costs_nothing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """g_idx that is there but in order, not there, or all -1: no permutation."""
    stored = FORMATS["gptq-asymmetric"]

    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}

    int4, twin = quantized_checkpoint(
        tiny_checkpoint("qwen3_moe"), tmp_path, stored, change=without
    )
    weights = check_layer(int4, twin, 0, stored)
    assert weights.w13.permutation is None  # type: ignore[union-attr]

    def unused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {n: t for n, t in tensors.items() if n.endswith("weight_packed")}
        index = {
            n.replace("weight_packed", "weight_g_idx"): torch.full((8 * t.shape[1],), -1)
            for n, t in more.items()
        }
        return {**tensors, **index}

    int4, twin = quantized_checkpoint(
        tiny_checkpoint("qwen3_moe"), tmp_path / "ct", FORMATS["ct-32"], change=unused
    )
    check_layer(int4, twin, 0, FORMATS["ct-32"])


@pytest.mark.parametrize("name", ["gptq-act-order", "awq-32", "ct-asymmetric"])
def test_a_runtime_from_a_path(name: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    int4, twin = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, FORMATS[name])
    options = {"layer": 0, "max_tokens": 8, "buckets": (2,), "backend": "torch"}
    with MoERuntime(str(int4), **options) as rt, MoERuntime(str(twin), **options) as plain:  # type: ignore[arg-type]
        logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        expected = plain.forward(x, plain.route(logits))
        assert relative_error(rt.forward(x, rt.route(logits)), expected) < 1e-5
        assert rt.memory()["weights"] < plain.memory()["weights"] / 3


@pytest.mark.parametrize("name", ["gptq-act-order", "ct-asymmetric", "awq-64"])
def test_check_tells_format_and_memory(
    name: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    int4, _ = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, FORMATS[name])
    found = examine(int4)
    assert found.all_problems == [] and [layer.layer for layer in found.layers] == [0, 2]
    loaded = ExpertWeights.from_checkpoint(int4, 2)
    assert found.layers[1].nbytes == loaded.nbytes
    assert "I32" in found.layers[0].formats and found.packing is not None
    assert main(["check", str(int4)]) == 0
    printed = capsys.readouterr().out
    assert f"experts: {found.packing}" in printed and "no problems" in printed
    assert main(["check", str(int4), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packing"] == found.packing


def test_rounding_while_loading(tiny_checkpoint: Checkpoint) -> None:
    """A dense checkpoint and a config that asks for int4."""
    path = str(tiny_checkpoint("gpt_oss"))
    cfg = replace(MoEConfig.from_pretrained(path), quant=Quant("int4", 32, symmetric=False))
    weights = ExpertWeights.from_checkpoint(path, 0, cfg=cfg)
    weights.check(cfg)
    again = ExpertWeights.from_checkpoint(path, 0).quantize(group_size=32, symmetric=False)
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, weights.tensors()[name]), name


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """(bytes still held, most held at once) of torch's CPU allocations during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    held = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del result
    return held, most


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("name", ["gptq-act-order-asymmetric", "awq-64", "ct-32"])
def test_no_second_copy_of_the_layer(name: str, tmp_path: Path) -> None:
    """Packed expert by expert: beside the result there are never more than a few experts' bytes."""
    stored, experts, hidden, inner = FORMATS[name], 48, 256, 384
    source = tmp_path / "source"
    write_layer(source, experts, hidden, inner)
    int4, _ = quantized_checkpoint(source, tmp_path, stored)
    made: list[ExpertWeights] = []

    def load() -> None:
        made.append(ExpertWeights.from_checkpoint(int4, 0))

    load()  # what is made once
    before = anonymous()
    load()
    grown = anonymous() - before
    made.clear()
    held, most = allocated(load)
    weights = made[0]
    for part, tensor in weights.tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), part
    assert weights.nbytes <= held <= weights.nbytes + (1 << 16)
    codes = 3 * hidden * inner  # of one expert, one byte each
    mapped = (int4 / "model.safetensors").stat().st_size  # is counted, and is no memory
    assert most - held - mapped < 6 * codes < weights.nbytes / 4
    assert grown < weights.nbytes + 6 * codes + (4 << 20)


def write_layer(path: Path, experts: int, hidden: int, inner: int) -> None:
    """One layer's router and experts, dense, of qwen3_moe."""
    path.mkdir()
    g = torch.Generator().manual_seed(0)
    base = "model.layers.0.mlp."
    tensors = {f"{base}gate.weight": torch.randn(experts, hidden, generator=g)}
    for e in range(experts):
        for leaf, n, k in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            tensors[f"{base}experts.{e}.{leaf}_proj.weight"] = torch.randn(n, k, generator=g)
    config = {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
