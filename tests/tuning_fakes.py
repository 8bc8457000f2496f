"""A backend whose candidates behave as planted, and probes with planted times, for the real tuner."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from moert.arena import Field
from moert.backends.base import Backend, BlockSteps, Program, Router
from moert.call import Call
from moert.compile_job import CompileJob
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import STRATEGIES, Choice, Plan, Tile
from moert.steps.experts_reference import experts_reference
from moert.tuning.store import Record, Store, geometry
from moert.tuning.tuner import plan_buckets
from moert.weights import ExpertWeights

CFG = MoEConfig(8, 2, 32, 16, dtype="float32")
FACTS = DeviceFacts("cuda", "Fake GPU", "sm_0", 4, 65536, 32, 1 << 20, 1 << 30)
MADE_WITH = {"moert": "1", "triton": "2", "torch": "3", "driver": "4"}
DEFAULT = Choice("one_shot", Tile(16, 16, 16), Tile(16, 16, 16))
FAST = Choice("one_shot", Tile(16, 32, 16), Tile(16, 32, 16))
PHASED = Choice("multi_phase", Tile(16, 64, 16), Tile(16, 64, 16))
DIRECT = Choice("none", Tile(1, 8, 16), Tile(1, 8, 16))
SIZES = [(1, True), (8, True), (64, False)]
CHOICES = (DEFAULT, FAST, PHASED, DIRECT)


class FakeProgram(Program):
    """The reference, spoiled as planted for its choice."""

    kernels = ("fake",)
    ran: ClassVar[list[FakeProgram]] = []

    def __init__(
        self, backend: FakeBackend, choice: Choice, views: dict[str, torch.Tensor]
    ) -> None:
        self.backend, self.choice, self.views = backend, choice, views

    def run(self, call: Call, stream: int) -> None:
        FakeProgram.ran.append(self)
        weights, ids = call.topk
        self.skewed = ids.shape[0] > 1 and bool((ids == ids[:1]).all())
        live = call.live_on_host()
        topk = type(call.topk)(weights[:live], ids[:live])
        y = experts_reference(call.x[:live], topk, self.backend.weights, self.backend.cfg)
        spoil = self.backend.spoil.get(self.choice)
        if spoil is not None:
            y = spoil(y, call, self.views)
        call.out[: y.shape[0]] = y.to(call.out.dtype)


class FakeBackend(Backend):
    """Candidates `choices`, the first one the default.

    Attributes:
        spoil: what a choice's output goes through: (y, call, views) to y.
        broken: what making a program raises, by choice.
        scratch: bytes of a choice's arena field.
        crowded: a choice with tiles for crowds beside its own.
        kernels_of: names of what is compiled for a choice.
        log: what happened, in order; shared with `FakeProbes.log` on request.
    """

    name = "triton"
    uses_graphs = True
    spoil: dict[Choice, Callable[[torch.Tensor, Call, dict[str, torch.Tensor]], torch.Tensor]]

    def __init__(
        self,
        cfg: MoEConfig = CFG,
        weights: ExpertWeights | None = None,
        facts: DeviceFacts = FACTS,
        choices: Sequence[Choice] = CHOICES,
    ) -> None:
        super().__init__(cfg, ExpertWeights.random(cfg) if weights is None else weights, facts)
        self.choices = list(choices)
        self.spoil = {}
        self.broken: dict[Choice, Exception] = {}
        self.scratch: dict[Choice, int] = {}
        self.crowded: dict[Choice, list[Choice]] = {}
        self.made: list[tuple[int, Choice]] = []
        self.kernels_of: Callable[[int, Choice], tuple[str, ...]] = lambda tokens, choice: ()
        self.log: list[tuple[str, Any]] = []

    @staticmethod
    def supports(cfg: MoEConfig, facts: DeviceFacts) -> str | None:
        return None

    def default_choice(self, tokens: int) -> Choice:
        return self.choices[0]

    def candidates(self, tokens: int, strategies: Sequence[str]) -> list[Choice]:
        others = [choice for choice in self.choices[1:] if choice.strategy in strategies]
        return [self.choices[0], *others]

    def crowded_choices(self, choice: Choice, tokens: int) -> list[Choice]:
        return self.crowded.get(choice, [])

    def fields(self, tokens: int, choice: Choice) -> tuple[Field, ...]:
        return (Field("h", (self.scratch.get(choice, 256),), torch.uint8),)

    def kernels(self, tokens: int, choice: Choice) -> tuple[str, ...]:
        return (f"fake_{choice.strategy}",)

    def compile_jobs(
        self, tokens: int, choice: Choice, aligned: bool = True
    ) -> tuple[CompileJob, ...]:
        return tuple(fake_job(name) for name in self.kernels_of(tokens, choice))

    def program(
        self,
        tokens: int,
        choice: Choice,
        views: dict[str, torch.Tensor],
        *,
        aligned: bool = True,
        kernel_cache: dict[Any, Any] | None = None,
    ) -> Program:
        self.made.append((tokens, choice))
        self.log.append(("build", tokens))
        if choice in self.broken:
            raise self.broken[choice]
        return FakeProgram(self, choice, views)

    def router(self, *_: Any) -> Router:
        raise NotImplementedError

    def block_fields(self, *_: Any) -> tuple[Field, ...]:
        return ()

    def block_steps(self, *_: Any) -> BlockSteps:
        raise NotImplementedError


class FakeRepeated:
    """Remembers which choice it stands for, and whether all tokens had the same experts."""

    def __init__(self, choice: Choice, skewed: bool) -> None:
        self.choice, self.skewed, self.open = choice, skewed, True

    def close(self) -> None:
        self.open = False


class FakeAhead:
    """Jobs that somebody is said to compile.

    Args:
        log: ("ahead", names), ("wait", names) and ("close", ()) are appended.
    """

    def __init__(self, log: list[tuple[str, Any]]) -> None:
        self.log = log

    def wait(self, jobs: Collection[CompileJob]) -> None:
        self.log.append(("wait", tuple(job.name for job in jobs)))

    def close(self) -> None:
        self.log.append(("close", ()))


def fake_job(name: str) -> CompileJob:
    return CompileJob("nowhere", name, (), (), (), ())


class FakeProbes:
    """A device whose times are planted.

    Args:
        us: microseconds of a call, by choice; every other choice takes 100.
        free: bytes of free memory.
        skewed: as `us`, where all of more than one token have the same experts.
    """

    def __init__(
        self,
        us: dict[Choice, float] | None = None,
        free: int = 1 << 30,
        skewed: dict[Choice, float] | None = None,
    ) -> None:
        self.us, self.free, self.skewed = us or {}, free, skewed or {}
        self.seconds = 0.0
        self.is_capturing = False
        self.timed: list[tuple[Choice, int]] = []
        self.repeats: list[FakeRepeated] = []
        self.before_time: Callable[[], None] = lambda: None
        self.log: list[tuple[str, Any]] = []

    def versions(self) -> dict[str, str]:
        return {"triton": "2", "torch": "3", "driver": "4"}

    def capturing(self) -> bool:
        return self.is_capturing

    def free_bytes(self) -> int:
        return self.free

    def now(self) -> float:
        return self.seconds

    def compile_ahead(self, jobs: Sequence[CompileJob]) -> FakeAhead:
        self.log.append(("ahead", tuple(job.name for job in jobs)))
        return FakeAhead(self.log)

    def build(self, makers: Sequence[Callable[[], Program]]) -> list[Program | Exception]:
        def build_one(maker: Callable[[], Program]) -> Program | Exception:
            try:
                return maker()
            except Exception as error:
                return error

        return [build_one(maker) for maker in makers]

    def run(self, program: Program, call: Call) -> None:
        program.run(call, 0)

    def repeat(self, calls: Sequence[Callable[[int], None]]) -> FakeRepeated:
        before = len(FakeProgram.ran)
        for enqueue in calls:
            enqueue(0)
        ran = FakeProgram.ran[before:]
        (choice,) = {program.choice for program in ran}
        self.repeats.append(FakeRepeated(choice, all(program.skewed for program in ran)))
        return self.repeats[-1]

    def time(self, entrants: Sequence[Any], groups: int) -> list[list[float]]:
        self.before_time()
        self.timed += [(entrant.choice, groups) for entrant in entrants]
        return [
            [(self.skewed if e.skewed else self.us).get(e.choice, 100.0)] * groups for e in entrants
        ]

    def release(self) -> None:
        pass


def fake_store(
    folder: Path, backend: Backend | None = None, made_with: dict[str, str] = MADE_WITH
) -> Store:
    """A store with one place, `folder`."""
    backend = FakeBackend() if backend is None else backend
    name = geometry(backend.cfg, backend.weights, backend.name)
    return Store(backend.facts, name, made_with, [(folder, "cache")])


def fake_record(choice: Choice = FAST, us: float = 10.0, **versions: str) -> Record:
    return Record(choice, us, 20.0, True, {**MADE_WITH, **versions})


def tune(
    folder: Path,
    probes: FakeProbes,
    backend: FakeBackend | None = None,
    sizes: list[tuple[int, bool]] | None = None,
    **options: Any,
) -> tuple[Plan, ...]:
    """The plans of `sizes` with records in `folder`; `options` of `plan_buckets`."""
    backend = FakeBackend() if backend is None else backend
    store = options.pop("store", None) or fake_store(folder, backend)
    sizes = SIZES if sizes is None else sizes
    return plan_buckets(backend, sizes, probes=probes, store=store, **options)


assert {choice.strategy for choice in CHOICES} == set(STRATEGIES)


def fresh_processes() -> Any:
    """Where processes come from that share nothing with this one; torch is imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuning_fakes"])
    return context
