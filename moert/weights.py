"""The tensors of one mixture-of-experts layer, in one layout for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch

from moert.config import MoEConfig
from moert.errors import WeightsError

# up to this many elements `random` draws on the CPU, so that every device gets the same values
SAME_EVERYWHERE: Final = 1 << 24
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The weights of one layer; letters as in `moert.config`.

    Shapes are logical, strides are free as long as one of a matrix's two dimensions has stride 1: weights
    stored transposed are a strided view.

    Args:
        w13: [E, 2I, H], gate rows then up rows (or alternating, see `interleaved`); [E, I, H] ungated.
        w2: [E, H, I], same dtype.
        b13: [E, 2I] in w13's order, of the weights' dtype or float32; None for none.
        b2: [E, H], likewise.
        correction_bias: [E] float32, added to the scores for the choice of experts only.
        router_weight: [E, H], any floating dtype; kept for the caller, the runtime takes logits.
        router_bias: [E], likewise.
        interleaved: rows of w13 and b13 alternate gate, up (even = gate).
    """

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    router_weight: torch.Tensor | None = None
    router_bias: torch.Tensor | None = None
    interleaved: bool = False

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
    ) -> ExpertWeights:
        """Views of the caller's tensors, never copies; a later in-place change is seen.

        Args:
            w13, w2, b13, b2, correction_bias, router_weight, router_bias, interleaved: see the class.
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
        larger one is drawn on its own device, in place, and has other values on another kind of device.

        Args:
            cfg: shapes, dtype and which of the optional tensors there are.
            seed: same seed, same values.
            device: where the tensors live.
        """
        experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        target = torch.device(device)
        small = experts * (cfg.w13_rows + inner) * hidden <= SAME_EVERYWHERE
        source = torch.device("cpu") if small else target
        generator = torch.Generator(source).manual_seed(seed)

        def normal(std: float, *shape: int, dtype: torch.dtype = cfg.torch_dtype) -> torch.Tensor:
            values = torch.empty(shape, dtype=dtype, device=source)
            return values.normal_(0.0, std, generator=generator).to(target)

        # a weighted mean over K experts has 1/K of one expert's variance: w2 makes up for it
        optional: dict[str, Any] = {}
        w13 = normal(hidden**-0.5, experts, cfg.w13_rows, hidden)
        w2 = normal((cfg.top_k / inner) ** 0.5, experts, hidden, inner)
        optional["router_weight"] = normal(hidden**-0.5, experts, hidden)
        if cfg.bias:
            optional["b13"] = normal(0.1, experts, cfg.w13_rows)
            optional["b2"] = normal(0.1, experts, hidden)
            optional["router_bias"] = normal(0.1, experts)
        if cfg.routing.correction_bias:
            optional["correction_bias"] = normal(0.1, experts, dtype=torch.float32)
        return cls(w13=w13, w2=w2, **optional)

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
        before up rows, in cfg.dtype.

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
    def nbytes(self) -> int:
        """Bytes of all elements, shared storage counted once for each tensor that shows it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if isinstance(value, torch.Tensor)}

    def to(self, device: str | torch.device) -> ExpertWeights:
        """The same weights on a device; itself where they are there already."""
        target = torch.device(device)
        moved: dict[str, Any] = {k: t.to(target) for k, t in self.tensors().items()}
        return replace(self, **moved)

    def copy_(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy new values into the tensors in place, all of them or none.

        Raises:
            WeightsError: a name that is not here, or another shape; nothing was changed.
        """
        mine = self.tensors()
        for name, value in values.items():
            if name not in mine:
                raise WeightsError(f"{name}: not among these weights ({', '.join(mine)})")
            if not isinstance(value, torch.Tensor) or value.shape != mine[name].shape:
                given = (
                    list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                )
                raise WeightsError(f"{name}: got {given}, need {list(mine[name].shape)}")
        # in inference mode any tensor may be written, those made in it and those made outside
        with torch.inference_mode():
            for name, value in values.items():
                mine[name].copy_(value)

    def check(self, cfg: MoEConfig) -> None:
        """Refuse weights that do not fit the description.

        `correction_bias`, `router_weight` and `router_bias` may be absent: `forward` does not use them.

        Raises:
            WeightsError: the tensor, what it is and what is needed.
        """
        experts, hidden, rows = cfg.num_experts, cfg.hidden_size, cfg.w13_rows
        shapes = {
            "w13": (experts, rows, hidden),
            "w2": (experts, hidden, cfg.intermediate_size),
            "b13": (experts, rows),
            "b2": (experts, hidden),
            "correction_bias": (experts,),
            "router_weight": (experts, hidden),
            "router_bias": (experts,),
        }
        tensors = self.tensors()
        for name, wanted in (("b13", cfg.bias), ("b2", cfg.bias)):
            if wanted and name not in tensors:
                raise WeightsError(f"{name}: missing, need {list(shapes[name])} because bias=True")
            if name in tensors and not wanted:
                raise WeightsError(f"{name}: given, but the config says bias=False")
        if self.correction_bias is not None and not cfg.routing.correction_bias:
            raise WeightsError(
                "correction_bias: given, but the config says routing.correction_bias=False"
            )
        if self.interleaved and not cfg.gated:
            raise WeightsError(
                "interleaved: True, but the config says gated=False: there are no gate rows"
            )
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name]:
                raise WeightsError(f"{name}: shape {list(tensor.shape)}, need {list(shapes[name])}")
            if tensor.dtype not in _dtypes_of(name, cfg.torch_dtype):
                needed = " or ".join(str(dtype) for dtype in _dtypes_of(name, cfg.torch_dtype))
                raise WeightsError(f"{name}: dtype {tensor.dtype}, need {needed}")
            if tensor.device != self.device:
                raise WeightsError(
                    f"{name}: device {tensor.device}, need {self.device}, where w13 is"
                )
        for name in ("w13", "w2"):
            _check_strides(name, tensors[name])


def _dtypes_of(name: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    if name in ("w13", "w2"):
        return (dtype,)
    if name in ("b13", "b2"):
        return tuple(dict.fromkeys((dtype, torch.float32)))
    return (torch.float32,) if name == "correction_bias" else _FLOATS


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    dims = ((tensor.shape[1], tensor.stride(1)), (tensor.shape[2], tensor.stride(2)))
    if not any(stride == 1 or size == 1 for size, stride in dims):
        raise WeightsError(
            f"{name}: strides {list(tensor.stride())}, need stride 1 in dimension 1 or 2"
        )
