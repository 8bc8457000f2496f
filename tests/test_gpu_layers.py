"""Layers of every kind on a GPU: activations, biases, layouts, routing rules, and sizes past 32 bits."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, ODD, assert_close, make_case, runtime, variant

from moert import ExpertWeights, MoEConfig, MoERuntime, Routing, TopK
from moert.config import Quant
from moert.steps.routing.reference import route_reference

pytestmark = pytest.mark.gpu

KINDS = {
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2-ungated": {"activation": "relu2", "gated": False},
    "silu-limit": {"activation_limit": 1.5},
    "swiglu_oai-bias": {"activation": "swiglu_oai", "bias": True},
    "one-expert": {"num_experts": 1, "top_k": 1},
    "all-experts": {"num_experts": 5, "top_k": 5},
    "many-experts": {"num_experts": 300, "top_k": 10},
    "tiny-dims": {"hidden_size": 8, "intermediate_size": 3},
    "int4": {"quant": Quant("int4", 128), "activation": "swiglu_oai", "bias": True},
    "int4-ungated-fp16": {
        "quant": Quant("int4", -1, symmetric=False),
        "activation": "gelu",
        "gated": False,
        "dtype": "float16",
    },
    "int4-fp32": {"quant": Quant("int4", 32, symmetric=False), "dtype": "float32"},
    "int4-tiny-dims": {"quant": Quant("int4", 32), "hidden_size": 8, "intermediate_size": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [0, 1, 2, 3])
def test_kinds_of_layers_under_every_policy(kind: str, policy: int) -> None:
    cfg = variant(ODD, **KINDS[kind])
    with runtime(cfg, sort_policy=policy, max_tokens=40, buckets=(1, 4, 32)) as rt:
        for tokens in (1, 3, 4, 17, 32, 40):
            case = make_case(cfg, tokens)
            rt._group.arena.poison()
            rt.forward(case.x, case.topk, case.out)
            assert_close(case.out, case.expected(rt), cfg.torch_dtype)


def test_interleaved_and_transposed_weights_are_used_in_place() -> None:
    """gpt-oss's layout: [E, H, 2I] with gate and up alternating, [E, I, H]."""
    cfg = variant(ODD, activation="swiglu_oai", bias=True)
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=g, device=DEVICE) * cfg.hidden_size**-0.5
        return values.to(cfg.torch_dtype)

    experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    w13, w2 = normal(experts, hidden, 2 * inner), normal(experts, inner, hidden)
    weights = ExpertWeights.from_tensors(
        w13,
        w2,
        normal(experts, 2 * inner),
        normal(experts, hidden),
        interleaved=True,
        transposed=True,
    )
    with MoERuntime(cfg, weights, tune="off", max_tokens=40, buckets=(1, 4, 32)) as rt:
        assert rt.weights.w13.data_ptr() == w13.data_ptr()
        for tokens in (1, 3, 17, 40):
            case = make_case(cfg, tokens)
            rt.forward(case.x, case.topk, case.out)
            assert_close(case.out, case.expected(rt), cfg.torch_dtype)


@pytest.mark.parametrize("skew", ["one", "hot", "each-once", "duplicates"])
@pytest.mark.parametrize("tokens", [2, 8, 60, 96])
def test_skewed_routing(skew: str, tokens: int) -> None:
    with runtime(ODD) as rt:
        case = make_case(ODD, tokens)
        rows = torch.arange(tokens * ODD.top_k, device=DEVICE).view(tokens, -1)
        ids = {
            "one": torch.full_like(rows, 7),
            "hot": torch.where(rows % 3 == 0, 7, rows % ODD.num_experts),
            "each-once": rows % ODD.num_experts,
            "duplicates": rows // 2 % ODD.num_experts,
        }[skew]
        case.topk = TopK(case.topk.weights, ids.int())
        rt.forward(case.x, case.topk, case.out)
        assert_close(case.out, case.expected(rt), ODD.torch_dtype)


def test_offsets_past_32_bits() -> None:
    """72 experts of 2 * 4096 x 4096 rows: w13 has 2.4e9 elements, so the last experts start past 2**31."""
    cfg = MoEConfig(num_experts=72, top_k=2, hidden_size=4096, intermediate_size=4096)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    for policy in (1, 2, 3):
        with runtime(cfg, sort_policy=policy, max_tokens=8, buckets=(1, 8)) as rt:
            for tokens in (1, 8):
                case = make_case(cfg, tokens)
                case.topk = TopK(
                    case.topk.weights,
                    torch.full_like(case.topk.ids, 71).index_fill_(
                        1, torch.tensor([0], device=DEVICE), 70
                    ),
                )
                rt.forward(case.x, case.topk, case.out)
                assert_close(case.out, case.expected(rt), cfg.torch_dtype)


@pytest.mark.parametrize(
    "rule",
    [
        Routing(),
        Routing(renormalize=False),
        Routing("softmax_topk", renormalize=False),
        Routing("sigmoid", correction_bias=True, num_groups=4, top_groups=2, scaling_factor=2.5),
        Routing("sqrtsoftplus", correction_bias=True),
    ],
    ids=str,
)
def test_route(rule: Routing) -> None:
    """Both alternating buffers, live counts, every logits dtype, against the reference."""
    cfg = variant(ODD, routing=rule)
    with runtime(cfg) as rt:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tokens in (1, 5, 64, 96):
                logits = torch.randn(tokens, cfg.num_experts, device=DEVICE).to(dtype)
                expected = route_reference(logits, cfg, rt.weights.correction_bias)
                first = rt.route(logits)
                count = torch.tensor(tokens // 2, dtype=torch.int32, device=DEVICE)
                second = rt.route(-logits, num_valid=count)
                same = first.ids == expected.ids
                assert same.float().mean() > 0.99  # near-ties may fall either way by one rounding
                error = (first.weights - expected.weights)[same].abs().max()
                assert error <= 1e-5
                assert second.ids.data_ptr() != first.ids.data_ptr()
