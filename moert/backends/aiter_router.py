"""Routing by AITER's `_topk_softmax`, which allocates nothing, where it keeps the rule of our own kernel.

Read off github.com/ROCm/aiter at e4048607 (csrc/kernels/topk_softmax_kernels.cu): for a power of two of
experts one kernel ranks logits, the lowest id first among equals, and divides by the sum of the chosen K or
of all E. For other numbers of experts it ranks probabilities, of which many are 0, and from 512 on AITER
asks for scratch: those are left to our kernel, as is all that the operator has no parameter for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moert.backends.base import Router
from moert.backends.triton_router import LOGITS_DTYPES
from moert.config import MoEConfig
from moert.topk import TopK

OPERATOR = "_topk_softmax"
_MOST_EXPERTS = 256
_LOAD_BYTES = 32  # of the widest loads of logits, which expect that alignment
_OFFSETS = 2**31


def refuses(cfg: MoEConfig, max_tokens: int) -> str | None:
    """Why the operator cannot route by the rule, up to `max_tokens` rows a call, or None; pure."""
    rule, experts = cfg.routing, cfg.num_experts
    reasons = {
        f"scoring={rule.scoring!r} is no softmax": not rule.scoring.startswith("softmax"),
        "it adds no correction bias": rule.correction_bias,
        "it knows no groups of experts": rule.num_groups > 1,
        f"scaling_factor={rule.scaling_factor} is not 1": rule.scaling_factor != 1.0,
        f"E={experts} is not a power of two up to {_MOST_EXPERTS}": (
            experts > _MOST_EXPERTS or experts & (experts - 1) != 0
        ),
        f"offsets into {max_tokens} rows of E={experts} logits pass 31 bits": (
            max_tokens * experts >= _OFFSETS
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class AiterRouter(Router):
    """One launch of the operator on exactly T rows, into the caller's tensors.

    Calls with a live count, and logits with gaps between rows or less than 32-byte alignment, run `ours`.

    Args:
        operator: takes weights [T, K] fp32, ids [T, K] int32, scratch [T, K] int32, logits [T, E], a
            workspace that E as here leaves alone, whether to divide by the sum of the chosen.
        scratch: int32 [max_tokens, K], written and never read; layers that share may share it.
        ours: any call.
    """

    def __init__(
        self, operator: Callable[..., Any], cfg: MoEConfig, scratch: torch.Tensor, ours: Router
    ) -> None:
        self.ours, self._operator, self._scratch = ours, operator, scratch
        rule = cfg.routing
        # softmax over the chosen K is what softmax over all E is once it is divided by their sum
        self._renormalize = rule.scoring == "softmax_topk" or rule.renormalize
        self._workspace = scratch.new_empty(0, dtype=torch.float32)
        # views by T, made on its first call: bookkeeping of the host
        self._views: dict[int, torch.Tensor] = {}
        self.nbytes = ours.nbytes + scratch.numel() * scratch.element_size()

    def run(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, stream: int
    ) -> None:
        aligned = logits.data_ptr() % _LOAD_BYTES == 0
        if num_valid is not None or not aligned or not logits.is_contiguous():
            self.ours.run(logits, out, num_valid, stream)
            return
        tokens = logits.shape[0]
        if tokens not in self._views:
            self._views[tokens] = self._scratch[:tokens]
        # on torch's current stream, which is the one given
        self._operator(
            out.weights,
            out.ids,
            self._views[tokens],
            logits,
            self._workspace,
            self._renormalize,
        )

    def warm_up(self, experts: int) -> None:
        """One row of every dtype: AITER builds and loads its module when it is first called."""
        shape, device = (1, self._scratch.shape[1]), self._scratch.device
        out = TopK(
            torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)
        )
        for dtype in LOGITS_DTYPES:
            self.run(torch.zeros(1, experts, dtype=dtype, device=device), out, None, 0)


def make_router(
    operator: Callable[..., Any] | str,
    cfg: MoEConfig,
    max_tokens: int,
    ours: Router,
    device: torch.device,
    kernel_cache: dict[Any, Any],
) -> tuple[Router, str]:
    """The router of a layer, and a note that says which kernel routes, and why if it is ours.

    Args:
        operator: or the reason why there is none.
        kernel_cache: keeps the scratch of the layers that share, and how their first call went.
    """
    if isinstance(operator, str):
        return ours, _ours(operator)
    if reason := refuses(cfg, max_tokens):
        return ours, _ours(reason)
    first = "aiter_router" not in kernel_cache
    if first:
        shape = (max_tokens, cfg.top_k)
        kernel_cache["aiter_router"] = torch.empty(shape, dtype=torch.int32, device=device)
    kept = kernel_cache["aiter_router"]
    if isinstance(kept, str):
        return ours, kept
    router = AiterRouter(operator, cfg, kept, ours)
    if first:
        try:
            router.warm_up(cfg.num_experts)
        except Exception as error:
            # its compiler may be missing, or fail in any way
            kernel_cache["aiter_router"] = _ours(f"{OPERATOR} fails: {type(error).__name__}")
            return ours, kernel_cache["aiter_router"]
    return router, (
        f"routing by AITER's {OPERATOR}, for finite logits: rows with NaN or +inf, or all -inf, get NaN "
        "weights, and ids repeat where fewer than K logits are finite; with num_valid, and for logits with "
        "gaps between rows or less than 32-byte alignment, by our kernel"
    )


def _ours(reason: str) -> str:
    return f"routing by our kernel: {reason}"
