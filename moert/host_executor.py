"""Runs checked calls of one layer on a CPU: no graphs, no streams, the live count is read on the host."""

from __future__ import annotations

from bisect import bisect_left

import torch

from moert.backends.base import Backend, BlockSteps, Router
from moert.block_rows import BlockRows
from moert.call import Key
from moert.checks import check_forward
from moert.labels import profiling
from moert.share import ShareGroup
from moert.topk import TopK


def layer_router(group: ShareGroup, backend: Backend) -> Router | None:
    """The routing step of a layer; a shard of fewer than K experts has none."""
    cfg = group.described
    if not cfg.can_route:
        return None
    return backend.router(cfg, group.options.max_tokens, group.call.no_limit, group.kernel_cache)


def layer_block(group: ShareGroup, backend: Backend, block: BlockRows | None) -> BlockSteps | None:
    """The steps before this layer's experts on the group's rows; None where the group has none."""
    if block is None:
        return None
    return backend.block_steps(group.described, block.rows, block.views, group.kernel_cache)


class HostExecutor:
    """Programs of one layer, for every plan of its share group."""

    def __init__(self, group: ShareGroup, backend: Backend) -> None:
        self.group = group
        self.counts = {"replays": 0, "eager": 0, "captured": 0, "rebinds": 0}
        arena = group.arena
        assert arena is not None
        self._router = layer_router(group, backend)
        self._block = layer_block(group, backend, group.block)
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
        key: Key,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        capturing: bool,
    ) -> None:
        """Compute one call of up to max_tokens rows; arguments as for `DeviceExecutor.run`."""
        group = self.group
        check_forward(group.cfg, group.device, x, topk, out, num_valid, key[17])
        if x.shape[0]:
            group.call.set(key, x, topk, out, num_valid)
            program = self._programs[bisect_left(self._limits, x.shape[0])]
            program.launch(group.call, 0, group.labels)
            group.call.release()
            self.counts["eager"] += 1

    def rows_left(self, num_valid: torch.Tensor, start: int) -> torch.Tensor:
        """The live count of the rows from `start` on."""
        return self.group.rows_left(num_valid, start)

    @property
    def routing_bytes(self) -> int:
        """Scratch of the routing step."""
        return 0 if self._router is None else self._router.nbytes

    def capturing(self) -> bool:
        """There are no captures on a CPU."""
        return False

    def route(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, capturing: bool
    ) -> None:
        """Route 1..max_tokens rows into `out`."""
        assert self._router is not None
        if profiling():
            with self.group.labels.step("route", logits.shape[0]):
                self._router.run(logits, out, num_valid, 0)
        else:
            self._router.run(logits, out, num_valid, 0)

    def fill_slots(
        self,
        key: Key,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        routed: bool,
        capturing: bool,
    ) -> None:
        """Fill the group's slots for a checked call; arguments as for `DeviceExecutor.fill_slots`."""
        group, steps = self.group, self._block
        assert steps is not None
        group.call.set(key, x, topk, out, num_valid)
        try:
            (steps.take if routed else steps.route)(group.call, 0, group.labels)
        finally:
            group.call.release()

    def close(self) -> None:
        self._programs = []
        del self._router, self._block
