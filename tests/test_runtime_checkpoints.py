"""`MoERuntime("path", layer=n)` for every family: what the model's own layer computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import relative_error
from resaving import Tensors, resaved

from moert import MoEConfig, MoERuntime
from moert.errors import ConfigError, WeightsError

# family -> a layer with experts in its tiny model
LAYERS = {
    "mixtral": 1,
    "qwen2_moe": 0,
    "qwen3_moe": 2,  # behind a dense one
    "qwen3_next": 1,
    "deepseek_v3": 1,  # groups, a correction bias, scaled weights
    "olmoe": 0,
    "minimax_m2": 1,
    "gpt_oss": 0,  # biases, interleaved, transposed
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3}
T = 5


def own_layer(model: Any, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] and the routed experts' output [T, H] of a model's own modules."""
    block = model.model.layers[layer].mlp
    router = getattr(block, "router", None) or block.gate
    bias = (block.e_score_correction_bias,) if hasattr(block, "e_score_correction_bias") else ()
    routed = router(x, *bias)
    logits, weights, ids = routed
    return logits, block.experts(x, ids, weights.to(x.dtype))


def make_x(cfg: MoEConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, cfg.hidden_size, generator=generator).to(cfg.torch_dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_of_every_family(
    family: str,
    dtype: str,
    tiny_model: Callable[..., Any],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """By path, and by a config that remembers it: routing and experts, from hidden states to output."""
    path, layer = tiny_checkpoint(family, dtype), LAYERS[family]
    rt = MoERuntime(str(path), layer=layer, max_tokens=8, buckets=(1, 4))
    x = make_x(rt.cfg)
    with torch.no_grad():
        logits, expected = own_layer(tiny_model(family, dtype), layer, x)
    y = rt.forward(x, rt.route(logits)).clone()
    assert y.dtype == rt.cfg.torch_dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    # the kept router tensors give the same logits
    w = rt.weights
    assert w.router_weight is not None
    own = torch.nn.functional.linear(x.to(w.router_weight.dtype), w.router_weight, w.router_bias)
    assert relative_error(own, logits) < TOLERANCE[dtype]
    cfg = MoEConfig.from_pretrained(str(path))
    again = MoERuntime(cfg, layer=layer, share=rt)
    assert torch.equal(again.forward(x, again.route(logits)), y)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_on_the_kernels(
    family: str, tiny_model: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    layer = LAYERS[family]
    rt = MoERuntime(
        tiny_checkpoint(family), layer=layer, backend="triton", max_tokens=8, buckets=(1, 4)
    )
    x = make_x(rt.cfg)
    with torch.no_grad():
        logits, expected = own_layer(tiny_model(family), layer, x)
    for tokens in (1, T):
        y = rt.forward(x[:tokens], rt.route(logits[:tokens]))
        assert relative_error(y, expected[:tokens]) < 1e-5


EXPERT = "model.layers.0.mlp.experts.3.down_proj.weight"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def turned(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[name].t()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(EXPERT), f"{EXPERT}: missing from"),
        (turned(EXPERT), rf"{EXPERT}: shape \[96, 64\], need \[64, 96\]"),
    ],
)
def test_a_broken_checkpoint(
    change: Callable[[Tensors], Tensors],
    message: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = resaved(tiny_checkpoint("olmoe"), tmp_path, change)
    with pytest.raises(WeightsError, match=message):
        MoERuntime(path, layer=0)
    MoERuntime(path, layer=1, max_tokens=4)  # another layer is whole


@pytest.mark.parametrize("layer", [2, -1, "1", 1.0, True, None, [0]])
def test_no_such_layer(layer: Any, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(WeightsError, match="layer"):
        MoERuntime(tiny_checkpoint("olmoe"), layer=layer)


def test_contradictory_fields(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = resaved(tiny_checkpoint("olmoe"), tmp_path, num_experts_per_tok=9)
    with pytest.raises(ConfigError, match="top_k=9 exceeds num_experts=8"):
        MoERuntime(path, layer=0)
