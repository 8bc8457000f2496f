"""The portable int4 kernels under the interpreter: every intermediate, for tiles that fit nothing evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import relative_error
from gemm_cases import CPU, assert_rows, intermediates, run
from runtime_cases import TOLERANCE, Case, make_case

from moert import MoEConfig
from moert.backends import int4_launches
from moert.backends.int4_tiles import group_of, step_of
from moert.backends.triton import TritonBackend
from moert.config import Quant
from moert.device import device_facts
from moert.plan import Choice, Tile
from moert.quantization.int4_layout import Int4Matrix, dequantize
from moert.steps.experts_reference import experts_reference
from moert.weights import ExpertWeights

TOKENS = 3
ODD = MoEConfig(4, 3, 200, 24, dtype="float32", quant=Quant("int4", 32))
ROWS = Quant("int4", -1, symmetric=False)
LAYERS = {
    "g32": ODD,
    "g32, zero points": replace(
        ODD, hidden_size=80, intermediate_size=41, quant=Quant("int4", 32, symmetric=False)
    ),
    "g64, half": replace(ODD, dtype="float16", activation="gelu", quant=Quant("int4", 64)),
    "g96": replace(ODD, intermediate_size=100, quant=Quant("int4", 96, symmetric=False)),
    "g128, gpt-oss": replace(
        ODD, activation="swiglu_oai", activation_limit=0.4, bias=True, quant=Quant("int4", 128)
    ),
    "a group a row": replace(ODD, activation="gelu_tanh", activation_limit=0.5, quant=ROWS),
    "ungated": replace(ODD, activation="relu2", gated=False, bias=True, quant=ROWS),
    "order": replace(ODD, quant=Quant("int4", 128)),
    "order, half, ungated": replace(ODD, dtype="float16", gated=False, quant=ROWS),
    "exact": MoEConfig(3, 2, 128, 64, dtype="float16", quant=Quant("int4", 64)),
    "tiny": MoEConfig(2, 1, 1, 1, dtype="float32", quant=Quant("int4", 32)),
}
# strategy; BM, row tiles and the widest step of each GEMM
CHOICES = {
    "direct": ("none", (1, 1, 16), (1, 1, 128)),
    "direct, more rows than there are": ("none", (1, 4, 128), (1, 16, 64)),
    "direct, half blocks": ("none", (1, 2, 32), (1, 2, 16)),
    "grouped": ("one_shot", (16, 1, 64), (16, 1, 16)),
    "grouped, more rows than there are": ("one_shot", (32, 4, 128), (32, 16, 64)),
    "multi-phase": ("multi_phase", (16, 4, 32), (16, 2, 32)),
}


def make_choice(cfg: MoEConfig, name: str) -> Choice:
    """A step has to lie within a group: it is narrower than the table says where groups are."""
    strategy, *sizes = CHOICES[name]
    columns = (cfg.hidden_size, cfg.intermediate_size)
    up, down = (
        Tile(bm, tiles * 16, step_of(group_of(cfg, k), most), 4, 2)
        for (bm, tiles, most), k in zip(sizes, columns, strict=True)
    )
    return Choice(strategy, up, down)


def layer_weights(name: str) -> ExpertWeights:
    weights = ExpertWeights.random(LAYERS[name])
    if not name.startswith("order"):
        return weights
    matrix = weights.w13
    assert isinstance(matrix, Int4Matrix)
    generator = torch.Generator().manual_seed(1)
    order = [torch.randperm(matrix.columns, generator=generator) for _ in range(matrix.shape[0])]
    return replace(weights, w13=replace(matrix, permutation=torch.stack(order).int()))


def check(name: str, choice: Choice, case: Case) -> None:
    """h, y and the result; each row of them once, and no other."""
    cfg, weights = LAYERS[name], layer_weights(name)
    backend = TritonBackend(cfg, weights, device_facts(CPU))
    views = run(backend, choice, case)
    plain = replace(weights, w13=dequantize(weights.w13), w2=dequantize(weights.w2))
    h, y = intermediates(cfg, plain, case)
    assert_rows(views["h"], h)
    if choice.strategy != "none":
        assert_rows(views["y"], y)
    expected = experts_reference(case.x, case.topk, weights, cfg)
    assert relative_error(case.out, expected) < TOLERANCE[case.out.dtype]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tiles", CHOICES)
def test_every_row_of_every_step(tiles: str, name: str) -> None:
    cfg = LAYERS[name]
    check(name, make_choice(cfg, tiles), make_case(cfg, TOKENS, strange=0.3, wide=1))
