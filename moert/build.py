"""From what a user hands over to a layer that is ready: checks, backend, plans, arena, programs, graphs.

What that takes on an NVIDIA H200 (torch 2.11, triton 3.6; E=128, K=8, H=2048, I=768 in bf16, 12 buckets,
3 eager sizes): compiling is 0.11 s a kernel, 0.06 s with 8 threads; a capture 0.08 ms. The first layer is
ready after 24 s with empty caches, tuning included, and after 0.45 s with warm ones; each further layer
that shares takes 16 ms, so 48 layers are ready in 1.2 s.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moert.backends.base import Backend
from moert.backends.registry import rival, select_backend
from moert.config import MoEConfig
from moert.device import device_facts
from moert.env import SORT_POLICIES, TUNE_MODES, Env, read_env
from moert.errors import ConfigError, StateError, WeightsError
from moert.host_executor import HostExecutor
from moert.plan import Plan, PlanReport
from moert.share import Options, ShareGroup
from moert.streams import refuse_inside_capture
from moert.tuning.contest import contest
from moert.tuning.tuner import plan_buckets
from moert.weights import ExpertWeights

log = logging.getLogger("moert")

DEFAULT_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)
DEFAULT_MAX_TOKENS = 4096
GRAPH_MODES = ("own", "host", "off")


@dataclass
class Built:
    """One ready layer: what it shares, and what is its own."""

    group: ShareGroup
    backend: Backend
    weights: ExpertWeights
    executor: Any
    notes: tuple[str, ...]
    kind: type[Backend]

    def report(self) -> PlanReport:
        group = self.group
        return PlanReport(
            self.backend.name,
            self.backend.same_bits,
            group.options.graphs,
            (*self.notes, *self.backend.notes, *group.notes),
            group.plans,
        )

    def close(self) -> None:
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)
        self.executor.close()
        self.group.leave(self.executor)
        # whoever made the weights may keep them; those read from a checkpoint are nobody else's
        del self.weights, self.backend


def resolve_config(model_cfg: Any) -> MoEConfig:
    """A `MoEConfig` from itself, a dict, a Hugging Face config object, or a path.

    Raises:
        ConfigError: none of these, or a description that contradicts itself.
    """
    if isinstance(model_cfg, MoEConfig):
        return model_cfg
    if isinstance(model_cfg, (str, Path)):
        return MoEConfig.from_pretrained(str(model_cfg))
    if isinstance(model_cfg, Mapping):
        # a config.json names its family; moert's own fields never do
        hugging_face = "model_type" in model_cfg or "architectures" in model_cfg
        return MoEConfig.from_hf(model_cfg) if hugging_face else MoEConfig.from_dict({**model_cfg})
    if hasattr(model_cfg, "to_dict"):
        return MoEConfig.from_hf(model_cfg)
    raise ConfigError(
        f"model_cfg: got {type(model_cfg).__name__}, need a MoEConfig, a dict, a Hugging Face config or "
        "the path of a checkpoint"
    )


def build(
    cfg: MoEConfig,
    weights: ExpertWeights | None,
    *,
    layer: int | None,
    device: torch.device | str | None,
    backend: str | None,
    max_tokens: int | None,
    buckets: Sequence[int] | None,
    graphs: str | None,
    sort_policy: int | None,
    tune: str | None,
    share: Built | None,
) -> Built:
    """Build one layer; see `MoERuntime` for the arguments and errors."""
    # buffers made in inference mode could not be written outside it
    with torch.inference_mode(False), torch.no_grad():
        return _build(
            cfg,
            weights,
            share,
            layer,
            device,
            {
                "backend": backend,
                "max_tokens": max_tokens,
                "buckets": buckets,
                "graphs": graphs,
                "sort_policy": sort_policy,
                "tune": tune,
            },
        )


def _build(
    cfg: MoEConfig,
    weights: ExpertWeights | None,
    share: Built | None,
    layer: int | None,
    device: torch.device | str | None,
    wishes: dict[str, Any],
) -> Built:
    env = read_env()
    if env.log_level is not None:
        log.setLevel(env.log_level)
    if share is not None:
        _check_share(cfg, share, wishes)
        device = share.group.device if device is None else device
    if weights is not None and not isinstance(weights, ExpertWeights):
        raise WeightsError(f"weights: got {type(weights).__name__}, need an ExpertWeights")
    place = _device(device, weights)
    if share is not None and place != share.group.device:
        raise ConfigError(f"device={place}: the shared runtime is on {share.group.device}")
    facts = device_facts(place)
    refuse_inside_capture(place, "MoERuntime")
    # whatever can be refused is, before a checkpoint is read
    launched = cfg.as_launched
    if share is not None:
        kind, notes, other = share.kind, share.notes, None
        weights = _weights(cfg, weights, layer, place)
        group = share.group
    else:
        name = _wish(wishes.pop("backend"), env.backend, "auto")
        kind, notes = select_backend(name, launched, facts)
        options = plan_options(env, place, **wishes)
        other = None
        if name == "auto":
            other = rival(kind, launched, facts, graphs=options.graphs, tune=options.tune)
        if options.graphs == "own" and not kind.uses_graphs:
            options = replace(options, graphs="host")
        weights = _weights(cfg, weights, layer, place)
        group = ShareGroup(cfg, place, facts, options)
    device_of = torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()
    with device_of:
        return _assemble(group, kind(launched, weights, facts), weights, notes, env, other)


def _assemble(
    group: ShareGroup,
    backend: Backend,
    weights: ExpertWeights,
    notes: tuple[str, ...],
    env: Env,
    other: type[Backend] | str | None,
) -> Built:
    with group.lock:
        if group.closed:  # by another thread, since share= was looked at
            raise StateError("share: the runtime is closed; make a new MoERuntime")
        if not group.plans:
            backend, group.plans, said = contest(backend, other, lambda b: _plans(group, b, env))
            notes = (*notes, *said)
            group.make_arenas()
            if weights.router_weight is not None or group.described.shared_experts:
                group.make_block(backend)
            group.labels.prepare(group.plans)
        executor: Any
        if group.device.type == "cuda":
            from moert.device_executor import DeviceExecutor

            executor = DeviceExecutor(group, backend)
        else:
            executor = HostExecutor(group, backend)
        group.join(executor)
    return Built(group, backend, weights, executor, notes, type(backend))


def _plans(group: ShareGroup, backend: Backend, env: Env) -> tuple[Plan, ...]:
    options = group.options
    return plan_buckets(
        backend,
        plan_sizes(options),
        policy=options.sort_policy,
        mode=options.tune,
        tuning_dir=env.tuning_dir,
        notes=group.notes,
    )


def plan_sizes(options: Options) -> list[tuple[int, bool]]:
    """(tokens, captured) of every plan: the buckets, then eager sizes doubling up to max_tokens."""
    sizes = [(bucket, options.graphs == "own") for bucket in options.buckets]
    tokens = options.buckets[-1]
    while tokens < options.max_tokens:
        tokens = min(2 * tokens, options.max_tokens)
        sizes.append((tokens, False))
    return sizes


def plan_options(
    env: Env,
    device: torch.device,
    *,
    max_tokens: int | None,
    buckets: Sequence[int] | None,
    graphs: str | None,
    sort_policy: int | None,
    tune: str | None,
) -> Options:
    most = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    if not isinstance(most, int) or isinstance(most, bool) or not 1 <= most < 2**24:
        raise ConfigError(f"max_tokens={most!r} must be an integer in 1..{2**24 - 1}")
    if buckets is None:
        sizes = tuple(b for b in DEFAULT_BUCKETS if b <= most)
    else:
        sizes = tuple(buckets) if isinstance(buckets, Iterable) else ()
        if not sizes or any(type(b) is not int or not 1 <= b <= most for b in sizes):
            raise ConfigError(f"buckets={buckets!r} must be integers in 1..max_tokens={most}")
        sizes = tuple(sorted(set(sizes)))
    mode = _wish(graphs, None, "own")
    if mode not in GRAPH_MODES:
        raise ConfigError(f"graphs={mode!r} is not one of {', '.join(GRAPH_MODES)}")
    policy = _wish(sort_policy, env.sort_policy, 0)
    if type(policy) is not int or policy not in SORT_POLICIES:
        meanings = ", ".join(f"{number} ({name})" for number, name in SORT_POLICIES.items())
        raise ConfigError(f"sort_policy={policy!r} is not one of {meanings}")
    tuning = _wish(tune, env.tune, "auto")
    if tuning not in TUNE_MODES:
        raise ConfigError(f"tune={tuning!r} is not one of {', '.join(TUNE_MODES)}")
    return Options(most, sizes, mode if device.type == "cuda" else "off", policy, tuning)


def _wish(argument: Any, variable: Any, default: Any) -> Any:
    """An option: the argument, else the environment's variable, else the default."""
    given = (value for value in (argument, variable) if value is not None)
    return next(given, default)


def _check_share(cfg: MoEConfig, share: Built, given: dict[str, Any]) -> None:
    set_anyway = [name for name, value in given.items() if value is not None]
    if set_anyway:
        raise ConfigError(
            f"share: {', '.join(set_anyway)} come(s) from the shared runtime and cannot be given again"
        )
    if cfg != share.group.described:
        raise ConfigError(
            f"share: config {cfg} differs from the shared runtime's {share.group.described}"
        )


def _device(device: torch.device | str | None, weights: ExpertWeights | None) -> torch.device:
    if device is not None:
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            raise ConfigError(
                f"device={device!r} is no device, need one like 'cuda:0' or 'cpu'"
            ) from None
    elif weights is not None:
        place = weights.device
    else:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and place.index is None and torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    # tensors on the CPU never name an index
    return torch.device("cpu") if place.type == "cpu" else place


def _weights(
    cfg: MoEConfig, weights: ExpertWeights | None, layer: int | None, device: torch.device
) -> ExpertWeights:
    if weights is None:
        if cfg.path is None:
            raise WeightsError(
                "weights: missing; give ExpertWeights.from_tensors(...), .random(cfg) or "
                ".from_checkpoint(path, layer), or a checkpoint path with layer="
            )
        if layer is None:
            raise WeightsError(f"layer: missing, need the number of a layer of {cfg.path}")
        weights = ExpertWeights.from_checkpoint(cfg.path, layer, device, cfg=cfg)
    weights.check(cfg)
    return weights if weights.device == device else weights.to(device)
