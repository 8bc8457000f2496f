"""What moert needs to know of an experts module of transformers: geometry, weights, activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from moert.checkpoint.hf_config import TOP_K
from moert.config import ACTIVATIONS, DTYPES, MoEConfig
from moert.errors import ConfigError, UnsupportedError
from moert.integrations.int4_module import Int4Tensors
from moert.steps.activation import activate_reference
from moert.weights import ExpertWeights

# what `use_experts_implementation` puts on a module (transformers/integrations/moe.py, 5.17 to 5.23)
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts_module(module: torch.nn.Module) -> bool:
    """Whether the module's forward is chosen by transformers' experts interface, or its experts are int4."""
    if isinstance(module, Int4Tensors):
        return True
    return all(hasattr(module, name) for name in (*_FLAGS, "down_proj"))


def parameters(module: Any) -> list[torch.Tensor]:
    """The tensors the module computes with: w13, w2, and if it has biases b13, b2; int4 ones codes first."""
    if isinstance(module, Int4Tensors):
        return module.tensors()
    first = module.gate_up_proj if module.has_gate else module.up_proj
    if not module.has_bias:
        return [first, module.down_proj]
    bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    return [first, module.down_proj, bias, module.down_proj_bias]


def activation_dtype(module: Any, params: list[torch.Tensor]) -> torch.dtype:
    """What the module computes in; `params` are its `parameters`."""
    return module.dtype if isinstance(module, Int4Tensors) else params[0].dtype


def describe(module: Any, top_k: int) -> tuple[MoEConfig, ExpertWeights]:
    """The module as a config and as views of its parameters.

    Args:
        module: one for which `is_experts_module` holds.
        top_k: K, which the module itself does not know.

    Raises:
        UnsupportedError: a norm after the experts, parameters that are no plain tensors of a supported
            dtype, or an activation that moert does not compute.
        ConfigError, WeightsError: parameters that do not describe a layer.
    """
    if isinstance(module, Int4Tensors):
        _check_loaded(module)
        dtype = str(module.dtype)
        return replace(module.cfg, top_k=top_k, dtype=dtype), module.weights()
    name = type(module).__name__
    _check_no_norm(module)
    tensors = parameters(module)
    for tensor in tensors:
        _check_plain(name, tensor)
    w13, w2, *biases = tensors
    weights = ExpertWeights.from_tensors(
        w13,
        w2,
        *biases,
        interleaved=module.has_gate and not module.is_concatenated,
        transposed=module.is_transposed,
    )
    experts, hidden, inner = weights.w2.shape
    shape = {
        "num_experts": experts,
        "top_k": top_k,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "gated": module.has_gate,
        "bias": module.has_bias,
        "dtype": str(w13.dtype),
    }
    return _with_activation(module, shape), weights


def activation_of(module: Any, cfg: MoEConfig) -> MoEConfig:
    """The config with the activation that a module computes, whose parameters need not be there.

    Raises:
        UnsupportedError: see `describe`. ConfigError: another kind of layer than `cfg` describes.
    """
    _check_no_norm(module)
    if (module.has_gate, module.has_bias) != (cfg.gated, cfg.bias):
        raise ConfigError(
            f"{type(module).__name__}: has_gate={module.has_gate}, has_bias={module.has_bias}, but the "
            f"checkpoint's experts have gated={cfg.gated}, bias={cfg.bias}"
        )
    names = ("num_experts", "top_k", "hidden_size", "intermediate_size", "gated", "bias", "dtype")
    return _with_activation(module, {name: getattr(cfg, name) for name in names})


def _check_no_norm(module: Any) -> None:
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError(
            f"{type(module).__name__}: has a norm between each expert and its routing weight, which moert "
            "does not compute"
        )


def _check_loaded(module: Int4Tensors) -> None:
    if any(tensor.is_meta for tensor in module.tensors()):
        raise UnsupportedError(
            f"{type(module).__name__}: its int4 tensors are not there (offloaded); need them loaded"
        )


def top_k_of(module: Any) -> int:
    """K as the module's config tells it.

    Raises:
        ConfigError: no field that does.
    """
    config = getattr(module, "config", None)
    for alias in TOP_K:
        value = getattr(config, alias, None)
        if isinstance(value, int):
            return value
    raise ConfigError(
        f"{type(module).__name__}: its config has none of {', '.join(TOP_K)}; give prepare(model, top_k=...)"
    )


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    dtypes = [getattr(torch, dtype) for dtype in DTYPES]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in dtypes:
        raise UnsupportedError(
            f"{name}: its parameters are {type(tensor).__name__} of {tensor.dtype}; need plain tensors of "
            f"{', '.join(DTYPES)}"
        )
    if tensor.is_meta:
        raise UnsupportedError(
            f"{name}: its parameters are on the meta device (offloaded); need them loaded"
        )


def _with_activation(module: Any, shape: dict[str, Any]) -> MoEConfig:
    """The config whose activation gives the module's own values, found by trying.

    Names (`hidden_act`) and classes do not tell: a module may clamp, scale or shift in its `_apply_gate`.
    Values do, over a range that reaches past every clamp in use and into both tails.
    """
    gate, up, expected = _probe(module, shape["intermediate_size"])
    # how far float32 evaluations of one formula are apart, on the scale of what is multiplied
    tolerance = 1e-5 * (1 + up.abs() + expected.abs())
    for activation, limit, alpha in _candidates(module):
        cfg = MoEConfig(
            **shape, activation=activation, activation_limit=limit, activation_alpha=alpha
        )
        actual = activate_reference(gate if cfg.gated else None, up, cfg)
        if bool(((actual - expected).abs() <= tolerance).all()):
            return cfg
    raise UnsupportedError(
        f"{type(module).__name__}: its activation (act_fn={getattr(module, 'act_fn', None)}, gate function "
        f"{_gate_name(module)}) is none that moert computes: {', '.join(ACTIVATIONS)}, with or without clamps"
    )


def _probe(module: Any, inner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate and up values [n, I] and what the module makes of them, float32."""
    place = module.down_proj.device
    place = torch.device("cpu") if place.type == "meta" else place
    f32: dict[str, Any] = {"dtype": torch.float32, "device": place}
    far = torch.tensor([-1000.0, -100.0, 100.0, 1000.0], **f32)
    gate = torch.cat((torch.linspace(-30, 30, 121, **f32), far))
    up = torch.linspace(-30, 30, 61, **f32).repeat(-(-inner // 61))[:inner]
    gate, up = (values.contiguous() for values in torch.broadcast_tensors(gate[:, None], up))
    # the gate of an ungated module is its only input
    if not module.has_gate:
        up = gate
    try:
        with torch.no_grad(), torch.autocast(gate.device.type, enabled=False):
            if not module.has_gate:
                result = module.act_fn(gate)
            elif module.is_concatenated:
                result = module._apply_gate(torch.cat((gate, up), dim=-1))
            else:
                result = module._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__}: its activation failed on float32 [n, I] values: {error}"
        ) from error
    if not isinstance(result, torch.Tensor) or result.shape != gate.shape:
        raise UnsupportedError(
            f"{type(module).__name__}: its activation does not give [n, I] values for [n, I] gates"
        )
    return gate, up, result.float()


def _candidates(module: Any) -> Iterator[tuple[str, float | None, float]]:
    """(activation, limit, alpha) worth trying, from the numbers that the module and its config name."""
    limits = _numbers(module, "limit", "swiglu_limit")
    alphas = [1.702, *_numbers(module, "alpha", "swiglu_alpha")]
    for limit in (None, *limits):
        for activation in ACTIVATIONS:
            if activation != "swiglu_oai":
                yield activation, limit, 1.702
            elif module.has_gate:
                yield from ((activation, limit, alpha) for alpha in alphas)


def _numbers(module: Any, *names: str) -> list[float]:
    """The positive numbers among these attributes, each once."""
    owners = (module, getattr(module, "config", None))
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return list(dict.fromkeys(v for v in values if isinstance(v, (int, float)) and v > 0))


def _gate_name(module: Any) -> str:
    return getattr(getattr(type(module), "_apply_gate", None), "__qualname__", "none")
