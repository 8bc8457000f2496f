"""The portable int4 kernels under the interpreter: every intermediate, for tiles that fit nothing evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import relative_error
from gemm_cases import CPU, assert_rows, intermediates, run
from runtime_cases import NAN, TOLERANCE, Case, make_case

from moert import MoEConfig, TopK
from moert.backends import int4_launches
from moert.backends.int4_tiles import group_of, step_of
from moert.backends.triton import TritonBackend
from moert.config import Quant
from moert.device import device_facts
from moert.plan import Choice, Tile
from moert.quantization.int4_layout import Int4Matrix, dequantize
from moert.steps.experts_reference import experts_reference
from moert.weights import ExpertWeights

TOKENS = 2
# the interpreter takes its time for a program, not for what a program computes: few rows and steps
ODD = MoEConfig(3, 2, 136, 20, dtype="float32", quant=Quant("int4", 32))
ROWS = Quant("int4", -1, symmetric=False)
LAYERS = {
    "g32": ODD,
    "g32, zero points": replace(
        ODD, hidden_size=80, intermediate_size=37, quant=Quant("int4", 32, symmetric=False)
    ),
    "g64, half": replace(ODD, dtype="float16", activation="gelu", quant=Quant("int4", 64)),
    "g96": replace(ODD, hidden_size=112, quant=Quant("int4", 96, symmetric=False)),
    "g128, gpt-oss": replace(
        ODD, activation="swiglu_oai", activation_limit=0.4, bias=True, quant=Quant("int4", 128)
    ),
    "a group a row": replace(ODD, activation="gelu_tanh", activation_limit=0.5, quant=ROWS),
    "ungated": replace(ODD, activation="relu2", gated=False, bias=True, quant=ROWS),
    "order": replace(ODD, quant=Quant("int4", 128)),
    "order, half, ungated": replace(ODD, dtype="float16", gated=False, quant=ROWS),
    "exact": MoEConfig(3, 2, 64, 16, dtype="float16", quant=Quant("int4", 64)),
    "tiny": MoEConfig(2, 1, 1, 1, dtype="float32", quant=Quant("int4", 32)),
}
# strategy; BM, row tiles and the widest step of each GEMM
CHOICES = {
    "direct": ("none", (1, 2, 128), (1, 4, 128)),
    "direct, more rows than there are": ("none", (1, 4, 128), (1, 16, 64)),
    "direct, half blocks": ("none", (1, 4, 32), (1, 8, 16)),
    "grouped": ("one_shot", (16, 1, 64), (16, 2, 16)),
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


# one sort or the other precedes the same kernels
PAIRS = [
    (tiles, name)
    for tiles in CHOICES
    for name in LAYERS
    if tiles != "multi-phase" or name in ("g32", "order, half, ungated", "exact")
]


@pytest.mark.parametrize(("tiles", "name"), PAIRS)
def test_every_row_of_every_step(tiles: str, name: str) -> None:
    cfg = LAYERS[name]
    check(name, make_choice(cfg, tiles), make_case(cfg, TOKENS, strange=0.3, wide=1))


@pytest.mark.parametrize("name", ["g64, half", "order, half, ungated", "exact"])
@pytest.mark.parametrize("tiles", ["grouped", "multi-phase"])
def test_codes_widened_by_a_magic_exponent(
    tiles: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on AMD."""
    monkeypatch.setattr(int4_launches, "widening", lambda cfg, facts: "magic")
    cfg = LAYERS[name]
    check(name, make_choice(cfg, tiles), make_case(cfg, TOKENS, wide=1))


@pytest.mark.parametrize(
    ("live", "pad"), [(None, "keep"), (0, "zero"), (1, "keep"), (1, "zero"), (5, "keep")]
)
@pytest.mark.parametrize("tiles", ["direct, more rows than there are", "grouped", "multi-phase"])
def test_rows_that_are_not_there(tiles: str, live: int | None, pad: str) -> None:
    """A bucket of 4, a call of 2 rows, `live` of them: NaN and anybody's ids behind, none of it read."""
    name = "g32, zero points"
    cfg, weights = LAYERS[name], layer_weights(name)
    backend = TritonBackend(cfg, weights, device_facts(CPU))
    case, kept = make_case(cfg, 2, strange=0.0), 2 if live is None else min(live, 2)
    case.topk.ids[:, 0] = torch.tensor([-1, cfg.num_experts])
    case.topk.weights[:, 0] = NAN  # of an id that no expert has
    case.x[kept:], case.topk.weights[kept:] = NAN, NAN
    run(backend, make_choice(cfg, tiles), case, bucket=4, live=live, pad=pad)
    if kept:
        rows = case.rows(kept)
        topk = TopK(rows.topk.weights.nan_to_num(), rows.topk.ids)
        expected = experts_reference(rows.x, topk, weights, cfg)
        assert relative_error(rows.out, expected) < TOLERANCE[cfg.torch_dtype]
    rest = case.out[kept:]
    assert (rest == 0).all() if pad == "zero" else rest.isnan().all()


def test_sums_in_slot_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, in any other order 1."""
    cfg = MoEConfig(3, 3, 1, 1, "relu2", gated=False, dtype="float32", quant=Quant("int4", 32))
    one = torch.ones(3, 1, 1)
    weights = ExpertWeights.from_tensors(one, one).quantize(group_size=32)
    # the code is 15, which means 7: with this scale a weight is 1
    matrices = (replace(m, scales=m.scales * 0 + 1 / 7) for m in (weights.w13, weights.w2))
    weights = replace(weights, **dict(zip(("w13", "w2"), matrices, strict=True)))
    backend = TritonBackend(cfg, weights, device_facts(CPU))
    for name in ("grouped", "multi-phase"):
        case = make_case(cfg, 2)
        case.x.fill_(1.0)
        case.topk.ids.copy_(torch.tensor([[0, 1, 2], [2, 0, 1]]))
        case.topk.weights.copy_(torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]]))
        run(backend, make_choice(cfg, name), case)
        assert case.out.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("tiles", ["direct", "grouped", "multi-phase"])
def test_kernels_are_what_the_plan_says(tiles: str) -> None:
    backend = TritonBackend(ODD, layer_weights("g32"), device_facts(CPU))
    choice = make_choice(ODD, tiles)
    found = backend.kernels(TOKENS, choice)
    gemms = tuple(k for k in found if "int4" in k)
    how = "direct" if choice.strategy == "none" else "grouped"
    assert gemms == (f"gate_up_{how}_int4_kernel", f"down_{how}_int4_kernel")
    assert {k for k in found if k not in gemms and not k.startswith("sort_")} <= {"combine_kernel"}
