"""Decides every bucket's plan before any arena exists: records first, then measurement, then the heuristic.

Where torch.distributed runs, rank 0 decides and the others are told; otherwise processes that start at once
on one machine take turns by the lock of the record file, so that one measures and the others read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moert.backends.base import Backend
from moert.errors import StateError
from moert.plan import Choice, Plan
from moert.tuning.agree import agree
from moert.tuning.candidates import allowed_candidates, crossed, usable
from moert.tuning.layer import Layer
from moert.tuning.measure import contenders, pick, steadiest
from moert.tuning.probes import DeviceProbes, Probes
from moert.tuning.progress import Progress
from moert.tuning.store import Record, Store, geometry, open_store
from moert.tuning.trial import Trial

log = logging.getLogger("moert")

FEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one bucket: the fields of `Plan` that do not follow from the rest."""

    choice: Choice
    source: str = "heuristic"
    us: float | None = None
    default_us: float | None = None


def plan_buckets(
    backend: Backend,
    sizes: Sequence[tuple[int, bool]],
    *,
    policy: int = 0,
    mode: str = "auto",
    tuning_dir: Path | None = None,
    notes: list[str] | None = None,
    probes: Probes | None = None,
    store: Store | None = None,
) -> tuple[Plan, ...]:
    """The plans of all buckets of a share group.

    Everything that is needed on the device meanwhile is freed again. Buckets measured before an
    interruption are kept.

    Args:
        backend: bound to the weights of the group's first layer, whose device is current.
        sizes: (tokens, captured) of each plan.
        policy: a key of `moert.env.SORT_POLICIES`.
        mode: one of `moert.env.TUNE_MODES`.
        tuning_dir: looked up, and written, before the user's cache.
        notes: what a reader of the plans should know is appended.
        probes, store: stand in for the device and for the record files.

    Raises:
        StateError: the current stream is capturing, or rank 0 failed.
    """
    if probes is None:
        if backend.weights.device.type == "cpu":
            return tuple(
                backend.plan(*size, allowed_candidates(backend, size[0], policy)[0])
                for size in sizes
            )
        probes = DeviceProbes(backend.weights.device)
    if probes.capturing():
        raise StateError(
            "tuning: the current stream is capturing, and tuning compiles, allocates and waits; make the "
            "runtime before the capture"
        )
    if store is None:
        store = open_store(
            backend.facts,
            backend.cfg,
            backend.weights,
            backend.name,
            probes.versions(),
            tuning_dir,
        )
    tuner = Tuner(backend, probes, store, policy, mode)
    buckets = [tokens for tokens, _ in sizes]

    def decide() -> tuple[dict[int, Decision], list[str]]:
        with torch.no_grad():
            return tuner.decide(buckets), tuner.notes

    name = geometry(backend.cfg, backend.weights, backend.name)
    question = (backend.facts.slug, name, tuple(buckets), policy, mode)
    decisions, said = agree(question, decide)
    if notes is not None:
        notes += said
    return tuple(
        backend.plan(
            tokens,
            captured,
            decisions[tokens].choice,
            source=decisions[tokens].source,
            us=decisions[tokens].us,
            default_us=decisions[tokens].default_us,
        )
        for tokens, captured in sizes
    )


class Tuner:
    """Decides the buckets of one layer geometry in one process.

    Args:
        backend: bound to a layer of this geometry.
        probes: its device.
        store: the records of this geometry.
        policy, mode: as for `plan_buckets`.
    """

    def __init__(
        self, backend: Backend, probes: Probes, store: Store, policy: int, mode: str
    ) -> None:
        self.notes: list[str] = []
        self._backend, self._probes, self._store = backend, probes, store
        self._policy, self._mode = policy, mode
        self._winner: Choice | None = None

    def decide(self, buckets: Sequence[int]) -> dict[int, Decision]:
        """One decision per bucket."""
        sizes = sorted(set(buckets))
        candidates = {t: allowed_candidates(self._backend, t, self._policy) for t in sizes}
        found: dict[int, Decision] = {}
        with self._open_layer() as layer:
            if self._mode != "force":
                found = self._look_up(layer, sizes, candidates)
            missing = [t for t in sizes if t not in found and len(candidates[t]) > 1]
            if missing and self._mode != "off":
                with self._store.lock():
                    if self._mode != "force":
                        # another process may have measured while this one waited
                        self._store.reload()
                        found |= self._look_up(layer, missing, candidates)
                    todo = [tokens for tokens in missing if tokens not in found]
                    found |= self._measure_all(layer, todo, candidates)
        return {t: found.get(t) or Decision(candidates[t][0]) for t in sizes}

    @contextlib.contextmanager
    def _open_layer(self) -> Iterator[Layer]:
        layer = Layer(self._backend, self._probes)
        try:
            yield layer
        finally:
            layer.close()

    def _note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)

    def _look_up(
        self, layer: Layer, sizes: Sequence[int], candidates: dict[int, list[Choice]]
    ) -> dict[int, Decision]:
        found = {}
        for tokens in sizes:
            for record in self._store.find(tokens, self._policy):
                able = usable(self._backend, record.choice, tokens, candidates[tokens])
                if able and self._trusted(layer, tokens, record):
                    found[tokens] = Decision(
                        record.choice, record.source, record.us, record.default_us
                    )
                    break
        return found

    def _trusted(self, layer: Layer, tokens: int, record: Record) -> bool:
        """Made by this very code, or checked now."""
        if self._store.made_by_this_code(record):
            return True
        made = " ".join(f"{name} {record.made_with.get(name, '?')}" for name in ("moert", "triton"))
        try:
            # where even routing crowds, its own tiles are idle in the check
            choices = list(dict.fromkeys((record.choice, replace(record.choice, crowded=None))))
            with Trial(layer, tokens, choices) as trial:
                right = trial.checkable and len(trial.sound()) == len(choices)
        except torch.OutOfMemoryError:
            right = False
        if right:
            self._note(f"{tokens} tokens: {record.source} record made with {made}, checked here")
        else:
            log.warning(
                "tuning record of %d tokens (%s, %s): its choice %s could not be confirmed here: ignored",
                tokens,
                record.source,
                made,
                record.choice,
            )
        return right

    def _measure_all(
        self, layer: Layer, sizes: Sequence[int], candidates: dict[int, list[Choice]]
    ) -> dict[int, Decision]:
        measured: dict[int, Decision] = {}
        self._winner = None
        progress = Progress(self._store.name, len(sizes))
        try:
            layer.compile_ahead({tokens: self._entrants(tokens, candidates) for tokens in sizes})
            for number, tokens in enumerate(sizes):
                progress.update(number, f"{tokens} tokens")
                with self._told(layer, tokens, len(candidates[tokens])):
                    decision = self._measure(layer, tokens, candidates[tokens], progress, number)
                if decision is not None:
                    measured[tokens] = decision
        finally:
            progress.close()
        return measured

    def _entrants(self, tokens: int, candidates: dict[int, list[Choice]]) -> list[Choice]:
        """A bucket's candidates, and each pair of tiles for crowds that may be timed beside one of them."""
        found = candidates[tokens]
        crowded: dict[object, Choice] = {}
        if tokens > FEW_TOKENS:
            for base in found:
                for choice in self._backend.crowded_choices(base, tokens):
                    crowded.setdefault(choice.crowded, choice)
        return [*found, *crowded.values()]

    @contextlib.contextmanager
    def _told(self, layer: Layer, tokens: int, count: int) -> Iterator[None]:
        """Log what the seconds go into meanwhile; a handler finds them as `spent` of the log record."""
        before = dict(layer.spent)
        try:
            yield
        finally:
            spent = {work: seconds - before[work] for work, seconds in layer.spent.items()}
            told = ", ".join(f"{work} {seconds:.2f} s" for work, seconds in spent.items())
            log.debug(
                "tuning %d tokens: %d candidates, %s", tokens, count, told, extra={"spent": spent}
            )

    def _measure(
        self,
        layer: Layer,
        tokens: int,
        candidates: Sequence[Choice],
        progress: Progress,
        number: int,
    ) -> Decision | None:
        """Measure one bucket and keep the record; None where nothing could be."""
        default, winner = candidates[0], self._winner
        if winner is not None and usable(self._backend, winner, tokens, candidates):
            # the neighbour's winner may be no candidate of this bucket's own list
            candidates = list(dict.fromkeys((*candidates, winner)))
        stages = iter((0.6, 0.7, 0.8, 0.9))

        def tick() -> None:
            progress.update(number + next(stages, 0.95), f"{tokens} tokens")

        try:
            with Trial(layer, tokens, candidates) as trial:
                if not trial.checkable:
                    self._note("not tuned: the weights hold values that are not finite")
                    return None
                programs = trial.sound(default)
                medians, cold = trial.times(
                    programs, default if default in programs else None, tick
                )
            medians |= self._beside(layer, tokens, medians, crossed(medians), tick)
        except torch.OutOfMemoryError as error:
            log.debug("tuning %d tokens: %r", tokens, error)
            medians, cold = {}, True
        if not medians:
            self._note(f"{tokens} tokens: not tuned, no candidate could be checked and timed here")
            return None
        if not cold:
            self._note("timed on warm weights: the layer is too small to be read from memory")
        choice = self._steadiest(layer, tokens, medians, default, tick)
        # the next bucket finds tiles for crowds of its own
        self._winner = replace(choice, crowded=None)
        us, default_us = round(medians[choice], 3), medians.get(default)
        default_us = None if default_us is None else round(default_us, 3)
        record = Record(choice, us, default_us, cold, self._store.made_with)
        self._store.add(tokens, self._policy, record)
        return Decision(choice, "tuned", us, default_us)

    def _beside(
        self,
        layer: Layer,
        tokens: int,
        medians: dict[Choice, float],
        more: Sequence[Choice],
        tick: Callable[[], None],
    ) -> dict[Choice, float]:
        """Times of further choices, on the scale of `medians`."""
        if not more:
            return {}
        best = min(medians, key=medians.__getitem__)
        with Trial(layer, tokens, [best, *more]) as trial:
            again, _ = trial.times(trial.sound(best), best, tick)
        if best not in again:
            return {}
        scale = medians[best] / again[best]
        return {choice: us * scale for choice, us in again.items() if choice != best}

    def _steadiest(
        self,
        layer: Layer,
        tokens: int,
        medians: dict[Choice, float],
        default: Choice,
        tick: Callable[[], None],
    ) -> Choice:
        """What is fastest by even routing, or as good as that and faster where all tokens take the same
        experts; tiles for crowds are among it, and added to `medians`.

        A few tokens are no more than a block of rows, however they are routed.
        """
        base = pick(medians, default)
        if tokens <= FEW_TOKENS:
            return base
        crowded = self._backend.crowded_choices(base, tokens)
        try:
            medians |= self._beside(layer, tokens, medians, crowded, tick)
            rivals = contenders(medians, base, default, crowded)
            if len(rivals) < 2:
                return base
            with Trial(layer, tokens, rivals) as trial:
                return steadiest(base, medians, trial.skewed_times(trial.sound(base)))
        except torch.OutOfMemoryError as error:
            log.debug("tuning %d tokens, all to the same experts: %r", tokens, error)
            return base
