"""moert as an experts implementation of transformers.

    from moert.integrations.transformers import prepare, register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moert")
    layers = prepare(model)  # tunes and captures now; without it each layer does so in its first forward

Checkpoints whose experts are int4 are opened by `load(path)` instead.

Runtimes work on the model's own parameters, never on copies, and are kept outside the modules, so that the
model can be copied, saved and moved as before. Parameters that were moved, converted or replaced are noticed
at the next forward, and the runtime is made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moert.errors import ConfigError, InputError, StateError, UnsupportedError
from moert.integrations import experts_runtimes as runtimes
from moert.integrations.blocks import blocks_in, release, take_over
from moert.integrations.experts_module import (
    activation_dtype,
    is_experts_module,
    parameters,
    top_k_of,
)
from moert.integrations.experts_runtimes import Prepared
from moert.runtime import MoERuntime
from moert.topk import TopK

__all__ = ["OPTIONS", "Prepared", "experts_forward", "load", "prepare", "register"]

NAME = "moert"
OPTIONS = ("backend", "buckets", "graphs", "max_tokens", "sort_policy", "tune")


def register() -> None:
    """Make "moert" a value of transformers' `experts_implementation`; idempotent.

    Raises:
        UnsupportedError: transformers is missing or has no experts interface.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise UnsupportedError(
            f"transformers: no experts interface ({error}); need transformers >= 5.17"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A causal language model whose experts are int4 on disk, ready to generate; nothing else is needed.

    GPTQ, AWQ and compressed-tensors checkpoints, without the packages that wrote them. The experts stay int4
    and are computed by moert; other quantised matrices (attention, shared experts) become dense ones.

    Args:
        path: local directory.
        device: where the model goes.
        dtype: of the activations and of everything that is not int4; default: what config.json says.
        options: of transformers' `from_pretrained`, as attn_implementation.

    Returns:
        The model that `AutoModelForCausalLM` makes, in eval mode; it cannot be saved.

    Raises:
        UnsupportedError: a checkpoint that is not quantised or otherwise than told above, no experts module
            to replace, or transformers is missing.
        ConfigError, WeightsError: see `moert.checkpoint.loader.load_layer`.
    """
    register()
    from moert.integrations.int4_models import load_model

    return load_model(path, device, dtype, options)


def prepare(
    model: torch.nn.Module, *, top_k: int | None = None, blocks: bool = False, **options: Any
) -> Prepared:
    """Build, tune and capture the runtimes of all experts modules of a model now.

    Layers of equal geometry share one arena and one set of plans. The model is switched to
    `experts_implementation="moert"` if it has that choice. Layers that are ready with the same options
    stay as they are.

    Args:
        model: a transformers model, or a module that contains experts modules.
        top_k: K, where the model's config does not tell.
        blocks: whole blocks, router and shared experts too, where they are nothing else: each is first
            compared with its own forward. The parameters of experts beside shared ones become views of
            tensors that hold both. A block runs its own forward where moert cannot take its place: while it
            is compiled, trained, or has hooks inside, as once router logits were asked for.
        options: of `MoERuntime`: backend, buckets, graphs, max_tokens, sort_policy, tune. They hold for
            later rebuilds of these layers, too.

    Raises:
        UnsupportedError: no experts module inside, or one, or with blocks=True a block, that moert cannot
            compute.
        ConfigError: an unknown option, or whatever `MoERuntime` raises. No runtime is left behind.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigError(
            f"prepare: unknown option(s) {', '.join(unknown)}; known: {', '.join(OPTIONS)}"
        )
    register()
    experts = [module for module in model.modules() if is_experts_module(module)]
    if not experts:
        raise UnsupportedError(
            f"{type(model).__name__}: no module whose forward transformers' experts interface chooses"
        )
    modules = blocks_in(model) if blocks else experts
    for module in model.modules():
        release(module)
        if module not in modules:
            runtimes.drop(
                module
            )  # of the experts inside what is now a block, or the other way round
    # all former ones go first, so that two arenas are never there at the same time
    for module in modules:
        runtimes.wish(module, options)
    prepared = Prepared(modules)
    try:
        for module in modules:
            if blocks:
                take_over(module, top_k or top_k_of(module.experts))
            else:
                runtimes.make(module, top_k or top_k_of(module))
        switch = getattr(model, "set_experts_implementation", None)
        if switch is not None:
            switch(NAME)
    except BaseException:
        for module in modules:
            release(module)
        prepared.close()
        raise
    return prepared


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The forward of an experts module, as transformers' interface calls it.

    The result is a new tensor each time, not a buffer of the runtime: models, hooks and
    `output_hidden_states` may keep the output of every layer.

    Args:
        self: the experts module.
        hidden_states: [T, H]. top_k_index: [T, K] integers, ids >= E contribute zero.
        top_k_weights: [T, K] floating.

    Raises:
        InputError: gradients are asked for, or shapes do not fit.
        UnsupportedError: see `experts_module.describe`.
        StateError: a first forward inside a capture.
    """
    params = parameters(self)
    if torch.is_grad_enabled():
        _refuse_gradients(hidden_states, top_k_weights, *params)
    dtype = activation_dtype(self, params)
    out = torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)
    if torch.compiler.is_compiling():
        _know(self)
        experts_op(out, hidden_states, top_k_index, top_k_weights, params)
    else:
        top_k = top_k_index.shape[-1]
        entry = runtimes.find(runtimes.key_of(params, top_k)) or runtimes.make(self, top_k)
        _run(entry.runtime, out, hidden_states, top_k_index, top_k_weights)
    return out.to(hidden_states.dtype)


@torch.library.custom_op("moert::experts", mutates_args=("out",))
def experts_op(
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    params: list[torch.Tensor],
) -> None:
    """`experts_forward` inside compiled code.

    The parameters name the runtime, not a number baked into the code: compiled code outlives a runtime that
    is rebuilt, and stays right when parameters are replaced without a new trace.
    """
    top_k = ids.shape[-1]
    key = runtimes.key_of(params, top_k)
    entry = runtimes.find(key)
    if entry is None:
        module = runtimes.module_of(key)
        if module is None:
            raise StateError(
                "moert::experts: compiled code has no runtime for these parameters; call "
                "moert.integrations.transformers.prepare(model) before"
            )
        entry = runtimes.make(module, top_k)
    _run(entry.runtime, out, x, ids, weights)


@experts_op.register_fake
def _(
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    params: list[torch.Tensor],
) -> None:
    return None


# runs while code is traced, with the real module, and not again when the compiled code runs
_know: Callable[[torch.nn.Module], bool] = torch.compiler.assume_constant_result(runtimes.know)


def _run(
    runtime: MoERuntime,
    out: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Forward into `out`; what the runtime does not read as it is gets converted first."""
    if weights.dtype not in (torch.float32, out.dtype):
        weights = weights.float()
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    x, weights, ids = (_rows(tensor.detach()) for tensor in (x.to(out.dtype), weights, ids))
    runtime.forward(x, TopK(weights, ids), out)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if any(tensor.requires_grad for tensor in tensors):
        raise InputError(
            "experts_implementation='moert' computes no gradients, and inputs or parameters have "
            "requires_grad=True; call the model inside torch.no_grad() or torch.inference_mode()"
        )
