"""The Triton backend: NVIDIA and AMD GPUs, and any CPU under Triton's interpreter for tests.

Strategy "none": two launches, gate/up and down, each program finding its expert by itself. Sorted strategies:
sort (one or more launches), gate/up, down, combine. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moert.arena import Field
from moert.backends import triton_tiles
from moert.backends.base import Backend, Program, Router
from moert.backends.triton_router import make_router
from moert.call import Call
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.launch import CompiledLaunch, Launch, compile_launch, run_interpreted, signature
from moert.plan import Choice
from moert.steps.combine.triton import combine_kernel
from moert.steps.down.triton import down_direct_kernel, down_grouped_kernel
from moert.steps.gate_up.triton import gate_up_direct_kernel, gate_up_grouped_kernel
from moert.steps.routing.triton import MAX_EXPERTS
from moert.steps.sorting.launches import feasible, sort_fields, sort_launches
from moert.steps.sorting.layout import max_blocks

Views = dict[str, torch.Tensor]


class TritonBackend(Backend):
    """See the module docstring."""

    name = "triton"
    uses_graphs = True

    @staticmethod
    def supports(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        if facts.kind == "cpu":
            import triton

            if not triton.knobs.runtime.interpret:
                return (
                    "runs on a CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests"
                )
        if cfg.num_experts > MAX_EXPERTS:
            return f"num_experts={cfg.num_experts} exceeds the kernels' limit of {MAX_EXPERTS}"
        return None

    def default_choice(self, tokens: int) -> Choice:
        return triton_tiles.default_choice(self.cfg, self.facts, tokens)

    def candidates(self, tokens: int, strategies: Sequence[str]) -> list[Choice]:
        cfg = self.cfg
        able = [
            s
            for s in strategies
            if s == "none" or feasible(s, tokens, cfg.num_experts, cfg.top_k, self.facts) is None
        ]
        return triton_tiles.candidates(cfg, self.facts, tokens, able)

    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        cfg = self.cfg
        rows = tokens * cfg.top_k
        h = Field("h", (rows, cfg.intermediate_size), cfg.torch_dtype)
        if choice.strategy == "none":
            return (h,)
        assert choice.gate_up is not None
        sort = sort_fields(choice.strategy, tokens, cfg.num_experts, cfg.top_k, choice.gate_up.bm)
        y = Field("y", (rows, cfg.hidden_size), cfg.torch_dtype)
        return (*(Field(*f) for f in sort), h, y)

    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        fields = self.fields(tokens, choice)
        absent = {f.name: torch.empty(f.shape, dtype=f.dtype, device="meta") for f in fields}
        return tuple(launch.name for launch in self.launches(tokens, choice, absent))

    def launches(self, tokens: int, choice: Choice, views: Views) -> list[Launch]:
        """The launches of a plan in order; pure but for the tensors it names."""
        assert choice.gate_up is not None and choice.down is not None
        if choice.strategy == "none":
            return [self._gate_up_direct(choice, views), self._down_direct(choice, views)]
        cfg = self.cfg
        sort = sort_launches(
            choice.strategy,
            self.facts,
            tokens,
            cfg.num_experts,
            cfg.top_k,
            choice.gate_up.bm,
            views,
        )
        return [
            *sort,
            self._gate_up_grouped(choice, views),
            self._down_grouped(choice, views),
            self._combine(views),
        ]

    def program(
        self,
        tokens: int,
        choice: Choice,
        views: Views,
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        launches = self.launches(tokens, choice, views)
        if self.facts.kind == "cpu":
            return InterpretedProgram(launches)
        cache = {} if kernel_cache is None else kernel_cache
        return CompiledProgram([self._compile(launch, aligned, cache) for launch in launches])

    def router(
        self, max_tokens: int, no_limit: torch.Tensor, kernel_cache: dict[Any, Any]
    ) -> Router:
        bias = self.weights.correction_bias
        return make_router(self.cfg, self.facts, bias, no_limit, max_tokens, kernel_cache)

    @property
    def row_multiple(self) -> int:
        return 16 if self.cfg.hidden_size % 16 == 0 else 1

    def _compile(self, launch: Launch, aligned: bool, cache: dict[Any, Any]) -> CompiledLaunch:
        dtype = self.cfg.torch_dtype
        sig, constants, attrs = signature(launch, dtype, aligned, self.row_multiple)
        key = (
            launch.kernel,
            tuple(sig.items()),
            tuple(constants.items()),
            tuple(attrs),
            launch.num_warps,
            launch.num_stages,
            tuple(launch.options.items()),
        )
        if key not in cache:
            cache[key] = compile_launch(
                launch, dtype, aligned=aligned, row_multiple=self.row_multiple
            )
        return CompiledLaunch(launch, cache[key])

    def _expert_constants(self) -> dict[str, Any]:
        cfg, w13 = self.cfg, self.weights.w13
        return {
            "K": cfg.top_k,
            "H": cfg.hidden_size,
            "I": cfg.intermediate_size,
            "W_E": w13.stride(0),
            "W_N": w13.stride(1),
            "W_K": w13.stride(2),
            "GATED": cfg.gated,
            "INTERLEAVED": self.weights.interleaved,
            "ACTIVATION": cfg.activation,
            "LIMIT": cfg.activation_limit or 0.0,
            "ALPHA": cfg.activation_alpha,
        }

    def _down_constants(self) -> dict[str, Any]:
        cfg, w2 = self.cfg, self.weights.w2
        return {
            "K": cfg.top_k,
            "H": cfg.hidden_size,
            "I": cfg.intermediate_size,
            "W_E": w2.stride(0),
            "W_N": w2.stride(1),
            "W_K": w2.stride(2),
        }

    def _gate_up_direct(self, choice: Choice, views: Views) -> Launch:
        tile, cfg = choice.gate_up, self.cfg
        assert tile is not None
        tiles_n = -(-cfg.intermediate_size // tile.bn)
        return Launch(
            gate_up_direct_kernel,
            lambda tokens: (tiles_n * tokens * cfg.top_k, 1, 1),
            {"w13_ptr": self.weights.w13, "b13_ptr": self.weights.b13, "h_ptr": views["h"]},
            {**self._expert_constants(), "E": cfg.num_experts, "BN": tile.bn, "BK": tile.bk},
            tile.num_warps,
            tile.num_stages,
        )

    def _down_direct(self, choice: Choice, views: Views) -> Launch:
        tile, cfg = choice.down, self.cfg
        assert tile is not None
        tiles_n = -(-cfg.hidden_size // tile.bn)
        return Launch(
            down_direct_kernel,
            lambda tokens: (tiles_n * tokens, 1, 1),
            {"w2_ptr": self.weights.w2, "b2_ptr": self.weights.b2, "h_ptr": views["h"]},
            {**self._down_constants(), "E": cfg.num_experts, "BN": tile.bn, "BK": tile.bk},
            tile.num_warps,
            tile.num_stages,
        )

    def _grouped_grid(self, bm: int, columns: int, bn: int) -> Any:
        cfg, tiles_n = self.cfg, -(-columns // bn)

        def grid(tokens: int) -> tuple[int, int, int]:
            return (max_blocks(tokens, cfg.top_k, cfg.num_experts, bm) * tiles_n, 1, 1)

        return grid

    def _gate_up_grouped(self, choice: Choice, views: Views) -> Launch:
        tile, cfg = choice.gate_up, self.cfg
        assert tile is not None
        return Launch(
            gate_up_grouped_kernel,
            self._grouped_grid(tile.bm, cfg.intermediate_size, tile.bn),
            {
                "sorted_token_ids": views["sorted_token_ids"],
                "sorted_expert_ids": views["sorted_expert_ids"],
                "num_valid_ids": views["num_valid_ids"],
                "w13_ptr": self.weights.w13,
                "b13_ptr": self.weights.b13,
                "h_ptr": views["h"],
            },
            {**self._expert_constants(), **self._grouped_constants(tile)},
            tile.num_warps,
            tile.num_stages,
        )

    def _down_grouped(self, choice: Choice, views: Views) -> Launch:
        tile, cfg = choice.down, self.cfg
        assert tile is not None
        return Launch(
            down_grouped_kernel,
            self._grouped_grid(tile.bm, cfg.hidden_size, tile.bn),
            {
                "sorted_token_ids": views["sorted_token_ids"],
                "sorted_weights": views["sorted_weights"],
                "sorted_expert_ids": views["sorted_expert_ids"],
                "num_valid_ids": views["num_valid_ids"],
                "w2_ptr": self.weights.w2,
                "b2_ptr": self.weights.b2,
                "h_ptr": views["h"],
                "y_ptr": views["y"],
            },
            {**self._down_constants(), **self._grouped_constants(tile)},
            tile.num_warps,
            tile.num_stages,
        )

    def _grouped_constants(self, tile: Any) -> dict[str, Any]:
        return {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk}

    def _combine(self, views: Views) -> Launch:
        cfg = self.cfg
        bn = min(512, 1 << (cfg.hidden_size - 1).bit_length())
        tiles_n = -(-cfg.hidden_size // bn)
        return Launch(
            combine_kernel,
            lambda tokens: (tiles_n * tokens, 1, 1),
            {"y_ptr": views["y"]},
            {"E": cfg.num_experts, "K": cfg.top_k, "H": cfg.hidden_size, "BN": bn},
            num_warps=2,
            num_stages=1,
        )


class CompiledProgram(Program):
    """Compiled launches in order."""

    def __init__(self, launches: list[CompiledLaunch]) -> None:
        self.launches = launches
        self.kernels = tuple(launch.name for launch in launches)

    def run(self, call: Call, stream: int) -> None:
        for launch in self.launches:
            launch.run(call.values, call.tokens, stream)


class InterpretedProgram(Program):
    """The same launches on CPU tensors."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches
        self.kernels = tuple(launch.name for launch in launches)

    def run(self, call: Call, stream: int) -> None:
        run_interpreted(self.launches, call.interpreter_values(), call.tokens)
