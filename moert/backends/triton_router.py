"""Routing on a GPU: one launch of the routing kernel, compiled at start-up for every logits dtype."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from moert.backends.base import Router
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.steps.routing.triton import route_triton, routing_fwd_kernel, routing_launch
from moert.topk import TopK

_LOGITS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
LOGITS_DTYPES = tuple(_LOGITS)
_TYPES = {
    "correction_bias_ptr": "*fp32",
    "routed_weights_ptr": "*fp32",
    "routed_ids_ptr": "*i32",
    "num_valid_ptr": "*i32",
    "num_tokens": "i32",
    "logits_stride": "i64",
}


def routing_source(
    dtype: torch.dtype, constants: dict[str, Any], correction_bias: bool
) -> ASTSource:
    """What is compiled for logits of one dtype: the constants of `routing_launch`, no attributes."""
    if not correction_bias:
        constants = {**constants, "correction_bias_ptr": None}
    types = {**_TYPES, "logits_ptr": _LOGITS[dtype]}
    names = routing_fwd_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    return ASTSource(routing_fwd_kernel, signature, constants, {})


class TritonRouter(Router):
    """One per runtime; the compiled kernels are the share group's.

    Args:
        correction_bias: [E] or None, as the routing rule has it.
        no_limit: int32 scalar on the device, read where the caller gives no live count.
        max_tokens: the most rows of a call.
        dependent: the kernel that follows may start while routing drains.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        correction_bias: torch.Tensor | None,
        no_limit: torch.Tensor,
        max_tokens: int,
        dependent: bool,
        kernel_cache: dict[Any, Any],
    ) -> None:
        self.cfg, self.no_limit = cfg, no_limit
        self.bias = correction_bias if cfg.routing.correction_bias else None
        # launches by T, made once for a share group, so that no call builds a dictionary
        if "router_launches" not in kernel_cache:
            sizes = range(max_tokens + 1)
            kernel_cache["router_launches"] = [routing_launch(cfg, t, dependent) for t in sizes]
        self._launches = kernel_cache["router_launches"]
        self._kernels = {
            (dtype, constants["BLOCK_T"]): self._compiled(dtype, constants, warps, kernel_cache)
            for dtype in _LOGITS
            for _, constants, warps in (self._launches[1], self._launches[-1])
        }

    def _compiled(
        self, dtype: torch.dtype, constants: dict[str, Any], num_warps: int, cache: dict[Any, Any]
    ) -> Any:
        key = ("router", dtype, tuple(constants.items()), self.bias is None, num_warps)
        if key not in cache:
            source = routing_source(dtype, constants, self.bias is not None)
            cache[key] = triton.compile(source, options={"num_warps": num_warps})
            cache[key].run  # noqa: B018  loads the binary now, so that no call does
        return cache[key]

    def run(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, stream: int
    ) -> None:
        tokens = logits.shape[0]
        grid, constants, _ = self._launches[tokens]
        kernel = self._kernels[logits.dtype, constants["BLOCK_T"]]
        kernel.run(
            grid[0],
            1,
            1,
            stream,
            kernel.function,
            kernel.packed_metadata,
            None,
            None,
            None,
            logits.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            out.weights.data_ptr(),
            out.ids.data_ptr(),
            0 if num_valid is None else num_valid.data_ptr(),
            tokens,
            logits.stride(0),
            *constants.values(),
        )


class InterpretedRouter(Router):
    """The same kernel on CPU tensors under Triton's interpreter."""

    def __init__(self, cfg: MoEConfig, correction_bias: torch.Tensor | None) -> None:
        self.cfg, self.bias = cfg, correction_bias

    def run(
        self, logits: torch.Tensor, out: TopK, num_valid: torch.Tensor | None, stream: int
    ) -> None:
        route_triton(logits, self.cfg, self.bias, out, num_valid)


def make_router(
    cfg: MoEConfig,
    facts: DeviceFacts,
    correction_bias: torch.Tensor | None,
    no_limit: torch.Tensor,
    max_tokens: int,
    kernel_cache: dict[Any, Any],
) -> Router:
    """The router for a device; on a CPU the interpreted one."""
    if facts.kind == "cpu":
        return InterpretedRouter(cfg, correction_bias)
    return TritonRouter(
        cfg, correction_bias, no_limit, max_tokens, facts.dependent_launch, kernel_cache
    )
