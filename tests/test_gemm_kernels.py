"""The GEMM kernels under the interpreter: every intermediate, for tiles that fit nothing evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import make_weights, relative_error
from gemm_cases import CPU, assert_rows, intermediates, run
from runtime_cases import TOLERANCE, make_case

from moert import MoEConfig
from moert.arena import Arena, layout
from moert.backends.triton import TritonBackend
from moert.device import device_facts
from moert.plan import Choice, Tile
from moert.steps.experts_reference import experts_reference
from moert.weights import ExpertWeights

TOKENS = 3
SMALL, WIDE = Tile(16, 16, 16, 4, 1), Tile(16, 64, 32, 4, 2)
DIRECT, TALL = Tile(1, 8, 16, 4, 2), Tile(1, 32, 64, 4, 2)
CHOICES = {
    "direct": Choice("none", DIRECT, DIRECT),
    "direct, tiles larger than the matrix": Choice("none", TALL, TALL),
    "direct, tiles of different sizes": Choice("none", Tile(1, 16, 32), Tile(1, 4, 16)),
    "grouped": Choice("one_shot", SMALL, SMALL),
    "grouped, tiles larger than the matrix": Choice("one_shot", WIDE, WIDE),
    "grouped, tiles of different sizes": Choice("one_shot", Tile(32, 16, 32), Tile(32, 32, 16)),
    "multi-phase": Choice("multi_phase", SMALL, WIDE),
}
ODD = MoEConfig(4, 3, 37, 21, dtype="float32")
LAYERS: dict[str, tuple[MoEConfig, str]] = {
    "odd": (ODD, "plain"),
    "exact": (MoEConfig(4, 3, 32, 16, dtype="float32"), "plain"),
    "half": (replace(ODD, dtype="float16", activation="gelu"), "transposed"),
    "gpt-oss": (replace(ODD, activation="swiglu_oai", bias=True), "interleaved"),
    "interleaved-transposed": (replace(ODD, dtype="float16"), "interleaved-transposed"),
    "ungated": (replace(ODD, activation="relu2", gated=False, bias=True), "plain"),
    "tiny": (MoEConfig(2, 1, 1, 1, dtype="float32"), "plain"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CHOICES)
def test_every_row_of_every_step(name: str, layer: str) -> None:
    cfg, storage = LAYERS[layer]
    weights, choice = make_weights(cfg, storage), CHOICES[name]
    backend = TritonBackend(cfg, weights, device_facts(CPU))
    case = make_case(cfg, TOKENS, strange=0.3, wide=1)
    views = run(backend, choice, case)
    h, y = intermediates(cfg, weights, case)
    assert_rows(views["h"], h)
    if choice.strategy != "none":
        assert_rows(views["y"], y)
    expected = experts_reference(case.x, case.topk, weights, cfg)
    assert relative_error(case.out, expected) < TOLERANCE[case.out.dtype]


@pytest.mark.parametrize("layer", ["odd", "gpt-oss", "ungated"])
@pytest.mark.parametrize("strategy", ["one_shot", "multi_phase"])
def test_tiles_for_crowds(strategy: str, layer: str) -> None:
    """Whichever pair the sort gives rows to, every row is right; the other pair gets none."""
    cfg, storage = LAYERS[layer]
    crowd = Tile(32, 16, 16, 4, 1)
    choice = Choice(strategy, SMALL, SMALL, crowded=(crowd, crowd))
    backend = TritonBackend(cfg, make_weights(cfg, storage), device_facts(CPU))
    for tokens, same in ((5, False), (33, True), (64, True)):
        case = make_case(cfg, tokens)
        if same:
            case.topk.ids[:] = case.topk.ids[:1].clone()
        views = run(backend, choice, case)
        h, y = intermediates(cfg, backend.weights, case)
        assert_rows(views["h"], h)
        assert_rows(views["y"], y)
        # 33 rows: three blocks of 16 are no twice two of 32
        assert bool(views["num_valid_ids"][0]) == (tokens < 64)
        assert bool(views["crowded_valid_ids"][0]) == (tokens == 64)
        expected = experts_reference(case.x, case.topk, backend.weights, cfg)
        assert relative_error(case.out, expected) < TOLERANCE[case.out.dtype]


def test_sums_in_slot_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, in any other order 1."""
    cfg = MoEConfig(3, 3, 1, 1, activation="relu2", gated=False, dtype="float32")
    one = torch.ones(3, 1, 1)
    backend = TritonBackend(cfg, ExpertWeights.from_tensors(one, one), device_facts(CPU))
    for ids in ([0, 1, 2], [2, 0, 1], [1, 1, 1]):
        for name in ("direct", "grouped", "multi-phase"):
            case = make_case(cfg, 2)
            case.x.fill_(1.0)
            case.topk.ids.copy_(torch.tensor([ids, ids]))
            case.topk.weights.copy_(torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]]))
            run(backend, CHOICES[name], case)
            assert case.out.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("name", ["direct", "grouped", "multi-phase"])
def test_kernels_are_what_the_plan_says(name: str) -> None:
    backend = TritonBackend(ODD, make_weights(ODD), device_facts(CPU))
    choice = CHOICES[name]
    views = Arena(CPU, layout(backend.fields(TOKENS, choice))[1]).views(
        backend.fields(TOKENS, choice)
    )
    assert backend.program(TOKENS, choice, views).kernels == backend.kernels(TOKENS, choice)
    sorts = {"none": 0, "one_shot": 1, "multi_phase": 3}[choice.strategy]
    rest = (
        ("gate_up_direct", "down_direct")
        if not sorts
        else ("gate_up_grouped", "down_grouped", "combine")
    )
    kernels = backend.kernels(TOKENS, choice)
    assert all(kernel.startswith("sort_") for kernel in kernels[:sorts])
    assert kernels[sorts:] == tuple(f"{kernel}_kernel" for kernel in rest)
