"""int4 weights on the CPU: every layer against the reference, without allocating, in pieces of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import make_experts, make_inputs, relative_error, run_experts
from runtime_cases import MAX_TOKENS, make_case, poison
from test_torch_experts_cost import tensor_allocations

import moert.backends.torch_int4 as torch_int4
from moert import MoEConfig, MoERuntime, Quant, TopK
from moert.quantization.int4_layout import Int4Matrix, dequantize
from moert.steps.experts_reference import experts_reference
from moert.weights import ExpertWeights

# nothing but the result is rounded to 16 bits
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
BASE = MoEConfig(5, 2, 200, 24, dtype="float32", quant=Quant("int4", 32))
LAYERS: dict[str, MoEConfig] = {
    "group-32": BASE,
    "group-64": replace(BASE, quant=Quant("int4", 64)),
    # a group of one block and a half
    "group-96": replace(BASE, quant=Quant("int4", 96)),
    "per-channel": replace(BASE, quant=Quant("int4", -1)),
    "asymmetric": replace(BASE, quant=Quant("int4", 32, symmetric=False)),
    "asymmetric-per-channel": replace(BASE, quant=Quant("int4", -1, symmetric=False)),
    "bias": replace(BASE, bias=True),
    "gpt-oss": replace(BASE, bias=True, activation="swiglu_oai"),
    "ungated": replace(BASE, gated=False, activation="relu2"),
    "ungated-bias": replace(BASE, gated=False, bias=True, intermediate_size=17),
    "whole-blocks": MoEConfig(3, 2, 128, 64, dtype="float32", quant=Quant("int4", 64)),
    # less than a tile, a block or a group
    "tiny": MoEConfig(3, 2, 1, 1, dtype="float32", quant=Quant()),
    "odd": MoEConfig(3, 2, 65, 33, dtype="float32", quant=Quant("int4", 32, symmetric=False)),
    "half": replace(BASE, dtype="float16"),
    "bfloat16": replace(BASE, dtype="bfloat16", bias=True),
    "bfloat16-asymmetric": replace(BASE, dtype="bfloat16", quant=Quant("int4", 64, False)),
}


@pytest.mark.parametrize("piece", [1, 1 << 13, 1 << 18], ids=["tiles", "some", "whole"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_the_reference(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_int4, "PIECE_NUMEL", piece)
    cfg = LAYERS[name]
    weights = ExpertWeights.random(cfg)
    experts = make_experts(cfg, weights, 9)
    for tokens in (1, 2, 9):
        x, topk = make_inputs(cfg, tokens)
        expected = experts_reference(x, topk, weights, cfg)
        got = run_experts(experts, x, topk)
        assert not got.isnan().any()
        assert relative_error(got, expected) < TOLERANCE[got.dtype]


def test_more_rows_than_a_block_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill: 600 rows of one expert are gathered in two blocks."""
    weights = ExpertWeights.random(BASE)
    x, topk = make_inputs(BASE, 600)
    topk = TopK(topk.weights, torch.where(torch.arange(2) == 0, 3, topk.ids))
    got = run_experts(make_experts(BASE, weights, 600), x, topk)
    assert relative_error(got, experts_reference(x, topk, weights, BASE)) < 2e-6


def test_bias_of_another_dtype() -> None:
    cfg = replace(BASE, dtype="float16", bias=True)
    weights = ExpertWeights.random(cfg)
    assert weights.b13 is not None and weights.b2 is not None
    weights = replace(weights, b13=weights.b13.float(), b2=weights.b2.float())
    x, topk = make_inputs(cfg, 4)
    got = run_experts(make_experts(cfg, weights, 4), x, topk)
    assert relative_error(got, experts_reference(x, topk, weights, cfg)) < 3e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_in_another_order(dtype: str) -> None:
    """A permutation for each expert: stored column k is input column permutation[k]."""
    cfg = replace(BASE, dtype=dtype)
    weights = ExpertWeights.random(cfg)
    assert isinstance(weights.w13, Int4Matrix)
    order = torch.stack([torch.randperm(200) for _ in range(5)]).int()
    permuted = replace(weights, w13=replace(weights.w13, permutation=order))
    permuted.check(cfg)
    inverse = order.long().argsort(1).unsqueeze(1).expand(-1, 48, -1)
    plain = replace(
        weights,
        w13=dequantize(weights.w13).gather(2, inverse),
        w2=dequantize(weights.w2),  # type: ignore[arg-type]
    )
    x, topk = make_inputs(cfg, 7)
    expected = experts_reference(x, topk, plain, cfg)
    assert relative_error(experts_reference(x, topk, permuted, cfg), expected) < 1e-6
    got = run_experts(make_experts(cfg, permuted, 7), x, topk)
    assert relative_error(got, expected) < TOLERANCE[got.dtype]
    assert relative_error(run_experts(make_experts(cfg, weights, 7), x, topk), expected) > 0.1


@pytest.mark.parametrize("name", ["group-32", "gpt-oss", "bfloat16", "bfloat16-asymmetric", "odd"])
def test_no_tensor_is_allocated(name: str) -> None:
    cfg = LAYERS[name]
    weights = ExpertWeights.random(cfg)
    assert isinstance(weights.w13, Int4Matrix)
    if name == "group-32":  # gathers its columns
        order = torch.stack([torch.randperm(200) for _ in range(5)]).int()
        weights = replace(weights, w13=replace(weights.w13, permutation=order))
    experts = make_experts(cfg, weights, 64)
    calls: list[Any] = []
    for tokens in (1, 3, 64):
        x, topk = make_inputs(cfg, tokens)
        out = torch.empty_like(x)
        arguments = (x, topk.weights, topk.ids, out, tokens, True)
        calls.append(lambda arguments=arguments: experts.run(*arguments))
    assert tensor_allocations(lambda: torch.empty(100)) == [400]  # the profiler sees them
    assert tensor_allocations(lambda: [call() for call in calls]) == []


@pytest.mark.parametrize("name", ["group-32", "asymmetric", "bfloat16"])
def test_a_runtime_of_int4_weights(name: str) -> None:
    """The same API, on a poisoned arena, ids of nobody among the ids, the same bits every time."""
    cfg = LAYERS[name]
    weights = ExpertWeights.random(cfg)
    with MoERuntime(cfg, weights, max_tokens=MAX_TOKENS, buckets=(1, 2, 5)) as rt:
        assert rt.plan().backend == "torch"
        for tokens in (1, 3, 8, 19):
            case = make_case(cfg, tokens)
            poison(rt)
            first = case.call(rt).clone()
            expected = case.expected(rt)
            nobody = ~expected.any(1)
            assert not first[nobody].any() and not first.isnan().any()
            if not nobody.all():
                assert relative_error(first, expected) < TOLERANCE[first.dtype]
            assert torch.equal(case.call(rt), first)
        memory = rt.memory()
        assert memory["weights"] == weights.nbytes
        assert memory["arena"] == max(p.scratch_bytes for p in rt.plan())
        new = ExpertWeights.random(cfg, seed=1)
        rt.update_weights(w13=new.w13, w2=new.w2)
        changed = case.call(rt)
        assert relative_error(changed, case.expected(rt)) < TOLERANCE[first.dtype]
        assert relative_error(changed, first) > 0.1


def test_layers_share_and_weights_are_not_copied() -> None:
    layers = [ExpertWeights.random(BASE, seed) for seed in (0, 1)]
    with MoERuntime(BASE, layers[0], max_tokens=8, buckets=(4,)) as first:
        second = MoERuntime(BASE, layers[1], share=first)
        case = make_case(BASE, 4)
        for rt, weights in ((first, layers[0]), (second, layers[1])):
            for name, tensor in rt.weights.tensors().items():
                assert tensor.data_ptr() == weights.tensors()[name].data_ptr(), name
            assert relative_error(case.call(rt), case.expected(rt)) < 2e-6


def test_prefill_scratch_does_not_grow_with_the_experts() -> None:
    """Weights are dequantised a piece at a time: the scratch is no copy of a matrix."""
    shapes = [(4096, 2048), (2048, 2048)]
    fields = torch_int4.int4_fields(shapes, 8, torch.bfloat16)
    assert sum(f.nbytes for f in fields) < 2 * 4 * torch_int4.PIECE_NUMEL < 4096 * 2048
