"""What profilers see: the names of steps and calls, in the grammar that the field's tools parse.

    fused_moe_<way>_<format> MxNxK E=<E> top_k=<K>

names a GEMM of M tokens (a bucket, or T of a call that is launched kernel by kernel): N x K is 2I x H for
gate/up and H x I for down. The way is "wvsplitk" for the skinny GEMMs that decode runs without a sort, the
name that tools look for (ROCm/vllm, pull request 896: `fused_moe_wvsplitk_int4`), and "grouped" after a sort.
The other steps have no format: sorting and routing are MxKxE, combine is MxHxK, rows as fixed-point numbers
MxHx2 and MxIx2 for two bytes a column. A replayed graph is one range for the call, `fused_moe_graph_<format>`
with B x H x I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from torch._C._autograd import _profiler_enabled as profiling
from torch.autograd.profiler import record_function

from moert.config import MoEConfig
from moert.plan import Plan

__all__ = ["Labels", "label", "profiling", "step_label"]

FORMATS: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def label(what: str, m: int, n: int, k: int, cfg: MoEConfig) -> str:
    """`fused_moe_<what> MxNxK E=<E> top_k=<K>`."""
    return f"fused_moe_{what} {m}x{n}x{k} E={cfg.num_experts} top_k={cfg.top_k}"


def step_label(kernel: str, cfg: MoEConfig, weights_format: str, tokens: int) -> str:
    """The name of the range around one kernel.

    Args:
        kernel: its name; GEMMs begin with gate_up or down and say "direct" or "gathered" where rows are not
            sorted.
        weights_format: of the experts, as `FORMATS` has it, or "int4" and the like.
        tokens: M.
    """
    step = kernel.removesuffix("_kernel")
    unsorted = "direct" in step or "gathered" in step
    way = f"{'wvsplitk' if unsorted else 'grouped'}_{weights_format}"
    if step.startswith("gate_up"):
        return label(way, tokens, cfg.w13_rows, cfg.hidden_size, cfg)
    if step.startswith("down"):
        return label(way, tokens, cfg.hidden_size, cfg.intermediate_size, cfg)
    if step.startswith("combine"):
        return label(step, tokens, cfg.hidden_size, cfg.top_k, cfg)
    if step.startswith("split"):
        columns = cfg.hidden_size if step == "split_x" else cfg.intermediate_size
        return label(step, tokens, columns, 2, cfg)
    return label(step, tokens, cfg.top_k, cfg.num_experts, cfg)


class Labels:
    """The names of one layer geometry, each made once: for all plans at start, for a T in between when a
    profiler first sees it.

    Args:
        cfg: the geometry, and the format of the weights.
    """

    def __init__(self, cfg: MoEConfig) -> None:
        self._cfg = cfg
        self._format = FORMATS[cfg.dtype] if cfg.quant is None else cfg.quant.format
        self._steps: dict[tuple[str, int], str] = {}
        self._calls: dict[tuple[str, int], str] = {}

    def prepare(self, plans: Iterable[Plan]) -> None:
        """Make the names of all plans."""
        for plan in plans:
            self._call("graph" if plan.captured else "call", plan.tokens)
            for kernel in plan.kernels:
                self._step(kernel, plan.tokens)

    def step(self, kernel: str, tokens: int) -> record_function:
        """The range around one kernel of a call of `tokens` rows."""
        return record_function(self._step(kernel, tokens))

    def call(self, tokens: int) -> record_function:
        """The range around all kernels of a call, where they cannot be told apart."""
        return record_function(self._call("call", tokens))

    def replay(self, bucket: int) -> record_function:
        """The range around a replay of the graph of a bucket."""
        return record_function(self._call("graph", bucket))

    def steps_of(self, tokens: int) -> Callable[..., Any]:
        """A function that calls others under the range of a step: (kernel, function, arguments)."""

        def run(kernel: str, function: Callable[..., Any], *args: Any) -> Any:
            with self.step(kernel, tokens):
                return function(*args)

        return run

    def _step(self, kernel: str, tokens: int) -> str:
        name = self._steps.get((kernel, tokens))
        if name is None:
            name = step_label(kernel, self._cfg, self._format, tokens)
            self._steps[kernel, tokens] = name
        return name

    def _call(self, what: str, tokens: int) -> str:
        name = self._calls.get((what, tokens))
        if name is None:
            cfg = self._cfg
            what_of = f"{what}_{self._format}"
            name = label(what_of, tokens, cfg.hidden_size, cfg.intermediate_size, cfg)
            self._calls[what, tokens] = name
        return name
