"""Runs checked calls of one layer on a CPU: no graphs, no streams, the live count is read on the host."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from moert.backends.base import Backend
from moert.share import ShareGroup
from moert.topk import TopK


class HostExecutor:
    """Programs of one layer, for every plan of its share group."""

    def __init__(self, group: ShareGroup, backend: Backend) -> None:
        self.group = group
        self.counts = {"replays": 0, "eager": 0, "captured": 0, "rebinds": 0}
        arena = group.arena
        assert arena is not None
        self._router = backend.router(
            group.options.max_tokens, group.call.no_limit, group.kernel_cache
        )
        self._limits = [plan.tokens for plan in group.plans]
        self._programs = [
            backend.program(
                plan.tokens,
                plan.choice,
                arena.views(plan.fields),
                kernel_cache=group.kernel_cache,
            )
            for plan in group.plans
        ]

    def run(
        self,
        key: Any,
        admit: Callable[[], None],
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        pad_zero: bool,
        capturing: bool = False,
    ) -> None:
        """Compute one call of 1..max_tokens rows; arguments as for `DeviceExecutor.run`."""
        admit()
        call = self.group.call
        call.set(x, topk, out, num_valid, pad_zero)
        self._programs[bisect_left(self._limits, x.shape[0])].run(call, 0)
        self.counts["eager"] += 1

    def capturing(self) -> bool:
        """There are no captures on a CPU."""
        return False

    def route(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, capturing: bool
    ) -> None:
        """Route 1..max_tokens rows into `out`."""
        self._router.run(logits, out, num_valid, 0)

    def close(self) -> None:
        self._programs = []
