"""The AITER backend: AMD's operators that take preallocated outputs, called in sequence on arena buffers.

    checked_rows     ours: ids of any dtype to int32 in 0..E, weights to fp32
    moe_sorting_*    sorts, and clears the caller's `out` in the same launch
    ck_moe_stage1    gate/up GEMM and activation
    ck_moe_stage2    down GEMM, rows weighted and added to `out`

`route` calls AITER's `_topk_softmax` where that keeps our rule (`aiter_router`).

AITER's sort takes any id for an index, so an id outside 0..E-1 must not reach it. Ours gives such rows,
and those of tokens that are not live, the id E; the sort is told of E + 1 experts and a mask without the
last, its means for experts of other machines: masked rows are in no list of rows, so no GEMM reads them.

The sort clears all rows of `out` that it is shown. Where rows from the live count on must keep what they
hold, it is shown an empty tensor (then it clears nothing) and a kernel of ours clears the live rows.

AITER's operators read no strides: calls whose x or out have gaps between rows, or that are not 16-byte
aligned, run the direct kernels of backend "triton" instead. The addresses of its captured launches
cannot be rewritten, so there are no graphs of our own: calls are launched operator by operator, on
exactly T rows, or join the capture of an engine.
"""

from __future__ import annotations

from collections import abc
from typing import Any

import torch

from moert.arena import Field
from moert.backends.aiter_ops import AiterOps, find_aiter
from moert.backends.aiter_router import make_router
from moert.backends.aiter_sequences import (
    POLICY,
    Packed,
    Sequence,
    Step,
    Views,
    block_m,
    exact_views,
    sequence_of,
    sort_fields,
)
from moert.backends.base import Backend, BlockSteps, Program, Router
from moert.backends.triton import TritonBackend
from moert.call import Call
from moert.config import MoEConfig
from moert.device import DeviceFacts, device_facts
from moert.errors import UnsupportedError
from moert.plan import Choice
from moert.steps.checked_rows.launches import checked_rows_launch, clear_live_rows_launch
from moert.weights import ExpertWeights

_SORT_LDS = 65536  # bytes its sort counts with, whatever the device has
_MAX_BYTES = 2**31  # of a GEMM operand: offsets are 32 bits


class AiterBackend(Backend):
    """See the module docstring."""

    name = "aiter"
    same_bits = False

    def __init__(self, cfg: MoEConfig, weights: ExpertWeights, facts: DeviceFacts) -> None:
        super().__init__(cfg, weights, facts)
        sequence = sequence_of(cfg)
        ops = sequence if isinstance(sequence, str) else find_aiter(sequence.operators)
        if isinstance(sequence, str) or isinstance(ops, str):
            raise UnsupportedError(f"backend aiter: {ops}")
        self.sequence: type[Sequence] = sequence
        self.ops: AiterOps = ops
        self.packed: Packed = self.sequence.pack(ops, weights)
        # kernels of ours run where the tensors are
        self.triton = TritonBackend(cfg, weights, device_facts(weights.device))
        self._workspaces = [0]
        self._routed_by: tuple[str, ...] = ()

    @staticmethod
    def refuses(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        """Why no AITER whatsoever could serve the configuration on the device, or None; pure."""
        if facts.kind != "hip":
            return "AITER is for ROCm devices"
        if facts.warp_size != 64:
            return f"AITER's GEMMs are for CDNA devices, {facts.name} ({facts.arch}) is none"
        sequence = sequence_of(cfg)
        if isinstance(sequence, str):
            return sequence
        return sequence.refuses(cfg) or TritonBackend.supports(cfg, facts)

    @staticmethod
    def supports(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        if reason := AiterBackend.refuses(cfg, facts):
            return reason
        sequence = sequence_of(cfg)
        assert not isinstance(sequence, str)
        ops = find_aiter(sequence.operators)
        if isinstance(ops, str):
            return ops
        if sort_rows_at_once(cfg.num_experts + 1) == 0 and ops.sort_workspace is None:
            return f"E={cfg.num_experts} needs the multi-phase sort, and {_ALLOCATES}"
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [
            "plans name AITER's operators; a trace shows the kernels they launch",
            f"a second copy of the weights, {self.packed.nbytes} bytes in the order of AITER's GEMMs",
            "no graphs of its own: AITER's captured launches cannot take other addresses; calls are launched "
            "one by one or join an engine's capture",
            "x or out with gaps between rows, or not 16-byte aligned: direct kernels of backend triton",
        ]
        if self.ops.sort_workspace is None:
            notes.append(f"multi_phase: refused, {_ALLOCATES}")
        return (*notes, *self._routed_by)

    @property
    def packed_bytes(self) -> int:
        return self.packed.nbytes

    def weights_changed(self) -> None:
        self.sequence.pack(self.ops, self.weights, self.packed)

    def default_choice(self, tokens: int) -> Choice:
        # AITER's own rule for policy 0 (moe_sorting_is_oneshot in csrc/include/moe_sorting_opus.h)
        experts = self.cfg.num_experts + 1
        one_shot = tokens <= sort_rows_at_once(experts) and experts < 512
        preferred = "one_shot" if one_shot else "multi_phase"
        able = [s for s in POLICY if self.infeasible(s, tokens) is None]
        return Choice(preferred if preferred in able else able[0])

    def candidates(self, tokens: int, strategies: abc.Sequence[str]) -> list[Choice]:
        able = [s for s in POLICY if s in strategies and self.infeasible(s, tokens) is None]
        return sorted((Choice(s) for s in able), key=lambda c: c != self.default_choice(tokens))

    def infeasible(self, strategy: str, tokens: int) -> str | None:
        if strategy not in POLICY:
            return "AITER's GEMMs need sorted rows"
        if strategy == "one_shot" and sort_rows_at_once(self.cfg.num_experts + 1) == 0:
            return f"E={self.cfg.num_experts} are too many for one workgroup of AITER's sort"
        if strategy == "multi_phase" and self.ops.sort_workspace is None:
            return _ALLOCATES
        return None

    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        block = block_m(self.cfg, self.facts, tokens)
        sort = sort_fields(self.cfg, tokens, block, self._workspace(tokens, choice))
        return (*sort, *self.sequence.fields(self.cfg, tokens, block))

    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        return ("checked_rows_kernel", self.ops.sort_name, *self.sequence.operators)

    def program(
        self,
        tokens: int,
        choice: Choice,
        views: dict[str, torch.Tensor],
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        cache: dict[Any, Any] = {} if kernel_cache is None else kernel_cache
        # rows whose strides are not multiples of 16 elements can come here only if not aligned
        direct = self.triton.program(
            tokens, self.triton.direct_choice(), views, aligned=aligned, kernel_cache=cache
        )
        return AiterProgram(self, tokens, choice, views, cache, direct) if aligned else direct

    def router(
        self,
        cfg: MoEConfig,
        max_tokens: int,
        no_limit: torch.Tensor,
        kernel_cache: dict[Any, Any],
    ) -> Router:
        ours = self.triton.router(cfg, max_tokens, no_limit, kernel_cache)
        device = self.weights.device
        router, note = make_router(self.ops.route, cfg, max_tokens, ours, device, kernel_cache)
        self._routed_by = (note,)
        return router

    def block_fields(self, cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
        return self.triton.block_fields(cfg, rows)

    def block_steps(
        self,
        cfg: MoEConfig,
        rows: int,
        views: dict[str, torch.Tensor],
        kernel_cache: dict[Any, Any],
    ) -> BlockSteps:
        return self.triton.block_steps(cfg, rows, views, kernel_cache)

    def _workspace(self, tokens: int, choice: Choice) -> int:
        """The most bytes of scratch that the sort of up to `tokens` rows asks for; not monotone in T."""
        if self.ops.sort_workspace is None:
            return 0
        policy = POLICY[choice.strategy]
        size, experts, top_k = self.ops.sort_workspace, self.cfg.num_experts + 1, self.cfg.top_k
        if policy == POLICY["one_shot"]:
            return max(size(t, experts, top_k, policy) for t in (1, tokens))
        while len(self._workspaces) <= tokens:
            asked = size(len(self._workspaces), experts, top_k, policy)
            self._workspaces.append(max(self._workspaces[-1], asked))
        return self._workspaces[tokens]


_ALLOCATES = (
    "moe_sorting_fwd allocates its scratch in every call: this aiter has no moe_sorting_opus_fwd"
)


def sort_rows_at_once(experts: int) -> int:
    """The most tokens that one workgroup of AITER's sort counts at once; 0 where it has no room for any.

    Half of its memory in rows of one word an expert and one more, 8 rows at a time, two for sums
    (moe_sorting_get_smem_row_col in csrc/include/moe_sorting_opus.h).
    """
    rows = _SORT_LDS // 4 // 2 // (experts + 1)
    return 0 if rows < 10 else (rows - 2) // 8 * 8


def most_tokens(cfg: MoEConfig) -> int:
    """The most tokens whose rows, x and out [T, H] and h [T * K, I], AITER's GEMMs can address."""
    row_bytes = cfg.torch_dtype.itemsize * max(cfg.hidden_size, cfg.top_k * cfg.intermediate_size)
    return (_MAX_BYTES - 1) // row_bytes


class AiterProgram(Program):
    """One plan: the operators on arena views, and what runs instead where they do not fit.

    Args:
        tokens: the most rows of a call.
        direct: computes any call.
    """

    def __init__(
        self,
        backend: AiterBackend,
        tokens: int,
        choice: Choice,
        views: Views,
        kernel_cache: dict[Any, Any],
        direct: Program,
    ) -> None:
        cfg, triton = backend.cfg, backend.triton
        self.kernels = backend.kernels(tokens, choice)
        self.direct = direct
        self._cfg, self._ops, self._packed = cfg, backend.ops, backend.packed
        self._sequence, self._views = backend.sequence, views
        self._block, self._policy = block_m(cfg, backend.facts, tokens), POLICY[choice.strategy]
        check = checked_rows_launch(cfg, views["checked_ids"], views["checked_weights"])
        self._check = triton.bind([check], kernel_cache=kernel_cache)
        self._clear = triton.bind([clear_live_rows_launch(cfg)], kernel_cache=kernel_cache)
        self._nothing = backend.packed.w1.new_empty(0, 0)
        # views by T, made on its first call: bookkeeping of the host
        self._steps: dict[int, tuple[Step, ...]] = {}
        self._most = min(tokens, most_tokens(cfg))

    def run(self, call: Call, stream: int) -> None:
        x, out, tokens = call.x, call.out, call.tokens
        if not (x.is_contiguous() and out.is_contiguous()) or tokens > self._most:
            self.direct.run(call, stream)
            return
        if tokens not in self._steps:
            self._steps[tokens] = self._exact(tokens)
        sort, *rest = self._steps[tokens]
        self._check.run(call, stream)
        if call.num_valid is call.no_limit or call.pad_zero:
            sort(x, out)
        else:
            self._clear.run(call, stream)
            sort(x, self._nothing)
        for step in rest:
            step(x, out)

    def _exact(self, tokens: int) -> tuple[Step, ...]:
        views = exact_views(self._cfg, self._views, tokens, self._block)
        steps = self._sequence.steps(self._cfg, self._ops, self._packed, views, tokens, self._block)
        return (self._sort(views), *steps)

    def _sort(self, views: Views) -> Step:
        inputs = [views["checked_ids"], views["checked_weights"]]
        outputs = [
            views[name]
            for name in ("sorted_token_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")
        ]
        operator, experts, block = self._ops.sort, self._cfg.num_experts + 1, self._block
        options: dict[str, Any] = {
            "local_expert_mask": self._packed.expert_mask,
            "dispatch_policy": self._policy,
        }
        if "workspace" in views:
            options["workspace"] = views["workspace"]

        def sort(x: torch.Tensor, out: torch.Tensor) -> None:
            operator(*inputs, *outputs, out, experts, block, **options)

        return sort
