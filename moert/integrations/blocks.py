"""Whole blocks of transformers on moert: `forward_block` in place of a block's own forward.

A block's class gets a forward that looks the module up; those that nobody prepared run their own, as before.
Nothing is put on a module, so models are copied, saved and moved as before.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moert.errors import UnsupportedError
from moert.integrations import experts_runtimes as runtimes
from moert.integrations.block_module import (
    block_parameters,
    parts_of_block,
    shared_changed,
)
from moert.integrations.experts_module import is_experts_module
from moert.runtime import MoERuntime

# module -> K
_BLOCKS: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
_PATCHED: set[type] = set()
# what a block's own result and moert's may differ by: rounding, and in 16 bits an expert chosen otherwise
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TRIAL_TOKENS = 16


def blocks_in(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a model, in its order.

    Raises:
        UnsupportedError: experts that lie in no block of a known kind.
    """
    blocks = [module for module in model.modules() if parts_of_block(module) is not None]
    inside = {id(block.experts) for block in blocks}
    for name, module in model.named_modules():
        if is_experts_module(module) and id(module) not in inside:
            raise UnsupportedError(
                f"{name or type(module).__name__}: the module around these experts is more than a router, "
                "experts and a shared expert; need blocks=False"
            )
    return blocks


def take_over(module: torch.nn.Module, top_k: int) -> None:
    """From now on the block's forward is moert's; `release` undoes it.

    Raises:
        UnsupportedError: the block computes something else than its runtime, or gives more than its output.
    """
    entry = runtimes.make(module, top_k)
    _check_same(module, entry.runtime)
    kind = type(module)
    if kind not in _PATCHED:
        kind.forward = _with_lookup(kind.forward)
        _PATCHED.add(kind)
    _BLOCKS[module] = top_k


def release(module: torch.nn.Module) -> None:
    """The block runs its own forward again; idempotent."""
    _BLOCKS.pop(module, None)


def _with_lookup(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(
        self: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if args or kwargs or not _can_take(self, hidden_states):
            return own(self, hidden_states, *args, **kwargs)
        params, top_k = block_parameters(self), _BLOCKS[self]
        entry = runtimes.find(runtimes.key_of(params, top_k)) or runtimes.make(self, top_k)
        if shared_changed(self):
            entry.runtime.update_weights()
        x = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return entry.runtime.forward_block(x, out).view(hidden_states.shape)

    return forward


def _can_take(module: torch.nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a call is one for moert; others, and those that somebody watches inside, are the block's own.

    Watched is what has a hook: transformers records router logits by one.
    """
    if torch.compiler.is_compiling() or module not in _BLOCKS or module.training:
        return False
    params = block_parameters(module)
    if hidden_states.dtype != params[0].dtype or hidden_states.device != params[0].device:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, *params)):
        return False
    return not any(
        m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module
    )


def _check_same(module: torch.nn.Module, runtime: MoERuntime) -> None:
    """Compare the block's own forward with the runtime's on random rows."""
    weights, name = runtime.weights, type(module).__name__
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TRIAL_TOKENS, runtime.cfg.hidden_size, generator=generator)
    x = x.to(device=runtime.device, dtype=runtime.cfg.torch_dtype)
    with torch.no_grad(), _eager_experts(module), _evaluated(module):
        own = module(x)
        mine = runtime.forward_block(x[0]).float()
    if not isinstance(own, torch.Tensor) or own.shape != x.shape:
        raise UnsupportedError(
            f"{name}: its forward gives {type(own).__name__}, not one tensor like its input; need "
            "blocks=False"
        )
    expected = own[0].float()
    errors = (mine - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    # a row whose experts are chosen by a hair may be another one's; most are not
    error = float(errors.median())
    if not error <= _TOLERANCE[weights.dtype]:
        raise UnsupportedError(
            f"{name}: its forward computes something else than router, {runtime.cfg.routing}, experts and "
            f"shared experts (relative error {error:.1e}); need blocks=False"
        )


@contextmanager
def _eager_experts(module: torch.nn.Module) -> Iterator[None]:
    """The experts by transformers' own loop: the comparison must not build runtimes for them."""
    config = getattr(module.experts, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "eager"  # type: ignore[union-attr]
    try:
        yield
    finally:
        config._experts_implementation = before  # type: ignore[union-attr]


@contextmanager
def _evaluated(module: torch.nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    release(module)
    try:
        yield
    finally:
        module.train(training)
