"""Which kernels the plans of a layer can launch on a device that need not be there. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from moert.backends.triton import TritonBackend
from moert.backends.triton_router import LOGITS_DTYPES, routing_source
from moert.cli.absent import absent_views, absent_weights
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES
from moert.env import SORT_POLICIES
from moert.errors import ConfigError
from moert.launch import Launch, compile_launch, signature
from moert.plan import STRATEGIES, Choice
from moert.steps.routing.triton import routing_launch
from moert.tuning.store import SHIPPED, Store, geometry

LAYOUTS = ("plain", "bias", "interleaved", "transposed")


@dataclass(frozen=True, slots=True)
class Layer:
    """A configuration and how its weights lie in memory: one of `LAYOUTS`."""

    cfg: MoEConfig
    layout: str = "plain"

    def backend(self, arch: str) -> TritonBackend:
        weights = absent_weights(
            self.cfg,
            interleaved=self.layout == "interleaved",
            transposed=self.layout == "transposed",
        )
        return TritonBackend(self.cfg, weights, KNOWN_DEVICES[arch])


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as one launch specialises it.

    Args:
        arch: a key of `KNOWN_DEVICES`.
        layer: whose plan it is.
        tokens: of the first bucket that launches it.
        choice: of the plan; None for routing.
        index: of the launch within the plan; for routing, of the dtype in `LOGITS_DTYPES`.
        aligned: addresses and strides of a call are known to be multiples of 16.
    """

    arch: str
    layer: Layer
    tokens: int
    choice: Choice | None
    index: int
    aligned: bool
    kernel: str

    def launch(self) -> Launch:
        assert self.choice is not None
        backend = self.layer.backend(self.arch)
        views = absent_views(backend.fields(self.tokens, self.choice))
        return backend.launches(self.tokens, self.choice, views)[self.index]

    @property
    def tile(self) -> str:
        """The tile or the sorting strategy, whichever decided how the kernel is made."""
        if self.choice is None:
            return str(LOGITS_DTYPES[self.index]).removeprefix("torch.")
        if self.kernel.startswith("gate_up"):
            return str(self.choice.gate_up)
        return str(self.choice.down) if self.kernel.startswith("down") else "-"

    @property
    def needs_matrix(self) -> bool:
        return "grouped" in self.kernel and self.layer.cfg.dtype != "float32"

    @property
    def needs_wide(self) -> bool:
        """Weights are read 16 bytes a lane, where their rows begin at multiples of 16 bytes."""
        if not self.kernel.startswith(("gate_up", "down")) or self.layer.layout == "transposed":
            return False
        cfg = self.layer.cfg
        size = cfg.hidden_size if self.kernel.startswith("gate_up") else cfg.intermediate_size
        return size * cfg.torch_dtype.itemsize % 16 == 0


def layouts_of(cfg: MoEConfig, layouts: Sequence[str]) -> list[Layer]:
    """The layers that differ; "bias" adds biases, "interleaved" needs a gate."""
    found: dict[Layer, None] = {}
    for layout in layouts:
        if layout == "interleaved" and not cfg.gated:
            continue
        if layout == "bias":
            found[Layer(replace(cfg, bias=True))] = None
        else:
            found[Layer(cfg, layout)] = None
    return list(found)


def variants(
    layer: Layer, arch: str, buckets: Sequence[int], all_candidates: bool = False
) -> Iterator[Variant]:
    """Every kernel of the plans for these buckets, each specialisation once.

    Args:
        all_candidates: also what tuning would time, not only defaults and shipped records.

    Raises:
        ConfigError: not even the default can be made.
    """
    backend = layer.backend(arch)
    if reason := backend.supports(layer.cfg, backend.facts):
        raise ConfigError(f"{layer.cfg}: {reason}")
    shipped = Store(backend.facts, geometry(layer.cfg, backend.weights), {}, [(SHIPPED, "shipped")])
    seen = set()
    for tokens in buckets:
        choices = [backend.default_choice(tokens)]
        choices += [r.choice for policy in SORT_POLICIES for r in shipped.find(tokens, policy)]
        if all_candidates:
            choices += backend.candidates(tokens, STRATEGIES)
        for choice in dict.fromkeys(choices):
            launches = backend.launches(
                tokens, choice, absent_views(backend.fields(tokens, choice))
            )
            for aligned in (True, False):
                for index, launch in enumerate(launches):
                    key = _key(launch, layer.cfg.torch_dtype, aligned, backend.row_multiple)
                    if key not in seen:
                        seen.add(key)
                        yield Variant(arch, layer, tokens, choice, index, aligned, launch.name)


def routing_variants(layer: Layer, arch: str, buckets: Sequence[int]) -> Iterator[Variant]:
    """The routing kernel of these buckets for every dtype of logits."""
    seen = set()
    for tokens in buckets:
        constants = tuple(routing_launch(layer.cfg, tokens)[1].items())
        if constants not in seen:
            seen.add(constants)
            for index in range(len(LOGITS_DTYPES)):
                yield Variant(arch, layer, tokens, None, index, False, "routing_fwd_kernel")


def compile_variant(variant: Variant) -> tuple[Any, int]:
    """The compiled kernel, exactly as a runtime on that device would get it, and its warps."""
    facts = KNOWN_DEVICES[variant.arch]
    name = variant.arch if facts.kind == "hip" else int(variant.arch.removeprefix("sm_"))
    target = GPUTarget(facts.kind, name, facts.warp_size)
    cfg = variant.layer.cfg
    if variant.choice is None:
        _, constants, warps = routing_launch(cfg, variant.tokens, facts.dependent_launch)
        dtype, bias = LOGITS_DTYPES[variant.index], cfg.routing.correction_bias
        source = routing_source(dtype, constants, bias)
        return triton.compile(source, target=target, options={"num_warps": warps}), warps
    launch = variant.launch()
    compiled = compile_launch(
        launch,
        cfg.torch_dtype,
        aligned=variant.aligned,
        row_multiple=variant.layer.backend(variant.arch).row_multiple,
        target=target,
    )
    return compiled, launch.num_warps


def _key(launch: Launch, dtype: torch.dtype, aligned: bool, row_multiple: int) -> Any:
    sig, constants, attrs = signature(launch, dtype, aligned, row_multiple)
    return (
        launch.name,
        *(tuple(part.items()) for part in (sig, constants)),
        tuple(attrs),
        launch.num_warps,
        launch.num_stages,
        tuple(launch.options.items()),
    )
