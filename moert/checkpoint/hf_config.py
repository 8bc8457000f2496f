"""A Hugging Face `config.json` (or config object) as a `MoEConfig`.

`model_type` decides the family first, fields second. Each family's rule is the one of its router class
in `transformers/models/<family>/modeling_<family>.py` (read in 5.23). Where those classes renormalise
by `sum + 1e-20` (DeepSeek-V3, V3.2, V4 and GLM-4) the epsilon changes a float32 result only when every
chosen score is below about 1e-13; a sum of zero gives weights of zero there, never NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from moert.checkpoint.families import FAMILIES, SHARED_COUNT, Family
from moert.checkpoint.packing import QUANTIZED, packing_of
from moert.config import GROUP_SCORES, SCORINGS, MoEConfig, Routing
from moert.errors import ConfigError, UnsupportedError
from moert.shared_experts import parts_of

Fields = Mapping[str, Any]

EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K: Final = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "experts_per_token")
NESTED: Final = ("text_config", "thinker_config", "llm_config", "language_config")
DTYPES: Final = ("dtype", "torch_dtype")
_ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu2": "relu2",
}
# `topk_method`: (a correction bias is added for the choice, the rule for groups are chosen by)
_METHODS: Final = {
    "greedy": (False, None),
    "group_limited_greedy": (False, "max"),
    "noaux_tc": (True, "top2_sum"),
}


def config_from_hf(hf_config: Any) -> MoEConfig:
    """The MoE layers of a Hugging Face model as a `MoEConfig`.

    The language model of a multimodal config (`text_config` and its like) is found by itself. A config
    without `dtype` or `torch_dtype` gets bfloat16. DeepSeek-V2's `norm_topk_prob` is not used, as its
    class does not use it. Of a checkpoint whose experts are quantised, the shared ones, which most keep
    dense, are not part of the layer: `shared_experts` is 0. So it is for families in no table.

    Args:
        hf_config: a config object with `to_dict`, or the dict of a config.json.

    Raises:
        ConfigError: no experts, an unknown family, a missing or contradictory field.
        UnsupportedError: a quantisation that `packing_of` does not know, or an activation outside the list.
    """
    fields = text_fields(_as_dict(hf_config))
    packing = packing_of(fields)
    model_type = fields.get("model_type")
    family = FAMILIES.get(str(model_type)) or _inferred(fields)
    inner = _intermediate_size(fields, family)
    shared = _shared_experts(fields, family, inner) if packing is None else 0
    cfg = MoEConfig(
        num_experts=_needed(fields, EXPERTS),
        top_k=_needed(fields, TOP_K),
        hidden_size=_needed(fields, ("hidden_size",)),
        intermediate_size=inner,
        activation=_activation(fields, family),
        activation_limit=family.limit and _get(fields, "swiglu_limit", family.limit),
        activation_alpha=_get(fields, "swiglu_alpha", 1.702),
        bias=family.bias,
        dtype=_dtype(fields),
        routing=_routing(fields, family),
        quant=None if packing is None else packing.quant,
        shared_experts=shared,
        shared_gate=bool(shared) and family.shared_gate,
    )
    cfg.check_routing()
    return cfg


def config_from_pretrained(path: str | Path) -> MoEConfig:
    """Read `config.json` of a checkpoint directory; the result remembers the path in `.path`.

    Raises:
        ConfigError: no such directory or file, no JSON object, and whatever `config_from_hf` raises.
        UnsupportedError: see `config_from_hf`.
    """
    fields = read_config(path)
    return replace(config_from_hf(fields), path=str(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of `path/config.json` as they are; raises ConfigError if it cannot be read."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"path={str(path)!r}: no config.json there; need the local directory of a checkpoint "
            "(config.json and *.safetensors)"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{file}: got a JSON {type(fields).__name__}, need an object")
    return fields


def text_fields(fields: Fields) -> Fields:
    """The fields of the part that has experts; dtype and quantisation are inherited from outside.

    Raises:
        ConfigError: no part of the config counts experts.
    """
    if any(fields.get(alias) is not None for alias in EXPERTS):
        return fields
    inherited = {key: fields[key] for key in (*DTYPES, *QUANTIZED) if fields.get(key) is not None}
    for key in NESTED:
        inner = fields.get(key)
        if not isinstance(inner, Mapping):
            continue
        if any(inner.get(name) is not None for name in DTYPES):
            inherited = {name: value for name, value in inherited.items() if name not in DTYPES}
        try:
            return text_fields({**inner, **inherited})
        except ConfigError:
            continue
    raise ConfigError(
        f"model_type={fields.get('model_type')!r}: no experts; none of {', '.join(EXPERTS)} is set, "
        f"nor in {', '.join(NESTED)}"
    )


def _as_dict(hf_config: Any) -> Fields:
    if isinstance(hf_config, Mapping):
        return hf_config
    if callable(getattr(hf_config, "to_dict", None)):
        fields = hf_config.to_dict()
        assert isinstance(fields, dict)
        return fields
    raise ConfigError(
        f"hf_config: got {type(hf_config).__name__}, need a Hugging Face config object or its dict"
    )


def _get(fields: Fields, name: str, default: Any) -> Any:
    value = fields.get(name)
    return default if value is None else value


def _find(fields: Fields, aliases: tuple[str, ...]) -> Any:
    """The value under whichever alias is set, None if none is; ConfigError if two disagree."""
    found = {alias: fields[alias] for alias in aliases if fields.get(alias) is not None}
    if not found:
        return None
    first = next(iter(found.values()))
    if any(value != first for value in found.values()):
        raise ConfigError(
            "contradictory fields: "
            + ", ".join(f"{alias}={value!r}" for alias, value in found.items())
        )
    return first


def _needed(fields: Fields, aliases: tuple[str, ...]) -> Any:
    value = _find(fields, aliases)
    if value is None:
        raise ConfigError(
            f"model_type={fields.get('model_type')!r}: missing field {' or '.join(aliases)}"
        )
    return value


def _intermediate_size(fields: Fields, family: Family) -> Any:
    # the other name, where both exist, is the width of the dense layers
    present = [alias for alias in family.intermediate if fields.get(alias) is not None]
    return _needed(fields, tuple(present[:1]) or family.intermediate)


def _shared_experts(fields: Fields, family: Family, inner: Any) -> Any:
    """Of how many experts of size I a family's shared expert is; an explicit null means none."""
    if family.shared is None:
        return 0
    value = fields.get(family.shared, family.shared_default) or 0
    if family.shared == SHARED_COUNT or type(value) is not int or type(inner) is not int:
        return value  # what is no number is refused where the config is made
    return parts_of(value, max(inner, 1))


def _activation(fields: Fields, family: Family) -> str:
    if family.activation is not None:
        return family.activation
    name = _find(fields, ("hidden_act", "mlp_hidden_act", "hidden_activation")) or "silu"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedError(f"hidden_act={name!r}: supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _dtype(fields: Fields) -> str:
    dtypes = [fields[key] for key in DTYPES if fields.get(key) is not None]
    dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else "auto"
    return "bfloat16" if dtype == "auto" else dtype


def _routing(fields: Fields, family: Family) -> Routing:
    scoring = _get(fields, "scoring_func", family.scoring)
    if family.scoring_fixed and scoring != family.scoring:
        raise ConfigError(
            f"scoring_func={scoring!r}: model_type={fields.get('model_type')!r} routes by "
            f"{family.scoring!r} only"
        )
    if scoring not in SCORINGS:
        raise UnsupportedError(f"scoring_func={scoring!r}: supported are {', '.join(SCORINGS)}")
    method = _get(fields, "topk_method", family.topk_method)
    if method not in family.methods:
        raise ConfigError(
            f"topk_method={method!r}: model_type={fields.get('model_type')!r} knows "
            f"{', '.join(family.methods)} only"
        )
    bias, group_score = _METHODS[method]
    # an explicit null means no groups, an absent field means the family's default
    groups = (fields.get("n_group", family.n_group) or 1) if group_score else 1
    renormalize = family.norm_topk_prob
    if not family.norm_fixed:
        renormalize = _get(fields, "norm_topk_prob", renormalize)
    scaling = _get(fields, "routed_scaling_factor", family.scaling) if family.scaled else 1.0
    return Routing(
        scoring=scoring,
        renormalize=renormalize,
        correction_bias=bias and bool(_get(fields, "use_routing_bias", True)),
        num_groups=groups,
        top_groups=fields.get("topk_group", family.topk_group) if groups != 1 else 1,
        group_score=group_score if group_score and groups != 1 else GROUP_SCORES[-1],
        scaling_factor=scaling,
    )


def _inferred(fields: Fields) -> Family:
    """A family read off the fields alone, for a model_type that is in no table.

    Only when nothing is left to guess: the scoring function and the renormalisation are spelled out,
    and so is the top-k method wherever a bias or groups are possible.
    """
    missing = [key for key in ("scoring_func", "norm_topk_prob") if fields.get(key) is None]
    grouped = (fields.get("n_group") or 1) != 1
    if fields.get("topk_method") is None and (fields.get("scoring_func") != "softmax" or grouped):
        missing.append("topk_method")
    if fields.get("swiglu_limit") is not None or fields.get("swiglu_alpha") is not None:
        missing.append("a plain activation (swiglu_limit and swiglu_alpha differ between families)")
    if missing:
        raise ConfigError(
            f"model_type={fields.get('model_type')!r} is not known and its fields do not settle the "
            f"routing rule (missing: {', '.join(missing)}); known: {', '.join(sorted(FAMILIES))}"
        )
    return Family(
        scoring_fixed=False,
        methods=tuple(_METHODS),
        intermediate=("moe_intermediate_size", "intermediate_size"),
        scaled=True,
    )
