"""Hugging Face configs of every family: the fields they give, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moert.checkpoint.families import FAMILIES
from moert.checkpoint.hf_config import config_from_hf, config_from_pretrained
from moert.checkpoint.names import NAMES
from moert.config import MoEConfig, Routing
from moert.errors import ConfigError, UnsupportedError

transformers = pytest.importorskip("transformers")

NO_NORM = Routing(renormalize=False)
V3 = Routing("sigmoid", True, True, 8, 4, "top2_sum", 2.5)

# config class, arguments beyond its defaults, expected E, K, H, I, expected routing
CASES: list[tuple[str, dict[str, Any], tuple[int, int, int, int], Routing]] = [
    ("MixtralConfig", {}, (8, 2, 4096, 14336), Routing()),
    ("Qwen2MoeConfig", {}, (60, 4, 2048, 1408), NO_NORM),
    ("Qwen2MoeConfig", {"norm_topk_prob": True}, (60, 4, 2048, 1408), Routing()),
    ("Qwen3MoeConfig", {"num_experts": 96}, (96, 8, 2048, 768), NO_NORM),
    ("Qwen3MoeConfig", {"norm_topk_prob": True}, (128, 8, 2048, 768), Routing()),
    ("Qwen3NextConfig", {}, (512, 10, 2048, 512), Routing()),
    ("Qwen3_5MoeTextConfig", {}, (256, 8, 2048, 512), Routing()),
    ("Qwen3VLMoeTextConfig", {}, (60, 4, 2048, 1408), Routing()),
    ("OlmoeConfig", {}, (64, 8, 2048, 2048), NO_NORM),
    ("FlexOlmoConfig", {}, (7, 5, 4096, 11008), NO_NORM),
    (
        "DeepseekV2Config",
        {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
        (64, 6, 4096, 1407),
        NO_NORM,
    ),
    (
        "DeepseekV2Config",
        {
            "num_experts_per_tok": 6,
            "n_routed_experts": 160,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
        (160, 6, 4096, 1407),
        Routing("softmax", False, False, 8, 3, "max", 16.0),
    ),
    ("DeepseekV3Config", {}, (256, 8, 7168, 2048), V3),
    ("DeepseekV32Config", {}, (256, 8, 7168, 2048), V3),
    (
        "DeepseekV3Config",
        {"norm_topk_prob": False, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
        (256, 8, 7168, 2048),
        Routing("sigmoid", False, True, scaling_factor=1.5),
    ),
    ("Glm4MoeConfig", {}, (128, 8, 4096, 1408), Routing("sigmoid", True, True)),
    (
        "Glm4MoeLiteConfig",
        {},
        (64, 4, 2048, 1536),
        Routing("sigmoid", True, True, scaling_factor=1.8),
    ),
    (
        "GlmMoeDsaConfig",
        {},
        (256, 8, 6144, 2048),
        Routing("sigmoid", True, True, scaling_factor=2.5),
    ),
    ("Glm4vMoeTextConfig", {}, (128, 8, 4096, 1408), Routing("sigmoid", True, True)),
    (
        "Dots1Config",
        {"num_experts_per_tok": 6, "n_routed_experts": 128},
        (128, 6, 4608, 1408),
        Routing("sigmoid", False, True),
    ),
    ("MiniMaxM2Config", {}, (256, 8, 3072, 1536), Routing("sigmoid", True, True)),
    ("GptOssConfig", {}, (128, 4, 2880, 2880), Routing("softmax_topk", False)),
    (
        "DeepseekV4Config",
        {},
        (256, 6, 4096, 2048),
        Routing("sqrtsoftplus", True, True, scaling_factor=1.5),
    ),
]
IDS = [f"{name}-{'-'.join(extra) or 'default'}" for name, extra, *_ in CASES]


def hf(name: str, **fields: Any) -> Any:
    return getattr(transformers, name)(**fields)


@pytest.mark.parametrize(("name", "extra", "sizes", "routing"), CASES, ids=IDS)
def test_config_classes(
    name: str, extra: dict[str, Any], sizes: tuple[int, int, int, int], routing: Routing
) -> None:
    source = hf(name, **extra)
    cfg = MoEConfig.from_hf(source)
    assert (cfg.num_experts, cfg.top_k, cfg.hidden_size, cfg.intermediate_size) == sizes
    assert cfg.routing == routing
    oai = name == "GptOssConfig"
    assert cfg.activation == ("swiglu_oai" if oai else "silu")
    assert cfg.activation_limit == {"GptOssConfig": 7.0, "DeepseekV4Config": 10.0}.get(name)
    assert cfg.bias is oai and cfg.gated and cfg.dtype == "bfloat16" and cfg.path is None
    # through JSON, as config.json has it
    assert config_from_hf(json.loads(source.to_json_string())) == cfg


QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 96,
    "intermediate_size": 160,
}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    "alias", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"]
)
def test_expert_count_aliases(alias: str) -> None:
    assert config_from_hf({**without(QWEN, "num_experts"), alias: 16}).num_experts == 16


@pytest.mark.parametrize(
    "alias", ["num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "experts_per_token"]
)
def test_top_k_aliases(alias: str) -> None:
    assert config_from_hf({**without(QWEN, "num_experts_per_tok"), alias: 3}).top_k == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")],
)
@pytest.mark.parametrize("alias", ["hidden_act", "mlp_hidden_act"])
def test_activation_names(alias: str, name: str, expected: str) -> None:
    assert config_from_hf({**QWEN, alias: name}).activation == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "bfloat16"),
        ({"dtype": "auto"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": torch.float16}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float32"}, "float32"),
    ],
)
def test_dtype(fields: dict[str, Any], expected: str) -> None:
    assert config_from_hf({**QWEN, **fields}).dtype == expected


def test_model_type_decides_before_fields() -> None:
    # Mixtral's experts are `intermediate_size` wide and always renormalise, whatever else it says
    fields = {**QWEN, "model_type": "mixtral", "norm_topk_prob": False, "n_group": 4}
    cfg = config_from_hf(fields)
    assert cfg.intermediate_size == 160 and cfg.routing == Routing()
    # a dense width is never taken for an expert's
    with pytest.raises(ConfigError, match="moe_intermediate_size"):
        config_from_hf(without(QWEN, "moe_intermediate_size"))


def test_nested_language_model() -> None:
    inner = {**QWEN, "dtype": None}
    outer = {"model_type": "some_vl", "dtype": "float16", "vision_config": {"hidden_size": 3}}
    for path in (("text_config",), ("thinker_config", "text_config"), ("llm_config",)):
        fields: dict[str, Any] = inner
        for key in reversed(path):
            fields = {"model_type": "inner_vl", key: fields}
        cfg = config_from_hf({**fields, **outer})
        assert (cfg.num_experts, cfg.hidden_size, cfg.dtype) == (8, 64, "float16")
    own = config_from_hf({**outer, "text_config": {**QWEN, "torch_dtype": "float32"}})
    assert own.dtype == "float32"
    assert config_from_hf(hf("Qwen3VLMoeConfig")).num_experts == 60
    assert config_from_hf(hf("Glm4vMoeConfig")).routing.scoring == "sigmoid"


@pytest.mark.parametrize(
    ("model_type", "routing", "limit"),
    [
        ("qwen3_moe", NO_NORM, None),
        ("qwen3_next", Routing(), None),
        ("kimi_k2", V3, None),
        ("glm4_moe_lite", Routing("sigmoid", True, True, scaling_factor=1.8), None),
        ("deepseek_v4", Routing("sqrtsoftplus", True, True, scaling_factor=1.5), 10.0),
        ("gpt_oss", Routing("softmax_topk", False), 7.0),
    ],
)
def test_absent_fields_mean_the_class_defaults(
    model_type: str, routing: Routing, limit: float | None
) -> None:
    cfg = config_from_hf({**QWEN, "model_type": model_type, "num_experts": 64})
    assert cfg.routing == routing
    assert cfg.activation_limit == limit


def test_swiglu_fields() -> None:
    fields = {**QWEN, "model_type": "gpt_oss", "swiglu_limit": 5.0, "swiglu_alpha": 1.5}
    cfg = config_from_hf(fields)
    assert (cfg.activation_limit, cfg.activation_alpha) == (5.0, 1.5)
    # a family that never clamps does not start to
    assert config_from_hf({**QWEN, "swiglu_limit": 5.0}).activation_limit is None


def test_minimax_without_its_bias() -> None:
    fields = {**QWEN, "model_type": "minimax_m2", "use_routing_bias": False}
    assert config_from_hf(fields).routing == Routing("sigmoid")


def test_null_groups_are_no_groups() -> None:
    fields = {**QWEN, "model_type": "deepseek_v3", "n_group": None, "topk_group": None}
    assert config_from_hf(fields).routing == Routing("sigmoid", True, True, scaling_factor=2.5)


SETTLED = {**QWEN, "model_type": "brand_new", "norm_topk_prob": True, "scoring_func": "sigmoid"}


def test_unknown_model_type_is_inferred_only_when_settled() -> None:
    cfg = config_from_hf(
        {
            **SETTLED,
            "topk_method": "noaux_tc",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2,
        }
    )
    assert cfg.routing == Routing("sigmoid", True, True, 4, 2, "top2_sum", 2.0)
    assert cfg.intermediate_size == 96
    softmax = without({**SETTLED, "scoring_func": "softmax"}, "moe_intermediate_size")
    assert config_from_hf(softmax).routing == Routing()
    assert config_from_hf(softmax).intermediate_size == 160


V3_FIELDS = {**QWEN, "model_type": "deepseek_v3"}
BAD: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("not-a-config", 7, ConfigError, ["int", "dict"]),
    ("dense", {"model_type": "llama", "hidden_size": 64}, ConfigError, ["'llama'", "num_experts"]),
    ("unknown", {**QWEN, "model_type": "new"}, ConfigError, ["'new'", "scoring_func", "qwen3_moe"]),
    ("no-method", SETTLED, ConfigError, ["'brand_new'", "topk_method", "mixtral"]),
    (
        "clamped",
        {**SETTLED, "topk_method": "greedy", "swiglu_limit": 7.0},
        ConfigError,
        ["swiglu_limit"],
    ),
    ("no-type", without(QWEN, "model_type"), ConfigError, ["None", "deepseek_v3"]),
    (
        "contradiction",
        {**QWEN, "num_local_experts": 16},
        ConfigError,
        ["num_experts=8", "num_local_experts=16"],
    ),
    ("no-k", without(QWEN, "num_experts_per_tok"), ConfigError, ["num_experts_per_tok"]),
    ("no-h", without(QWEN, "hidden_size"), ConfigError, ["hidden_size"]),
    ("activation", {**QWEN, "hidden_act": "mish"}, UnsupportedError, ["'mish'", "silu"]),
    (
        "v3-softmax",
        {**QWEN, "model_type": "deepseek_v3", "scoring_func": "softmax"},
        ConfigError,
        ["scoring_func='softmax'", "sigmoid"],
    ),
    (
        "v2-noaux",
        {**QWEN, "model_type": "deepseek_v2", "topk_method": "noaux_tc"},
        ConfigError,
        ["topk_method='noaux_tc'", "group_limited_greedy"],
    ),
    (
        "scoring",
        {**QWEN, "model_type": "deepseek_v4", "scoring_func": "tanh"},
        UnsupportedError,
        ["scoring_func='tanh'", "sqrtsoftplus"],
    ),
    ("dtype", {**QWEN, "dtype": "float8_e4m3fn"}, ConfigError, ["float8_e4m3fn"]),
    # only a shard has fewer experts than K, and no checkpoint is one
    (
        "k-above-e",
        {**QWEN, "num_experts_per_tok": 99},
        ConfigError,
        ["top_k=99 exceeds num_experts"],
    ),
    # values of another type than the field's
    ("text", {**QWEN, "num_experts_per_tok": "2"}, ConfigError, ["top_k='2'", "integer"]),
    ("list", {**QWEN, "hidden_act": ["silu"]}, UnsupportedError, ["hidden_act=['silu']"]),
    ("norm", {**QWEN, "norm_topk_prob": "maybe"}, ConfigError, ["renormalize='maybe'"]),
    ("groups", {**V3_FIELDS, "n_group": "4"}, ConfigError, ["num_groups='4'", "integer"]),
    ("scale", {**V3_FIELDS, "routed_scaling_factor": "x"}, ConfigError, ["scaling_factor='x'"]),
    (
        "limit",
        {**QWEN, "model_type": "gpt_oss", "intermediate_size": 96, "swiglu_limit": "7"},
        ConfigError,
        ["activation_limit='7'", "number"],
    ),
    ("format", {**QWEN, "quantization_config": "fp8"}, UnsupportedError, ["'fp8'"]),
]


@pytest.mark.parametrize(("fields", "kind", "words"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_refuses(fields: Any, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as error:
        config_from_hf(fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            ["'fp8'", "e4m3"],
        ),
        ({"quant_method": "mxfp4"}, ["'mxfp4'"]),
        ({"quant_method": "gptq", "bits": 8}, ["'gptq'", "bits=8", "8 bits, need 4"]),
        ({"quant_method": "awq", "version": "gemv"}, ["'awq'", "gemv"]),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            ["'compressed-tensors'", "pack-quantized"],
        ),
        (SimpleNamespace(quant_method=SimpleNamespace(value="gptq")), ["'gptq'"]),
    ],
)
def test_other_quantizations_are_unsupported(quantization: Any, words: list[str]) -> None:
    for fields in (
        {**QWEN, "quantization_config": quantization},
        {"model_type": "some_vl", "text_config": QWEN, "quantization_config": quantization},
    ):
        with pytest.raises(UnsupportedError) as error:
            config_from_hf(fields)
        for word in (*words, "bfloat16", "float16", "float32"):
            assert word in str(error.value)
    assert config_from_hf({**QWEN, "quantization_config": None}).num_experts == 8


def test_from_pretrained_reads_the_file_and_remembers_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    cfg = MoEConfig.from_pretrained(str(tmp_path))
    assert cfg.path == str(tmp_path) and cfg == config_from_hf(QWEN)
    assert config_from_pretrained(tmp_path).path == str(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["no config.json"]), ("{", ["not valid JSON"]), ("[1]", ["JSON list", "object"])],
)
def test_from_pretrained_refuses(tmp_path: Path, content: str | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        config_from_pretrained(tmp_path)
    for word in (str(tmp_path), *words):
        assert word in str(error.value)


def test_every_family_has_names() -> None:
    assert set(FAMILIES) == set(NAMES)
