"""What moert needs to know of a whole mixture-of-experts block of transformers.

Shared experts have to lie behind the routed ones in the same tensors. Where a block has them, the parameters
of its experts are made views of such tensors, once: the block then needs as much memory as before, and a
second copy of the shared experts alone, which keep parameters of their own.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from moert.config import MoEConfig
from moert.errors import ConfigError, UnsupportedError
from moert.integrations.experts_module import describe, is_experts_module, parameters
from moert.integrations.int4_module import Int4Tensors
from moert.shared_experts import fill_shared, parts_of
from moert.weights import ExpertWeights

_ROUTERS = ("gate", "router")
_SHARED = ("shared_expert", "shared_experts")
_SHARED_GATE = "shared_expert_gate"
_MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Parts:
    """A block's modules; `shared` and `gate` are None where it has none."""

    experts: Any
    router: Any
    shared: Any
    gate: Any


@dataclass
class _Packed:
    """All experts of a block in one tensor each, and the versions of what was copied there."""

    w13: torch.Tensor
    w2: torch.Tensor
    versions: tuple[int, ...]


_PACKED: weakref.WeakKeyDictionary[torch.nn.Module, _Packed] = weakref.WeakKeyDictionary()


def parts_of_block(module: torch.nn.Module) -> Parts | None:
    """The parts of a block that consists of nothing else; None for any other module."""
    children = dict(module.named_children())
    experts = children.pop("experts", None)
    routers = [children.pop(name) for name in _ROUTERS if name in children]
    shared = [children.pop(name) for name in _SHARED if name in children]
    gate = children.pop(_SHARED_GATE, None)
    if experts is None or not is_experts_module(experts) or children:
        return None
    if len(routers) != 1 or len(shared) > 1 or (gate is not None and not shared):
        return None
    if getattr(routers[0], "weight", None) is None:
        return None
    return Parts(experts, routers[0], shared[0] if shared else None, gate)


def block_parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a block computes with, its experts' first."""
    parts = _parts(module)
    optional = (getattr(parts.router, "bias", None), _correction_bias(module, parts))
    found = [*parameters(parts.experts), parts.router.weight, *optional]
    if parts.shared is not None:
        found += [*_shared(parts), getattr(parts.gate, "weight", None)]
    return [tensor for tensor in found if tensor is not None]


def describe_block(module: torch.nn.Module, top_k: int) -> tuple[MoEConfig, ExpertWeights]:
    """The block as a config and as views of its parameters; its shared experts are packed, see `settle`.

    Raises:
        UnsupportedError: a family whose routing rule is not known, a shared expert that is not three plain
            matrices, and what `experts_module.describe` refuses.
        ConfigError, WeightsError: parameters that do not describe a layer.
    """
    parts, name = _parts(module), type(module).__name__
    cfg, weights = describe(parts.experts, top_k)
    try:
        known = MoEConfig.from_hf(parts.experts.config)
    except ConfigError as error:
        raise UnsupportedError(f"{name}: its routing rule is not known: {error}") from error
    bias = _correction_bias(module, parts)
    cfg = replace(cfg, routing=known.routing)
    weights = replace(
        weights,
        router_weight=parts.router.weight.detach(),
        router_bias=_detached(getattr(parts.router, "bias", None)),
        correction_bias=None if bias is None else bias.detach().float(),
    )
    if parts.shared is None:
        return cfg, weights
    packed = _PACKED[module]
    count = packed.w2.shape[0] - weights.w2.shape[0]
    gate = None if parts.gate is None else parts.gate.weight.detach()
    cfg = replace(cfg, shared_experts=count, shared_gate=gate is not None)
    return cfg, replace(weights, w13=packed.w13, w2=packed.w2, shared_gate=gate)


def settle(module: torch.nn.Module) -> None:
    """Make the experts' parameters views of tensors that hold the shared experts too, unless they are.

    Raises:
        UnsupportedError, WeightsError: see `describe_block`.
    """
    parts = _parts(module)
    if parts.shared is None:
        return
    if isinstance(parts.experts, Int4Tensors):
        raise UnsupportedError(
            f"{type(module).__name__}: its experts are int4 and its shared expert is not; need blocks=False"
        )
    first, second = parameters(parts.experts)[:2]
    packed = _PACKED.get(module)
    if packed is not None and (packed.w13.data_ptr(), packed.w2.data_ptr()) == (
        first.data_ptr(),
        second.data_ptr(),
    ):
        return
    gate, up, down = _shared(parts)
    _, weights = describe(parts.experts, 1)
    experts, inner = weights.w2.shape[0], weights.w2.shape[2]
    made = weights.append_shared(torch.cat((gate, up)).detach(), down.detach())
    assert isinstance(made.w13, torch.Tensor) and isinstance(made.w2, torch.Tensor)
    assert made.w2.shape[0] == experts + parts_of(up.shape[0], inner)
    for parameter, tensor in ((first, made.w13), (second, made.w2)):
        view = tensor[:experts]
        parameter.data = view.transpose(1, 2) if parts.experts.is_transposed else view
    _PACKED[module] = _Packed(made.w13, made.w2, _versions(parts))


def shared_changed(module: torch.nn.Module) -> bool:
    """Whether the shared expert was written in place since it was copied; if so, it is copied again."""
    packed = _PACKED.get(module)
    if packed is None:
        return False
    parts = _parts(module)
    if (versions := _versions(parts)) == packed.versions:
        return False
    gate, up, down = (tensor.detach() for tensor in _shared(parts))
    experts = packed.w2.shape[0] - parts_of(up.shape[0], packed.w2.shape[2])
    fill_shared(packed.w13[experts:], packed.w2[experts:], gate, up, down)
    packed.versions = versions
    return True


def _parts(module: torch.nn.Module) -> Parts:
    parts = parts_of_block(module)
    assert parts is not None
    return parts


def _shared(parts: Parts) -> list[torch.Tensor]:
    """gate and up [S, H], down [H, S] of the shared expert."""
    found: list[torch.Tensor] = []
    for name in _MATRICES:
        linear = getattr(parts.shared, name, None)
        if type(linear) is not torch.nn.Linear or linear.bias is not None:
            raise UnsupportedError(
                f"{type(parts.shared).__name__}: its {name} is {type(linear).__name__}; need linear layers "
                f"{', '.join(_MATRICES)} without biases"
            )
        found.append(linear.weight)
    return found


def _versions(parts: Parts) -> tuple[int, ...]:
    # tensors made in inference mode count no writes
    return tuple(0 if t.is_inference() else t._version for t in _shared(parts))


def _correction_bias(module: Any, parts: Parts) -> torch.Tensor | None:
    name = "e_score_correction_bias"
    found: torch.Tensor | None = getattr(parts.router, name, getattr(module, name, None))
    return found


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()
