"""What a backend offers the runtime: pure decisions before tokens arrive, programs that run after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from moert.arena import Field
from moert.call import Call
from moert.compile_job import CompileJob
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

    def crowded_choices(self, choice: Choice, tokens: int) -> list[Choice]:
        """The choice with tiles for crowds beside its own, as `Choice.crowded` says, that fit the device;
        pure."""
        return []

    def can_run(self, choice: Choice, tokens: int) -> bool:
        """Whether the kernels of a choice can read these very weights, as they lie in memory, and serve up to
        `tokens` rows."""
        return True

    def infeasible(self, strategy: str, tokens: int) -> str | None:
        """Why a sorting strategy cannot serve up to `tokens` rows; None if it can; pure."""
        return None

    @abstractmethod
    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        """Arena fields a program for this choice uses; pure."""

    @abstractmethod
    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        """Kernel names in launch order: what a trace of one call shows; pure."""

    def compile_jobs(
        self, tokens: int, choice: Choice, aligned: bool = True
    ) -> tuple[CompileJob, ...]:
        """What `program` compiles, the keys of its `kernel_cache`; pure."""
        return ()

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
        self,
        cfg: MoEConfig,
        max_tokens: int,
        no_limit: torch.Tensor,
        kernel_cache: dict[Any, Any],
    ) -> Router:
        """The routing step for up to `max_tokens` rows a call.

        Args:
            cfg: the layer as it was described, shared experts apart.
            no_limit: stands for an absent live count.
        """

    @abstractmethod
    def block_fields(self, cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
        """The scratch of `block_steps` for up to `rows` tokens, for `slot_fields` too; pure."""

    @abstractmethod
    def block_steps(
        self,
        cfg: MoEConfig,
        rows: int,
        views: dict[str, torch.Tensor],
        kernel_cache: dict[Any, Any],
    ) -> BlockSteps:
        """What precedes the launches of this layer where a call does not bring all K + n slots.

        Args:
            cfg: as for `router`. views: of `block_fields(cfg, rows)`.
        """


def slot_fields(cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
    """The routing of K + n slots that `BlockSteps` write and the layer's launches read."""
    shape = (rows, cfg.top_k + cfg.shared_experts)
    return Field("slot_weights", shape, torch.float32), Field("slot_ids", shape, torch.int32)


class BlockSteps(ABC):
    """Fills the slots of `slot_fields` for a call's rows; those from the live count on are left alone."""

    @abstractmethod
    def route(self, call: Call, stream: int, labels: Labels) -> None:
        """By the router's matrix and the routing rule from call.x; the shared experts in the last n slots."""

    @abstractmethod
    def take(self, call: Call, stream: int, labels: Labels) -> None:
        """From call.topk of K slots; the last n slots are nobody's."""


class Router(ABC):
    """Logits to ids and weights in preallocated buffers; `nbytes` of scratch serve all that share."""

    nbytes: int = 0

    @abstractmethod
    def run(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, stream: int
    ) -> None:
        """Fill `out`, whose rows are as many as those of `logits`; rows from num_valid on are left alone."""
