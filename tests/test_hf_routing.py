"""The routing rule read from a config does what the router class of transformers does."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from moert.checkpoint.hf_config import config_from_hf
from moert.steps.routing.reference import route_reference

transformers = pytest.importorskip("transformers")

ROUTERS = [
    # id, config class, arguments, router class
    ("mixtral", "MixtralConfig", {"num_local_experts": 12}, "MixtralTopKRouter"),
    ("qwen2", "Qwen2MoeConfig", {"num_experts": 12}, "Qwen2MoeTopKRouter"),
    ("qwen2-norm", "Qwen2MoeConfig", {"norm_topk_prob": True}, "Qwen2MoeTopKRouter"),
    ("qwen3", "Qwen3MoeConfig", {"norm_topk_prob": True}, "Qwen3MoeTopKRouter"),
    ("qwen3-next", "Qwen3NextConfig", {"num_experts": 24}, "Qwen3NextTopKRouter"),
    ("qwen3-next-raw", "Qwen3NextConfig", {"norm_topk_prob": False}, "Qwen3NextTopKRouter"),
    ("qwen3.5", "Qwen3_5MoeTextConfig", {"num_experts": 24}, "Qwen3_5MoeTopKRouter"),
    ("qwen3-vl", "Qwen3VLMoeTextConfig", {"num_experts": 24}, "Qwen3VLMoeTextTopKRouter"),
    ("olmoe", "OlmoeConfig", {"num_experts": 16}, "OlmoeTopKRouter"),
    ("v2", "DeepseekV2Config", {"num_experts_per_tok": 6, "n_group": 1}, "DeepseekV2TopkRouter"),
    # the class does not look at norm_topk_prob
    (
        "v2-norm",
        "DeepseekV2Config",
        {"num_experts_per_tok": 6, "norm_topk_prob": True},
        "DeepseekV2TopkRouter",
    ),
    (
        "v2-groups",
        "DeepseekV2Config",
        {
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        "DeepseekV2TopkRouter",
    ),
    ("v3", "DeepseekV3Config", {"n_routed_experts": 64}, "DeepseekV3TopkRouter"),
    ("v3-raw", "DeepseekV3Config", {"norm_topk_prob": False}, "DeepseekV3TopkRouter"),
    ("v32", "DeepseekV32Config", {"n_routed_experts": 64}, "DeepseekV32TopkRouter"),
    ("glm4", "Glm4MoeConfig", {"routed_scaling_factor": 1.5}, "Glm4MoeTopkRouter"),
    ("glm4-groups", "Glm4MoeConfig", {"n_group": 4, "topk_group": 2}, "Glm4MoeTopkRouter"),
    ("v4", "DeepseekV4Config", {"n_routed_experts": 64}, "DeepseekV4TopKRouter"),
    ("v4-sigmoid", "DeepseekV4Config", {"scoring_func": "sigmoid"}, "DeepseekV4TopKRouter"),
    ("minimax-m2", "MiniMaxM2Config", {"num_local_experts": 16}, "MiniMaxM2TopKRouter"),
    ("gpt-oss", "GptOssConfig", {"num_local_experts": 16}, "GptOssTopKRouter"),
]


@pytest.mark.parametrize(
    ("name", "extra", "router"), [case[1:] for case in ROUTERS], ids=[case[0] for case in ROUTERS]
)
def test_routing_is_that_of_the_router_class(name: str, extra: dict[str, Any], router: str) -> None:
    torch.manual_seed(0)
    source = getattr(transformers, name)(**extra, hidden_size=64, num_attention_heads=4)
    package = type(source).__module__.replace("configuration", "modeling")
    module = getattr(importlib.import_module(package), router)(source)
    cfg = config_from_hf(source)
    # large enough that the correction bias and the groups change the choice
    torch.nn.init.normal_(module.weight, std=0.2)
    bias = torch.randn(cfg.num_experts) * 0.3
    x = torch.randn(37, 64)
    if name == "MiniMaxM2Config":
        logits, weights, ids = module(x, bias)
    else:
        for own in ("bias", "e_score_correction_bias"):
            if isinstance(getattr(module, own, None), torch.Tensor):
                getattr(module, own).data.copy_(bias)
        logits, weights, ids = module(x)
    ours = route_reference(logits.detach(), cfg, bias)
    assert torch.equal(ours.ids.sort(-1).values, ids.sort(-1).values)
    dense = torch.zeros_like(logits, dtype=torch.float64)
    theirs = dense.scatter(1, ids, weights.detach().double())
    found = dense.scatter(1, ours.ids.long(), ours.weights.double())
    assert (found - theirs).norm() < 1e-6 * theirs.norm()
