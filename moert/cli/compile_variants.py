"""Which kernels the plans of a layer can launch on a device that need not be there. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget

from moert.arena import absent_views
from moert.backends.aiter import AiterBackend
from moert.backends.triton import TritonBackend
from moert.backends.triton_router import LOGITS_DTYPES, routing_source
from moert.cli.absent import absent_weights
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES
from moert.env import SORT_POLICIES
from moert.errors import ConfigError
from moert.launch import Launch, compile_job, compile_launch
from moert.plan import STRATEGIES, Choice, Tile
from moert.steps.checked_rows.launches import checked_rows_launch, clear_live_rows_launch
from moert.steps.routing.triton import routing_launch
from moert.tuning.store import SHIPPED, Store, geometry

LAYOUTS = ("plain", "bias", "interleaved", "transposed")
ROUTING: Final = "routing_fwd_kernel"


def _checked_rows(cfg: MoEConfig) -> Launch:
    ids, weights = (
        torch.empty(1, cfg.top_k, dtype=dtype, device="meta")
        for dtype in (torch.int32, torch.float32)
    )
    return checked_rows_launch(cfg, ids, weights)


# kernels that belong to no choice of a plan: what the AITER backend launches of ours
BESIDE: Final[dict[str, Callable[[MoEConfig], Launch]]] = {
    "checked_rows_kernel": _checked_rows,
    "clear_live_rows_kernel": clear_live_rows_launch,
}


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
        choice: of the plan; None for routing, and for kernels in `BESIDE`.
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
        if self.choice is None:
            return BESIDE[self.kernel](self.layer.cfg)
        return planned_launches(
            self.layer.backend(self.arch), self.tokens, self.choice, self.aligned
        )[self.index]

    @property
    def tile(self) -> str:
        """The tile or the sorting strategy, whichever decided how the kernel is made."""
        if self.kernel == ROUTING:
            return str(LOGITS_DTYPES[self.index]).removeprefix("torch.")
        tile = self.gemm_tile
        return "-" if tile is None else str(tile)

    @property
    def gemm_tile(self) -> Tile | None:
        """What a GEMM of the plan is tiled by; None for other kernels."""
        if self.choice is None or not self.kernel.startswith(("gate_up", "down")):
            return None
        backend = self.layer.backend(self.arch)
        choice = self.choice if self.aligned else backend.unaligned(self.choice)
        launches = planned_launches(backend, self.tokens, self.choice, self.aligned)
        before = [launch.name for launch in launches[: self.index]]
        return choice.tiles[sum(name.startswith(("gate_up", "down")) for name in before)]

    @property
    def needs_matrix(self) -> bool:
        units = any(
            word in self.kernel for word in ("grouped", "stream", "registers", "specialised")
        )
        return units and self.layer.cfg.dtype != "float32"

    @property
    def needs_wide(self) -> bool:
        """Weights are read 16 bytes a lane, where their rows begin at multiples of 16 bytes.

        Rows of up to 64 elements are too short for every lane of a workgroup to have as much. int4 codes of a
        step are whole words of 16 bytes from 64 columns on; a tile may have fewer of them than lanes.
        """
        if not self.kernel.startswith(("gate_up", "down")) or self.layer.layout == "transposed":
            return False
        cfg = self.layer.cfg
        if cfg.quant is not None:
            tile = self.gemm_tile
            assert tile is not None
            lanes = tile.num_warps * KNOWN_DEVICES[self.arch].warp_size
            return tile.bk >= 64 and tile.bn * tile.bk // 2 >= 16 * lanes
        size = cfg.hidden_size if self.kernel.startswith("gate_up") else cfg.intermediate_size
        return size > 64 and size * cfg.torch_dtype.itemsize % 16 == 0


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


def planned_launches(
    backend: TritonBackend, tokens: int, choice: Choice, aligned: bool
) -> list[Launch]:
    """What a program of the backend launches for a choice; see `Backend.program`."""
    views = absent_views(backend.fields(tokens, choice))
    return backend.launches(tokens, choice if aligned else backend.unaligned(choice), views)


def plan_variants(
    layer: Layer, arch: str, buckets: Sequence[int], all_candidates: bool = False
) -> Iterator[Variant]:
    """Every kernel of the plans for these buckets.

    Args:
        all_candidates: also what tuning would time, not only defaults and shipped records.

    Raises:
        ConfigError: not even the default can be made.
    """
    backend = layer.backend(arch)
    if reason := backend.supports(layer.cfg, backend.facts):
        raise ConfigError(f"{layer.cfg}: {reason}")
    shipped = Store(backend.facts, geometry(layer.cfg, backend.weights), {}, [(SHIPPED, "shipped")])
    for tokens in buckets:
        choices = [backend.default_choice(tokens)]
        choices += [r.choice for policy in SORT_POLICIES for r in shipped.find(tokens, policy)]
        if all_candidates:
            choices += backend.candidates(tokens, STRATEGIES)
            choices += backend.crowded_choices(choices[0], tokens)
        for choice in dict.fromkeys(choices):
            for aligned in (True, False):
                launches = planned_launches(backend, tokens, choice, aligned)
                for index, launch in enumerate(launches):
                    yield Variant(arch, layer, tokens, choice, index, aligned, launch.name)


def routing_variants(
    layer: Layer, arch: str, buckets: Sequence[int], all_candidates: bool = False
) -> Iterator[Variant]:
    """The routing kernel of these buckets for every dtype of logits."""
    for tokens in buckets:
        for index in range(len(LOGITS_DTYPES)):
            yield Variant(arch, layer, tokens, None, index, False, ROUTING)


def beside_variants(
    layer: Layer, arch: str, buckets: Sequence[int], all_candidates: bool = False
) -> Iterator[Variant]:
    """What precedes AITER's operators, where these can serve the layer."""
    if AiterBackend.refuses(layer.cfg, KNOWN_DEVICES[arch]) is None:
        for kernel in BESIDE:
            yield Variant(arch, layer, buckets[0], None, 0, True, kernel)


# (layer, arch, buckets, all_candidates) -> variants: further families of kernels are added here
FAMILIES: Final = (routing_variants, plan_variants, beside_variants)


def compile_variant(variant: Variant) -> tuple[Any, int]:
    """The compiled kernel, exactly as a runtime on that device would get it, and its warps."""
    facts = KNOWN_DEVICES[variant.arch]
    name = variant.arch if facts.kind == "hip" else facts.compute_capability
    target = GPUTarget(facts.kind, name, facts.warp_size)
    cfg = variant.layer.cfg
    if variant.kernel == ROUTING:
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
    # those that copy beside those that multiply are counted too
    return compiled, compiled.metadata.num_warps


def specialisation(variant: Variant) -> tuple[Any, ...]:
    """What the compiler is given: variants of which it is equal are one kernel."""
    cfg = variant.layer.cfg
    if variant.kernel == ROUTING:
        dependent = KNOWN_DEVICES[variant.arch].dependent_launch
        _, constants, warps = routing_launch(cfg, variant.tokens, dependent)
        bias = cfg.routing.correction_bias
        return (variant.arch, ROUTING, variant.index, tuple(constants.items()), bias, warps)
    launch = variant.launch()
    row_multiple = variant.layer.backend(variant.arch).row_multiple
    return variant.arch, compile_job(launch, cfg.torch_dtype, variant.aligned, row_multiple)
