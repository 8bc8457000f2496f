"""`MoERuntime`: one mixture-of-experts layer, ready before the first token."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from moert.build import Built, build, resolve_config
from moert.call import call_key
from moert.checks import check_forward, check_logits, check_num_valid, rows_of
from moert.config import MoEConfig
from moert.errors import ConfigError, InputError, StateError, WeightsError
from moert.plan import PlanReport
from moert.streams import refuse_inside_capture
from moert.topk import TopK, as_topk
from moert.weights import ExpertWeights

_LIVE: weakref.WeakSet[MoERuntime] = weakref.WeakSet()


class MoERuntime:
    """Runs one layer at decode time: no allocation, no copy, no host decision per token.

    Args:
        model_cfg: a `MoEConfig`, a dict of its fields, a Hugging Face config object, or a checkpoint path.
        weights: an `ExpertWeights`; read from the config's checkpoint where absent.
        layer: which layer of the checkpoint; needed only to read weights.
        device: where to run; the weights' device, else the current GPU, else the CPU.
        backend: "auto", "triton", "aiter" or "torch".
        max_tokens: the arena's size; more rows a call are done in chunks of this many.
        buckets: batch sizes to capture; default 1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512.
        graphs: "own" captures and replays; "host": an engine captures whole-model graphs around
            `forward`, nothing is captured here; "off": neither, and calls inside a capture are refused.
        sort_policy: 0 measured, 1 one-shot, 2 multi-phase, 3 none.
        tune: "auto" measures what no record holds, "off" never measures, "force" measures again.
        share: another runtime: same arena, plans and options, other weights of the same geometry. Two
            graphs captured by others from runtimes of one share group must not run at the same time.

    Raises:
        ConfigError, WeightsError, UnsupportedError: what was given does not fit; nothing is left behind.
        StateError: the current stream is capturing, or `share` is closed; likewise.
    """

    def __init__(
        self,
        model_cfg: MoEConfig | dict[str, Any] | str | Path | Any,
        weights: ExpertWeights | None = None,
        *,
        layer: int | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        max_tokens: int | None = None,
        buckets: tuple[int, ...] | list[int] | None = None,
        graphs: str | None = None,
        sort_policy: int | None = None,
        tune: str | None = None,
        share: MoERuntime | None = None,
    ) -> None:
        self._refusal: str | None = "the runtime was not built"
        self.cfg = resolve_config(model_cfg)
        if share is not None:
            if not isinstance(share, MoERuntime):
                raise ConfigError(f"share: got {type(share).__name__}, need a MoERuntime")
            share._usable("share")
        self._built: Built = build(
            self.cfg,
            weights,
            layer=layer,
            device=device,
            backend=backend,
            max_tokens=max_tokens,
            buckets=buckets,
            graphs=graphs,
            sort_policy=sort_policy,
            tune=tune,
            share=None if share is None else share._built,
        )
        built = self._built
        self._group, self._executor = built.group, built.executor
        # bound once: a call looks up as little as it can
        self._lock, self._run = built.group.lock, built.executor.run
        self._capturing = built.executor.capturing
        self.device = built.group.device
        self._max_tokens = built.group.options.max_tokens
        self._counts = {"calls": 0, "chunks": 0, "routes": 0}
        self._lacks_bias = (
            self.cfg.routing.correction_bias and built.weights.correction_bias is None
        )
        # calls leave the caller's current device alone; with one GPU there is nothing to switch
        self._switch_device = self.device.type == "cuda" and torch.cuda.device_count() > 1
        self._refusal = None
        _LIVE.add(self)

    def forward(
        self,
        x: torch.Tensor,
        topk: TopK | tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
        *,
        num_valid: torch.Tensor | None = None,
        pad: str = "keep",
    ) -> torch.Tensor:
        """The experts' output of T tokens, enqueued on the current stream of the runtime's device.

        Args:
            x: [T, H] of the model's dtype, unit inner stride.
            topk: `TopK(weights [T, K] float32 or the model's dtype, ids [T, K] int32 or int64)`, or a pair
                in either order; ids outside 0..E-1 contribute zero.
            out: [T, H] like x; the last kernel writes straight into it. Without it the result lives in one
                of two alternating buffers of the share group: it is overwritten by the call after next.
            num_valid: int32 scalar on the device: rows from there on are not read.
            pad: what those rows of `out` get: "keep" leaves them as they are, "zero" clears them.

        Returns:
            out, or the runtime's own buffer, [T, H].

        Raises:
            InputError: an argument does not fit; nothing was launched or changed.
            StateError: closed, forked, or inside a capture that it cannot join.
        """
        if self._refusal is not None:
            self._usable("forward")
        if type(topk) is not TopK:
            topk = as_topk(topk)
        if self._switch_device and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._forward(x, topk, out, num_valid, pad)
        return self._forward(x, topk, out, num_valid, pad)

    __call__ = forward

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
                return self._forward_chunks(x, topk, result, num_valid, pad)
            self._run(key, x, topk, result, num_valid, capturing)
            if out is None:
                self._group.results_for(capturing).take_output()
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

    def _forward_chunks(
        self,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        pad: str,
    ) -> torch.Tensor:
        """More than max_tokens rows: slices of max_tokens, each with its own share of the live count."""
        check_forward(self.cfg, self.device, x, topk, out, num_valid, pad)
        for start in range(0, x.shape[0], self._max_tokens):
            rows = slice(start, start + self._max_tokens)
            live = None
            if num_valid is not None:
                live = self._executor.rows_left(num_valid, start)
            chunk = TopK(topk.weights[rows], topk.ids[rows])
            self._forward(x[rows], chunk, out[rows], live, pad)
            self._counts["calls"] -= 1
            self._counts["chunks"] += 1
        self._counts["calls"] += 1
        return out

    def route(self, router_logits: torch.Tensor, *, num_valid: torch.Tensor | None = None) -> TopK:
        """Expert ids and weights by the config's routing rule.

        Args:
            router_logits: [T, E] float32, bfloat16 or float16, unit inner stride, T <= max_tokens.
            num_valid: int32 scalar on the device: rows from there on are neither read nor written.

        Returns:
            TopK(weights [T, K] float32, ids [T, K] int32) in one of two alternating buffers of the share
            group, overwritten by the call after next.

        Raises:
            InputError: an argument does not fit; nothing was launched or changed.
            WeightsError: the rule has a correction bias and the weights do not.
            StateError: closed, forked, or inside a capture that it cannot join.
        """
        self._usable("route")
        if self._lacks_bias:
            raise WeightsError(
                "correction_bias: missing, need [E] float32 because routing.correction_bias=True"
            )
        check_logits(self.cfg, self.device, router_logits)
        if num_valid is not None:
            check_num_valid(self.device, num_valid)
        tokens = router_logits.shape[0]
        if tokens > self._max_tokens:
            raise InputError(
                f"router_logits: got {tokens} rows, need at most max_tokens={self._max_tokens}"
            )
        if self._switch_device and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._route(router_logits, num_valid)
        return self._route(router_logits, num_valid)

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

    @property
    def weights(self) -> ExpertWeights:
        """The layer's tensors; a closed runtime has none."""
        self._usable("weights")
        return self._built.weights

    def plan(self) -> PlanReport:
        """What was chosen for every bucket, why, and from where."""
        with self._open("plan") as built:
            return built.report()

    def memory(self) -> dict[str, int]:
        """Bytes by purpose: weights (this layer's, a second copy that its backend needs too), and what the
        share group holds together; total."""
        with self._open("memory") as built:
            weights = built.weights.nbytes + built.backend.packed_bytes
            sizes = {"weights": weights, **self._group.memory()}
            sizes["routing"] = self._executor.routing_bytes
            return {**sizes, "total": sum(sizes.values())}

    def stats(self) -> dict[str, int]:
        """Counts since construction: calls, replays, eager, captured, rebinds, chunks, routes."""
        return {**self._counts, **self._executor.counts}

    def update_weights(self, **tensors: torch.Tensor) -> None:
        """Copy new values into the weights in place; captured graphs stay valid.

        Waits for everything in flight on the device first, so that no running replay sees half of them.

        Args:
            tensors: by name (w13, w2, b13, b2, correction_bias, …), each of the shape it has now; the
                same dtype or one that converts to it, any device.

        Raises:
            WeightsError: a name that these weights do not have, or another shape; nothing was changed.
            StateError: closed, forked, or the current stream is capturing.
        """
        with self._open("update_weights") as built:
            refuse_inside_capture(self.device, "update_weights")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            built.weights.copy_(tensors)
            built.backend.weights_changed()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Free graphs at once, and with the last runtime of the share group the arena; idempotent.

        Raises:
            StateError: the current stream is capturing; nothing was freed.
        """
        if self._refusal is not None:
            return
        with self._lock:
            if self._refusal is None:  # not closed by another thread meanwhile
                refuse_inside_capture(self.device, "close")
                self._refusal = "the runtime is closed"
                _LIVE.discard(self)
                self._built.close()

    def __enter__(self) -> MoERuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _open(self, what: str) -> Iterator[Built]:
        """The built layer, which nobody closes meanwhile."""
        self._usable(what)  # first: in a forked child the lock may never be free
        with self._lock:
            self._usable(what)
            yield self._built

    def _usable(self, what: str) -> None:
        if self._refusal is not None:
            raise StateError(f"{what}: {self._refusal}; make a new MoERuntime")

    def _refuse_copy(self, *_: object) -> NoReturn:
        raise StateError(
            "a MoERuntime holds device memory and captured graphs and cannot be pickled or copied; make a "
            "new one from the config and weights, with share= for the same arena"
        )

    __reduce_ex__ = __deepcopy__ = __copy__ = _refuse_copy

    def __repr__(self) -> str:
        state = self._refusal or f"backend={self._built.backend.name}, {self.device}"
        return f"MoERuntime({self.cfg!r}, {state})"


def _refuse_after_fork() -> None:
    for runtime in list(_LIVE):
        runtime._refusal = (
            "the process was forked after it was made: GPU state does not survive that"
        )


os.register_at_fork(after_in_child=_refuse_after_fork)
