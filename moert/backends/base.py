"""What a backend offers the runtime: pure decisions before tokens arrive, programs that run after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from moert.arena import Field
from moert.call import Call
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.labels import Labels, profiling
from moert.plan import Choice, Plan
from moert.topk import TopK

if TYPE_CHECKING:
    from moert.weights import ExpertWeights


class Program(ABC):
    """One plan bound to weights and arena views: runs a checked call, allocates nothing."""

    kernels: tuple[str, ...]

    @abstractmethod
    def run(self, call: Call, stream: int) -> None:
        """Enqueue on a raw stream handle (ignored on the CPU)."""

    def run_labelled(self, call: Call, stream: int, labels: Labels) -> None:
        """`run`, its kernels under profiler ranges; by default under one for all."""
        with labels.call(call.tokens):
            self.run(call, stream)

    def launch(self, call: Call, stream: int, labels: Labels) -> None:
        """`run`, or `run_labelled` where a profiler watches."""
        if profiling():
            self.run_labelled(call, stream, labels)
        else:
            self.run(call, stream)


class Backend(ABC):
    """One layer's computation for one configuration, weights and device.

    Class attributes:
        name: as in `MoERuntime(backend=...)`.
        same_bits: sums have a fixed order.
        uses_graphs: the runtime can capture its programs and replay them on other tensors. Without, calls
            are launched one by one, and may still join somebody else's capture.
    """

    name: ClassVar[str]
    same_bits: ClassVar[bool] = True
    uses_graphs: ClassVar[bool] = False

    def __init__(self, cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts) -> None:
        self.cfg = cfg
        self.weights = weights
        self.facts = facts

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its plans should know."""
        return ()

    @property
    def packed_bytes(self) -> int:
        """Device memory of weights that it keeps in an order of its own, beside the caller's."""
        return 0

    def weights_changed(self) -> None:
        """The weights were written in place: renew what was made of them, at the same addresses."""
        return

    @staticmethod
    @abstractmethod
    def supports(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        """None, or the reason why this backend cannot serve the configuration on the device."""

    @abstractmethod
    def default_choice(self, tokens: int) -> Choice:
        """The heuristic choice for up to `tokens` rows; pure."""

    @abstractmethod
    def candidates(self, tokens: int, strategies: Sequence[str]) -> list[Choice]:
        """Choices worth timing that fit the device, the default first; pure."""

    def infeasible(self, strategy: str, tokens: int) -> str | None:
        """Why a sorting strategy cannot serve up to `tokens` rows; None if it can; pure."""
        return None

    @abstractmethod
    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        """Arena fields a program for this choice uses; pure."""

    @abstractmethod
    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        """Kernel names in launch order: what a trace of one call shows; pure."""

    def plan(self, tokens: int, captured: bool, choice: Choice, **provenance: Any) -> Plan:
        """The plan for a choice; `provenance`: source, us, default_us of `Plan`."""
        kernels, fields = self.kernels(tokens, choice), self.fields(tokens, choice)
        return Plan(tokens, captured, choice, kernels, fields, **provenance)

    @abstractmethod
    def program(
        self,
        tokens: int,
        choice: Choice,
        views: dict[str, torch.Tensor],
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        """Compile and bind. `kernel_cache` keeps compiled kernels between layers of one geometry.

        Args:
            aligned: call tensors are 16-byte aligned with row strides to match; False compiles the
                variant that assumes nothing.
        """

    @abstractmethod
    def router(
        self, max_tokens: int, no_limit: torch.Tensor, kernel_cache: dict[Any, Any]
    ) -> Router:
        """The routing step for up to `max_tokens` rows a call; `no_limit` stands for an absent live count."""


class Router(ABC):
    """Logits to ids and weights in preallocated buffers; `nbytes` of scratch serve all that share."""

    nbytes: int = 0

    @abstractmethod
    def run(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, stream: int
    ) -> None:
        """Fill `out`, whose rows are as many as those of `logits`; rows from num_valid on are left alone."""
