"""Captures the graphs of one layer at start-up; each must do what an eager launch does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.backends.base import Program
from moert.backends.triton import CompiledProgram
from moert.call import call_key
from moert.errors import StateError
from moert.graphs import CapturedPlan
from moert.plan import Plan
from moert.share import ShareGroup
from moert.steps.sorting.layout import certain_crowd
from moert.topk import TopK, all_as_first, distinct_ids


class StartUpRows:
    """Random tensors of up to `tokens` rows on the current stream, for calls made at start-up."""

    def __init__(self, group: ShareGroup, tokens: int, seed: int = 0) -> None:
        self._call = group.call
        cfg, device = group.cfg, group.device
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(tokens, cfg.hidden_size, generator=generator, device=device)
        self.x = x.to(cfg.torch_dtype)
        self.out = torch.empty_like(self.x)
        scores = torch.rand(tokens, cfg.num_experts, generator=generator, device=device)
        self.ids = distinct_ids(scores, cfg.top_k)
        self._crowd: torch.Tensor | None = None
        self.weights = torch.full_like(self.ids, 1.0 / cfg.top_k, dtype=torch.float32)

    def set(self, tokens: int, crowd: bool = False) -> torch.Tensor:
        """Make the first rows the present call; what it writes.

        Args:
            crowd: all rows take the first one's experts.
        """
        x, out = self.x[:tokens], self.out[:tokens]
        ids = self.ids
        if crowd:
            if self._crowd is None:
                self._crowd = all_as_first(ids)
            ids = self._crowd
        topk = TopK(self.weights[:tokens], ids[:tokens])
        self._call.set(call_key(x, topk, out, None, "keep"), x, topk, out, None)
        return out


def start_up_calls(plan: Plan) -> list[tuple[int, bool]]:
    """(rows, whether all take the same experts) of calls in which every kernel of a plan does something."""
    calls = [(plan.tokens, False)]
    if tall := plan.choice.crowded_bm:
        calls.append((certain_crowd(plan.tokens, tall), True))
    return calls


def capture_plans(group: ShareGroup, programs: Sequence[Program]) -> list[CapturedPlan | None]:
    """A graph for each plan that is to be captured, None for the others; largest first.

    Each graph is captured on one set of tensors, then replayed on another and compared, bit for bit, with an
    eager launch there: that shows that the driver really rewrites its nodes, and the right ones.

    Args:
        group: with plans made.
        programs: one per plan, each run before on the group's capture stream.

    Raises:
        StateError: torch or the driver cannot do it, or a replay differs; nothing is left behind.
    """
    group.open_driver()
    stream = group.capture_stream
    graphs: list[CapturedPlan | None] = [None] * len(programs)
    stream.wait_stream(torch.cuda.current_stream(group.device))
    try:
        with torch.cuda.stream(stream):
            # two tensors each: slices of one would not be as aligned
            first, second = (StartUpRows(group, group.largest_bucket, seed) for seed in (0, 1))
            expected = torch.empty_like(second.out)
            differs = torch.zeros(len(programs), dtype=torch.int32, device=group.device)
            free = torch.cuda.mem_get_info(group.device)[0]
            for slot in reversed(range(len(programs))):
                plan, program = group.plans[slot], programs[slot]
                if not plan.captured:
                    continue
                assert isinstance(program, CompiledProgram)
                first.set(plan.tokens)
                graphs[slot] = graph = _captured(group, program, plan.tokens)
                for rows, crowd in start_up_calls(plan):
                    out, want = second.set(rows, crowd), expected[:rows]
                    program.launch(group.call, stream.cuda_stream, group.labels)
                    want.copy_(out)
                    out.fill_(float("nan"))
                    graph.update()
                    graph.launch(stream.cuda_stream)
                    differs[slot] |= (_bits(out) != _bits(want)).any()
            # waits for all of them
            wrong = [p.tokens for p, n in zip(group.plans, differs.tolist(), strict=True) if n]
        used = free - torch.cuda.mem_get_info(group.device)[0]
    finally:
        group.call.release()
    if wrong:
        raise StateError(f"graphs of {wrong} tokens with updated nodes differ from eager launches")
    group.graph_bytes += max(0, used)
    return graphs


def _captured(group: ShareGroup, program: CompiledProgram, tokens: int) -> CapturedPlan:
    assert group.driver is not None
    call, stream = group.call, group.capture_stream
    return CapturedPlan(program, tokens, call, stream, group.pool, group.driver, group.labels)


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """As integers: weights that nobody has filled yet give NaN, which is unlike itself."""
    return rows.view(torch.int32 if rows.itemsize == 4 else torch.int16)
