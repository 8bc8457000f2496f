"""`MoERuntime`: one mixture-of-experts layer, ready before the first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moert.build import Built, build, resolve_config
from moert.call_flow import CallFlow
from moert.checks import check_logits, check_num_valid
from moert.config import MoEConfig
from moert.errors import ConfigError, InputError, MoertError, UnsupportedError, WeightsError
from moert.plan import PlanReport
from moert.streams import refuse_inside_capture
from moert.topk import TopK, as_topk
from moert.weights import ExpertWeights, Matrix


class MoERuntime(CallFlow):
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
        super().__init__()
        self.cfg = resolve_config(model_cfg)
        if share is not None:
            if not isinstance(share, MoERuntime):
                raise ConfigError(f"share: got {type(share).__name__}, need a MoERuntime")
            share._usable("share")
        built = build(
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
        self._unroutable = self._why_not_route("route", built.weights)
        self._no_block = self._why_not_block(built)
        self._fills_slots = bool(self.cfg.shared_experts)
        # calls leave the caller's current device alone; with one GPU there is nothing to switch
        self._switch_device = built.group.device.type == "cuda" and torch.cuda.device_count() > 1
        self._begin(built)

    def forward(
        self,
        x: torch.Tensor,
        topk: TopK | tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
        *,
        num_valid: torch.Tensor | None = None,
        pad: str = "keep",
    ) -> torch.Tensor:
        """The routed experts' output of T tokens, enqueued on the current stream of the runtime's device.

        Shared experts are not in it: those who route on their own usually add them on their own, too;
        `forward_block` is for the sum. A layer that has them is launched with n slots of nobody a token; a
        config with shared_experts=0 does without them.

        Same tensors, same bits, every time. On a GPU, addresses that are not multiples of 16 bytes, and row
        strides that are not multiples of 16 elements though H is, take the plan of the largest T, kernel by
        kernel: right, slower, other bits.

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
        call = self._forward_block if self._fills_slots else self._forward
        if self._switch_device and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return call(x, topk, out, num_valid, pad)
        return call(x, topk, out, num_valid, pad)

    __call__ = forward

    def forward_block(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None = None,
        *,
        num_valid: torch.Tensor | None = None,
        pad: str = "keep",
    ) -> torch.Tensor:
        """The whole block: router (logits in float32), routing rule, routed and shared experts.

        As `forward` otherwise. Ahead of the kernels that `plan()` names, two are launched one by one: router
        logits and routing.

        Args:
            x: [T, H] of the model's dtype, unit inner stride.
            out, num_valid, pad: see `forward`.

        Returns:
            out, or the runtime's own buffer, [T, H].

        Raises:
            InputError: an argument does not fit; nothing was launched or changed.
            WeightsError: the weights have no router_weight, or lack the correction bias or the shared gate
                that the config tells of.
            UnsupportedError: there are fewer than K experts here.
            StateError: closed, forked, or inside a capture that it cannot join.
        """
        self._usable("forward_block")
        if self._no_block is not None:
            kind, reason = self._no_block
            raise kind(reason)
        if self._switch_device and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._forward_block(x, None, out, num_valid, pad)
        return self._forward_block(x, None, out, num_valid, pad)

    def route(self, router_logits: torch.Tensor, *, num_valid: torch.Tensor | None = None) -> TopK:
        """Expert ids and weights by the config's routing rule.

        Args:
            router_logits: [T, E] float32, bfloat16 or float16, unit inner stride, T <= max_tokens.
            num_valid: int32 scalar on the device: rows from there on are not written, and what they hold
                makes no difference.

        Returns:
            TopK(weights [T, K] float32, ids [T, K] int32) in one of two alternating buffers of the share
            group, overwritten by the call after next.

        Raises:
            InputError: an argument does not fit; nothing was launched or changed.
            WeightsError: the rule has a correction bias and the weights do not.
            UnsupportedError: there are fewer than K experts here.
            StateError: closed, forked, or inside a capture that it cannot join.
        """
        self._usable("route")
        if self._unroutable is not None:
            kind, reason = self._unroutable
            raise kind(reason)
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

    def _why_not_block(self, built: Built) -> tuple[type[MoertError], str] | None:
        weights = built.weights
        if weights.router_weight is None:
            return WeightsError, "router_weight: missing, forward_block needs [E, H]"
        if built.group.block is None:
            return WeightsError, (
                "router_weight: given, but the runtime that is shared was made without one"
            )
        if self.cfg.shared_gate and weights.shared_gate is None:
            return WeightsError, "shared_gate: missing, need [1, H] because shared_gate=True"
        return self._why_not_route("forward_block", weights)

    def _why_not_route(
        self, what: str, weights: ExpertWeights
    ) -> tuple[type[MoertError], str] | None:
        cfg = self.cfg
        if not cfg.can_route:
            return UnsupportedError, (
                f"{what}: top_k={cfg.top_k} exceeds num_experts={cfg.num_experts}, so these experts are a "
                "shard of a layer's; route where all are known, with ids of others outside 0..E-1"
            )
        if cfg.routing.correction_bias and weights.correction_bias is None:
            return WeightsError, (
                "correction_bias: missing, need [E] float32 because routing.correction_bias=True"
            )
        return None

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

    def update_weights(self, **tensors: Matrix) -> None:
        """Copy new values into the weights in place; captured graphs stay valid.

        Waits for everything in flight on the device first, so that no running replay sees half of them.

        Args:
            tensors: by name (w13, w2, b13, b2, correction_bias, …), each of the shape it has now; the
                same dtype or one that converts to it, any device; for an int4 w13 or w2 an `Int4Matrix` of
                the same layout.

        Raises:
            WeightsError: a name that these weights do not have, or another shape or layout; nothing was
                changed.
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

    def __repr__(self) -> str:
        state = self._refusal or f"backend={self._built.backend.name}, {self.device}"
        return f"MoERuntime({self.cfg!r}, {state})"
