"""A chain of layers as a model has it, for benchmarks: own weights, own routing, out of one is x
of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from device_timing import DEVICE, GPU

from moert import ExpertWeights, MoEConfig, MoERuntime, TopK
from moert.steps.experts_reference import experts_reference

READ_BYTES_PER_SECOND = 4.58e12  # best read kernel over GiBs on an H200
MATMUL_FLOPS = 788e12  # bf16 8192^3 on an H200
MAX_ERROR = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-5}
LAYER_BYTES = 24 << 30  # of weights of a chain, at most


@dataclass
class Chain:
    """Runtimes of one share group with inputs for T tokens.

    Args:
        layers: one runtime each.
        topks: one routing each.
        rows: x of the first, then out of every layer: [layers + 1] of [T, H].
    """

    layers: list[MoERuntime]
    topks: list[TopK]
    rows: list[torch.Tensor]

    def run(self) -> None:
        """One pass over all layers on the current stream."""
        for layer, topk, x, out in zip(
            self.layers, self.topks, self.rows, self.rows[1:], strict=False
        ):
            layer.forward(x, topk, out)

    def floor_us(self) -> float:
        """Mean floor of a layer in microseconds: the larger of the bytes really hit and the FLOPs."""
        cfg = self.layers[0].cfg
        return sum(floor_us(cfg, topk.ids) for topk in self.topks) / len(self.topks)

    def hit_bytes(self) -> int:
        """Mean bytes a layer's floor counts."""
        cfg = self.layers[0].cfg
        return sum(hit_bytes(cfg, topk.ids) for topk in self.topks) // len(self.topks)

    def facts(self, us: float) -> dict[str, Any]:
        """What a reader wants to know beside `us`, the microseconds of one layer."""
        tokens = self.rows[0].shape[0]
        report = self.layers[0].plan()
        plan = report.for_tokens(tokens)
        found = {
            "tokens": tokens,
            "layers": len(self.layers),
            "backend": report.backend,
            "plan": str(plan.choice),
            "source": plan.source,
            "kernels": list(plan.kernels),
            "bytes": self.hit_bytes(),
            "GB_per_s": round(self.hit_bytes() / us / 1e3, 1),
        }
        if GPU:
            floor = self.floor_us()
            found |= {"floor_us": round(floor, 2), "times_the_floor": round(us / floor, 3)}
        return found


def expert_bytes(cfg: MoEConfig) -> int:
    """Both matrices of one expert: codes of half a byte and the scales of groups where they are int4."""
    hidden, inner, wide = cfg.hidden_size, cfg.intermediate_size, cfg.torch_dtype.itemsize
    matrices = ((cfg.w13_rows, hidden), (hidden, inner))
    if cfg.quant is None:
        return sum(rows * columns for rows, columns in matrices) * wide
    total = 0
    for rows, columns in matrices:
        size = cfg.quant.group_size
        groups = 1 if size == -1 else -(-columns // size)
        per_group = wide if cfg.quant.symmetric else 2 * wide
        total += rows * columns // 2 + rows * groups * per_group
    return total


def hit_bytes(cfg: MoEConfig, ids: torch.Tensor) -> int:
    """Weights of the distinct experts that are hit, activations in and out, ids and weights."""
    distinct = int(ids.unique().numel())
    rows = 2 * ids.shape[0] * cfg.hidden_size * cfg.torch_dtype.itemsize
    return distinct * expert_bytes(cfg) + rows + ids.numel() * 8


def floor_us(cfg: MoEConfig, ids: torch.Tensor) -> float:
    """The larger of the bytes at read bandwidth and the FLOPs at the matrix rate."""
    flops = 2 * ids.numel() * (cfg.w13_rows + cfg.intermediate_size) * cfg.hidden_size
    return max(hit_bytes(cfg, ids) / READ_BYTES_PER_SECOND, flops / MATMUL_FLOPS) * 1e6


def layer_count(cfg: MoEConfig) -> int:
    """4 to 8 layers, as many as fit LAYER_BYTES."""
    return max(4, min(8, LAYER_BYTES // (cfg.num_experts * expert_bytes(cfg))))


def make_layers(cfg: MoEConfig, count: int, **options: Any) -> list[MoERuntime]:
    """`count` runtimes with separate random weights that share."""
    layers: list[MoERuntime] = []
    for seed in range(count):
        weights = ExpertWeights.random(cfg, seed=seed, device=DEVICE)
        more = {"share": layers[0]} if layers else options
        layers.append(MoERuntime(cfg, weights, **more))
    return layers


Router = Callable[[int, int, int], torch.Tensor]


def uniform_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Every token takes K distinct experts at random."""
    return torch.rand(tokens, experts, device=DEVICE).topk(top_k, 1).indices.int()


def one_hot_expert_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Expert 0 in every token, the others at random."""
    ids = torch.rand(tokens, experts - 1, device=DEVICE).topk(top_k - 1, 1).indices.int() + 1
    return torch.cat([torch.zeros_like(ids[:, :1]), ids], 1) if top_k > 1 else ids * 0


def same_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """All tokens take the same K experts."""
    return uniform_ids(1, experts, top_k).expand(tokens, -1).contiguous()


def make_chain(
    layers: list[MoERuntime], tokens: int, seed: int, ids: Router = uniform_ids
) -> Chain:
    """Random inputs for T tokens."""
    torch.manual_seed(seed)
    cfg = layers[0].cfg
    rows = [
        torch.randn(tokens, cfg.hidden_size, device=DEVICE).to(cfg.torch_dtype)
        for _ in range(len(layers) + 1)
    ]
    topks = [
        TopK(
            torch.softmax(torch.randn(tokens, cfg.top_k, device=DEVICE), -1),
            ids(tokens, cfg.num_experts, cfg.top_k),
        )
        for _ in layers
    ]
    return Chain(layers, topks, rows)


def check(chain: Chain) -> float:
    """Relative L2 error of the first layer against the fp32 reference, on up to 16 rows.

    Raises:
        AssertionError: it is too large, so that no time would mean anything.
    """
    layer, topk, x, out = chain.layers[0], chain.topks[0], chain.rows[0], chain.rows[1]
    out.fill_(float("nan"))
    layer.forward(x, topk, out)
    rows = slice(0, x.shape[0], max(1, x.shape[0] // 16))
    sample = TopK(topk.weights[rows], topk.ids[rows])
    expected = experts_reference(x[rows], sample, layer.weights, layer.cfg)
    error = float((out[rows].float() - expected).norm() / expected.norm())
    assert error <= MAX_ERROR[layer.cfg.dtype] and not out.isnan().any(), (
        f"wrong result, relative error {error:.1e}: nothing is timed"
    )
    return error
