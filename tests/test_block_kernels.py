"""Router logits and slots under the interpreter, part by part; tiers; code for devices that are absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from expert_cases import relative_error

from moert import ExpertWeights, MoEConfig, TopK
from moert.arena import Arena, layout
from moert.backends.base import slot_fields
from moert.backends.triton_block import (
    LEAST_PART,
    Tier,
    logits_field,
    route_launches,
    router_tiers,
    take_launch,
    unaligned_tier,
)
from moert.call import Call, call_key
from moert.config import Routing
from moert.device import KNOWN_DEVICES
from moert.launch import run_interpreted
from moert.steps.block.reference import block_routing_reference, router_logits_reference

FACTS = KNOWN_DEVICES["gfx942"]
NAN = float("nan")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)

# sizes that fit no tile; the gate is a column of its own
CFG = MoEConfig(
    13, 3, 83, 8, dtype="float32", shared_experts=2, shared_gate=True, routing=Routing("sigmoid")
)
# id -> tier: of values, of one part, of many (the last one of which is short, or all padding)
TIERS = {
    "values": Tier(9, 0, 1, 128, 1, 83, 4),
    "values-in-steps": Tier(9, 0, 1, 32, 1, 83, 4),
    "tile": Tier(9, 16, 32, 32, 1, 96, 2),
    "parts": Tier(9, 16, 16, 16, 3, 32, 2),
    "a-part-of-nothing": Tier(9, 16, 16, 16, 4, 32, 2),
    "tall": Tier(9, 64, 16, 16, 2, 48, 4),
}
LAYERS = {
    "plain": (CFG, {}),
    "half": (replace(CFG, dtype="float16"), {}),
    "half-router-fp32": (replace(CFG, dtype="float16"), {"router_weight": torch.float32}),
    "half-gate-fp32": (replace(CFG, dtype="float16"), {"shared_gate": torch.float32}),
    "no-gate": (replace(CFG, shared_gate=False), {}),
    "nothing-shared": (replace(CFG, shared_gate=False, shared_experts=0), {}),
    "bias": (replace(CFG, bias=True), {}),
    "corrected": (replace(CFG, routing=Routing("sigmoid", correction_bias=True)), {}),
}


def make_weights(cfg: MoEConfig, dtypes: dict[str, torch.dtype]) -> ExpertWeights:
    weights = ExpertWeights.random(cfg, seed=5)
    return replace(weights, **{n: getattr(weights, n).to(dtype) for n, dtype in dtypes.items()})


def make_views(cfg: MoEConfig, rows: int, tier: Tier) -> dict[str, torch.Tensor]:
    """Full of NaN."""
    logits = logits_field(cfg, FACTS, rows)
    logits = logits._replace(shape=(rows * tier.parts, logits.shape[1]))
    fields = (*slot_fields(cfg, rows), logits)
    arena = Arena(torch.device("cpu"), layout(fields)[1])
    arena.poison()
    return arena.views(fields)


def make_call(x: torch.Tensor, topk: TopK, live: int | None) -> Call:
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32), 1)
    num_valid = None if live is None else torch.tensor(live, dtype=torch.int32)
    out = torch.empty_like(x)
    call.set(call_key(x, topk, out, num_valid, "keep"), x, topk, out, num_valid)
    return call


def routed(
    cfg: MoEConfig, weights: ExpertWeights, tier: Tier, x: torch.Tensor, live: int | None = None
) -> dict[str, torch.Tensor]:
    rows = x.shape[0]
    views = make_views(cfg, rows, tier)
    call = make_call(x, TopK(views["slot_weights"], views["slot_ids"]), live)
    launches = route_launches(cfg, FACTS, weights, tier, rows, views)
    run_interpreted(launches, call.interpreter_values(), rows)
    return views


@interpreted
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tier", TIERS)
def test_logits_and_slots(tier: str, layer: str) -> None:
    cfg, dtypes = LAYERS[layer]
    weights = make_weights(cfg, dtypes)
    x = torch.randn(5, 87, generator=torch.Generator().manual_seed(1)).to(cfg.torch_dtype)
    x = x[:, 2:85]  # gaps between rows
    views = routed(cfg, weights, TIERS[tier], x)
    logits = views["logits"].view(TIERS[tier].parts, 5, -1).sum(0)
    assert relative_error(logits, router_logits_reference(x, weights)) < 1e-6
    expected = block_routing_reference(x, weights, cfg)
    assert torch.equal(views["slot_ids"], expected.ids)
    assert relative_error(views["slot_weights"], expected.weights) < 1e-6


@interpreted
@pytest.mark.parametrize("tier", ["values", "parts"])
def test_rows_that_are_not_live(tier: str) -> None:
    """NaN in them is not seen, and their slots keep what they hold."""
    weights = make_weights(CFG, {})
    x = torch.randn(20, 83)
    x[3:] = NAN
    views = routed(CFG, weights, TIERS[tier], x, live=3)
    expected = block_routing_reference(x[:3], weights, CFG)
    assert torch.equal(views["slot_ids"][:3], expected.ids)
    assert relative_error(views["slot_weights"][:3], expected.weights) < 1e-6
    assert (views["slot_ids"][3:] == -1).all() and views["slot_weights"][3:].isnan().all()
    assert views["logits"].view(TIERS[tier].parts, 20, -1)[:, 3:].isnan().all()


@interpreted
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("live", [None, 0, 70])
def test_slots_of_a_routing(ids: torch.dtype, live: int | None) -> None:
    """More rows than a program takes; ids of nobody, that of the first shared expert among them."""
    rows, count = 80, 80 if live is None else live
    views = make_views(CFG, rows, TIERS["tile"])
    given = torch.randint(0, 13, (rows, 5), dtype=ids)[:, 1:4]
    given[::3, 0] = 13
    given[::5, 1] = -7
    if ids == torch.int64:
        given[::7, 2] = 2**32 + 1
    weights = torch.rand(rows, 3)
    call = make_call(torch.zeros(rows, 83), TopK(weights, given), live)
    run_interpreted([take_launch(CFG, views)], call.interpreter_values(), rows)
    nobody = (given < 0) | (given >= 13)
    assert torch.equal(views["slot_ids"][:count, :3], given.int().masked_fill(nobody, -1)[:count])
    assert torch.equal(views["slot_weights"][:count, :3], weights[:count])
    assert (views["slot_ids"][:count, 3:] == -1).all()
    assert not views["slot_weights"][:count, 3:].any()
    assert views["slot_weights"][count:].isnan().all() and (views["slot_ids"][count:] == -1).all()


SHAPES = {
    "mixtral": MoEConfig(8, 2, 4096, 14336),
    "qwen3-next": MoEConfig(512, 10, 2048, 512, shared_experts=1, shared_gate=True),
    "deepseek-v3": MoEConfig(256, 8, 7168, 2048, shared_experts=1),
    "tiny": MoEConfig(3, 1, 7, 5),
    "odd": MoEConfig(60, 4, 2880, 1408, shared_experts=4, shared_gate=True),
}


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiers_cover_every_call(shape: str, arch: str) -> None:
    """Parts hold all of H and none is empty; what the logits need is what is allocated."""
    cfg, facts = SHAPES[shape], KNOWN_DEVICES[arch]
    for rows in (1, 2, 3, 64, 4096):
        tiers = router_tiers(cfg, facts, rows)
        assert tiers[-1].tokens >= rows and all(t.tokens < rows for t in tiers[:-1])
        allocated = logits_field(cfg, facts, rows).shape[0]
        for tier in (*tiers, unaligned_tier(tiers)):
            assert tier.parts * tier.part >= cfg.hidden_size > (tier.parts - 1) * tier.part
            assert tier.bm == 0 or tier.part % tier.bk == 0
            assert tier.parts == 1 or tier.part >= LEAST_PART
            assert min(tier.tokens, rows) * tier.parts <= allocated
            # a program's share of a tensor
            assert tier.bm * tier.bn <= 4096 and tier.bk <= 8192


# the interpreter replaces the compiler for the whole process, so compiling takes another one
COMPILE = """
import json, re, torch
from triton.backends.compiler import GPUTarget
from moert import ExpertWeights, MoEConfig
from moert.backends.base import slot_fields
from moert.backends.triton_block import (
    logits_field, route_launches, router_tiers, take_launch, unaligned_tier
)
from moert.config import Routing
from moert.device import KNOWN_DEVICES
from moert.launch import compile_launch

NOAUX = Routing("sigmoid", True, True, 8, 4, "top2_sum", 2.5)
LAYERS = {
    "qwen3-next": (MoEConfig(512, 10, 2048, 512, shared_experts=1, shared_gate=True), torch.bfloat16),
    "deepseek-v3": (MoEConfig(256, 8, 7168, 2048, shared_experts=1, routing=NOAUX), torch.float32),
}
found = {}
for name, (cfg, dtype) in LAYERS.items():
    def absent(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")
    weights = ExpertWeights(
        absent(1, 1, 1), absent(1, 1, 1), router_weight=absent(cfg.num_experts, cfg.hidden_size),
        correction_bias=absent(256, dtype=torch.float32),
        shared_gate=absent(1, cfg.hidden_size) if cfg.shared_gate else None,
    )
    archs = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950", "gfx1151")
    for arch in archs if dtype == torch.bfloat16 else ("sm_90", "gfx942", "gfx1151"):
        facts = KNOWN_DEVICES[arch]
        target = GPUTarget(facts.kind, arch if facts.kind == "hip" else int(arch[3:]), facts.warp_size)
        fields = (*slot_fields(cfg, 4096), logits_field(cfg, facts, 4096))
        views = {f.name: torch.empty(f.shape, dtype=f.dtype, device="meta") for f in fields}
        tiers = router_tiers(cfg, facts, 4096)
        chains = [(t, True) for t in tiers] + [(unaligned_tier(tiers), False)]
        launches = [(l, a) for t, a in chains for l in route_launches(cfg, facts, weights, t, 4096, views)]
        for launch, aligned in [*launches, (take_launch(cfg, views), False)]:
            code = compile_launch(launch, cfg.torch_dtype, aligned=aligned, target=target)
            assert code.metadata.shared <= facts.shared_memory, (name, arch, launch.name)
            key = f"{name} {arch}"
            facts_of = found.setdefault(key, {"kernels": 0, "spills": 0, "matrix": 0})
            facts_of["kernels"] += 1
            text = code.asm["amdgcn" if facts.kind == "hip" else "ptx"]
            if facts.kind == "hip":
                for spilled in ("vgpr_spill_count", "private_segment_fixed_size"):
                    facts_of["spills"] += int(re.search(spilled + r": *(\\d+)", text)[1])
            else:
                facts_of["spills"] += len(re.findall(r"(ld|st)\\.local", text))
            matrix = re.search("mma.sync|wgmma|tcgen05|v_mfma|v_wmma", text) is not None
            facts_of["matrix"] += matrix and launch.name == "router_logits_tiled_kernel"
print(json.dumps(found))
"""


def test_cross_compiled_code() -> None:
    """For every target: no spills, within shared memory, matrix units where both are of 16 bits."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found) == 10
    for name, facts in found.items():
        # a pair for each of four tiers and one for unaligned calls, and the slots' kernel
        assert facts["kernels"] == 11 and facts["spills"] == 0, (name, facts)
        if name.startswith("qwen3-next"):
            assert facts["matrix"] == 4, (name, facts)
