"""Small, deterministic mixture-of-experts models and checkpoints, with transformers' own model classes.

A checkpoint is config.json and safetensors, about 1 MB. Everything that initialises to a constant (router,
biases, correction bias, norms) gets random values, so that leaving any of it out changes the output.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

# H, 2I and I all differ, so that a transposed matrix never has the right shape by chance
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
DENSE_AND_EXPERTS = {"intermediate_size": 160, "moe_intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "intermediate_size": 96, "head_dim": 16}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **DENSE_AND_EXPERTS,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 32,
        },
    ),
    # a dense layer between two with experts
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **DENSE_AND_EXPERTS,
            "num_experts": 8,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **DENSE_AND_EXPERTS,
            "num_experts": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **DENSE_AND_EXPERTS,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_mtp_layers": 0,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "intermediate_size": 96, "num_key_value_heads": 4}),
    "minimax_m2": (
        "MiniMaxM2Config",
        {"num_local_experts": 8, "intermediate_size": 96, "head_dim": 16},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 8,
            "intermediate_size": 96,
            "head_dim": 16,
            "max_position_embeddings": 131072,
        },
    ),
}
# these have a meaning as initialised: decay rates of linear attention, rotary frequencies
KEEP = ("A_log", "dt_bias", "inv_freq")


def make_model(family: str, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """A causal language model of `family` in eval mode; the same tensors for the same arguments.

    Raises:
        ValueError: a family that is not in the table.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    class_name, overrides = FAMILIES[family]
    config = getattr(transformers, class_name)(**{**COMMON, **overrides})
    # what is kept as initialised is drawn from the global generator
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(KEEP) or "rotary" in name:
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        tensor.data = _values(family, name, tensor, generator)
    return model.eval()


def make(family: str, out: str | Path, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Save `make_model(family, dtype, seed)` under `out` and return that path."""
    out = Path(out)
    make_model(family, dtype, seed).save_pretrained(out)
    return out


def _values(
    family: str, name: str, tensor: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if "e_score_correction_bias" in name:
        return noise * 0.2  # float32 whatever the model's dtype, as in the released checkpoints
    if "norm" in name:
        return (1 + 0.1 * noise).to(tensor.dtype)
    if name.endswith("bias") or tensor.ndim < 2:
        return (0.1 * noise).to(tensor.dtype)
    # gpt-oss keeps experts as [E, in, out], all other matrices are [out, in]
    transposed = family == "gpt_oss" and tensor.ndim == 3
    fan_in = tensor.shape[-2] if transposed else tensor.shape[-1]
    values: torch.Tensor = noise * fan_in**-0.5
    return values.to(tensor.dtype)
