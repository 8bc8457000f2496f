"""The torch backend, the default on a CPU: experts one after another on preallocated memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from moert.arena import Field
from moert.backends.base import Backend, BlockSteps, Program, Router, slot_fields
from moert.backends.torch_block import TorchBlockSteps
from moert.backends.torch_experts import TorchExperts
from moert.call import Call
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.labels import Labels
from moert.plan import Choice
from moert.steps.routing.torch_ops import TorchRouter
from moert.topk import TopK
from moert.weights import ExpertWeights


class TorchBackend(Backend):
    """See the module docstring. Tokens are grouped by expert on the host, so there is nothing to choose."""

    name = "torch"

    def __init__(self, cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts) -> None:
        super().__init__(cfg, weights, facts)
        # its views of the weights serve every bucket; programs own it, and with them the arena goes
        self._first: weakref.ref[TorchExperts] | None = None

    @staticmethod
    def supports(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        if facts.kind != "cpu":
            return "reads expert ids on the host, so it runs on a CPU only"
        return None

    def default_choice(self, tokens: int) -> Choice:
        return Choice("none")

    def candidates(self, tokens: int, strategies: Sequence[str]) -> list[Choice]:
        return [Choice("none")]

    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        return tuple(Field(*field) for field in TorchExperts.scratch_fields(self.cfg, tokens))

    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        return ("torch_experts",)

    def program(
        self,
        tokens: int,
        choice: Choice,
        views: dict[str, torch.Tensor],
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        first = self._first() if self._first else None
        experts = TorchExperts(self.cfg, self.weights, views, like=first)
        if first is None:
            self._first = weakref.ref(experts)
        return TorchProgram(experts)

    def router(
        self,
        cfg: MoEConfig,
        max_tokens: int,
        no_limit: torch.Tensor,
        kernel_cache: dict[Any, Any],
    ) -> Router:
        router = _shared_router(cfg, max_tokens, kernel_cache)
        return HostRouter(router, self.weights.correction_bias)

    def block_fields(self, cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
        return (*slot_fields(cfg, rows), *TorchBlockSteps.scratch_fields(cfg, rows))

    def block_steps(
        self,
        cfg: MoEConfig,
        rows: int,
        views: dict[str, torch.Tensor],
        kernel_cache: dict[Any, Any],
    ) -> BlockSteps:
        router = _shared_router(cfg, rows, kernel_cache) if cfg.can_route else None
        return TorchBlockSteps(cfg, self.weights, views, router)


def _shared_router(cfg: MoEConfig, max_tokens: int, kernel_cache: dict[Any, Any]) -> TorchRouter:
    # its scratch is the share group's, so the layers share it too
    if "torch_router" not in kernel_cache:
        kernel_cache["torch_router"] = TorchRouter(cfg, max_tokens)
    router: TorchRouter = kernel_cache["torch_router"]
    return router


class TorchProgram(Program):
    """One `TorchExperts` on its arena views."""

    kernels = ("torch_experts",)

    def __init__(self, experts: TorchExperts) -> None:
        self.experts = experts

    def run(self, call: Call, stream: int) -> None:
        weights, ids = call.topk
        live = call.live_on_host()
        self.experts.run(call.x, weights, ids, call.out, live, call.pad_zero)

    def run_labelled(self, call: Call, stream: int, labels: Labels) -> None:
        weights, ids = call.topk
        live, step = call.live_on_host(), labels.steps_of(call.tokens)
        self.experts.run(call.x, weights, ids, call.out, live, call.pad_zero, step)


class HostRouter(Router):
    """Routing on the CPU."""

    def __init__(self, route: TorchRouter, correction_bias: torch.Tensor | None) -> None:
        self._route, self._bias = route, correction_bias
        self.nbytes = route.nbytes

    def run(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, stream: int
    ) -> None:
        if num_valid is not None:
            live = max(0, min(int(num_valid), logits.shape[0]))
            logits, out = logits[:live], TopK(out.weights[:live], out.ids[:live])
        if logits.shape[0]:
            self._route(logits, out, self._bias)
