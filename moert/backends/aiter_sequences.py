"""Which of AITER's operators serve weights of one format, in which order, on which buffers.

One `Sequence` per format of the weights, found in `SEQUENCES`; the backend around it (checked ids, sort,
policies, exact views, what runs instead) knows none of them. A format that quantises activations adds its
operators to `operators`, its scales to a subclass of `Packed`, its buffers to `fields`, and a step before
each GEMM to `steps`: steps run after the sort, so they may read the sorted lists.

Layouts and limits are those of github.com/ROCm/aiter (aiter/ops, csrc/include/moe_sorting_opus.h,
csrc/ck_gemm_moe_2stages_codegen).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from moert.arena import Field
from moert.backends.aiter_ops import GEMM, AiterOps
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.steps.sorting.layout import padded_rows
from moert.weights import ExpertWeights

Views = Mapping[str, torch.Tensor]
# runs on (x, out) of a call
Step = Callable[[torch.Tensor, torch.Tensor], Any]

POLICY = {"one_shot": 1, "multi_phase": 2}
GEMM_TILE = 128  # columns and depth of the largest tiles that its operators choose by themselves
BLOCKS = (32, 64, 128)
ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu"}


@dataclass(frozen=True)
class Packed:
    """A layer's weights in the order that AITER's GEMMs read, and what the sort is told of the experts.

    Args:
        w1: [E, 2I, H], gate rows then up rows, shuffled.
        w2: [E, H, I], shuffled.
        expert_mask: [E + 1] int32: 1 for every expert, 0 for id E, which rows of nobody carry.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    expert_mask: torch.Tensor

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors)


def block_m(cfg: MoEConfig, facts: DeviceFacts, tokens: int) -> int:
    """Rows a GEMM block takes: AITER's own rule (get_block_size_M in aiter/fused_moe.py).

    The size with the fewest rounds of workgroups over the compute units; among equals, the fullest last one.
    """

    def rounds(block: int) -> tuple[int, int]:
        rows = tokens * cfg.top_k + cfg.num_experts * block - cfg.top_k
        groups = -(-cfg.intermediate_size // 128) * (rows + block - 1) // block
        units = facts.compute_units
        return -(-groups // units), units - groups % units

    return min(BLOCKS, key=rounds)


def sort_fields(cfg: MoEConfig, tokens: int, block: int, workspace: int) -> tuple[Field, ...]:
    """What the sort of up to `tokens` rows reads and writes.

    The lengths are those AITER allocates for E + 1 experts; the GEMMs are shown no more than can be used.
    """
    rows = tokens * cfg.top_k + (cfg.num_experts + 1) * block - cfg.top_k
    fields = (
        Field("checked_ids", (tokens, cfg.top_k), torch.int32),
        Field("checked_weights", (tokens, cfg.top_k), torch.float32),
        Field("sorted_token_ids", (rows,), torch.int32),
        Field("sorted_weights", (rows,), torch.float32),
        Field("sorted_expert_ids", (-(-rows // block),), torch.int32),
        Field("num_valid_ids", (2,), torch.int32),
    )
    return (*fields, Field("workspace", (workspace,), torch.uint8)) if workspace else fields


def exact_views(cfg: MoEConfig, views: Views, tokens: int, block: int) -> dict[str, torch.Tensor]:
    """The views of a call of exactly `tokens` rows; grids follow from their lengths."""
    rows = padded_rows(tokens, cfg.top_k, cfg.num_experts, block)
    exact = dict(views)
    exact |= {name: views[name][:tokens] for name in ("checked_ids", "checked_weights")}
    exact |= {name: views[name][:rows] for name in ("sorted_token_ids", "sorted_weights")}
    exact["sorted_expert_ids"] = views["sorted_expert_ids"][: rows // block]
    return exact


class Sequence(ABC):
    """The operators that serve one format of weights; nothing of it holds state.

    Class attributes:
        operators: name to the parameters that are passed, beside the sort's.
    """

    operators: ClassVar[Mapping[str, tuple[str, ...]]]

    @staticmethod
    @abstractmethod
    def refuses(cfg: MoEConfig) -> str | None:
        """Why it cannot compute a layer, or None; pure."""

    @staticmethod
    @abstractmethod
    def fields(cfg: MoEConfig, tokens: int, block: int) -> tuple[Field, ...]:
        """Arena buffers of up to `tokens` rows, beside the sort's; pure.

        "h" [T * K, I] must be among them: rows with gaps are computed by direct kernels that need it.
        """

    @staticmethod
    @abstractmethod
    def pack(ops: AiterOps, weights: ExpertWeights, into: Packed | None = None) -> Packed:
        """The weights as the operators read them.

        Args:
            into: packed before: its storage is written again, and programs bound to it stay valid.
        """

    @staticmethod
    @abstractmethod
    def steps(
        cfg: MoEConfig, ops: AiterOps, packed: Packed, views: Views, tokens: int, block: int
    ) -> tuple[Step, ...]:
        """What follows the sort, for calls of exactly `tokens` rows.

        Args:
            views: `exact_views`; `fields` are as long as the program's largest call.
            block: rows of a block: the sort's unit_size and the GEMMs' block_m.
        """


class Plain(Sequence):
    """bfloat16 and float16 weights: sort, gate/up with its activation, down.

    Stage 1 writes row `token * K + slot` of h; stage 2 weights those rows and adds them to the rows of `out`.
    """

    operators: ClassVar = {
        "ck_moe_stage1_fwd": ("hidden_states", *GEMM),
        "ck_moe_stage2_fwd": ("inter_states", *GEMM),
    }

    @staticmethod
    def refuses(cfg: MoEConfig) -> str | None:
        narrow = {
            name: size
            for name, size in (("H", cfg.hidden_size), ("I", cfg.intermediate_size))
            if size % GEMM_TILE
        }
        reasons = {
            "experts with biases are not among its bfloat16 and float16 operators": cfg.bias,
            "experts without a gate are not among its bfloat16 and float16 operators": not cfg.gated,
            f"activation={cfg.activation!r} is not one of {', '.join(ACTIVATIONS)}": (
                cfg.activation not in ACTIVATIONS
            ),
            f"activation_limit={cfg.activation_limit} is not supported": (
                cfg.activation_limit is not None
            ),
            f"its tiles need multiples of {GEMM_TILE}, got "
            + ", ".join(f"{name}={size}" for name, size in narrow.items()): bool(narrow),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @staticmethod
    def fields(cfg: MoEConfig, tokens: int, block: int) -> tuple[Field, ...]:
        return (Field("h", (tokens * cfg.top_k, cfg.intermediate_size), cfg.torch_dtype),)

    @staticmethod
    def pack(ops: AiterOps, weights: ExpertWeights, into: Packed | None = None) -> Packed:
        """Shuffle expert by expert, so that no more than one is ever there a third time."""
        experts = weights.w13.shape[0]
        if into is None:
            mask = torch.ones(experts + 1, dtype=torch.int32, device=weights.device)
            mask[experts] = 0
            w1, w2 = (
                torch.empty(t.shape, dtype=t.dtype, device=t.device)
                for t in (weights.w13, weights.w2)
            )
            into = Packed(w1, w2, mask)
        for expert in range(experts):
            gate_up = weights.w13[expert]
            if weights.interleaved:
                gate_up = torch.cat((gate_up[0::2], gate_up[1::2]))
            for matrix, packed in ((gate_up, into.w1), (weights.w2[expert], into.w2)):
                shuffled = ops.shuffle(matrix.contiguous())
                packed[expert].copy_(shuffled)
                # read off the tensor by the operators; a copy or a view would lose it
                packed.is_shuffled = shuffled.is_shuffled  # type: ignore[attr-defined]
        return into

    @staticmethod
    def steps(
        cfg: MoEConfig, ops: AiterOps, packed: Packed, views: Views, tokens: int, block: int
    ) -> tuple[Step, ...]:
        rows = (views["sorted_token_ids"], views["sorted_expert_ids"], views["num_valid_ids"])
        h = views["h"][: tokens * cfg.top_k].view(tokens, cfg.top_k, cfg.intermediate_size)
        stage1, stage2 = ops.module.ck_moe_stage1_fwd, ops.module.ck_moe_stage2_fwd
        w1, w2, top_k, weights = packed.w1, packed.w2, cfg.top_k, views["sorted_weights"]
        options = {
            "block_m": block,
            "quant_type": ops.module.QuantType.No,
            "activation": getattr(ops.module.ActivationType, ACTIVATIONS[cfg.activation]),
        }

        def gate_up(x: torch.Tensor, out: torch.Tensor) -> None:
            stage1(x, w1, w2, *rows, h, top_k, sorted_weights=None, **options)

        def down(x: torch.Tensor, out: torch.Tensor) -> None:
            stage2(h, w1, w2, *rows, out, top_k, sorted_weights=weights, **options)

        return gate_up, down


# by the format of the weights: the dtype, or that of the quantisation
SEQUENCES: dict[str, type[Sequence]] = {"bfloat16": Plain, "float16": Plain}


def sequence_of(cfg: MoEConfig) -> type[Sequence] | str:
    """The sequence for a layer's weights, or the reason why there is none."""
    format_ = cfg.dtype if cfg.quant is None else cfg.quant.format
    if format_ in SEQUENCES:
        return SEQUENCES[format_]
    what = f"dtype={cfg.dtype!r}" if cfg.quant is None else f"quant.format={format_!r}"
    return f"{what} is not one of {', '.join(SEQUENCES)}"
