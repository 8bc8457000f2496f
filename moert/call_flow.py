"""The way of one call through a runtime: which result it gets, chunks, calls inside a capture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moert.build import Built
from moert.call import Key, call_key
from moert.checks import check_forward, rows_of
from moert.config import MoEConfig
from moert.errors import StateError
from moert.lifetime import Lifetime
from moert.topk import TopK


class CallFlow(Lifetime):
    """What `MoERuntime` does with calls: on the runtime's device, under the lock of its share group."""

    cfg: MoEConfig

    def _begin(self, built: Built) -> None:
        self._group, self._executor = built.group, built.executor
        # bound once: a call looks up as little as it can
        self._run, self._capturing = built.executor.run, built.executor.capturing
        self._max_tokens = built.group.options.max_tokens
        self._counts = {"calls": 0, "chunks": 0, "routes": 0}
        self._checked_block: Key | None = None
        super()._begin(built)

    def _forward(
        self,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor | None,
        num_valid: torch.Tensor | None,
        pad: str,
    ) -> torch.Tensor:
        with self._lock:
            if self._refusal is not None:  # closed by another thread meanwhile
                self._usable("forward")
            capturing = self._capturing()
            if capturing:
                self._fits_capture("forward", rows_of("x", x, f"H={self.cfg.hidden_size}"))
            result = self._own_result(x, capturing) if out is None else out
            try:
                key = call_key(x, topk, result, num_valid, pad)
            except (AttributeError, RuntimeError):  # no tensor, or one without addresses
                check_forward(self.cfg, self.device, x, topk, result, num_valid, pad)
                raise
            if len(key[4]) == 2 and key[4][0] > self._max_tokens:
                return self._in_chunks(self._forward, x, topk, result, num_valid, pad)
            self._run(key, x, topk, result, num_valid, capturing)
            if out is None:
                self._group.results_for(capturing).take_output()
            self._counts["calls"] += 1
        return result

    def _forward_block(
        self,
        x: torch.Tensor,
        topk: TopK | None,
        out: torch.Tensor | None,
        num_valid: torch.Tensor | None,
        pad: str,
    ) -> torch.Tensor:
        """A call whose K + n slots are filled first: from `topk` of K slots, or, without it, by routing."""
        what, cfg, group = "forward" if topk is not None else "forward_block", self.cfg, self._group
        with self._lock:
            if self._refusal is not None:  # closed by another thread meanwhile
                self._usable(what)
            capturing, tokens = self._capturing(), rows_of("x", x, f"H={cfg.hidden_size}")
            if capturing:
                self._fits_capture(what, tokens)
            result = self._own_result(x, capturing) if out is None else out
            if tokens > self._max_tokens:
                return self._in_chunks(self._forward_block, x, topk, result, num_valid, pad)
            slots = group.block_for(capturing).slots(tokens)
            given = slots if topk is None else topk
            try:
                key = call_key(x, given, result, num_valid, pad)
            except (AttributeError, RuntimeError):  # no tensor, or one without addresses
                check_forward(cfg, self.device, x, topk, result, num_valid, pad)
                raise
            if key != self._checked_block:
                check_forward(cfg, self.device, x, topk, result, num_valid, pad)
                self._checked_block = key
            if tokens:
                routed = topk is not None
                self._executor.fill_slots(key, x, given, result, num_valid, routed, capturing)
                if routed:
                    key = call_key(x, slots, result, num_valid, pad)
                self._run(key, x, slots, result, num_valid, capturing)
            if out is None:
                group.results_for(capturing).take_output()
            self._counts["calls"] += 1
        return result

    def _own_result(self, x: torch.Tensor, capturing: bool) -> torch.Tensor:
        """Where a call without out= puts its result."""
        tokens = rows_of("x", x, f"H={self.cfg.hidden_size}")
        if tokens > self._max_tokens:
            return torch.empty_like(x)
        return self._group.results_for(capturing).peek_output(tokens)

    def _fits_capture(self, what: str, tokens: int) -> None:
        if tokens > (most := self._group.largest_bucket):
            raise StateError(
                f"{what}: {tokens} rows inside a capture, the arena for captures holds the largest "
                f"bucket, {most}; raise buckets="
            )

    def _in_chunks(
        self,
        call: Callable[..., torch.Tensor],
        x: torch.Tensor,
        topk: TopK | None,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        pad: str,
    ) -> torch.Tensor:
        """More than max_tokens rows: slices of max_tokens, each with its own share of the live count.

        Args:
            call: `_forward` or `_forward_block`.
        """
        check_forward(self.cfg, self.device, x, topk, out, num_valid, pad)
        for start in range(0, x.shape[0], self._max_tokens):
            rows = slice(start, start + self._max_tokens)
            live = None
            if num_valid is not None:
                live = self._executor.rows_left(num_valid, start)
            chunk = None if topk is None else TopK(topk.weights[rows], topk.ids[rows])
            call(x[rows], chunk, out[rows], live, pad)
            self._counts["calls"] -= 1
            self._counts["chunks"] += 1
        self._counts["calls"] += 1
        return out

    def _route(self, logits: torch.Tensor, num_valid: torch.Tensor | None) -> TopK:
        group, tokens = self._group, logits.shape[0]
        with group.lock:
            self._usable("route")  # not closed by another thread meanwhile
            capturing = self._capturing()
            if capturing:
                self._fits_capture("route", tokens)
            out = group.results_for(capturing).next_topk(tokens)
            if tokens:
                self._executor.route(logits, out, num_valid, capturing)
            self._counts["routes"] += 1
        return out
