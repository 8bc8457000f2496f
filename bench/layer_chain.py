"""A chain of layers as a model has it, for benchmarks: own weights, own routing, out of one is x
of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from device_timing import DEVICE, GPU, Run, device_us, replayable, side_stream

from moert import ExpertWeights, MoEConfig, MoERuntime, TopK
from moert.steps.experts_reference import experts_reference

READ_BYTES_PER_SECOND = 4.58e12  # best read kernel over GiBs on an H200
MATMUL_FLOPS = 788e12  # bf16 8192^3 on an H200, in a short burst, before clocks fall
MATMUL_SIZE = 8192 if GPU else 128
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

    def ends(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and out of a layer."""
        return self.rows[index], self.rows[index + 1]

    def call(self, index: int) -> None:
        """One layer on the current stream."""
        x, out = self.ends(index)
        self.layers[index].forward(x, self.topks[index], out)

    def level(self) -> None:
        """Run it once, and scale the routing weights so that every row of every out has a mean square of 1.

        A gated layer's out grows with the square of its x: a few layers on rows would be zero, infinite or no
        number, in float16 after six, and multiplying those takes another time than a model's rows do.

        Raises:
            AssertionError: a row that cannot be scaled.
        """
        for index, topk in enumerate(self.topks):
            self.call(index)
            sizes = self.ends(index)[1].float().square().mean(1, keepdim=True).sqrt()
            low, high = sizes.min().item(), sizes.max().item()
            assert 0.0 < low <= high < float("inf"), (
                f"layer {index}: rows of size {low} to {high}, nothing is timed"
            )
            topk.weights.div_(sizes)
            self.call(index)

    def expected(self, rows: slice) -> torch.Tensor:
        """What the first layer makes of some of its rows, by the reference: [n, H] float32."""
        layer, topk = self.layers[0], self.topks[0]
        sample = TopK(topk.weights[rows], topk.ids[rows])
        return experts_reference(self.ends(0)[0][rows], sample, layer.weights, layer.cfg)

    def work(self) -> list[tuple[int, int]]:
        """(bytes, FLOPs) that each layer's floor counts."""
        cfg = self.layers[0].cfg
        return [(hit_bytes(cfg, topk.ids), flops(cfg, topk.ids)) for topk in self.topks]

    def floor_us(self) -> float:
        """Mean floor of a layer in microseconds: the larger of the bytes really hit and the FLOPs."""
        return sum(limit_us(*work) for work in self.work()) / len(self.layers)

    def hit_bytes(self) -> int:
        """Mean bytes a layer's floor counts."""
        return sum(nbytes for nbytes, _ in self.work()) // len(self.layers)

    def cell(self, us: float, error: float) -> dict[str, Any]:
        """What a report says of a layer that takes `us` microseconds."""
        plan = self.layers[0].plan().for_tokens(self.rows[0].shape[0])
        work, floor = self.work(), self.floor_us()
        return {
            "us": round(us, 2),
            "floor us": round(floor, 2),
            "times the floor": round(us / floor, 3),
            "bytes": sum(nbytes for nbytes, _ in work) // len(work),
            "flops": sum(count for _, count in work) // len(work),
            "error": error,
            "choice": str(plan.choice),
            "source": plan.source,
        }

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


def flops(cfg: MoEConfig, ids: torch.Tensor) -> int:
    """Of both matrices for all S rows."""
    return 2 * ids.numel() * (cfg.w13_rows + cfg.intermediate_size) * cfg.hidden_size


def limit_us(nbytes: float, count: float) -> float:
    """The larger of the bytes at read bandwidth and the FLOPs at the matrix rate, in microseconds."""
    return max(nbytes / READ_BYTES_PER_SECOND, count / MATMUL_FLOPS) * 1e6


def floor_us(cfg: MoEConfig, ids: torch.Tensor) -> float:
    """The floor of one layer with this routing."""
    return limit_us(hit_bytes(cfg, ids), flops(cfg, ids))


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


def share_group(
    cfg: MoEConfig, weights: Sequence[ExpertWeights], tokens: Sequence[int], **options: Any
) -> list[MoERuntime]:
    """One runtime for each of the weights, planned for these token counts, and captured by the caller."""
    layers: list[MoERuntime] = []
    for tensors in weights:
        more: dict[str, Any] = {"share": layers[0]} if layers else options
        if not layers:
            more |= {"buckets": tuple(tokens), "max_tokens": max(tokens), "graphs": "host"}
        layers.append(MoERuntime(cfg, tensors, **more))
    return layers


Router = Callable[[int, int, int], torch.Tensor]


def uniform_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Every token takes K distinct experts at random."""
    return torch.rand(tokens, experts, device=DEVICE).topk(top_k, 1).indices.int()


def one_hot_expert_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Expert 0 in every token, the others at random."""
    ids = torch.rand(tokens, experts - 1, device=DEVICE).topk(top_k - 1, 1).indices.int() + 1
    return torch.cat([ids.new_zeros(tokens, 1), ids], 1)


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
    _, out = chain.ends(0)
    out.fill_(float("nan"))
    chain.call(0)
    rows = slice(0, out.shape[0], max(1, out.shape[0] // 16))
    expected = chain.expected(rows)
    error = float((out[rows].float() - expected).norm() / expected.norm())
    assert error <= MAX_ERROR[chain.layers[0].cfg.dtype] and not out.isnan().any(), (
        f"wrong result, relative error {error:.1e}: nothing is timed"
    )
    return error


def matmul() -> Run:
    """A dense product of MATMUL_SIZE in each direction, bf16, by the vendor's library."""
    torch.manual_seed(0)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b.t(), out=out)


def cells(
    chains: Mapping[str, Chain], graphs: bool = True, with_matmul: bool = False
) -> dict[str, dict[str, Any]]:
    """Levelled and checked, then timed in turns: `Chain.cell` of each.

    Args:
        graphs: one over each chain; without, its calls are launched one by one.
        with_matmul: time `matmul` in turns with them; its FLOPs a second are "matmul flops" of every cell.

    Raises:
        AssertionError: a wrong result.
    """
    errors = {}
    for name, chain in chains.items():
        chain.level()
        errors[name] = check(chain)
    runs = {name: replayable(c.run) if graphs else c.run for name, c in chains.items()}
    product = matmul() if with_matmul else None  # owns what its graph reads and writes
    if product is not None:
        runs["matmul"] = replayable(product)
    with side_stream():
        times = device_us(runs, rounds=9)
    beside = {} if product is None else {"matmul flops": 2e6 * MATMUL_SIZE**3 / times["matmul"]}
    return {
        name: chain.cell(times[name] / len(chain.layers), errors[name]) | beside
        for name, chain in chains.items()
    }
