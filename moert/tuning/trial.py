"""The candidates of one bucket on trial: temporary memory, programs, the check of each, and their times."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch

from moert.arena import Arena, layout
from moert.backends.base import Backend, Program
from moert.call import Call
from moert.plan import Choice
from moert.topk import TopK
from moert.tuning.check import Check, new_call, set_call
from moert.tuning.layer import Layer
from moert.tuning.measure import Rotation, rotated_ids, same_experts, successive_halving
from moert.tuning.probes import Enqueue, Repeated

log = logging.getLogger("moert")

MEMORY_FRACTION: Final = 0.9  # of what is free: allocators round up, kernels are loaded
SKEWED_GROUPS: Final = 6  # of replays
TIMING_S: Final = 5.0  # after this the timing of a bucket ends with the stage it is in


class Trial:
    """One bucket's trial; use as a context manager.

    Args:
        layer: shared by all trials.
        tokens: B.
        choices: candidates; those that do not fit the free memory are left out of `choices`.

    Raises:
        torch.OutOfMemoryError: not even the inputs fit.
    """

    def __init__(self, layer: Layer, tokens: int, choices: Sequence[Choice]) -> None:
        self._layer, self._tokens = layer, tokens
        layer.used = True
        cfg = layer.backend.cfg
        self._check = Check(cfg, layer.backend.weights, tokens)
        self._call = new_call(cfg, layer.backend.weights.device)
        self.choices, self._arena = self._allocate(choices)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        del self._arena, self._check

    @property
    def checkable(self) -> bool:
        """There is something to compare with: weights that nobody has filled yet give NaN."""
        return self._check.possible

    def _bytes(self, choice: Choice) -> int:
        return layout(self._layer.backend.fields(self._tokens, choice))[1]

    def _allocate(self, choices: Sequence[Choice]) -> tuple[list[Choice], Arena]:
        """The candidates that fit, and an arena for the largest of them."""
        # outputs that the check keeps
        kept = 1 + any(choice.crowded for choice in choices)
        free = int(MEMORY_FRACTION * self._layer.probes.free_bytes())
        limit = free - kept * self._check.out.nbytes
        while True:
            sizes = {choice: self._bytes(choice) for choice in choices}
            fitting = [choice for choice in choices if sizes[choice] <= limit]
            largest = max((sizes[choice] for choice in fitting), default=0)
            if len(fitting) < len(choices):
                log.debug(
                    "tuning %d tokens: %d of %d candidates need more than %d bytes",
                    self._tokens,
                    len(choices) - len(fitting),
                    len(choices),
                    limit,
                )
            try:
                return fitting, Arena(self._layer.backend.weights.device, largest)
            except torch.OutOfMemoryError:
                limit = largest - 1
                if limit < 0:
                    raise

    def sound(self, anchor: Choice | None = None) -> dict[Choice, Program]:
        """The programs of the candidates that compile and give right results; `anchor` is checked first."""
        self._layer.wait_for_kernels(self._tokens)
        with self._layer.spending("building"):
            built = self._build()
        order = sorted(built, key=lambda choice: choice != anchor)
        sound = {}
        for choice in order:
            with self._layer.spending("checking"):
                fault = self._fault(choice, built[choice])
            if fault is None:
                sound[choice] = built[choice]
            else:
                level = logging.WARNING if choice == anchor else logging.INFO
                log.log(level, "tuning %d tokens: %s rejected: %s", self._tokens, choice, fault)
        return sound

    def _build(self) -> dict[Choice, Program]:
        built: dict[Choice, Program] = {}
        for strategy in dict.fromkeys(choice.strategy for choice in self.choices):
            same = [choice for choice in self.choices if choice.strategy == strategy]
            # the first alone, so that kernels which all of them share are compiled once
            for wave in (same[:1], same[1:]):
                makers = [self._maker(self._layer.backend, choice) for choice in wave]
                for choice, result in zip(wave, self._layer.probes.build(makers), strict=True):
                    if isinstance(result, Exception):
                        self._dropped(choice, result)
                    else:
                        built[choice] = result
        return built

    def _dropped(self, choice: Choice, error: Exception) -> None:
        log.debug("tuning %d tokens: %s dropped: %r", self._tokens, choice, error)

    def _maker(self, backend: Backend, choice: Choice) -> Callable[[], Program]:
        def make() -> Program:
            views = self._arena.views(backend.fields(self._tokens, choice))
            return backend.program(
                self._tokens, choice, views, kernel_cache=self._layer.kernel_cache
            )

        return make

    def _fault(self, choice: Choice, program: Program) -> str | None:
        def run(call: Call) -> None:
            self._layer.probes.run(program, call)

        check, call, arena = self._check, self._call, self._arena
        try:
            fault = check.fault(run, call, arena)
            if fault is None and any(other.crowded for other in self.choices):
                fault = check.crowded_fault(run, call, arena, choice.crowded_bm)
            return fault
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def times(
        self,
        programs: dict[Choice, Program],
        anchor: Choice | None,
        on_stage: Callable[[], None],
    ) -> tuple[dict[Choice, float], bool]:
        """Median microseconds of the candidates timed to the end, and whether their weights were cold."""
        probes, start = self._layer.probes, self._layer.probes.now()

        def decide(repeated: dict[Choice, Repeated]) -> dict[Choice, float]:
            def time(entrants: Sequence[Choice], groups: int) -> list[list[float]]:
                on_stage()
                return probes.time([repeated[choice] for choice in entrants], groups)

            return successive_halving(
                list(repeated), anchor, time, lambda: probes.now() - start > TIMING_S
            )

        return self._timed(programs, decide)

    def skewed_times(self, programs: dict[Choice, Program]) -> dict[Choice, float]:
        """Median microseconds of every candidate where all tokens take the same experts."""

        def decide(repeated: dict[Choice, Repeated]) -> dict[Choice, float]:
            times = self._layer.probes.time(list(repeated.values()), SKEWED_GROUPS)
            return {c: statistics.median(t) for c, t in zip(repeated, times, strict=True)}

        return self._timed(programs, decide, skewed=True)[0]

    def _timed(
        self,
        programs: dict[Choice, Program],
        decide: Callable[[dict[Choice, Repeated]], dict[Choice, float]],
        skewed: bool = False,
    ) -> tuple[dict[Choice, float], bool]:
        with self._layer.spending("timing"):
            return self._decided(programs, decide, skewed)

    def _decided(
        self,
        programs: dict[Choice, Program],
        decide: Callable[[dict[Choice, Repeated]], dict[Choice, float]],
        skewed: bool,
    ) -> tuple[dict[Choice, float], bool]:
        """What `decide` makes of graphs of the programs, and whether the weights are cold in them."""
        layer = self._layer
        rotation = layer.rotation(self._tokens)
        try:
            backends = layer.bound_to_copies(rotation.copies)
        except torch.OutOfMemoryError:
            layer.forget_copies()
            backends, rotation = [layer.backend], replace(rotation, copies=1, cold=False)
        routings = self._routings(rotation, skewed)
        repeated: dict[Choice, Repeated] = {}
        try:
            for choice, program in programs.items():
                graph = self._repeated(choice, program, backends, routings)
                if graph is not None:
                    repeated[choice] = graph
            return (decide(repeated) if repeated else {}), rotation.cold
        finally:
            for graph in repeated.values():
                graph.close()

    def _routings(self, rotation: Rotation, skewed: bool) -> list[tuple[int, TopK]]:
        """(copy, routing) of each call; every tensor is an allocation of its own, hence aligned."""
        cfg, weights = self._layer.backend.cfg, self._check.topk.weights
        drawn = list(rotated_ids(cfg.num_experts, cfg.top_k, self._tokens, rotation))
        drawn = list(same_experts(drawn)) if skewed else drawn
        return [(copy, TopK(weights, ids.to(weights.device))) for copy, ids in drawn]

    def _repeated(
        self,
        choice: Choice,
        program: Program,
        backends: Sequence[Backend],
        routings: Sequence[tuple[int, TopK]],
    ) -> Repeated | None:
        try:
            calls = self._calls(choice, program, backends, routings)
            return self._layer.probes.repeat(calls)
        except Exception as error:
            # one more thing that a device may refuse: not enough memory for its graph
            self._dropped(choice, error)
            return None

    def _calls(
        self,
        choice: Choice,
        program: Program,
        backends: Sequence[Backend],
        routings: Sequence[tuple[int, TopK]],
    ) -> list[Enqueue]:
        programs = [program, *(self._maker(backend, choice)() for backend in backends[1:])]
        for other in programs[1:]:
            # whatever a program does on its first run must not happen inside a capture
            self._layer.probes.run(other, self._call)
        return [self._enqueue(programs[copy], topk) for copy, topk in routings]

    def _enqueue(self, program: Program, topk: TopK) -> Enqueue:
        x, out, call = self._check.x, self._check.out, self._call

        def enqueue(stream: int) -> None:
            set_call(call, x, topk, out)
            program.run(call, stream)

        return enqueue
