"""The steps before a whole block's experts on a CPU: preallocated memory, no new tensors."""

from __future__ import annotations

import torch

from moert.arena import Field
from moert.backends.base import BlockSteps
from moert.call import Call
from moert.config import MoEConfig
from moert.labels import Labels, profiling
from moert.steps.routing.torch_ops import TorchRouter
from moert.topk import TopK
from moert.weights import ExpertWeights

ROWS = 256  # tokens that are converted to float32 and projected at a time


class TorchBlockSteps(BlockSteps):
    """`block_routing_reference` of `moert.steps.block`, into the views.

    Args:
        cfg: the layer, shared experts apart.
        weights: read at every call, so that in-place updates are seen.
        views: of `slot_fields` and `scratch_fields`.
        router: for as many tokens; None where nothing is to be routed.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        weights: ExpertWeights,
        views: dict[str, torch.Tensor],
        router: TorchRouter | None,
    ) -> None:
        self.cfg, self.weights, self.views, self._router = cfg, weights, views, router
        first = cfg.num_experts
        with torch.device("cpu"):
            self._shared = torch.arange(first, first + cfg.shared_experts, dtype=torch.int32)
            self._first = torch.tensor(first, dtype=torch.int64)
            self._nobody = torch.tensor(-1, dtype=torch.int64)
            self._zero, self._one = torch.tensor([0.0, 1.0], dtype=torch.float32).unbind()

    @staticmethod
    def scratch_fields(cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
        """The scratch for up to `rows` tokens."""
        columns, hidden = cfg.num_experts + cfg.shared_gate, cfg.hidden_size
        return (
            Field("logits", (rows, columns), torch.float32),
            Field("gate", (rows, 1), torch.float32),
            Field("x", (min(rows, ROWS), hidden), torch.float32),
            Field("router", (columns, hidden), torch.float32),
            Field("router_bias", (cfg.num_experts,), torch.float32),
            Field("ids", (rows, cfg.top_k), torch.int64),
            Field("strange", (rows, cfg.top_k), torch.bool),
        )

    def route(self, call: Call, stream: int, labels: Labels) -> None:
        live = call.live_on_host()
        if profiling():
            with labels.step("router_logits", call.tokens):
                self._project(call.x, live)
            with labels.step("route", call.tokens):
                self._choose(live)
        else:
            self._project(call.x, live)
            self._choose(live)

    def take(self, call: Call, stream: int, labels: Labels) -> None:
        if profiling():
            with labels.step("routed_slots", call.tokens):
                self._take(call)
        else:
            self._take(call)

    def _project(self, x: torch.Tensor, live: int) -> None:
        v, experts, weights = self.views, self.cfg.num_experts, self.weights
        assert weights.router_weight is not None
        v["router"][:experts].copy_(weights.router_weight)
        if weights.shared_gate is not None:
            v["router"][experts:].copy_(weights.shared_gate)
        for start in range(0, live, ROWS):
            stop = min(live, start + ROWS)
            rows = v["x"][: stop - start].copy_(x[start:stop])
            torch.mm(rows, v["router"].t(), out=v["logits"][start:stop])
        if weights.router_bias is not None:
            v["logits"][:live, :experts].add_(v["router_bias"].copy_(weights.router_bias))

    def _choose(self, live: int) -> None:
        assert self._router is not None
        v, experts, k = self.views, self.cfg.num_experts, self.cfg.top_k
        weights, ids, logits = v["slot_weights"][:live], v["slot_ids"][:live], v["logits"][:live]
        if not live:
            return
        routed = TopK(weights[:, :k], ids[:, :k])
        self._router(logits[:, :experts], routed, self.weights.correction_bias)
        ids[:, k:].copy_(self._shared)
        if self.cfg.shared_gate:
            gate = torch.sigmoid(logits[:, experts:], out=v["gate"][:live])
            weights[:, k:].copy_(gate)
        else:
            weights[:, k:].copy_(self._one)

    def _take(self, call: Call) -> None:
        v, k, live = self.views, self.cfg.top_k, call.live_on_host()
        weights, ids = v["slot_weights"][:live], v["slot_ids"][:live]
        given, strange = v["ids"][:live], v["strange"][:live]
        # an id past the routed experts must not name a shared one
        given.copy_(call.topk.ids[:live]).clamp_(-1, self.cfg.num_experts)
        torch.eq(given, self._first, out=strange)
        ids[:, :k].copy_(given.masked_fill_(strange, self._nobody))
        ids[:, k:].copy_(self._nobody)
        weights[:, :k].copy_(call.topk.weights[:live])
        weights[:, k:].copy_(self._zero)
