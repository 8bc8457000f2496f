"""The rules of every known `model_type`: what its fields mean and what is assumed when one is absent.

Defaults and rules are those of the config and router classes of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

_OWN: Final = ("moe_intermediate_size",)
_SHARED: Final = ("intermediate_size",)
SHARED_COUNT: Final = "n_shared_experts"
SHARED_SIZE: Final = "shared_expert_intermediate_size"


@dataclass(frozen=True, slots=True)
class Family:
    """How one family reads its config.

    Args:
        scoring, norm_topk_prob, topk_method, n_group, topk_group, scaling: used when the config has no
            `scoring_func`, `norm_topk_prob`, `topk_method`, `n_group`, `topk_group`,
            `routed_scaling_factor`.
        scoring_fixed: the router class knows this scoring only.
        norm_fixed: the router class does not look at `norm_topk_prob`.
        methods: the values of `topk_method` that the family has.
        scaled: the router class multiplies by `routed_scaling_factor`.
        intermediate: the names that I may have, first found wins.
        activation: the activation when it is not `hidden_act`.
        limit: where gate and up are clamped if there is no `swiglu_limit`; None for families that never
            clamp.
        bias: the experts have biases.
        shared: the field that tells of shared experts: their number ("n_shared_experts") or the size of
            the one ("shared_expert_intermediate_size"); None for families without.
        shared_default: used when the config has no such field.
        shared_gate: a sigmoid gate weighs the shared expert.
    """

    scoring: str = "softmax"
    scoring_fixed: bool = True
    norm_topk_prob: bool = False
    norm_fixed: bool = False
    topk_method: str = "greedy"
    methods: tuple[str, ...] = ("greedy",)
    n_group: int = 1
    topk_group: int = 1
    scaling: float = 1.0
    scaled: bool = False
    intermediate: tuple[str, ...] = _OWN
    activation: str | None = None
    limit: float | None = None
    bias: bool = False
    shared: str | None = None
    shared_default: int = 0
    shared_gate: bool = False


_SOFTMAX: Final = Family()
_SOFTMAX_NORM: Final = replace(_SOFTMAX, norm_topk_prob=True)
_SOFTMAX_ALWAYS_NORM: Final = replace(_SOFTMAX_NORM, norm_fixed=True)
_GLM4: Final = Family(
    scoring="sigmoid",
    norm_topk_prob=True,
    topk_method="noaux_tc",
    methods=("noaux_tc",),
    scaled=True,
    shared=SHARED_COUNT,
    shared_default=1,
)
_DEEPSEEK_V3: Final = replace(_GLM4, n_group=8, topk_group=4, scaling=2.5)

FAMILIES: Final[dict[str, Family]] = {
    "mixtral": replace(_SOFTMAX_ALWAYS_NORM, intermediate=_SHARED),
    "qwen2_moe": replace(_SOFTMAX, shared=SHARED_SIZE, shared_default=5632, shared_gate=True),
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": replace(_SOFTMAX_NORM, shared=SHARED_SIZE, shared_default=512, shared_gate=True),
    "qwen3_omni_moe_text": _SOFTMAX_NORM,
    "qwen3_vl_moe_text": _SOFTMAX_ALWAYS_NORM,
    "qwen3_5_moe_text": replace(
        _SOFTMAX_ALWAYS_NORM, shared=SHARED_SIZE, shared_default=512, shared_gate=True
    ),
    "olmoe": replace(_SOFTMAX, intermediate=_SHARED),
    "flex_olmo": replace(_SOFTMAX, intermediate=_SHARED),
    "deepseek_v2": Family(
        norm_fixed=True,
        methods=("greedy", "group_limited_greedy"),
        scaled=True,
        shared=SHARED_COUNT,
        shared_default=2,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": _GLM4,
    "glm4v_moe_text": _GLM4,
    "glm4_moe_lite": replace(_GLM4, scaling=1.8),
    "glm_moe_dsa": replace(_GLM4, scaling=2.5),
    "dots1": replace(_GLM4, norm_topk_prob=False, shared_default=0),
    "deepseek_v4": Family(
        scoring="sqrtsoftplus",
        scoring_fixed=False,
        norm_topk_prob=True,
        norm_fixed=True,
        topk_method="noaux_tc",
        methods=("noaux_tc",),
        scaling=1.5,
        scaled=True,
        intermediate=("moe_intermediate_size", "intermediate_size"),
        limit=10.0,
        shared=SHARED_COUNT,
        shared_default=1,
    ),
    "minimax_m2": Family(
        scoring="sigmoid",
        norm_topk_prob=True,
        norm_fixed=True,
        topk_method="noaux_tc",
        methods=("noaux_tc",),
        intermediate=_SHARED,
    ),
    "gpt_oss": Family(
        scoring="softmax_topk",
        norm_fixed=True,
        intermediate=_SHARED,
        activation="swiglu_oai",
        limit=7.0,
        bias=True,
    ),
}
