"""On a GPU: every choice that plans may make for int4 weights, and every one that streams 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from gpu_support import DEVICE, GUARD, Case, assert_close, make_case, runtime, variant

from moert import ExpertWeights, MoEConfig, MoERuntime, TopK
from moert.arena import Arena, layout
from moert.backends import fixed_tiles, specialised_tiles
from moert.backends.base import Program
from moert.backends.triton import TritonBackend
from moert.config import Quant
from moert.device import device_facts
from moert.plan import STRATEGIES, Choice
from moert.quantization.int4_layout import Int4Matrix, empty_matrix, put_expert
from moert.steps.experts_reference import experts_reference
from moert.tuning.check import new_call, set_call
from moert.tuning.probes import DeviceProbes

pytestmark = pytest.mark.gpu

# multiples of 16, and of nothing more
SMALL = MoEConfig(24, 3, 528, 208, quant=Quant("int4", 128))
WIDE = MoEConfig(12, 4, 2880, 2880, activation="swiglu_oai", bias=True, quant=Quant("int4", 32))
ROWS = Quant("int4", -1, symmetric=False)
LAYERS = {
    "g128": SMALL,
    "g32, zero points": replace(SMALL, quant=Quant("int4", 32, symmetric=False)),
    "a group a row, zero points": replace(SMALL, dtype="float16", top_k=8, quant=ROWS),
    "gpt-oss": WIDE,
    "ungated": MoEConfig(
        *(10, 2, 1040, 272, "relu2"),
        gated=False,
        bias=True,
        dtype="float16",
        quant=Quant("int4", 64, symmetric=False),
    ),
    "columns in another order": SMALL,
    "rows of 400 bytes": replace(SMALL, intermediate_size=200, quant=Quant("int4", 64)),
    "no stream: odd rows": replace(SMALL, intermediate_size=196, quant=Quant("int4", 64)),
    "no stream: groups of 96": replace(SMALL, quant=Quant("int4", 96, symmetric=False)),
    "16 bits": replace(SMALL, quant=None),
    "16 bits, interleaved": replace(WIDE, quant=None, dtype="float16"),
    "16 bits, biases": replace(WIDE, quant=None),
    "16 bits, ungated": MoEConfig(10, 2, 1040, 272, "relu2", gated=False, bias=True),
}
GEMMS = ("gate_up", "down")
# of a device with so few, every workgroup has several pieces of a GEMM to go through
FEW_UNITS = 7
# (bucket, rows of the call): full, and with rows of the bucket to spare
CALLS = ((1, 1), (8, 3), (64, 64), (64, 17), (288, 280))


@dataclass
class Counted:
    """A call of T rows, of which `live` are to be computed; None for all, by a null pointer."""

    case: Case
    live: int | None
    pad: str
    expected: torch.Tensor


def permuted(matrix: Int4Matrix) -> Int4Matrix:
    """Columns stored in another order for each expert (act-order)."""
    generator = torch.Generator().manual_seed(5)
    order = [torch.randperm(matrix.columns, generator=generator) for _ in range(matrix.shape[0])]
    return replace(matrix, permutation=torch.stack(order).int().to(matrix.device))


def make_weights(name: str) -> ExpertWeights:
    weights = ExpertWeights.random(LAYERS[name], device=DEVICE)
    if name == "columns in another order":
        assert isinstance(weights.w13, Int4Matrix)
        return replace(weights, w13=permuted(weights.w13))
    return replace(weights, interleaved="interleaved" in name)


def choices(backend: TritonBackend, bucket: int) -> list[Choice]:
    """The candidates and tiles for crowds; of 16-bit weights those that no other test runs.

    Of portable int4 kernels, which the interpreter runs too, every fourth.
    """
    found = backend.candidates(bucket, STRATEGIES)
    portable = [choice for choice in found if choice.kernels == {"tile"}]
    left_out = set(portable) if backend.cfg.quant is None else set(portable) - set(portable[::4])
    own_warps = ({"specialised"}, {"fixed"})
    specialised = [choice for choice in found if choice.kernels in own_warps]
    tiles = specialised_tiles.every_tile(backend.cfg, backend.facts)
    if backend.cfg.quant is not None:
        # of int4 weights those of two products, some of which are offered for other numbers of rows
        tiles = [tile for tile in tiles if tile.bm.bit_count() > 1 and bucket > tile.bm]
        tiles += fixed_tiles.every_tile(backend.cfg, backend.facts)
    if bucket >= 64:
        further = [Choice("one_shot", tile, tile, True) for tile in tiles]
        specialised = list(dict.fromkeys((*specialised, *further)))
        found = list(dict.fromkeys((*found, *specialised)))
    if backend.facts.compute_units == FEW_UNITS:
        # 15 s of compiling for a kernel of int4 weights
        return specialised if backend.cfg.quant is None else specialised[::3]
    # beside one of each strategy and kind, tiles for crowds
    kinds = {(choice.strategy, *choice.kernels): choice for choice in reversed(found)}
    crowded = [c for choice in kinds.values() for c in backend.crowded_choices(choice, bucket)]
    return [choice for choice in found if choice not in left_out] + crowded + mixed(found)


def mixed(found: list[Choice]) -> list[Choice]:
    """Unsorted pairs of kernels of two kinds, as the tuner puts them together."""
    unsorted = [c for c in found if c.strategy == "none" and c.gate_up and c.down]
    ups = {c.gate_up.kernel: c for c in reversed(unsorted) if c.gate_up}
    downs = {c.down.kernel: c.down for c in reversed(unsorted) if c.down}
    pairs = [replace(up, down=down) for up in ups.values() for down in downs.values()]
    return [choice for choice in pairs if choice not in found]


def calls(cfg: MoEConfig, weights: ExpertWeights, tokens: int) -> Iterator[Counted]:
    """Of all rows, of some and the rest kept or cleared; a busy expert, a row that no expert has; a crowd."""
    nobody_lives = ((0, "keep"),) if tokens > 100 else ()
    for live, pad in ((None, "keep"), (tokens // 2, "keep"), (tokens // 2, "zero"), *nobody_lives):
        case = make_case(cfg, tokens)
        case.topk.ids[::2, 0] = 7
        nobody = torch.tensor([-1, cfg.num_experts, 1 << 30, -(1 << 31)], device=DEVICE)
        case.topk.ids[1:2] = nobody.repeat(2)[: cfg.top_k]
        case.topk.weights[1:2] = float("nan")
        expected = experts_reference(case.x, case.topk, weights, cfg)
        if live is not None:
            # behind the live rows there is anything
            case.x[live:] = float("nan")
            case.topk.weights[live:], case.topk.ids[live:] = float("nan"), 5
            expected = expected[:live]
        yield Counted(case, live, pad, expected)
    case = make_case(cfg, tokens)
    case.topk.ids[:] = case.topk.ids[:1].clone()
    expected = experts_reference(case.x, case.topk, weights, cfg)
    yield Counted(case, None, "keep", expected)


def allocations() -> int:
    """How many there have been on the device."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


class Bench:
    """One layer's programs of a bucket on one arena."""

    def __init__(self, cfg: MoEConfig, weights: ExpertWeights, units: int | None = None) -> None:
        self.cfg = cfg
        facts = device_facts(torch.device("cuda", 0))
        self.backend = TritonBackend(
            cfg, weights, replace(facts, compute_units=units or facts.compute_units)
        )
        self.probes = DeviceProbes(torch.device("cuda", 0))
        self.stream = torch.cuda.Stream()
        self.call = new_call(cfg, DEVICE)
        self.compiled: dict[object, object] = {}

    def build(self, bucket: int) -> dict[Choice, Program]:
        found = choices(self.backend, bucket)
        fields = {choice: self.backend.fields(bucket, choice) for choice in found}
        self.arena = Arena(DEVICE, max(layout(f)[1] for f in fields.values()))

        def maker(choice: Choice) -> Program:
            views = self.arena.views(fields[choice])
            return self.backend.program(bucket, choice, views, kernel_cache=self.compiled)

        jobs = dict.fromkeys(job for c in found for job in self.backend.compile_jobs(bucket, c))
        ahead = self.probes.compile_ahead([job for job in jobs if job not in self.compiled])
        ahead.wait(jobs)
        ahead.close()
        built = self.probes.build([lambda choice=choice: maker(choice) for choice in found])
        failed = [result for result in built if isinstance(result, Exception)]
        assert not failed, failed
        return dict(zip(found, built, strict=True))

    def run(self, program: Program, counted: Counted, bucket: int, out: torch.Tensor) -> None:
        """Enqueue as a replay of the bucket's graph does: its grid, the call's rows."""
        self.arena.poison()
        num_valid = self.counts.get(counted.live)
        set_call(self.call, counted.case.x, counted.case.topk, out, num_valid)
        if counted.pad == "zero":
            values = (*self.call.values[:-1], 1)
            self.call.values = values
        self.call.tokens = bucket
        program.run(self.call, torch.cuda.current_stream().cuda_stream)

    def fault(self, counted: Counted, out: torch.Tensor, behind: torch.Tensor) -> str | None:
        """What is wrong with rows that were NaN before, and those behind them."""
        kept = out.shape[0] if counted.live is None else counted.live
        rest = out[kept:]
        try:
            if kept:
                assert_close(out[:kept], counted.expected, self.cfg.torch_dtype)
                nobody = ~counted.expected.any(1)
                assert not out[:kept][nobody].any(), "a row that no expert has is not zero"
            untouched = (rest == 0).all() if counted.pad == "zero" else rest.isnan().all()
            assert untouched, "rows past the live ones"
            assert (behind == GUARD).all(), "rows behind out were written"
        except AssertionError as error:
            return f"{counted.live} of {out.shape[0]} {counted.pad}: {error}"
        return None

    def check(self, bucket: int, tokens: int, programs: dict[Choice, Program]) -> dict[str, str]:
        """Faults by choice: of each call, of a second time, of a replay."""
        counted = list(calls(self.cfg, self.backend.weights, tokens))
        lives = {c.live for c in counted if c.live is not None}
        self.counts = {n: torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in lives}
        jobs = [(choice, c) for choice in programs for c in counted]
        width = self.cfg.hidden_size

        def outs() -> list[torch.Tensor]:
            found = torch.full((len(jobs), tokens + 5, width), float("nan"), device=DEVICE)
            found[:, tokens:] = GUARD
            return list(found.to(self.cfg.torch_dtype))

        def run_all(into: list[torch.Tensor]) -> None:
            for (choice, c), out in zip(jobs, into, strict=True):
                self.run(programs[choice], c, bucket, out[:tokens])

        eager, again, replayed = outs(), outs(), outs()
        graph = torch.cuda.CUDAGraph()
        run_all(outs())  # whatever is loaded on a first run
        torch.cuda.synchronize()
        before = allocations()
        run_all(eager)
        run_all(again)
        allocated = allocations() - before
        with torch.cuda.graph(graph, stream=self.stream):
            # the beginning of a capture allocates for torch's random numbers
            before = allocations()
            run_all(replayed)
            allocated += allocations() - before
        graph.replay()
        torch.cuda.synchronize()
        faults = {"all": f"{allocated} allocations"} if allocated else {}
        for (choice, c), *three in zip(jobs, eager, again, replayed, strict=True):
            first, second, third = (out.view(torch.int16) for out in three)
            fault = self.fault(c, three[0][:tokens], three[0][tokens:])
            if fault is None and not torch.equal(first, second):
                fault = "other bits a second time"
            if fault is None and not torch.equal(first, third):
                fault = "a replay has other bits"
            if fault is not None:
                faults[f"bucket {bucket}, T={tokens}: {choice}"] = fault
        return faults


@pytest.mark.parametrize("name", LAYERS)
def test_every_choice(name: str) -> None:
    """Poisoned scratch and results, spare rows, live counts, guards; repeats and replays bit for bit."""
    cfg, weights = LAYERS[name], make_weights(name)
    bench = Bench(cfg, weights)
    if not choices(bench.backend, 1):
        pytest.skip("no streams on this device")
    faults: dict[str, str] = {}
    programs: dict[Choice, Program] = {}
    kernels = set()
    for (bucket, tokens), previous in zip(CALLS, (None, *CALLS), strict=False):
        if not choices(bench.backend, bucket):
            continue
        if previous is None or previous[0] != bucket:
            programs = bench.build(bucket)
            kernels |= {kernel for program in programs.values() for kernel in program.kernels}
        faults |= bench.check(bucket, tokens, programs)
    few = Bench(cfg, weights, FEW_UNITS)
    if choices(few.backend, CALLS[-1][0]):
        faults |= few.check(*CALLS[-1], few.build(CALLS[-1][0]))
    assert faults == {}
    streams = {k for k in kernels if "stream" in k}
    registers = {k for k in kernels if "registers" in k}
    specialised = {k for k in kernels if "specialised" in k}
    portable = {k for k in kernels if "int4" in k} - specialised
    if torch.version.hip is None:
        served = "no stream" not in name and "order" not in name
        ways = [f"{gemm}_{way}" for gemm in GEMMS for way in ("direct", "gathered", "grouped")]
        assert streams == ({f"{way}_stream_kernel" for way in ways} if served else set())
        held = {f"{gemm}_direct_registers_kernel" for gemm in GEMMS}
        assert registers == (held if served and cfg.quant else set())
        hopper = torch.cuda.get_device_capability() == (9, 0)
        # two products a step of 16-bit weights are kernels of their own, and fixed-point inputs are
        fixed = fixed_tiles.refuses(cfg, bench.backend.facts) is None
        several = 4 if fixed or not cfg.quant else 2
        assert len(specialised) == (several if served and hopper else 0)
    assert len(portable) == (4 if cfg.quant else 0)


@pytest.mark.parametrize("policy", [0, 1, 2, 3])
@pytest.mark.parametrize("quant", [Quant("int4", 128), Quant("int4", 32, symmetric=False)], ids=str)
def test_layers_under_every_policy(quant: Quant, policy: int) -> None:
    """As an engine calls them: graphs, addresses that nothing is known about, T past the buckets."""
    cfg = variant(SMALL, quant=quant)
    with runtime(cfg, sort_policy=policy, max_tokens=40, buckets=(1, 4, 32)) as rt:
        for tokens in (1, 3, 4, 17, 32, 40, 90):
            for offset in (0, 1):
                case = make_case(cfg, tokens, id_dtype=torch.int64)
                storage = torch.full((offset + case.x.numel(),), float("nan"), device=DEVICE)
                x = storage.to(cfg.torch_dtype)[offset:].view_as(case.x).copy_(case.x)
                rt._group.arena.poison()
                rt.forward(x, case.topk, case.out)
                assert_close(case.out, case.expected(rt), cfg.torch_dtype)


def test_int4_offsets_past_32_bits() -> None:
    """520 experts of 8192 x 4096 rows: the words of w13 number 2.2e9, the last experts start past 2**31."""
    cfg = MoEConfig(520, 2, 4096, 4096, quant=Quant("int4", 128))
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    generator = torch.Generator(DEVICE).manual_seed(0)

    def matrix(rows: int, std: float, paired: bool) -> Int4Matrix:
        where = (cfg.quant, cfg.torch_dtype, DEVICE)
        made = empty_matrix(cfg.num_experts, rows, 4096, *where, paired=paired)
        for expert in (0, 518, 519):
            codes = torch.randint(0, 16, (rows, 4096), generator=generator, device=DEVICE)
            scales = torch.full((rows, 32), std / 4.6, device=DEVICE)
            put_expert(made, expert, codes.to(torch.uint8), scales)
        return made

    weights = ExpertWeights(matrix(8192, 4096**-0.5, True), matrix(4096, 4096**-0.5, False))
    assert weights.w13.codes.numel() > 1 << 31
    for policy in (1, 2, 3):
        options = {"max_tokens": 8, "buckets": (1, 8), "tune": "off", "sort_policy": policy}
        with MoERuntime(cfg, weights, **options) as rt:
            for tokens in (1, 8):
                case = make_case(cfg, tokens)
                ids = torch.full_like(case.topk.ids, 519)
                ids[:, 0] = 518
                case.topk = TopK(case.topk.weights, ids)
                rt.forward(case.x, case.topk, case.out)
                assert_close(case.out, case.expected(rt), cfg.torch_dtype)
