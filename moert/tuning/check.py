"""Whether a candidate computes the right thing: asked before it is timed, or taken from other versions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from moert.arena import Arena
from moert.call import Call, call_key
from moert.config import MoEConfig, Routing
from moert.steps.experts_reference import experts_reference
from moert.steps.sorting.layout import certain_crowd
from moert.topk import TopK, all_as_first, distinct_ids
from moert.weights import ExpertWeights, Matrix

# relative L2 error of a right result: a few roundings to the dtype (of h, of y, of out), measured below half
# of these; a single wrong tile of many exceeds them
TOLERANCE: Final = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 2e-5}
REDUCED_FP32: Final = 2e-3  # where the process lets fp32 products be rounded to TF32
WORST_ROW: Final = 4.0  # a single row may be this many times worse than the whole
SAMPLE: Final = 16  # rows that are compared with the reference
HOST_SAMPLE: Final = 2  # where the device has no memory for it
CHUNK: Final = 256  # rows compared at once, to bound the memory of the comparison


@dataclass
class Sample:
    """A routing of the inputs, and what has to come of it.

    Args:
        rows, expected: of the output, the latter [rows, H] float32.
        baseline: [T, H] of the first program that passed, where not all rows are in the sample.
    """

    topk: TopK
    rows: torch.Tensor
    expected: torch.Tensor
    baseline: torch.Tensor | None = None


class Check:
    """Random inputs of a bucket's size, and what their output has to be.

    Ids outside 0..E-1 are among the routing. The sample's rows are compared with the fp32 reference, all rows
    with the output of the first program that passed.

    Args:
        cfg, weights: the layer.
        tokens: B.

    Raises:
        torch.OutOfMemoryError: not even the inputs fit.
    """

    def __init__(self, cfg: MoEConfig, weights: ExpertWeights, tokens: int, seed: int = 0) -> None:
        self.tokens, device = tokens, weights.device
        self.tolerance = TOLERANCE[cfg.torch_dtype]
        if cfg.dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
            self.tolerance = REDUCED_FP32
        self.x, self.topk = random_inputs(cfg, tokens, device, seed)
        if self.topk.ids.numel() > 8:
            self.topk.ids.view(-1)[3] = -1
            self.topk.ids.view(-1)[-2] = cfg.num_experts
        self.out = torch.empty_like(self.x)
        self.live = tokens - tokens // 4
        self._num_valid = torch.tensor(self.live, dtype=torch.int32, device=device)
        self._tail = self.x[self.live :].clone()
        self._layer = cfg, weights
        self._even = self._sample(self.topk)
        self._crowd: Sample | None = None

    @property
    def rows(self) -> torch.Tensor:
        """Of the output, those that are compared with the reference."""
        return self._even.rows

    @property
    def possible(self) -> bool:
        """The reference is finite: weights that nobody has filled yet cannot be checked."""
        return bool(torch.isfinite(self._even.expected).all())

    def fault(self, run: Callable[[Call], None], call: Call, arena: Arena) -> str | None:
        """What is wrong with a program's output, or None.

        Args:
            run: runs the program on the call and waits for it.
            call: for this device.
            arena: that the program's views are of; poisoned before each run.
        """
        fault = self._fault(run, call, arena, self._even, self.tokens)
        if fault is None and self.live < self.tokens:
            # as a padded batch: nothing of the rows from `live` on may be read or written
            self.x[self.live :].fill_(float("nan"))
            try:
                fault = self._fault(run, call, arena, self._even, self.live)
            finally:
                self.x[self.live :].copy_(self._tail)
        return fault

    def crowded_fault(
        self, run: Callable[[Call], None], call: Call, arena: Arena, crowded_bm: int
    ) -> str | None:
        """`fault` where all tokens take the same experts: what a choice has for crowds runs then.

        Args:
            crowded_bm: BM of that; as many rows are live as certainly make a crowd. 0: all rows, as a
                baseline for others.
        """
        if self._crowd is None:
            self._crowd = self._sample(TopK(self.topk.weights, all_as_first(self.topk.ids)))
        live = certain_crowd(self.tokens, crowded_bm) if crowded_bm else self.tokens
        fault = self._fault(run, call, arena, self._crowd, live)
        return None if fault is None else f"all tokens on the same experts: {fault}"

    def _fault(
        self,
        run: Callable[[Call], None],
        call: Call,
        arena: Arena,
        sample: Sample,
        live: int,
    ) -> str | None:
        arena.poison()
        self.out.fill_(float("nan"))
        num_valid = self._num_valid.fill_(live) if live < self.tokens else None
        set_call(call, self.x, sample.topk, self.out, num_valid)
        run(call)
        if not bool(torch.isnan(self.out[live:]).all()):
            return f"rows from {live} on were written, though only {live} are live"
        here = sample.rows < live
        fault = self._compare(self.out[sample.rows[here]], sample.expected[here], "the reference")
        if fault is None and sample.baseline is not None:
            fault = self._compare(self.out[:live], sample.baseline[:live], "a checked candidate")
        elif fault is None and live == self.tokens and sample.rows.numel() < self.tokens:
            sample.baseline = self.out.clone()
        return fault

    def _compare(self, got: torch.Tensor, want: torch.Tensor, what: str) -> str | None:
        whole, worst = relative_error(got, want)
        if whole <= self.tolerance and worst <= WORST_ROW * self.tolerance:
            return None
        return (
            f"relative error {whole:.2g} (worst row {worst:.2g}) against {what}, "
            f"allowed {self.tolerance:.2g}"
        )

    def _sample(self, routing: TopK) -> Sample:
        cfg, weights = self._layer
        try:
            rows = _spread(self.tokens, SAMPLE, weights.device)
            topk = TopK(routing.weights[rows], routing.ids[rows])
            return Sample(routing, rows, experts_reference(self.x[rows], topk, weights, cfg))
        except torch.OutOfMemoryError:
            rows = _spread(self.tokens, HOST_SAMPLE, weights.device)
            topk = TopK(routing.weights[rows].cpu(), routing.ids[rows].cpu())
            expected = reference_on_host(self.x[rows].cpu(), topk, weights, cfg)
            return Sample(routing, rows, expected.to(weights.device))


def random_inputs(
    cfg: MoEConfig, tokens: int, device: torch.device, seed: int
) -> tuple[torch.Tensor, TopK]:
    """x [T, H] standard normal; K distinct experts a token, int32; float32 weights that sum to 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(columns: int) -> torch.Tensor:
        shape = (tokens, columns)
        return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)

    x = torch.empty(tokens, cfg.hidden_size, dtype=cfg.torch_dtype, device=device)
    x.normal_(generator=generator)
    ids = distinct_ids(uniform(cfg.num_experts), cfg.top_k)
    weights = uniform(cfg.top_k) + 0.1
    return x, TopK(weights / weights.sum(dim=1, keepdim=True), ids)


def new_call(cfg: MoEConfig, device: torch.device) -> Call:
    """A call of a program's own, for use before there is a share group."""
    no_limit = torch.tensor(torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
    return Call(no_limit, 16 if cfg.hidden_size % 16 == 0 else 1)


def set_call(
    call: Call,
    x: torch.Tensor,
    topk: TopK,
    out: torch.Tensor,
    num_valid: torch.Tensor | None = None,
) -> None:
    """Take over the tensors of a call that needs no check."""
    call.set(call_key(x, topk, out, num_valid, "keep"), x, topk, out, num_valid)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """(relative L2 error of all rows, of the worst row); NaN where `got` holds one.

    A row's error is taken relative to its own norm, or to a tenth of the rows' root mean square where that
    is larger: a row of which nothing is routed is zero. Both arguments zero is no error.
    """
    wrong, norms = [], []
    for start in range(0, got.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        a, b = got[rows].float(), want[rows].float()
        wrong.append((a - b).norm(dim=1).double())
        norms.append(b.norm(dim=1).double())
    error, norm = torch.cat(wrong), torch.cat(norms)
    if not bool((error != 0).any()):
        return 0.0, 0.0
    scale = norm.square().mean().sqrt()
    worst = (error / norm.clamp_min(0.1 * float(scale))).max()
    return float(error.norm() / norm.norm()), float(worst)


def reference_on_host(
    x: torch.Tensor, topk: TopK, weights: ExpertWeights, cfg: MoEConfig
) -> torch.Tensor:
    """`experts_reference` on the CPU, of which only the experts that `topk` (on the CPU) names are copied."""
    valid = (topk.ids >= 0) & (topk.ids < cfg.num_experts)
    used = topk.ids[valid].unique().tolist()
    place = torch.full((cfg.num_experts,), -1, dtype=torch.int32, device="cpu")
    place[used] = torch.arange(len(used), dtype=torch.int32, device="cpu")
    ids = torch.where(valid, place[topk.ids.clamp(0, cfg.num_experts - 1).long()], -1)
    if not used:
        return torch.zeros(x.shape, dtype=torch.float32, device="cpu")

    def picked(tensor: Matrix | None) -> torch.Tensor | None:
        return None if tensor is None else torch.stack([tensor[e].cpu() for e in used])

    w13, w2 = picked(weights.w13), picked(weights.w2)
    assert w13 is not None and w2 is not None
    host = replace(weights, w13=w13, w2=w2, b13=picked(weights.b13), b2=picked(weights.b2))
    few = replace(cfg, num_experts=max(len(used), cfg.top_k), routing=Routing())
    return experts_reference(x, TopK(topk.weights, ids), host, few)


def _spread(tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """Up to `count` of the rows 0..T-1, evenly spread, the first and the last among them."""
    count = min(tokens, count)
    rows = [round(i * (tokens - 1) / max(count - 1, 1)) for i in range(count)]
    return torch.tensor(rows, dtype=torch.int64, device=device)
