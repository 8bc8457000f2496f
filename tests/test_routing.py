"""Routing: its implementations against the reference, which test_routing_reference.py checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from moert.config import MoEConfig, Routing
from moert.errors import InputError, UnsupportedError
from moert.steps.routing import route, route_reference
from moert.steps.routing.torch_ops import TorchRouter
from moert.topk import TopK

NAN, INF = float("nan"), float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the GPU's exp is an approximation whose relative error grows with its argument
WEIGHT_RTOL = {"cpu": 1e-6, "cuda": 1e-5}

RULES = {
    "softmax": Routing("softmax", renormalize=False),
    "softmax-renorm": Routing("softmax"),
    "softmax-bias": Routing("softmax", correction_bias=True),
    "softmax-bias-raw": Routing("softmax", renormalize=False, correction_bias=True),
    "topk": Routing("softmax_topk"),
    "topk-bias": Routing("softmax_topk", correction_bias=True),
    "sigmoid": Routing("sigmoid", scaling_factor=2.5),
    "sigmoid-bias-raw": Routing("sigmoid", renormalize=False, correction_bias=True),
    "sqrtsoftplus-bias": Routing("sqrtsoftplus", correction_bias=True, scaling_factor=1.5),
    "sqrtsoftplus-raw": Routing("sqrtsoftplus", renormalize=False),
    "softmax-groups-max": Routing("softmax", False, False, 8, 3, "max", 16.0),
    "softmax-groups-top2": Routing("softmax", False, False, 8, 3, "top2_sum"),
    "topk-groups-top2": Routing("softmax_topk", True, False, 8, 3, "top2_sum"),
    "sigmoid-groups-top2": Routing("sigmoid", True, False, 8, 3, "top2_sum"),
    "sigmoid-bias-groups-top2": Routing("sigmoid", True, True, 8, 4, "top2_sum", 2.5),
    "sqrtsoftplus-bias-groups-max": Routing("sqrtsoftplus", True, True, 8, 1, "max"),
}
SHAPES = {
    "empty": (0, 60, 4),
    "one-expert": (1, 1, 1),
    "qwen3": (1, 128, 8),
    "groups-of-ten": (3, 60, 4),
    "padded-quarter": (2, 384, 8),
    "odd-groups-of-125": (5, 1000, 10),
    "k-is-e": (2, 8, 8),
    "largest-k": (2, 256, 127),
    "largest-e": (1, 1024, 6),
}
GROUPS = {60: 6, 8: 2, 1: 1}


def make_config(rule: Routing, experts: int, k: int) -> MoEConfig:
    """The rule with a number of groups that divides E, and enough of them for K."""
    if rule.num_groups > 1:
        groups = GROUPS.get(experts, rule.num_groups)
        enough = -(-k * groups // experts)
        rule = replace(
            rule, num_groups=groups, top_groups=min(groups, max(rule.top_groups, enough))
        )
    return MoEConfig(experts, k, 8, 8, routing=rule)


def make_bias(cfg: MoEConfig) -> torch.Tensor | None:
    if not cfg.routing.correction_bias:
        return None
    return torch.randn(cfg.num_experts, generator=torch.Generator().manual_seed(7)) * 0.1


def poisoned(cfg: MoEConfig, rows: int, device: str = "cpu") -> TopK:
    shape = (rows, cfg.top_k)
    ids = torch.full(shape, -7, dtype=torch.int32, device=device)
    return TopK(torch.full(shape, NAN, device=device), ids)


def run_torch(logits: torch.Tensor, cfg: MoEConfig, bias: torch.Tensor | None) -> TopK:
    out = poisoned(cfg, logits.shape[0])
    TorchRouter(cfg, max_tokens=logits.shape[0] + 3)(logits, out, bias)
    return out


def run_kernel(
    logits: torch.Tensor, cfg: MoEConfig, bias: torch.Tensor | None, num_valid: int | None = None
) -> TopK:
    from moert.steps.routing.triton import route_triton

    out = poisoned(cfg, logits.shape[0], DEVICE)
    valid = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32, device=DEVICE)
    route_triton(logits.to(DEVICE), cfg, None if bias is None else bias.to(DEVICE), out, valid)
    return TopK(out.weights.cpu(), out.ids.cpu())


IMPLEMENTATIONS = {"torch": run_torch, "kernel": run_kernel}


def assert_same(got: TopK, want: TopK, rtol: float = 1e-6) -> None:
    assert got.ids.dtype == torch.int32 and got.weights.dtype == torch.float32
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.weights, want.weights, rtol=rtol, atol=1e-30)


def assert_valid(got: TopK, cfg: MoEConfig) -> None:
    assert ((got.ids >= 0) & (got.ids < cfg.num_experts)).all()
    for row in got.ids.tolist():
        assert len(set(row)) == cfg.top_k
    assert got.weights.isfinite().all() and (got.weights >= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_equals_the_reference(run: str, rule: str, shape: str) -> None:
    tokens, experts, k = SHAPES[shape]
    cfg = make_config(RULES[rule], experts, k)
    # every rule meets every dtype, at other shapes
    dtype = (torch.float32, torch.bfloat16, torch.float16)[(len(rule) + len(shape)) % 3]
    generator = torch.Generator().manual_seed(experts + k)
    logits = (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)
    bias = make_bias(cfg)
    want = route_reference(logits, cfg, bias)
    assert_valid(want, cfg)
    rtol = WEIGHT_RTOL[DEVICE if run == "kernel" else "cpu"]
    assert_same(IMPLEMENTATIONS[run](logits, cfg, bias), want, rtol)


def hard_rows(experts: int) -> torch.Tensor:
    rows = torch.randn(9, experts, generator=torch.Generator().manual_seed(3))
    rows[0] = NAN
    rows[1] = -INF
    rows[2, ::3] = NAN
    rows[3, 5:] = -INF  # fewer than K experts left
    rows[4] = 1.0  # all tie
    rows[5] = torch.arange(experts) % 2  # many tie
    rows[6] *= 1e30  # every score saturates
    rows[7, [2, 11, 30]] = INF
    rows[8] = torch.where(torch.arange(experts) % 2 == 0, -0.0, 0.0)  # the two zeros tie
    return rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("run", ["reference", *IMPLEMENTATIONS])
def test_hard_rows(run: str, rule: str) -> None:
    cfg = make_config(RULES[rule], 60, 7)
    logits, bias = hard_rows(60), make_bias(cfg)
    got = {"reference": route_reference, **IMPLEMENTATIONS}[run](logits, cfg, bias)
    assert_valid(got, cfg)
    if run != "reference":
        rtol = WEIGHT_RTOL[DEVICE if run == "kernel" else "cpu"]
        assert_same(got, route_reference(logits, cfg, bias), rtol)
    # nobody was asked for: zeros, not NaN and not a share for everybody
    assert not got.weights[:2].any()
    # a rejected expert is taken only to fill up, and weighs nothing
    assert not got.weights[3][got.ids[3] >= 5].any()
    if bias is None:
        lowest = torch.arange(7, dtype=torch.int32)
        for row in (0, 1, 4, 8):
            assert torch.equal(got.ids[row], lowest), f"row {row}: ties go to the lowest id"
        if cfg.routing.num_groups == 1:
            assert got.ids[5].tolist() == [1, 3, 5, 7, 9, 11, 13]
            assert got.ids[7, :3].tolist() == [2, 11, 30]


@pytest.mark.parametrize("num_valid", [0, 2, 4, 9], ids=lambda n: f"valid{n}")
@pytest.mark.parametrize("rule", ["softmax", "sigmoid-bias-groups-top2"])
def test_dead_rows_are_neither_read_nor_written(rule: str, num_valid: int) -> None:
    cfg = make_config(RULES[rule], 128, 8)
    bias = make_bias(cfg)
    logits = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    want = route_reference(logits, cfg, bias)
    logits[num_valid:] = NAN
    got = run_kernel(logits, cfg, bias, num_valid)
    live = min(num_valid, 4)  # a count above the rows given means all of them
    assert_same(
        TopK(*(t[:live] for t in got)), TopK(*(t[:live] for t in want)), WEIGHT_RTOL[DEVICE]
    )
    assert got.weights[live:].isnan().all() and (got.ids[live:] == -7).all()


def test_several_tokens_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of large batches, at a size where the last block is not full."""
    from moert.steps.routing import triton as step

    def wide(cfg: MoEConfig, tokens: int) -> Any:
        _, constexprs, warps = step_launch(cfg, 100_000)
        return (-(-tokens // constexprs["BLOCK_T"]),), constexprs, warps

    step_launch = step.routing_launch
    monkeypatch.setattr(step, "routing_launch", wide)
    assert wide(MoEConfig(128, 8, 8, 8), 9)[1]["BLOCK_T"] > 1
    for rule in ("softmax", "topk", "sigmoid-bias-groups-top2"):
        cfg = make_config(RULES[rule], 128, 8)
        bias = make_bias(cfg)
        logits = torch.randn(9, 128, generator=torch.Generator().manual_seed(2))
        assert_same(
            run_kernel(logits, cfg, bias), route_reference(logits, cfg, bias), WEIGHT_RTOL[DEVICE]
        )


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_row_stride(run: str) -> None:
    cfg = make_config(RULES["softmax"], 60, 4)
    wide = torch.full((5, 77), NAN)
    wide[:, 3:63] = torch.randn(5, 60, generator=torch.Generator().manual_seed(1))
    logits = wide[:, 3:63]
    assert_same(
        IMPLEMENTATIONS[run](logits, cfg, None), route_reference(logits, cfg), WEIGHT_RTOL[DEVICE]
    )


logit_values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, NAN, INF, -INF, 1e30, -1e30, 3e38, 1e-40]),
    st.floats(width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_logits_give_a_valid_routing(data: st.DataObject) -> None:
    experts = data.draw(st.sampled_from([1, 8, 60, 128]))
    k = data.draw(st.integers(1, experts).filter(lambda k: k <= 127))
    cfg = make_config(RULES[data.draw(st.sampled_from(sorted(RULES)))], experts, k)
    row = st.lists(logit_values, min_size=experts, max_size=experts)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)), dtype=torch.float32)
    bias = make_bias(cfg)
    want = route_reference(logits, cfg, bias)
    assert_valid(want, cfg)
    got = run_torch(logits, cfg, bias)
    assert_valid(got, cfg)
    assert torch.equal(got.ids, want.ids)


@pytest.mark.parametrize("rule", RULES)
def test_torch_router_allocates_nothing(rule: str) -> None:
    cfg = make_config(RULES[rule], 128, 8)
    router, bias = TorchRouter(cfg, 64), make_bias(cfg)
    if bias is not None:
        bias = bias.bfloat16()  # an operand that has to be converted
    out = poisoned(cfg, 37)
    logits = torch.randn(37, 128).bfloat16()
    router(logits, out, bias)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        router(logits, out, bias)
    found = [
        (e.name, e.self_cpu_memory_usage) for e in watch.events() if e.self_cpu_memory_usage > 0
    ]
    assert found == []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        torch.empty(37)
    assert any(e.self_cpu_memory_usage > 0 for e in watch.events()), "the detector detects nothing"


def test_torch_router_refuses_more_rows() -> None:
    cfg = make_config(RULES["softmax"], 8, 2)
    with pytest.raises(InputError, match="got 5 rows, this router was made for 4"):
        TorchRouter(cfg, 4)(torch.zeros(5, 8), poisoned(cfg, 5))


def test_route_writes_into_out() -> None:
    cfg = make_config(RULES["softmax"], 60, 4)
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out = poisoned(cfg, 5, DEVICE)
    assert route(logits, cfg, out=out) is out
    want = route_reference(logits.cpu(), cfg)
    assert_same(TopK(out.weights.cpu(), out.ids.cpu()), want, WEIGHT_RTOL[DEVICE])
    new = route(logits, cfg)
    assert torch.equal(new.ids, out.ids) and torch.equal(new.weights, out.weights)


GOOD = torch.zeros(3, 8)
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.zeros(8)}, r"logits: got shape \[8\], need \[T, E=8\]"),
    "experts": ({"logits": torch.zeros(3, 9)}, r"logits: got shape \[3, 9\]"),
    "dtype": ({"logits": GOOD.double()}, "logits: got torch.float64, need torch.float32"),
    "stride": ({"logits": torch.zeros(8, 3).t()}, r"logits: got strides \[1, 3\]"),
    "list": ({"logits": [[0.0] * 8] * 3}, "logits: got list, need"),
    "no-bias": ({"bias": None}, "correction_bias: got none, but"),
    "bias-shape": ({"bias": torch.zeros(7)}, r"correction_bias: got shape \[7\], need \[8\]"),
    "bias-dtype": ({"bias": torch.zeros(8).long()}, "correction_bias: got torch.int64"),
    "bias-device": (
        {"bias": torch.zeros(8, device="meta")},
        "correction_bias: got a tensor on meta",
    ),
    "out-rows": ({"rows": 2}, r"out.weights: got shape \[2, 2\], need \[3, 2\]"),
    "out-dtype": ({"ids": torch.int64}, "out.ids: got torch.int64, need torch.int32"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    changes, message = BAD_CALLS[case]
    given = {"logits": GOOD, "bias": torch.zeros(8), "rows": 3, "ids": torch.int32} | changes
    cfg = MoEConfig(8, 2, 8, 8, routing=Routing(correction_bias=True))
    out = TopK(
        torch.full((given["rows"], 2), NAN), torch.zeros(given["rows"], 2, dtype=given["ids"])
    )
    with pytest.raises(InputError, match=message):
        route(given["logits"], cfg, given["bias"], out)
    assert out.weights.isnan().all()


def test_a_bias_that_the_rule_does_not_have() -> None:
    with pytest.raises(InputError, match="correction_bias: got one, but"):
        route(GOOD, MoEConfig(8, 2, 8, 8), torch.zeros(8))


def test_fewer_experts_than_k() -> None:
    with pytest.raises(UnsupportedError, match="route: top_k=9 exceeds num_experts=8"):
        route(GOOD, MoEConfig(8, 9, 8, 8))


def test_launch_is_pure_and_bounded() -> None:
    from moert.steps.routing.triton import routing_fwd_kernel, routing_launch

    cfg = MoEConfig(60, 4, 8, 8)
    assert list(routing_launch(cfg, 1)[1]) == routing_fwd_kernel.arg_names[7:]
    for tokens in (0, 1, 63, 4096, 4097, 10**6):
        grid, constexprs, warps = routing_launch(cfg, tokens)
        assert (grid[0] - 1) * constexprs["BLOCK_T"] < max(tokens, 1) and warps in (1, 2, 4, 8)
        assert grid[0] * constexprs["BLOCK_T"] >= tokens
    with pytest.raises(UnsupportedError, match="num_experts=1025"):
        routing_launch(MoEConfig(1025, 4, 8, 8), 1)


# the interpreter replaces the compiler for the whole process, so compiling takes another one
COMPILE = """
import json, re, torch
from triton.backends.compiler import GPUTarget
from moert.config import MoEConfig, Routing
from moert.launch import Launch, compile_launch
from moert.steps.routing.triton import routing_fwd_kernel, routing_launch

NOAUX = Routing("sigmoid", True, True, 8, 4, "top2_sum", 2.5)
CONFIGS = {
    "qwen3-bf16": (MoEConfig(128, 8, 8, 8), torch.bfloat16),
    "qwen3-fp32": (MoEConfig(128, 8, 8, 8), torch.float32),
    "deepseek-v3": (MoEConfig(256, 8, 8, 8, routing=NOAUX), torch.float32),
}
HIP = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1151": 32}
TARGETS = [GPUTarget("cuda", 90, 32), *(GPUTarget("hip", *arch) for arch in HIP.items())]
found = {}
for name, (cfg, dtype) in CONFIGS.items():
    _, constants, warps = routing_launch(cfg, 64)
    args = {
        "logits_ptr": torch.empty(1, dtype=dtype),
        "correction_bias_ptr": torch.empty(1) if cfg.routing.correction_bias else None,
        "routed_weights_ptr": torch.empty(1),
        "routed_ids_ptr": torch.empty(1, dtype=torch.int32),
        "logits_stride": cfg.num_experts,  # a known multiple of 16: the code must not depend on it
    }
    launch = Launch(routing_fwd_kernel, lambda tokens: (tokens, 1, 1), args, constants, warps)
    for target in TARGETS:
        code = compile_launch(launch, dtype, target=target)
        facts = {"shared": code.metadata.shared}
        if target.backend == "hip":
            for key in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
                facts[key] = int(re.search(key + r": *(\\d+)", code.asm["amdgcn"])[1])
        else:
            facts["local memory"] = len(re.findall(r"(ld|st).local", code.asm["ptx"]))
            facts["warp reductions"] = code.asm["ptx"].count("redux.sync")
        found[f"{name} {target.arch}"] = facts
print(json.dumps(found))
"""


def test_cross_compiled_code_needs_no_scratch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 15
    for name, facts in found.items():
        reductions = facts.pop("warp reductions", None)
        assert not any(facts.values()), f"{name}: {facts}"
        if name == "qwen3-bf16 90":
            assert reductions == 8, "one hardware reduction for each of the K picks"
