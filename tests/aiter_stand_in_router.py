"""A stand-in for AITER's `_topk_softmax` on CPU tensors, as `aiter_stand_in` has the other operators.

Contract as in github.com/ROCm/aiter at e4048607 (aiter/ops/moe_op.py, csrc/kernels/topk_softmax_kernels.cu).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np
import torch
from aiter_stand_in import Called, demand


def _topk_softmax(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    softmax_workspace: torch.Tensor,
    need_renorm: bool,
    num_shared_experts: int = 0,
    shared_expert_scoring_func: str = "",
) -> None:
    tokens, experts = gating_output.shape
    shape = topk_indices.shape
    demand(topk_weights.dtype == softmax_workspace.dtype == torch.float32, "float pointers")
    demand(topk_indices.dtype == token_expert_indices.dtype == torch.int32, "int pointers")
    demand(gating_output.is_floating_point() and gating_output.stride(1) == 1, "logits")
    demand(gating_output.data_ptr() % 32 == 0 and gating_output.is_contiguous(), "wide loads")
    # rows are counted by the logits alone: other lengths are read or written past their ends
    demand(topk_weights.shape == shape == token_expert_indices.shape, "outputs [M, topk]")
    demand(shape[0] == tokens and shape[1] <= experts, "as many rows as logits")
    demand(token_expert_indices.is_contiguous(), "written without strides")
    demand(type(need_renorm) is bool and num_shared_experts == 0, "routed experts")
    needed = 0 if experts & (experts - 1) == 0 and experts <= 256 else tokens * experts
    demand(softmax_workspace.numel() >= needed, "workspace")
    logits = gating_output.float().numpy().copy()
    for token in range(tokens):
        peak = logits[token].max()
        powers = np.exp(logits[token] - peak)
        for slot in range(shape[1]):
            best = int(logits[token].argmax())  # the first among equals
            topk_weights[token, slot] = float(powers[best])
            topk_indices[token, slot] = best
            token_expert_indices[token, slot] = slot * tokens + token
            logits[token, best] = -np.inf
        topk_weights[token] /= topk_weights[token].sum() if need_renorm else float(powers.sum())


class RouterStandIn(ModuleType):
    """`aiter.ops.moe_op`, of the one operator.

    Attributes:
        calls: of the operator, in order, its first calls by a layer included.
        change: called with each call before it runs.
        fault: raised by every call.
        inert: calls are recorded and not run.
    """

    def __init__(self, operator: Callable[..., Any] = _topk_softmax) -> None:
        super().__init__("aiter.ops.moe_op")
        self.calls: list[Called] = []
        self.change: Callable[[dict[str, Any]], None] = lambda args: None
        self.fault: Exception | None = None
        self.inert = False
        signature = inspect.signature(operator)

        @wraps(operator)
        def call(*args: Any, **options: Any) -> None:
            if self.fault:
                raise self.fault
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            called = Called("_topk_softmax", dict(bound.arguments))
            self.calls.append(called)
            if not self.inert:
                self.change(called.args)
                operator(**called.args)

        self._topk_softmax = call

    def install(self, monkeypatch: Any) -> RouterStandIn:
        monkeypatch.setitem(sys.modules, "aiter.ops.moe_op", self)
        return self
