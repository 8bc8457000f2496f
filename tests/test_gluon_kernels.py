"""What the Gluon kernels compute, their own source run on a CPU (gluon_on_cpu.py), against the reference.

Shared memory, scratch and results begin as NaN, rows that nobody may read are NaN; a device of three units
lets every workgroup go through several pieces, around the ring more than once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import gluon_on_cpu
import pytest
import torch

pytest.importorskip("triton")

from expert_cases import relative_error
from runtime_cases import NAN, make_case

from moert import ExpertWeights, MoEConfig
from moert.arena import Arena, layout
from moert.backends import fixed_tiles, specialised_tiles, stream_choices
from moert.backends.stream_tiles import stream_shape
from moert.backends.triton import TritonBackend
from moert.call import Call, call_key
from moert.config import Quant
from moert.device import KNOWN_DEVICES
from moert.launch import run_interpreted
from moert.plan import Choice
from moert.steps.experts_reference import experts_reference
from moert.topk import TopK

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the sort beside them is compiled here, not interpreted"
)

CPU = torch.device("cpu")
FEW_UNITS = replace(KNOWN_DEVICES["sm_90"], compute_units=3)
# float16: the interpreter of the kernels beside these computes bfloat16 wrongly. Sizes that are whole blocks
# of nothing
PLAIN = MoEConfig(4, 3, 144, 88, "swiglu_oai", bias=True, dtype="float16")
UNGATED = MoEConfig(4, 3, 144, 88, "relu2", gated=False, bias=True, dtype="float16")
LAYERS = {
    "16 bits": PLAIN,
    "16 bits, interleaved": PLAIN,
    "16 bits, ungated": UNGATED,
    "16 bits, one step": replace(PLAIN, hidden_size=64, intermediate_size=32),
    "g128": MoEConfig(4, 2, 272, 144, dtype="float16", quant=Quant("int4", 128)),
    "g32, zero points": replace(PLAIN, quant=Quant("int4", 32, symmetric=False)),
    "a group a row": replace(PLAIN, quant=Quant("int4", -1)),
    "g128, zero points": replace(PLAIN, quant=Quant("int4", 128, symmetric=False)),
    "g64, zero points, ungated": replace(UNGATED, quant=Quant("int4", 64, symmetric=False)),
}
TOLERANCE = 2e-3


def cases() -> Iterator[tuple[str, Choice, int]]:
    """(layer, choice, T): every specialised tile, every fourth stream."""
    for name, cfg in LAYERS.items():
        streams = [
            *stream_choices.direct_choices(cfg, FEW_UNITS, 8),
            *stream_choices.grouped_choices(cfg, FEW_UNITS, "one_shot", 11),
        ]
        for number, choice in enumerate(dict.fromkeys(streams)):
            if number % 4 == 0:
                yield name, choice, 3 if choice.strategy == "none" else 11
        # several blocks of an expert by one program, as many as instructions are made for, and fewer
        wide = stream_choices.grouped_choices(cfg, FEW_UNITS, "one_shot", 64)
        most = max(wide, key=lambda c: (c.gate_up.together, c.down.together, -c.gate_up.bn))
        yield name, most, 45
        # an expert with more rows than a block, others with few; of blocks that are two products, also those
        # that need both, the first, and half of it
        for tile in specialised_tiles.every_tile(cfg, FEW_UNITS):
            tokens = 150 if tile.bm <= 128 else 200
            yield name, Choice("one_shot", tile, tile, FEW_UNITS.dependent_launch), tokens
        for tile in fixed_tiles.every_tile(cfg, FEW_UNITS):
            yield name, Choice("one_shot", tile, tile, FEW_UNITS.dependent_launch), 60


def gathers(choice: Choice) -> bool:
    return choice.down is not None and choice.down.kernel == "gathered"


def run(
    backend: TritonBackend, choice: Choice, tokens: int, live: int | None, outlier: float = 1.0
) -> None:
    """One call, with rows of nobody, behind the live ones anything; checks the result.

    Args:
        outlier: how many times as large a column of x is as the others.
    """
    cfg, weights = backend.cfg, backend.weights
    case = make_case(cfg, tokens + 2, strange=0.1)
    case.x[:, 5] *= outlier
    if tokens > 40:
        case.topk.ids[:, 0] = 1
    case.topk.weights[(case.topk.ids < 0) | (case.topk.ids >= cfg.num_experts)] = NAN
    computed = tokens if live is None else live
    case.x[computed:], case.topk.weights[computed:] = NAN, NAN
    x, topk = case.x[:tokens], TopK(case.topk.weights[:tokens], case.topk.ids[:tokens])
    out = case.out[:tokens]
    fields = backend.fields(tokens, choice)
    arena = Arena(CPU, layout(fields)[1])
    arena.poison()
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32), 1)
    count = None if live is None else torch.tensor(live, dtype=torch.int32)
    call.set(call_key(x, topk, out, count, "keep"), x, topk, out, count)
    call.tokens = tokens
    values, ran = call.interpreter_values(), 0
    for launch in backend.launches(tokens, choice, arena.views(fields)):
        if any(word in launch.name for word in ("stream", "specialised", "registers")):
            given = {**values, **launch.args, **launch.constants}
            gluon_on_cpu.run(launch.kernel, launch.grid(tokens)[0], given, launch.num_warps)
            ran += 1
        else:
            run_interpreted([launch], values, tokens)
    assert ran == 2, "kernels of no Gluon"
    if computed:
        topk = TopK(topk.weights[:computed], topk.ids[:computed])
        expected = experts_reference(x[:computed], topk, weights, cfg)
        assert relative_error(out[:computed], expected) < TOLERANCE
    assert case.out[computed:].isnan().all()


@pytest.mark.parametrize(
    ("name", "choice", "tokens"), list(cases()), ids=lambda v: str(v).replace(" ", "-")
)
def test_results(name: str, choice: Choice, tokens: int) -> None:
    cfg = LAYERS[name]
    weights = replace(ExpertWeights.random(cfg), interleaved="interleaved" in name)
    backend = TritonBackend(cfg, weights, FEW_UNITS)
    run(backend, replace(choice, dependent=False), tokens, None)


@pytest.mark.parametrize("live", [0, 1, 7])
@pytest.mark.parametrize("name", ["16 bits", "g32, zero points", "g128, zero points"])
def test_live_counts(name: str, live: int) -> None:
    """The first choice of each kind."""
    cfg = LAYERS[name]
    backend = TritonBackend(cfg, ExpertWeights.random(cfg), FEW_UNITS)
    direct = list(stream_choices.direct_choices(cfg, FEW_UNITS, 1))
    kinds = (
        (c for c in direct if c.kernels == {"stream"}),
        (c for c in direct if c.kernels == {"registers"}),
        (c for c in stream_choices.direct_choices(cfg, FEW_UNITS, 8) if gathers(c)),
        stream_choices.grouped_choices(cfg, FEW_UNITS, "one_shot", 9),
        specialised_tiles.choices(cfg, FEW_UNITS, "multi_phase", 1000.0),
        fixed_tiles.choices(cfg, FEW_UNITS, "multi_phase", 16.0),
    )
    for choices in kinds:
        choice = next(choices, None)
        if choice is None:
            held = choices is kinds[1] and cfg.quant is None
            assert held or (choices is kinds[-1] and fixed_tiles.refuses(cfg, FEW_UNITS))
            continue
        tokens = 9 if choice.strategy != "none" else max(3, live)
        run(backend, replace(choice, dependent=False), tokens, live)


@pytest.mark.parametrize("outlier", [30.0, 300.0])
@pytest.mark.parametrize("name", ["g128", "g128, zero points", "g32, zero points", "a group a row"])
def test_fixed_point_bears_a_column_far_above_the_others(name: str, outlier: float) -> None:
    cfg = LAYERS[name]
    backend = TritonBackend(cfg, ExpertWeights.random(cfg), FEW_UNITS)
    held = next(stream_choices.direct_choices(cfg, FEW_UNITS, 1))
    assert held.kernels == {"registers"}
    run(backend, replace(held, dependent=False), 3, None, outlier)
    for choice in islice(fixed_tiles.choices(cfg, FEW_UNITS, "one_shot", 8.0), 1):
        run(backend, replace(choice, dependent=False), 20, None, outlier)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(
    "quant", [Quant("int4", 32), Quant("int4", 128), Quant("int4", 64, symmetric=False)], ids=str
)
def test_registers_are_filled_again(quant: Quant, up: bool) -> None:
    """Rows that are longer than what lanes hold; with groups of 32, four of them side by side."""
    sizes = (2064, 88) if up else (144, 2072)
    cfg = MoEConfig(4, 3, *sizes, dtype="float16", quant=quant)
    backend = TritonBackend(cfg, ExpertWeights.random(cfg), FEW_UNITS)
    found = stream_choices.direct_choices(cfg, FEW_UNITS, 1)
    held = [c for c in found if c.kernels == {"registers"}]
    tiles = list(dict.fromkeys(c.gate_up if up else c.down for c in held))
    shapes = {t: stream_shape(cfg, t, up=up, direct=True) for t in tiles if t}
    again = [t for t, shape in shapes.items() if shape.iterations > shape.stages]
    assert len(again) >= 2
    assert {shapes[t].sub for t in again} == {128 // quant.group_size}
    for tile in again[:3]:
        choice = replace(held[0], **{"gate_up" if up else "down": tile}, dependent=False)
        run(backend, choice, 2, None)
