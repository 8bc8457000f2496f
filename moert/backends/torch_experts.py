"""The experts of one layer on the CPU, on preallocated memory.

The way of the rows: sort by expert; then block by block gather, gate and up, activation, down; then, from
the results of all (token, slot) pairs, the weighted sums in slot order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch

from moert.arena import Field
from moert.backends.torch_int4 import Int4Linear, int4_fields
from moert.backends.torch_linear import ExpertLinear, linear_fields
from moert.config import MoEConfig
from moert.quantization.int4_layout import Int4Matrix
from moert.steps.activation.inplace import activate_
from moert.steps.experts_reference import ExpertTensors, split_gate_up

# rows that are gathered and projected together: enough for full speed, few enough that the scratch of a
# large call stays small
BLOCK_ROWS: Final = 512
# float32 values that are combined together: 1 MiB, a core's cache
COMBINE_NUMEL: Final = 1 << 18
# a sort key is expert << 32 | row: distinct keys, so any sort is stable
KEY_SHIFT: Final = 32
ROW_MASK: Final = (1 << KEY_SHIFT) - 1


# calls a function for the step of that name
Step = Callable[..., Any]


def plainly(_: str, function: Callable[..., Any], *args: Any) -> Any:
    """A step that nobody watches."""
    return function(*args)


Linear = ExpertLinear | Int4Linear


class TorchExperts:
    """`out[t] = sum over k of weight[t, k] * expert[id[t, k]](x[t])`, without allocating a tensor.

    Args:
        cfg: the layer.
        weights: its tensors; only viewed, so that in-place updates are seen.
        scratch: a contiguous CPU tensor for each of `scratch_fields(cfg, tokens)`, of any content.
        like: another one of the same weights; its views of them, a kilobyte an expert, serve both.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        weights: ExpertTensors,
        scratch: dict[str, torch.Tensor],
        like: TorchExperts | None = None,
    ) -> None:
        self.cfg = cfg
        self.interleaved = weights.interleaved
        self.scratch = scratch
        self.linear13: Linear = _linear(
            weights.w13, weights.b13, scratch, like.linear13 if like else None
        )
        self.linear2: Linear = _linear(
            weights.w2, weights.b2, scratch, like.linear2 if like else None
        )
        self.bounds = torch.arange(cfg.num_experts + 1, device="cpu") << KEY_SHIFT
        self.alpha = torch.tensor(cfg.activation_alpha, dtype=torch.float32, device="cpu")
        # numpy has what torch lacks: a sort in place and cheaper calls on few integers
        self.keys, self.order, self.token = (
            scratch[name].numpy() for name in ("keys", "order", "token")
        )

    @staticmethod
    def scratch_fields(cfg: MoEConfig, tokens: int) -> tuple[Field, ...]:
        """The scratch for calls of up to `tokens` tokens."""
        hidden, inner, dtype = cfg.hidden_size, cfg.intermediate_size, cfg.torch_dtype
        slots = tokens * cfg.top_k
        rows = min(slots, BLOCK_ROWS)
        combined = min(tokens, _combine_tokens(cfg)) * cfg.top_k
        shapes = [(cfg.w13_rows, hidden), (hidden, inner)]
        # int4 products are float32 anyway, and need not be rounded before the last
        between = dtype if cfg.quant is None else torch.float32
        return (
            Field("keys", (slots,), torch.int64),  # expert << 32 | row
            Field("iota", (slots,), torch.int64),
            Field("order", (slots,), torch.int64),  # grouped row -> t * K + k
            Field("token", (slots,), torch.int64),  # grouped row -> t
            Field("inverse", (slots,), torch.int64),  # t * K + k -> grouped row
            Field("offsets", (cfg.num_experts + 1,), torch.int64),  # of the experts' rows
            Field("row_weights", (slots,), torch.float32),  # t * K + k -> routing weight
            Field("rows", (rows + 1, hidden), dtype),  # one more row: see `ExpertLinear`
            Field("gate_up", (rows, cfg.w13_rows), between),
            Field("gate", (rows, inner), torch.float32),
            Field("up", (rows, inner), torch.float32),
            Field("spare", (rows, inner), torch.float32),
            Field("inner", (rows + 1, inner), between),
            Field("results", (slots, hidden), between),  # in grouped order
            Field("picked", (combined, hidden), between),
            Field("sums", (combined, hidden), torch.float32),
            *(linear_fields if cfg.quant is None else int4_fields)(shapes, rows, dtype),
        )

    def run(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        out: torch.Tensor,
        live: int,
        pad_zero: bool,
        step: Step = plainly,
    ) -> None:
        """Compute rows 0..live-1 of `out`.

        Args:
            x: [B, H] of the layer's dtype, any row stride; rows from `live` on are not read.
            topk_weights: [B, K] float32 or the layer's dtype, any strides.
            topk_ids: [B, K] int32 or int64, any strides; an id outside 0..E-1 contributes zero.
            out: [B, H] of the layer's dtype, any row stride, apart from the inputs.
            live: at most the `tokens` of the scratch.
            pad_zero: rows from `live` on become zero instead of keeping what they hold.
            step: runs each step, named like the kernels that do the same on a GPU.
        """
        if pad_zero and live < out.shape[0]:
            out[live:].zero_()
        if live == 0:
            return
        offsets = step("sort", self._group, topk_weights, topk_ids, live)
        for start, experts, sizes in _blocks(offsets):
            self._project(x, start, experts, sizes, step)
        step("combine", self._combine, out, live)

    def _group(self, topk_weights: torch.Tensor, topk_ids: torch.Tensor, live: int) -> list[int]:
        """Sort the (token, slot) pairs by expert; expert e's rows are offsets[e]..offsets[e + 1]-1."""
        s, top_k, num_experts = self.scratch, self.cfg.top_k, self.cfg.num_experts
        n = live * top_k
        iota = torch.arange(n, out=s["iota"][:n], device="cpu")
        s["keys"][:n].view(live, top_k).copy_(topk_ids[:live]).clamp_(-1, num_experts)
        keys, order = self.keys[:n], self.order[:n]
        np.left_shift(keys, KEY_SHIFT, out=keys)
        np.add(keys, iota.numpy(), out=keys)
        keys.sort()
        np.bitwise_and(keys, ROW_MASK, out=order)
        np.floor_divide(order, top_k, out=self.token[:n])
        s["inverse"].scatter_(0, s["order"][:n], iota)
        torch.searchsorted(s["keys"][:n], self.bounds, out=s["offsets"])
        offsets: list[int] = s["offsets"].tolist()
        s["row_weights"][:n].view(live, top_k).copy_(topk_weights[:live])
        # what is routed elsewhere sorts before and behind the experts
        for start, stop in ((0, offsets[0]), (offsets[-1], n)):
            if start < stop:
                s["results"][start:stop].zero_()
                s["row_weights"].index_fill_(0, s["order"][start:stop], 0.0)
        return offsets

    def _project(
        self, x: torch.Tensor, start: int, experts: list[int], sizes: list[int], step: Step
    ) -> None:
        """The results of the grouped rows from `start` on: `sizes[i]` rows of `experts[i]`."""
        s = self.scratch
        n = sum(sizes)
        rows, gate_up, inner = s["rows"][:n], s["gate_up"][:n], s["inner"][:n]
        results = s["results"][start : start + n]
        torch.index_select(x, 0, s["token"][start : start + n], out=rows)
        step("gate_up_grouped", _multiply, self.linear13, experts, sizes, rows, gate_up)
        self._activate(gate_up, inner)
        step("down_grouped", _multiply, self.linear2, experts, sizes, inner, results)

    def _activate(self, gate_up: torch.Tensor, inner: torch.Tensor) -> None:
        n, s = gate_up.shape[0], self.scratch
        gate, up = split_gate_up(gate_up, self.cfg.gated, self.interleaved)
        spare = s["spare"][:n]
        if gate_up.dtype == torch.float32 and not self.interleaved:
            activate_(gate, up, spare, inner, self.cfg, self.alpha)
            return
        up = s["up"][:n].copy_(up)
        if gate is not None:
            gate = s["gate"][:n].copy_(gate)
        activate_(gate, up, spare, up, self.cfg, self.alpha)
        inner.copy_(up)

    def _combine(self, out: torch.Tensor, live: int) -> None:
        """Add the weighted results of every token in slot order, in float32."""
        s, top_k, hidden = self.scratch, self.cfg.top_k, self.cfg.hidden_size
        step = _combine_tokens(self.cfg)
        for start in range(0, live, step):
            stop = min(start + step, live)
            here = slice(start * top_k, stop * top_k)
            n = here.stop - here.start
            picked = torch.index_select(s["results"], 0, s["inverse"][here], out=s["picked"][:n])
            sums = s["sums"][:n].copy_(picked).mul_(s["row_weights"][here].unsqueeze(1))
            first, *others = sums.view(-1, top_k, hidden).unbind(1)
            for other in others:
                first.add_(other)
            out[start:stop].copy_(first)


def _multiply(
    linear: Linear,
    experts: Sequence[int],
    sizes: Sequence[int],
    rows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`sizes[i]` successive rows by the matrix of `experts[i]`."""
    for pieces in zip(experts, rows.split(sizes), out.split(sizes), strict=True):
        linear(*pieces)


def _linear(
    weight: object,
    bias: torch.Tensor | None,
    scratch: dict[str, torch.Tensor],
    like: Linear | None,
) -> Linear:
    if isinstance(weight, Int4Matrix):
        assert like is None or isinstance(like, Int4Linear)
        return Int4Linear(weight, bias, scratch, like)
    assert isinstance(weight, torch.Tensor) and not isinstance(like, Int4Linear)
    return ExpertLinear(weight, bias, scratch, like)


def _combine_tokens(cfg: MoEConfig) -> int:
    return max(1, COMBINE_NUMEL // (cfg.top_k * cfg.hidden_size))


def _blocks(offsets: list[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """(first grouped row, experts, their numbers of rows) of blocks of up to BLOCK_ROWS rows.

    An expert is only cut where it alone exceeds a block, because its weights are read once per piece.
    """
    start, count = offsets[0], 0
    experts: list[int] = []
    sizes: list[int] = []
    for e in range(len(offsets) - 1):
        left = offsets[e + 1] - offsets[e]
        while left:
            size = min(left, BLOCK_ROWS)
            if count + size > BLOCK_ROWS:
                yield start, experts, sizes
                start, count, experts, sizes = start + count, 0, [], []
            experts.append(e)
            sizes.append(size)
            count += size
            left -= size
    if count:
        yield start, experts, sizes
