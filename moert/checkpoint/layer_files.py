"""One layer's tensors by name: what is there, of which shape and dtype, and what is not."""

from __future__ import annotations

import difflib

import torch

from moert.checkpoint.files import FLOATS, TensorFiles
from moert.checkpoint.names import FUSED_B2, FUSED_B13, SHARED, SHARED_GATE, Names
from moert.config import MoEConfig
from moert.errors import UnsupportedError, WeightsError
from moert.shared_experts import fill_shared

Shape = tuple[int, ...]


class LayerFiles:
    """Names checked, shapes checked.

    Args:
        block: what all names start with, as `model.layers.3.mlp.`.
        problems: collects what is wrong; None raises the first.
    """

    def __init__(
        self,
        files: TensorFiles,
        block: str,
        names: Names,
        cfg: MoEConfig,
        device: torch.device,
        problems: list[str] | None = None,
    ) -> None:
        self.files, self.block, self.names, self.cfg, self.device = files, block, names, cfg, device
        self.problems = problems

    def small(self) -> dict[str, str]:
        """The names of the router's tensors, checked; read last, but missed first."""
        cfg, names = self.cfg, self.names
        found = {"router_weight": self._first(names.router, (cfg.num_experts, cfg.hidden_size))}
        if names.router_bias:
            found["router_bias"] = self._first(names.router_bias, (cfg.num_experts,))
        if cfg.routing.correction_bias:
            found["correction_bias"] = self._first(names.correction_bias, (cfg.num_experts,))
        if cfg.shared_gate:
            found["shared_gate"] = self._first(SHARED_GATE, (1, cfg.hidden_size))
        return found

    def check_shared(self) -> None:
        """The shared expert's matrices: of one size that n experts of size I hold, and no fewer."""
        if self.cfg.shared_experts:
            gate, up, down = self._shared()
            hidden, inner = self.cfg.hidden_size, self.cfg.intermediate_size
            count = self.cfg.shared_experts
            sizes = range((count - 1) * inner + 1, count * inner + 1)
            size = self.files.shape(gate)[0] if gate in self.files else sizes[-1]
            if size not in sizes:
                self.fail(
                    f"{gate}: {size} rows, need {sizes[0]} to {sizes[-1]} because shared_experts={count} of "
                    f"intermediate_size={inner}"
                )
            for name, shape in (
                (gate, (size, hidden)),
                (up, (size, hidden)),
                (down, (hidden, size)),
            ):
                self.check_tensor(name, shape)

    def read_shared(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        """Fill w13 [n, 2I, H] and w2 [n, H, I], the shared experts of the layer's tensors."""
        if self.cfg.shared_experts:
            gate, up, down = (self.files.read(name) for name in self._shared())
            fill_shared(w13, w2, gate, up, down)

    def _shared(self) -> list[str]:
        """The names of the shared expert's gate, up and down."""
        names = self.names
        prefixes = [self.block + prefix for prefix in SHARED]
        prefix = next((p for p in prefixes if p + names.down in self.files), prefixes[0])
        return [prefix + leaf for leaf in (names.gate, names.up, names.down)]

    def read_small(self, names: dict[str, str]) -> dict[str, torch.Tensor]:
        """What `small` named: the router's tensors in their own dtype, the correction bias in float32."""
        loaded: dict[str, torch.Tensor] = {}
        for key, name in names.items():
            dtype = torch.float32 if key == "correction_bias" else None
            loaded[key] = self.files.read(name).to(device=self.device, dtype=dtype, copy=True)
        return loaded

    def check_fused_biases(self) -> None:
        """Biases of all experts in one tensor each."""
        cfg = self.cfg
        self.check_tensor(self.block + FUSED_B13, (cfg.num_experts, 2 * cfg.intermediate_size))
        self.check_tensor(self.block + FUSED_B2, (cfg.num_experts, cfg.hidden_size))

    def read_fused_biases(self) -> dict[str, torch.Tensor]:
        """b13 [E, 2I], gate before up, and b2 [E, H], in cfg.dtype."""
        self.check_fused_biases()
        b13 = self.files.read(self.block + FUSED_B13)
        if self.names.fused_interleaved:
            b13 = torch.cat((b13[:, 0::2], b13[:, 1::2]), dim=1)
        dtype = self.cfg.torch_dtype
        return {
            name: tensor.to(device=self.device, dtype=dtype, copy=True)
            for name, tensor in (("b13", b13), ("b2", self.files.read(self.block + FUSED_B2)))
        }

    def expert(self, e: int, leaf: str) -> str:
        """The full name of a tensor of one expert."""
        return f"{self.block}experts.{e}.{leaf}"

    def check_no_more_experts(self, leaf: str) -> None:
        """Expert number E must not be there."""
        name = self.expert(self.cfg.num_experts, leaf)
        if name in self.files:
            self.fail(f"{name}: exists, but num_experts={self.cfg.num_experts} was expected")

    def shape(self, name: str) -> Shape:
        """The shape of a tensor that has to be there.

        Raises:
            WeightsError: it is not; near names are told.
        """
        if name not in self.files:
            raise WeightsError(f"{name}: missing from {self.files.path}{self._near(name)}")
        return self.files.shape(name)

    def check_tensor(self, name: str, *shapes: Shape, dtypes: tuple[str, ...] = FLOATS) -> bool:
        """Whether a tensor is there, of one of the shapes; its dtype too, unless reading it will tell."""
        try:
            given = self.shape(name)
            if given not in shapes:
                needed = " or ".join(str(list(shape)) for shape in shapes)
                raise WeightsError(f"{name}: shape {list(given)}, need {needed}")
            if self.problems is not None:
                self.files.check_dtype(name, dtypes)
        except (WeightsError, UnsupportedError) as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))
            return False
        return True

    def fail(self, text: str) -> None:
        """Collect a problem, or raise it as a WeightsError."""
        if self.problems is None:
            raise WeightsError(text)
        self.problems.append(text)

    def _first(self, leaves: tuple[str, ...], shape: Shape) -> str:
        options = [self.block + leaf for leaf in leaves]
        name = next((option for option in options if option in self.files), options[0])
        self.check_tensor(name, shape)
        return name

    def _near(self, name: str) -> str:
        # comparing against one layer's names only: a large checkpoint has 100,000 of them
        local = [key for key in self.files.names() if key.startswith(self.block)]
        near = difflib.get_close_matches(name, local, n=3, cutoff=0.8)
        return f"; near names there: {', '.join(near)}" if near else ""
