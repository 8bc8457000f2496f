"""The tensors of one mixture-of-experts layer, in one layout for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moert.config import MoEConfig, Quant
from moert.errors import WeightsError
from moert.quantization.experts import (
    check_replacement,
    quant_of,
    quantize_layer,
)
from moert.quantization.int4_layout import Int4Matrix
from moert.quantization.int4_skinny import SkinnyInt4, pack, unpack
from moert.random_weights import random_parts
from moert.shared_experts import appended
from moert.weights_check import check_weights

Matrix: TypeAlias = torch.Tensor | Int4Matrix


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The weights of one layer; letters as in `moert.config`. A layer with n shared experts has them behind
    the routed ones: w13, w2, b13 and b2 are of E + n experts then, the router's tensors of E.

    Shapes are logical, strides are free as long as one of a matrix's two dimensions has stride 1: weights
    stored transposed are a strided view. Both matrices may be int4, see `quantize`.

    Args:
        w13: [E, 2I, H], gate rows then up rows (or alternating, see `interleaved`); [E, I, H] ungated.
        w2: [E, H, I], same dtype.
        b13: [E, 2I] in w13's order, of the weights' dtype or float32; None for none.
        b2: [E, H], likewise.
        correction_bias: [E] float32, added to the scores for the choice of experts only.
        router_weight: [E, H], any floating dtype; needed by `forward_block` alone.
        router_bias: [E], likewise.
        interleaved: rows of w13 and b13 alternate gate, up (even = gate).
        shared_gate: [1, H], any floating dtype: sigmoid(x @ gate) weighs the shared experts.
    """

    w13: Matrix
    w2: Matrix
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    router_weight: torch.Tensor | None = None
    router_bias: torch.Tensor | None = None
    interleaved: bool = False
    shared_gate: torch.Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
        correction_bias: torch.Tensor | None = None,
        router_weight: torch.Tensor | None = None,
        router_bias: torch.Tensor | None = None,
        *,
        interleaved: bool = False,
        transposed: bool = False,
        shared_gate: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """Views of the caller's tensors, never copies; a later in-place change is seen.

        Shared experts are already behind the routed ones, or are put there by `append_shared`.

        Args:
            w13, w2, b13, b2, correction_bias, router_weight, router_bias, interleaved, shared_gate: see the
                class.
            transposed: w13 and w2 are given as [E, H, 2I] and [E, I, H].

        Raises:
            WeightsError: not a tensor, or w13 or w2 without three dimensions.
        """
        given = {
            "w13": w13,
            "w2": w2,
            "b13": b13,
            "b2": b2,
            "correction_bias": correction_bias,
            "router_weight": router_weight,
            "router_bias": router_bias,
            "shared_gate": shared_gate,
        }
        views: dict[str, Any] = {}
        for name, tensor in given.items():
            if tensor is None and name not in ("w13", "w2"):
                continue
            if not isinstance(tensor, torch.Tensor):
                raise WeightsError(f"{name}: got {type(tensor).__name__}, need a torch.Tensor")
            views[name] = tensor.detach()
        for name in ("w13", "w2"):
            if views[name].ndim != 3:
                raise WeightsError(
                    f"{name}: shape {list(views[name].shape)}, need 3 dimensions, experts first"
                )
            if transposed:
                views[name] = views[name].transpose(1, 2)
        return cls(**views, interleaved=interleaved)

    @classmethod
    def random(
        cls, cfg: MoEConfig, seed: int = 0, device: str | torch.device = "cpu"
    ) -> ExpertWeights:
        """Normal values, scaled so that standard normal inputs and routing weights that sum to 1 give
        outputs with a variance of order 1.

        A layer of at most 2**24 elements is drawn on the CPU and has the same values on every device; a
        larger one is drawn on its own device, in place, and has other values on another kind of device. Where
        cfg.quant asks for int4, the matrices are rounded from such values; a large layer's are drawn and
        rounded expert by expert, so that it never exists in full.

        Args:
            cfg: shapes, dtype, quant and which of the optional tensors there are.
            seed: same seed, same values.
            device: where the tensors live.
        """
        return cls(**random_parts(cfg, seed, device)).to(device)

    @classmethod
    def from_skinny_int4(cls, w13: SkinnyInt4, w2: SkinnyInt4, **others: Any) -> ExpertWeights:
        """Int4 weights from the layout of ROCm's skinny kernels, with the very codes, scales and zero points.

        Args:
            w13: [E, 2I, H] (gate rows, then up rows) or [E, I, H] ungated. w2: [E, H, I].
            others: the floating tensors of the class, by name.

        Raises:
            WeightsError: shapes, dtypes or zero points that do not fit.
        """
        for name, given in (("w13", w13), ("w2", w2)):
            if not isinstance(given, SkinnyInt4):
                raise WeightsError(f"{name}: got {type(given).__name__}, need a SkinnyInt4")
        gated = w13.codes.ndim == 3 and w13.codes.shape[1] == 2 * w2.columns
        return cls(w13=pack(w13, "w13", paired=gated), w2=pack(w2, "w2", paired=False), **others)

    def to_skinny_int4(self) -> tuple[SkinnyInt4, SkinnyInt4]:
        """w13 and w2 in the layout of ROCm's skinny kernels: the exact inverse of `from_skinny_int4`.

        Raises:
            WeightsError: the weights are not int4.
        """
        if not (isinstance(self.w13, Int4Matrix) and isinstance(self.w2, Int4Matrix)):
            raise WeightsError("w13: not int4, so there are no codes to export; quantize first")
        return unpack(self.w13), unpack(self.w2)

    def quantize(
        self, format: str = "int4", *, group_size: int = 128, symmetric: bool = True
    ) -> ExpertWeights:
        """The same layer with rounded matrices; how: see `moert.quantization.int4_rounding`.

        Biases, router and dtype of the activations stay; gate rows come before up rows. Extra memory beside
        the result: a few experts'.

        Args:
            format, group_size, symmetric: see `Quant`.

        Raises:
            ConfigError: an unknown format or group size.
            WeightsError: NaN or infinity among the weights, or weights that are int4 already.
        """
        quant = Quant(format, group_size, symmetric)
        changed = quantize_layer(self.w13, self.w2, self.b13, self.interleaved, quant)
        return replace(self, **changed)

    def append_shared(
        self, w13: torch.Tensor, w2: torch.Tensor, gate: torch.Tensor | None = None
    ) -> ExpertWeights:
        """The same layer with a shared expert behind the experts it has, as n = ceil(S / I) of size I.

        All experts are in new tensors then: until the old ones are dropped, memory holds both.

        Args:
            w13: [2S, H], gate rows then up rows ([S, H] without a gate), whatever `interleaved` says.
            w2: [H, S]. gate: `shared_gate`.

        Raises:
            WeightsError: shapes that do not fit, or int4 weights.
        """
        return replace(self, **appended(self, w13, w2, gate))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        layer: int,
        device: str | torch.device = "cpu",
        *,
        cfg: MoEConfig | None = None,
    ) -> ExpertWeights:
        """One layer of a Hugging Face checkpoint (config.json and safetensors), contiguous, gate rows
        before up rows, in cfg.dtype; int4 experts are packed as they are read.

        Args:
            path: local directory.
            layer: number of the layer as the checkpoint counts, dense layers included.
            device: where the tensors are made.
            cfg: another description than config.json's, as to get another dtype.

        Raises:
            ConfigError, WeightsError, UnsupportedError: see `moert.checkpoint.loader.load_layer`.
        """
        from moert.checkpoint.loader import load_layer

        tensors: dict[str, Any] = load_layer(path, layer, device, cfg)
        return cls(**tensors)

    @property
    def device(self) -> torch.device:
        return self.w13.device

    @property
    def dtype(self) -> torch.dtype:
        return self.w13.dtype

    @property
    def quant(self) -> Quant | None:
        """How the matrices are stored: what a config for these weights says; None for floating ones."""
        return quant_of(self.w13, self.w2)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, shared storage counted once for each tensor that shows it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def parts(self) -> dict[str, Matrix]:
        """The fields that are there, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {n: value for n, value in pairs if isinstance(value, (torch.Tensor, Int4Matrix))}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name; those of an int4 matrix as "w13.codes", "w13.scales", ..."""
        found: dict[str, torch.Tensor] = {}
        for name, part in self.parts().items():
            if isinstance(part, Int4Matrix):
                found |= {f"{name}.{inner}": tensor for inner, tensor in part.tensors().items()}
            else:
                found[name] = part
        return found

    def to(self, device: str | torch.device) -> ExpertWeights:
        """The same weights on a device; itself where they are there already."""
        target = torch.device(device)
        moved: dict[str, Any] = {name: part.to(target) for name, part in self.parts().items()}
        return replace(self, **moved)

    def copy_(self, values: Mapping[str, Matrix]) -> None:
        """Copy new values into the tensors in place, all of them or none.

        An int4 matrix takes an `Int4Matrix` of the same layout: floating values would have to be rounded.

        Raises:
            WeightsError: a name that is not here, or another shape or layout; nothing was changed.
        """
        mine = self.parts()
        for name, value in values.items():
            if name not in mine:
                raise WeightsError(f"{name}: not among these weights ({', '.join(mine)})")
            part = mine[name]
            if isinstance(part, Int4Matrix):
                check_replacement(name, part, value)
            elif not isinstance(value, torch.Tensor) or value.shape != part.shape:
                given = (
                    list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                )
                raise WeightsError(f"{name}: got {given}, need {list(part.shape)}")
        # in inference mode any tensor may be written, those made in it and those made outside
        with torch.inference_mode():
            for name, value in values.items():
                part = mine[name]
                if isinstance(part, Int4Matrix) and isinstance(value, Int4Matrix):
                    for inner, tensor in part.tensors().items():
                        tensor.copy_(value.tensors()[inner])
                elif isinstance(part, torch.Tensor) and isinstance(value, torch.Tensor):
                    part.copy_(value)

    def check(self, cfg: MoEConfig) -> None:
        """Refuse weights that do not fit the description.

        What only routing uses may be absent, as `forward` does not need it: `correction_bias`,
        `router_weight`, `router_bias`, `shared_gate`.

        Raises:
            WeightsError: the tensor, what it is and what is needed.
        """
        check_weights(self, cfg)
