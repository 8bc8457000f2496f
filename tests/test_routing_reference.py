"""The routing reference against the routers of published models, as transformers runs them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moert.config import MoEConfig, Routing
from moert.steps.routing import route_reference


def router_cases() -> list[Any]:
    """module, class, config fields beyond the common ones, our rule."""
    groups = {"n_group": 8, "topk_group": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    noaux = Routing("sigmoid", True, True, 8, 3, "top2_sum", 2.5)
    v4 = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}
    v2 = {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    rows: list[tuple[str, str, dict[str, Any], Routing]] = [
        ("mixtral", "MixtralTopKRouter", {}, Routing()),
        ("qwen2_moe", "Qwen2MoeTopKRouter", {"norm_topk_prob": False}, Routing(renormalize=False)),
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, Routing()),
        ("qwen3_next", "Qwen3NextTopKRouter", {"norm_topk_prob": True}, Routing()),
        ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, Routing(renormalize=False)),
        ("gpt_oss", "GptOssTopKRouter", {}, Routing("softmax_topk")),
        ("minimax_m2", "MiniMaxM2TopKRouter", {}, Routing("sigmoid", correction_bias=True)),
        ("deepseek_v2", "DeepseekV2TopkRouter", {**v2, "topk_method": "greedy"},
         Routing("softmax", False, scaling_factor=16.0)),
        ("deepseek_v2", "DeepseekV2TopkRouter", {**v2, "topk_method": "group_limited_greedy"},
         Routing("softmax", False, False, 8, 3, "max", 16.0)),
        ("deepseek_v3", "DeepseekV3TopkRouter", groups, noaux),
        ("deepseek_v3", "DeepseekV3TopkRouter", {**groups, "norm_topk_prob": False},
         replace(noaux, renormalize=False)),
        ("glm4_moe", "Glm4MoeTopkRouter", groups, noaux),
        ("dots1", "Dots1TopkRouter", groups, noaux),
        ("kimi_linear", "KimiLinearTopkRouter", groups, noaux),
        ("deepseek_v4", "DeepseekV4TopKRouter", v4,
         Routing("sqrtsoftplus", correction_bias=True, scaling_factor=1.5)),
        ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", {"moe_norm_min": 1e-12},
         Routing("softmax", correction_bias=True)),
    ]  # fmt: skip
    return [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(rows)]


@pytest.mark.parametrize(("module", "name", "fields", "rule"), router_cases())
def test_reference_equals_the_published_router(
    module: str, name: str, fields: dict[str, Any], rule: Routing
) -> None:
    pytest.importorskip("transformers")
    try:
        models = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    except ImportError as error:
        pytest.skip(str(error))
    if not hasattr(models, name):
        pytest.skip(f"this transformers has no {name}")
    cfg = MoEConfig(64, 6, 64, 8, routing=rule)
    counts = {"num_experts": 64, "num_local_experts": 64, "n_routed_experts": 64}
    config = SimpleNamespace(hidden_size=64, num_experts_per_tok=6, **counts, **fields)
    router = getattr(models, name)(config).float()
    bias = None
    if rule.correction_bias:
        bias = torch.randn(64, generator=torch.Generator().manual_seed(7)) * 0.1
    with torch.no_grad():
        router.weight.copy_(torch.eye(64))  # so the hidden states are the logits
        for key, buffer in [*router.named_buffers(), *router.named_parameters()]:
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(bias.view_as(buffer))
        logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(5)) * 2
        _, weights, ids = router(logits, bias) if module == "minimax_m2" else router(logits)
    got = route_reference(logits, cfg, bias)
    want_order, got_order = ids.argsort(1), got.ids.argsort(1)  # most routers leave the order open
    assert torch.equal(got.ids.gather(1, got_order).long(), ids.gather(1, want_order))
    torch.testing.assert_close(
        got.weights.gather(1, got_order), weights.gather(1, want_order), rtol=2e-6, atol=1e-12
    )
