"""Every kernel that a shipped plan names has been run and checked somewhere: here, or on a GPU with a date.

Each choice of the shipped records runs here under Triton's interpreter, on a layer that its tiles do not fit.
A kernel that the interpreter cannot run is listed in gpu_only_kernels.json, with the last run on a GPU:

    "name_kernel": {"date": "2026-11-21", "device": "NVIDIA H200", "test": "tests/test_x.py::test_y",
                    "result": "passed"}
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from code_size import ROOT

pytest.importorskip("triton")

from expert_cases import make_weights, relative_error
from fixed_point_cases import checked_splits
from runtime_cases import TOLERANCE, make_case

import moert.backends.triton as triton_backend
from moert import ExpertWeights, MoEConfig, Quant
from moert.arena import Arena, layout
from moert.backends.triton import TritonBackend
from moert.call import Call, call_key
from moert.cli.absent import absent_weights
from moert.device import KNOWN_DEVICES, device_facts
from moert.launch import run_interpreted
from moert.plan import Choice
from moert.steps.experts_reference import experts_reference
from moert.tuning.store import SHIPPED

CPU = torch.device("cpu")
TOKENS = 3
MANY_TOKENS = 180  # whose rows are more than the sort of few rows takes
GPU_ONLY: dict[str, dict[str, str]] = json.loads(
    (ROOT / "tests" / "gpu_only_kernels.json").read_text()
)
GEOMETRY = re.compile(r"E(\d+)-K(\d+)-H(\d+)-I(\d+)-(bfloat16|float16|float32)(?:-int4_g(\d+))?")


def geometries() -> dict[Path, MoEConfig]:
    """The layers of the shipped files; what else a name has in it needs a case here."""
    found = {}
    for path in sorted(SHIPPED.rglob("*.json")):
        match = GEOMETRY.fullmatch(path.stem)
        assert match is not None, f"{path.name}: not a geometry that this test can make a layer of"
        *shape, dtype, group = match.groups()
        quant = None if group is None else Quant("int4", int(group))
        found[path] = MoEConfig(*map(int, shape), dtype=dtype, quant=quant)
    return found


def records() -> list[tuple[MoEConfig, int, Choice]]:
    """(layer, T, choice) of every shipped record."""
    return [
        (cfg, int(tokens), Choice.from_json(record["choice"]))
        for path, cfg in geometries().items()
        for tokens, policies in json.loads(path.read_text())["entries"].items()
        for record in policies.values()
    ]


def shipped_device() -> Any:
    (folder,) = {path.parent.name for path in SHIPPED.rglob("*.json")}
    (facts,) = [facts for facts in KNOWN_DEVICES.values() if facts.slug == folder]
    return facts


@cache
def kernels_of(cfg: MoEConfig, tokens: int, choice: Choice) -> tuple[str, ...]:
    """What the device runs."""
    return TritonBackend(cfg, absent_weights(cfg), shipped_device()).kernels(tokens, choice)


def checked(
    choice: Choice, int4: bool, monkeypatch: pytest.MonkeyPatch, tokens: int = TOKENS
) -> list[str]:
    """The kernels of a layer by this choice, interpreted, its result that of the reference."""
    cfg = MoEConfig(4, 3, 37, 21, dtype="float32")
    weights = make_weights(cfg, "plain")
    if int4:
        # the widest step lies within a group, and neither size is a whole number of steps
        cfg = MoEConfig(3, 2, 136, 24, dtype="float32", quant=Quant("int4", 128))
        weights = ExpertWeights.random(cfg)
    backend = TritonBackend(cfg, weights, device_facts(CPU))
    if GPU_ONLY.keys() & set(backend.kernels(tokens, choice)):
        return []
    case = make_case(cfg, tokens, strange=0.3)
    fields = backend.fields(tokens, choice)
    arena = Arena(CPU, layout(fields)[1])
    arena.poison()
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32), 1)
    call.set(call_key(case.x, case.topk, case.out, None, "keep"), case.x, case.topk, case.out, None)
    ran: list[str] = []

    def watched(launches: Any, *rest: Any) -> None:
        ran.extend(launch.name for launch in launches)
        run_interpreted(launches, *rest)

    monkeypatch.setattr(triton_backend, "run_interpreted", watched)
    backend.program(tokens, choice, arena.views(fields)).run(call, 0)
    expected = experts_reference(case.x, case.topk, weights, cfg)
    assert relative_error(case.out, expected) < TOLERANCE[case.out.dtype], choice
    return ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_every_kernel_of_a_shipped_plan_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    # a dependent launch is one of the same kernel, and the interpreter has no launches to overlap
    choices = dict.fromkeys(
        (replace(choice, dependent=False, **without), cfg.quant is not None)
        for cfg, _, choice in records()
        # tiles for crowds may be what the interpreter cannot run, the others not
        for without in ({}, {"crowded": None})
    )
    ran = {kernel for choice in choices for kernel in checked(*choice, monkeypatch)}
    sorted_choices = (
        c for c, int4 in choices if c.strategy == "one_shot" and not int4 and not c.crowded
    )
    tiles = next(c for c in sorted_choices if c.gate_up is not None and c.gate_up.kernel == "tile")
    ran |= set(checked(tiles, False, monkeypatch, MANY_TOKENS))
    # they precede kernels that the interpreter cannot run
    ran |= set(checked_splits(True, None))
    named = {kernel for record in records() for kernel in kernels_of(*record)}
    assert len(named) > 5
    assert named - ran - GPU_ONLY.keys() == set()


def test_the_list_of_kernels_tested_on_a_gpu_only() -> None:
    """No entry is stale, in the future, of an unknown test or of a failure."""
    named = {kernel for record in records() for kernel in kernels_of(*record)}
    for kernel, entry in GPU_ONLY.items():
        assert kernel in named, f"{kernel}: no shipped plan names it"
        assert set(entry) == {"date", "device", "test", "result"}, kernel
        assert datetime.date.fromisoformat(entry["date"]) <= datetime.date.today()
        file, name = entry["test"].split("::")
        assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(), entry["test"]
        assert entry["result"] == "passed", f"{kernel}: {entry['result']}"
