"""The same layer by other projects, for comparison in one run; an adapter says why its project is not there.

An adapter takes a layer's weights and gives a function (x [T, H], topk) -> [T, H]. Whatever that gives is
checked against the fp32 reference before it is timed, so an adapter that misreads another project's
interface is left out with that reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from device_timing import GPU

from moert import ExpertWeights, MoEConfig, TopK

Call = Callable[[torch.Tensor, TopK], torch.Tensor]
# batched_mm copies the weights of every (token, slot): pointless beyond this many
BATCHED_MAX_SLOTS = 64


class AbsentError(Exception):
    """Why another project's layer cannot be measured here."""


def need(module: str) -> None:
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        raise AbsentError(f"{top} is not installed")
    if importlib.util.find_spec(module) is None:
        raise AbsentError(f"the installed {top} has no {module}")


def by_expert(topk: TopK, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots [S] sorted by expert, rows of each expert [E] int32), without asking the device."""
    flat = topk.ids.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    # bincount would have to know its length; histc takes integers on GPUs only
    counts = torch.histc(
        flat.int() if GPU else flat.float(), bins=experts, min=0, max=experts - 1
    ).int()
    return order, counts


def torch_grouped_mm(cfg: MoEConfig, weights: ExpertWeights, tokens: int) -> Call:
    """torch's own grouped matrix product, the sort and the rest in plain torch.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.grouped_mm.html
    """
    grouped: Any = getattr(torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))
    if grouped is None:
        raise AbsentError(f"torch {torch.__version__} has no grouped_mm")
    w13, w2 = weights.w13.transpose(1, 2), weights.w2.transpose(1, 2)

    def call(x: torch.Tensor, topk: TopK) -> torch.Tensor:
        order, counts = by_expert(topk, cfg.num_experts)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = grouped(x[order // cfg.top_k], w13, offs=ends).chunk(2, dim=1)
        rows = grouped(torch.nn.functional.silu(gate) * up, w2, offs=ends)
        rows = rows * topk.weights.reshape(-1)[order, None]
        slots = torch.empty_like(rows).index_copy_(0, order, rows)
        return slots.view(len(x), cfg.top_k, -1).sum(1).to(x.dtype)

    return call


def transformers_experts(implementation: str) -> Callable[[MoEConfig, ExpertWeights, int], Call]:
    """An `experts_implementation` of transformers on the same tensors."""

    def adapter(cfg: MoEConfig, weights: ExpertWeights, tokens: int) -> Call:
        need("transformers")
        if implementation == "batched_mm" and tokens * cfg.top_k > BATCHED_MAX_SLOTS:
            raise AbsentError(f"batched_mm copies the weights of all {tokens * cfg.top_k} slots")
        from bench_torch_experts import their_experts

        module = their_experts(cfg, weights)
        module.config._experts_implementation = implementation

        def call(x: torch.Tensor, topk: TopK) -> torch.Tensor:
            out: torch.Tensor = module(x, topk.ids, topk.weights)
            return out

        return call

    return adapter


def vllm_fused_experts(cfg: MoEConfig, weights: ExpertWeights, tokens: int) -> Call:
    """vLLM's Triton path; w1 [E, 2I, H] gate rows first, w2 [E, H, I], float32 weights, int32 ids.

    https://github.com/vllm-project/vllm, vllm/model_executor/layers/fused_moe/fused_moe.py, fused_experts
    """
    if not GPU:
        raise AbsentError("vLLM's Triton kernels need a GPU")
    need("vllm")
    from vllm.model_executor.layers.fused_moe import fused_experts

    def call(x: torch.Tensor, topk: TopK) -> torch.Tensor:
        out: torch.Tensor = fused_experts(
            hidden_states=x,
            w1=weights.w13,
            w2=weights.w2,
            topk_weights=topk.weights,
            topk_ids=topk.ids,
        )
        return out

    return call


def triton_kernels_matmul(cfg: MoEConfig, weights: ExpertWeights, tokens: int) -> Call:
    """Triton's ragged matmul with fused gather, scatter and routing weights; w is [E, K, N].

    https://github.com/triton-lang/triton, python/triton_kernels/triton_kernels/matmul.py (formerly
    matmul_ogs.py, whose interface differed) and tensor_details/ragged_tensor.py
    """
    if not GPU:
        raise AbsentError("triton_kernels needs a GPU")
    need("triton_kernels.matmul")
    from triton_kernels.matmul import matmul
    from triton_kernels.tensor import make_ragged_tensor_metadata

    w13, w2 = weights.w13.transpose(1, 2), weights.w2.transpose(1, 2)

    def call(x: torch.Tensor, topk: TopK) -> torch.Tensor:
        order, counts = by_expert(topk, cfg.num_experts)
        meta = make_ragged_tensor_metadata(counts, order.shape[0])
        sources, slots = (order // cfg.top_k).int(), order.int()
        gate, up = matmul(x, w13, None, a_ragged_metadata=meta, gather_indx=sources).chunk(2, 1)
        rows = matmul(
            torch.nn.functional.silu(gate) * up,
            w2,
            None,
            a_ragged_metadata=meta,
            scatter_indx=slots,
            gammas=topk.weights.reshape(-1)[order],
        )
        total: torch.Tensor = rows.view(len(x), cfg.top_k, -1).sum(1)
        return total

    return call


PEERS: dict[str, Callable[[MoEConfig, ExpertWeights, int], Call]] = {
    "torch-grouped_mm": torch_grouped_mm,
    "transformers-grouped_mm": transformers_experts("grouped_mm"),
    "transformers-batched_mm": transformers_experts("batched_mm"),
    "vllm-fused_experts": vllm_fused_experts,
    "triton_kernels-matmul": triton_kernels_matmul,
}
