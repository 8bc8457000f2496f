"""Where the steps before a whole block's experts put a call's routing: made once, shared by all layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moert.arena import Arena, Field, layout
from moert.topk import TopK


class BlockRows:
    """Scratch for calls of up to `rows` tokens.

    Args:
        fields: of `Backend.block_fields`, for as many rows.
    """

    def __init__(self, device: torch.device, rows: int, fields: Iterable[Field]) -> None:
        fields = tuple(fields)
        self.rows = rows
        self.arena = Arena(device, layout(fields)[1])
        self.views = self.arena.views(fields)
        self._slots: dict[int, TopK] = {}

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    def slots(self, tokens: int) -> TopK:
        """The routing of all K + n slots, [tokens, K + n]; no storage is allocated."""
        found = self._slots.get(tokens)
        if found is None:
            weights, ids = self.views["slot_weights"], self.views["slot_ids"]
            found = self._slots[tokens] = TopK(weights[:tokens], ids[:tokens])
        return found
