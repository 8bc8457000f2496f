"""An experts module whose matrices are int4: what takes the place of a transformers model's own."""

from __future__ import annotations

from typing import Any

import torch

from moert.config import MoEConfig
from moert.quantization.int4_layout import Int4Matrix
from moert.weights import ExpertWeights

MATRICES = ("w13", "w2")


class Int4Tensors(torch.nn.Module):
    """The tensors of a layer's experts as buffers, so that the model moves and copies them like its others.

    Args:
        config: the transformers config, which tells K.
        cfg: the layer; its dtype is that of the activations, and follows that of the buffers.
    """

    def __init__(self, config: Any, cfg: MoEConfig) -> None:
        super().__init__()
        self.config, self.cfg = config, cfg
        self.num_experts = cfg.num_experts
        self._layout: dict[str, dict[str, Any]] = {}

    def fill(self, weights: ExpertWeights) -> None:
        """Take the matrices and biases, no copies of them."""
        for name in MATRICES:
            matrix = getattr(weights, name)
            assert isinstance(matrix, Int4Matrix)
            self._layout[name] = {
                fact: getattr(matrix, fact) for fact in ("rows", "columns", "group_size", "paired")
            }
            for part, tensor in matrix.tensors().items():
                self.register_buffer(f"{name}_{part}", tensor)
        for name in ("b13", "b2"):
            self.register_buffer(name, getattr(weights, name))

    def tensors(self) -> list[torch.Tensor]:
        """All of them, w13's codes first."""
        return [buffer for buffer in self.buffers(recurse=False) if buffer is not None]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        scales = self.w13_scales
        assert isinstance(scales, torch.Tensor)
        return scales.dtype

    def weights(self) -> ExpertWeights:
        """Views of the buffers as they are now."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("b13", "b2")}
        for name in MATRICES:
            parts = ("codes", "scales", "zeros", "permutation")
            tensors = {part: getattr(self, f"{name}_{part}", None) for part in parts}
            found[name] = Int4Matrix(**tensors, **self._layout[name])  # type: ignore[arg-type]
        return ExpertWeights(**found)

    def extra_repr(self) -> str:
        cfg = self.cfg
        shape = f"E={cfg.num_experts}, H={cfg.hidden_size}, I={cfg.intermediate_size}"
        return f"{shape}, {cfg.activation}, {cfg.quant}"
