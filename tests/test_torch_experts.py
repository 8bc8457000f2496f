"""The CPU experts: against the reference, and what they must not read or touch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from expert_cases import (
    CFG,
    make_experts,
    make_inputs,
    make_weights,
    relative_error,
    run_experts,
)

from moert.backends import torch_experts, torch_linear
from moert.config import MoEConfig
from moert.steps.experts_reference import experts_reference
from moert.topk import TopK
from moert.weights import ExpertWeights

# 16-bit results are rounded five times on the way (gate, up, inner, result, out), by up to 2**-9 each in
# bfloat16; a square doubles what came before it, and few values do not average
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
NAN = math.nan

LAYERS = {
    "silu": CFG,
    "silu-limit": replace(CFG, activation_limit=0.5),
    "gelu": replace(CFG, activation="gelu"),
    "gelu_tanh": replace(CFG, activation="gelu_tanh"),
    "relu2": replace(CFG, activation="relu2"),
    "relu2-ungated": replace(CFG, activation="relu2", gated=False),
    "silu-ungated-bias": replace(CFG, gated=False, bias=True),
    "swiglu_oai-bias": replace(CFG, activation="swiglu_oai", bias=True),
    "one-expert": replace(CFG, num_experts=1, top_k=1),
    "every-expert": replace(CFG, top_k=7),
    "one-wide": MoEConfig(3, 2, 1, 1, bias=True, dtype="float32"),
    "long-k": MoEConfig(3, 2, 2000, 70, dtype="float32"),  # past the limit of one thread's flips
}


@pytest.fixture(params=[True, False], ids=["kernel", "staged"])
def half_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways with 16-bit weights, whatever this CPU has; small pieces, so that there are several."""
    monkeypatch.setattr(
        torch_linear, "_has_kernel", lambda dtype: dtype == torch.float32 or request.param
    )
    monkeypatch.setattr(torch_linear, "STAGE_NUMEL", 1)
    monkeypatch.setattr(torch_linear, "STAGE_MIN_COLUMNS", 16)


def stored(layer: MoEConfig) -> list[str]:
    """The ways of storing a layer's weights."""
    ways = ["plain", "transposed"]
    if layer.gated:
        ways += ["interleaved", "interleaved-transposed"]
    return [*ways, "bias-float32"] if layer.bias else ways


@pytest.mark.usefixtures("half_kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "storage"), [(name, way) for name, layer in LAYERS.items() for way in stored(layer)]
)
def test_matches_reference(name: str, storage: str, dtype: str) -> None:
    cfg = replace(LAYERS[name], dtype=dtype)
    weights = make_weights(cfg, storage)
    experts = make_experts(cfg, weights, 33)
    for tokens in (1, 2, 33):
        x, topk = make_inputs(cfg, tokens, seed=5)
        error = relative_error(
            run_experts(experts, x, topk), experts_reference(x, topk, weights, cfg)
        )
        assert error < TOLERANCE[dtype], (tokens, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pad_zero", [False, True])
def test_every_number_of_tokens_in_strided_padded_tensors(dtype: str, pad_zero: bool) -> None:
    cfg = replace(CFG, dtype=dtype)
    weights = make_weights(cfg)
    experts = make_experts(cfg, weights, 40)
    for live in range(41):
        rows = live + live % 3
        x, topk = make_inputs(cfg, rows, seed=live)
        x[live:] = NAN
        topk.weights[live:] = NAN
        topk.ids[live:] = 3
        wide = torch.full((2, rows, 70), NAN).to(x.dtype)
        wide[0, :, :66] = x
        ids = torch.full((rows, 5), 9, dtype=torch.int32)
        ids[:, 1:4] = topk.ids
        before = wide[0].clone()
        experts.run(
            wide[0, :, :66], topk.weights.to(x.dtype), ids[:, 1:4], wide[1, :, :66], live, pad_zero
        )
        torch.testing.assert_close(wide[0], before, rtol=0, atol=0, equal_nan=True)
        assert wide[1, :, 66:].isnan().all()
        padding = wide[1, live:, :66]
        assert not padding.any() if pad_zero else padding.isnan().all()
        if live:
            topk = TopK(topk.weights[:live].to(x.dtype), topk.ids[:live])
            expected = experts_reference(x[:live], topk, weights, cfg)
            assert relative_error(wide[1, :live, :66], expected) < TOLERANCE[dtype], live


@pytest.mark.parametrize(
    ("bad", "id_dtype"),
    [
        (-1, torch.int32),
        (7, torch.int32),  # E
        (2**30, torch.int32),
        (-(2**31), torch.int32),
        (2**40, torch.int64),
        (2**40 + 3, torch.int64),  # its low word is a valid id
        (-(2**63), torch.int64),
    ],
)
def test_ids_outside_contribute_zero(bad: int, id_dtype: torch.dtype) -> None:
    weights = make_weights(CFG)
    experts = make_experts(CFG, weights, 20)
    for tokens in (1, 20):
        x, topk = make_inputs(CFG, tokens)
        ids = topk.ids.to(id_dtype)
        ids[::3, 1] = bad
        ids[::4] = bad
        elsewhere = ids == bad
        topk.weights[elsewhere] = NAN  # of no interest
        got = run_experts(experts, x, TopK(topk.weights, ids))
        expected = experts_reference(x, TopK(topk.weights, ids), weights, CFG)
        assert not got[::4].any()
        assert torch.equal(got[::4], expected[::4])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_tokens_on_few_experts(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # blocks of 16 rows: experts that fill a block, that are cut, and blocks of several experts
    monkeypatch.setattr(torch_experts, "BLOCK_ROWS", 16)
    monkeypatch.setattr(torch_experts, "COMBINE_NUMEL", 66 * 3 * 4)  # 4 tokens at a time
    cfg = replace(CFG, dtype=dtype)
    weights = make_weights(cfg)
    for ids in (
        torch.full((50, 3), 6),  # one expert, three times a token
        torch.tensor([[0, 1, 2]]).repeat(50, 1),
        torch.cat([torch.full((5, 3), 0), torch.full((6, 3), 2), torch.full((39, 3), 5)]),
        torch.tensor([[4, 4, 1], [1, 4, 4]]).repeat(25, 1),
    ):
        x, topk = make_inputs(cfg, 50)
        topk = TopK(topk.weights, ids)
        got = run_experts(make_experts(cfg, weights, 50), x, topk)
        assert relative_error(got, experts_reference(x, topk, weights, cfg)) < TOLERANCE[dtype]


def test_blocks_cover_every_row_once_and_cut_only_large_experts() -> None:
    offsets = [3, 3, 503, 510, 520, 1800, 1800, 2311]
    covered, pieces = [], dict.fromkeys(range(7), 0)
    for start, owners, sizes in torch_experts._blocks(offsets):
        assert 0 < sum(sizes) <= torch_experts.BLOCK_ROWS
        for e, size in zip(owners, sizes, strict=True):
            covered += [(row, e) for row in range(start, start + size)]
            start += size
            pieces[e] += 1
    expected = [(row, e) for e in range(7) for row in range(offsets[e], offsets[e + 1])]
    assert covered == expected
    assert pieces == {0: 0, 1: 1, 2: 1, 3: 1, 4: 3, 5: 0, 6: 1}
    assert list(torch_experts._blocks([4, 4, 4])) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_same_bits(dtype: str) -> None:
    """Whatever the scratch holds, wherever the inputs lie, whichever instance computes."""
    cfg = replace(CFG, dtype=dtype, bias=True)
    weights = make_weights(cfg)
    for tokens in (1, 5, 40):
        x, topk = make_inputs(cfg, tokens)
        first = make_experts(cfg, weights, 40)
        expected = run_experts(first, x, topk)
        assert torch.equal(run_experts(first, x, topk), expected)
        shifted = torch.empty(tokens * 66 + 1, dtype=x.dtype)[1:].view(tokens, 66).copy_(x)
        assert shifted.data_ptr() % 8
        second = make_experts(cfg, weights, 40, like=first)
        assert second.linear2.weight_t is first.linear2.weight_t
        run_experts(second, *make_inputs(cfg, 37, seed=9))
        assert torch.equal(run_experts(second, shifted, topk), expected)


def test_sums_in_slot_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, in any other order 1."""
    cfg = MoEConfig(3, 3, 1, 1, activation="relu2", gated=False, dtype="float32")
    one = torch.ones(3, 1, 1)
    experts = make_experts(cfg, ExpertWeights.from_tensors(one, one), 2)
    weights = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])
    for ids in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [1, 1, 1]):
        topk = TopK(weights, torch.tensor([ids, ids]))
        assert run_experts(experts, torch.ones(2, 1), topk).tolist() == [[0.0], [1.0]]


def test_in_place_weight_updates_are_seen() -> None:
    cfg = replace(CFG, bias=True, dtype="bfloat16")
    for storage in ("plain", "transposed", "bias-float32"):
        weights, new = make_weights(cfg, storage), make_weights(cfg, storage, seed=1)
        experts = make_experts(cfg, weights, 4)
        x, topk = make_inputs(cfg, 4)
        run_experts(experts, x, topk)
        for name in ("w13", "w2", "b13", "b2"):
            getattr(weights, name).copy_(getattr(new, name))
        expected = experts_reference(x, topk, new, cfg)
        assert relative_error(run_experts(experts, x, topk), expected) < TOLERANCE["bfloat16"]


def test_parameters_that_require_grad_are_only_read() -> None:
    weights = make_weights(CFG)
    leaves = replace(weights, w13=torch.nn.Parameter(weights.w13))
    x, topk = make_inputs(CFG, 3)
    got = run_experts(make_experts(CFG, leaves, 3), x, topk)
    assert not got.requires_grad
    assert torch.equal(got, run_experts(make_experts(CFG, weights, 3), x, topk))
