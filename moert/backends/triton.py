"""The Triton backend: NVIDIA and AMD GPUs, and any CPU under Triton's interpreter for tests.

Strategy "none": two launches, gate/up and down, each program finding its expert by itself, and combine where
programs of the down GEMM have one expert each. Sorted strategies: sort (one or more launches), gate/up, down,
combine; both GEMMs twice where a plan has tiles for crowds. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moert.arena import Field, absent_views
from moert.backends import (
    crowded_tiles,
    fixed_tiles,
    int4_tiles,
    specialised_tiles,
    stream_tiles,
    triton_tiles,
)
from moert.backends.base import Backend, BlockSteps, Program, Router, slot_fields
from moert.backends.fixed_launches import fixed_fields
from moert.backends.triton_block import TritonBlockSteps, logits_field
from moert.backends.triton_launches import Views, direct_launches, grouped_launches
from moert.backends.triton_router import make_router
from moert.call import Call
from moert.compile_job import CompileJob
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.labels import Labels
from moert.launch import CompiledLaunch, Launch, compile_job, run_interpreted
from moert.plan import Choice
from moert.steps.routing.triton import MAX_EXPERTS
from moert.steps.sorting.launches import feasible, sort_fields, sort_launches


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
        choice: Choice = self._tiles.default_choice(self.cfg, self.facts, tokens)
        if not self.can_run(choice, tokens):
            choice = self._tiles.default_choice(self.cfg, self.facts, tokens, copied=False)
        return choice

    def candidates(self, tokens: int, strategies: Sequence[str]) -> list[Choice]:
        able = [s for s in strategies if self.infeasible(s, tokens) is None]
        found = self._tiles.candidates(self.cfg, self.facts, tokens, able)
        able_to = [choice for choice in found if self.can_run(choice, tokens)]
        return list(dict.fromkeys((self.default_choice(tokens), *able_to)))

    def crowded_choices(self, choice: Choice, tokens: int) -> list[Choice]:
        found = crowded_tiles.choices(self.cfg, self.facts, choice, tokens)
        return [choice for choice in found if self.can_run(choice, tokens)]

    @property
    def _tiles(self) -> Any:
        """The module that chooses tiles for these weights."""
        return triton_tiles if self.cfg.quant is None else int4_tiles

    def can_run(self, choice: Choice, tokens: int) -> bool:
        tiles = choice.tiles
        if any(tile.kernel == "gathered" and tile.bm < tokens for tile in tiles):
            return False
        kinds = {"specialised": specialised_tiles, "fixed": fixed_tiles}
        special = [tile for tile in tiles if tile.kernel in kinds]
        if special:
            fits = [kinds[tile.kernel].fits(self.cfg, self.facts, tile) for tile in special]
            return all(fits) and specialised_tiles.readable(self.weights)
        if self.cfg.quant is None and "registers" in choice.kernels:
            return False
        return choice.kernels <= {"tile"} or stream_tiles.readable(self.weights)

    def infeasible(self, strategy: str, tokens: int) -> str | None:
        return feasible(strategy, tokens, self.cfg.num_experts, self.cfg.top_k, self.facts)

    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        cfg = self.cfg
        rows = tokens * cfg.top_k
        h = Field("h", (rows, cfg.intermediate_size), cfg.torch_dtype)
        y = Field("y", (rows, cfg.hidden_size), cfg.torch_dtype)
        assert choice.gate_up is not None and choice.down is not None
        if choice.strategy == "none":
            return (h, y) if choice.down.kernel == "gathered" else (h,)
        sizes = (cfg.num_experts, cfg.top_k, choice.gate_up.bm, choice.crowded_bm)
        # what runs in its place on the same arrays may have lower blocks
        least = triton_tiles.portable_rows(choice.gate_up.bm)
        sort = sort_fields(choice.strategy, tokens, *sizes, least)
        split = fixed_fields(cfg, tokens) if "fixed" in choice.kernels else ()
        return (*(Field(*f) for f in sort), h, y, *split)

    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        return tuple(launch.name for launch in self._absent_launches(tokens, choice))

    def compile_jobs(
        self, tokens: int, choice: Choice, aligned: bool = True
    ) -> tuple[CompileJob, ...]:
        if self.facts.kind == "cpu":
            return ()
        choice = choice if aligned else self.unaligned(choice)
        return tuple(self._job(launch, aligned) for launch in self._absent_launches(tokens, choice))

    def _absent_launches(self, tokens: int, choice: Choice) -> list[Launch]:
        return self.launches(tokens, choice, absent_views(self.fields(tokens, choice)))

    def launches(self, tokens: int, choice: Choice, views: Views) -> list[Launch]:
        """The launches of a plan in order; pure but for the tensors it names.

        Weights that a plan made for others cannot read go without its tiles for crowds, or through portable
        kernels on the same arena.
        """
        cfg, weights = self.cfg, self.weights
        if choice.crowded and not self.can_run(choice, tokens):
            choice = replace(choice, crowded=None)
        if not self.can_run(choice, tokens):
            choice = self.unaligned(choice)
        if choice.strategy == "none":
            return direct_launches(cfg, weights, self.facts, choice, views)
        assert choice.gate_up is not None
        sort = sort_launches(
            choice.strategy,
            self.facts,
            tokens,
            cfg.num_experts,
            cfg.top_k,
            choice.gate_up.bm,
            views,
            dependent=choice.dependent,
            crowded_block_m=choice.crowded_bm,
            reach=choice.reach,
        )
        return [*sort, *grouped_launches(cfg, weights, self.facts, choice, views)]

    def program(
        self,
        tokens: int,
        choice: Choice,
        views: Views,
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        launches = self.launches(tokens, choice if aligned else self.unaligned(choice), views)
        return self.bind(launches, aligned=aligned, kernel_cache=kernel_cache)

    def unaligned(self, choice: Choice) -> Choice:
        """What runs in place of a choice where nothing is known about the caller's addresses."""
        unaligned: Choice = self._tiles.unaligned_choice(choice, self.cfg, self.facts)
        return unaligned

    def direct_choice(self) -> Choice:
        """A choice that computes any number of tokens and needs the arena field "h" alone."""
        choice: Choice = self._tiles.direct_choice(self.cfg, self.facts)
        return choice

    def bind(
        self,
        launches: list[Launch],
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        """The launches as a program; arguments as for `program`."""
        if self.facts.kind == "cpu":
            return InterpretedProgram(launches)
        cache = {} if kernel_cache is None else kernel_cache
        return CompiledProgram([self._compile(launch, aligned, cache) for launch in launches])

    def router(
        self,
        cfg: MoEConfig,
        max_tokens: int,
        no_limit: torch.Tensor,
        kernel_cache: dict[Any, Any],
    ) -> Router:
        bias = self.weights.correction_bias
        return make_router(cfg, self.facts, bias, no_limit, max_tokens, kernel_cache)

    def block_fields(self, cfg: MoEConfig, rows: int) -> tuple[Field, ...]:
        return (*slot_fields(cfg, rows), logits_field(cfg, self.facts, rows))

    def block_steps(
        self,
        cfg: MoEConfig,
        rows: int,
        views: Views,
        kernel_cache: dict[Any, Any],
    ) -> BlockSteps:
        def bind(launches: list[Launch], aligned: bool) -> Program:
            return self.bind(launches, aligned=aligned, kernel_cache=kernel_cache)

        return TritonBlockSteps(cfg, self.facts, self.weights, rows, views, bind)

    @property
    def row_multiple(self) -> int:
        return 16 if self.cfg.hidden_size % 16 == 0 else 1

    def _job(self, launch: Launch, aligned: bool) -> CompileJob:
        return compile_job(launch, self.cfg.torch_dtype, aligned, self.row_multiple)

    def _compile(self, launch: Launch, aligned: bool, cache: dict[Any, Any]) -> CompiledLaunch:
        job = self._job(launch, aligned)
        if job not in cache:
            cache[job] = job.compile(kernel=launch.kernel)
        return CompiledLaunch(launch, cache[job])


class CompiledProgram(Program):
    """Compiled launches in order."""

    def __init__(self, launches: list[CompiledLaunch]) -> None:
        self.launches = launches
        self.kernels = tuple(launch.name for launch in launches)

    def run(self, call: Call, stream: int) -> None:
        for launch in self.launches:
            launch.run(call.values, call.tokens, stream)

    def run_labelled(self, call: Call, stream: int, labels: Labels) -> None:
        for launch in self.launches:
            with labels.step(launch.name, call.tokens):
                launch.run(call.values, call.tokens, stream)


class InterpretedProgram(Program):
    """The same launches on CPU tensors."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches
        self.kernels = tuple(launch.name for launch in launches)

    def run(self, call: Call, stream: int) -> None:
        run_interpreted(self.launches, call.interpreter_values(), call.tokens)

    def run_labelled(self, call: Call, stream: int, labels: Labels) -> None:
        for launch in self.launches:
            with labels.step(launch.name, call.tokens):
                run_interpreted([launch], call.interpreter_values(), call.tokens)
