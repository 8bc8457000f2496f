"""The int4 experts of one layer: read, brought into order and packed expert by expert."""

from __future__ import annotations

from typing import Any

import torch

from moert.checkpoint.formats import format_of
from moert.checkpoint.layer_files import LayerFiles
from moert.checkpoint.names import FUSED_B13
from moert.checkpoint.packed import INTS, Decoded
from moert.checkpoint.packing import Packing
from moert.config import MoEConfig
from moert.errors import UnsupportedError, WeightsError
from moert.quantization.int4_layout import Int4Matrix, empty_matrix, put_expert


def same_quant(cfg: MoEConfig, packing: Packing | None) -> None:
    """Refuse to read int4 experts as something else than they are.

    Raises:
        WeightsError: the checkpoint has other ones.
    """
    if cfg.quant is not None and packing is not None and cfg.quant != packing.quant:
        raise WeightsError(f"quant={cfg.quant}: the checkpoint is {packing.quant} ({packing})")


class Int4Reader(LayerFiles):
    """Packed matrices `experts.<e>.<gate|up|down>.<suffix>`.

    Columns that an activation order has torn apart are sorted by group. Those of the down matrix are rows of
    gate and up, which are stored in that order instead; those of gate and up stay behind as a permutation of
    the layer's input.
    """

    def __init__(self, packing: Packing, *args: Any) -> None:
        super().__init__(*args)
        self.packing, self.format = packing, format_of(packing)
        names = (self.names.gate, self.names.up, self.names.down)
        self.gate, self.up, self.down = (name.removesuffix(".weight") for name in names)

    def check(self) -> None:
        """All names, shapes and dtypes; reads no data."""
        self.small()
        self._check_matrices()
        if self.cfg.bias:
            self._check_biases()

    def all(self) -> dict[str, Any]:
        small = self.small()
        self._check_matrices()
        if self.cfg.bias:
            self._check_biases()
        loaded = self._matrices()
        return loaded | self.read_small(small)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        inner, hidden = self.cfg.intermediate_size, self.cfg.hidden_size
        return {self.gate: (inner, hidden), self.up: (inner, hidden), self.down: (hidden, inner)}

    def _check_matrices(self) -> None:
        main = self.format.main
        first = self.expert(0, self.down)
        if f"{first}.{main}" not in self.files and f"{first}.weight" in self.files:
            self.fail(
                f"{first}.{main}: missing, but there is {first}.weight: these experts are not quantised; "
                "give a config with quant=None to load them"
            )
            return
        for e in range(self.cfg.num_experts):
            for leaf, (n, k) in self._shapes().items():
                self._check_matrix(self.expert(e, leaf), n, k)
        self.check_no_more_experts(f"{self.down}.{main}")

    def _check_matrix(self, base: str, n: int, k: int) -> None:
        try:
            parts = self.format.parts(base, n, k)
        except WeightsError as error:
            self.fail(str(error))
            return
        for suffix, part in parts.items():
            self.check_tensor(f"{base}.{suffix}", part.shape, dtypes=part.dtypes)
        index = f"{base}.{self.format.group_index}"
        if index in self.files:
            self.check_tensor(index, (k,), dtypes=INTS)

    def _matrices(self) -> dict[str, Any]:
        cfg = self.cfg
        experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        assert cfg.quant is not None
        where = (cfg.quant, cfg.torch_dtype, self.device)
        w13 = empty_matrix(
            experts, 2 * inner, hidden, *where, paired=True, permuted=self._has_order()
        )
        w2 = empty_matrix(experts, hidden, inner, *where, paired=False)
        biases = self._read_biases() if cfg.bias else {}
        for e in range(experts):
            rows = self._put(w13, w2, e)
            if rows is not None and biases:
                both = torch.cat((rows, rows + inner)).to(self.device)
                biases["b13"][e] = biases["b13"][e][both]
        return {"w13": w13, "w2": w2, **biases}

    def _put(self, w13: Int4Matrix, w2: Int4Matrix, e: int) -> torch.Tensor | None:
        """Pack one expert; the order of its I inner rows, if that is not their own."""
        gate, up, down = (self._decoded(e, leaf) for leaf in (self.gate, self.up, self.down))
        if not _equal(gate.order, up.order):
            raise UnsupportedError(
                f"{self.expert(e, self.gate)} and {self.expert(e, self.up)}: their columns are in two "
                f"different orders ({self.format.group_index}), but both read one input; need the same order"
            )
        put_expert(w2, e, down.codes, down.scales, down.zeros)
        rows, order = down.order, gate.order

        def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return torch.cat((first, second) if rows is None else (first[rows], second[rows]))

        zeros = None
        if gate.zeros is not None and up.zeros is not None:
            zeros = both(gate.zeros, up.zeros)
        put_expert(w13, e, both(gate.codes, up.codes), both(gate.scales, up.scales), zeros, order)
        return rows

    def _decoded(self, e: int, leaf: str) -> Decoded:
        return self.format.read(self.files, self.expert(e, leaf), *self._shapes()[leaf])

    def _has_order(self) -> bool:
        """Whether any expert's input columns are in another order than their own."""
        bases = (self.expert(e, self.gate) for e in range(self.cfg.num_experts))
        hidden, files = self.cfg.hidden_size, self.files
        orders = (self.format.order(b, self.format.index(files, b), hidden) for b in bases)
        return any(order is not None for order in orders)

    def _check_biases(self) -> None:
        if self.block + FUSED_B13 in self.files:
            self.check_fused_biases()
            return
        for e in range(self.cfg.num_experts):
            for leaf, (n, _) in self._shapes().items():
                self.check_tensor(self.expert(e, f"{leaf}.bias"), (n,))

    def _read_biases(self) -> dict[str, torch.Tensor]:
        """b13 [E, 2I] and b2 [E, H] in cfg.dtype, of one tensor each or of one for every matrix."""
        if self.block + FUSED_B13 in self.files:
            return self.read_fused_biases()

        def stacked(*leaves: str) -> torch.Tensor:
            names = [[self.expert(e, f"{leaf}.bias") for leaf in leaves] for e in self._experts()]
            rows = [torch.cat([self.files.read(name) for name in row]) for row in names]
            return torch.stack(rows).to(device=self.device, dtype=self.cfg.torch_dtype)

        return {"b13": stacked(self.gate, self.up), "b2": stacked(self.down)}

    def _experts(self) -> range:
        return range(self.cfg.num_experts)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
