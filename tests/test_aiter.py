"""The AITER backend on a stand-in of its operators: right numbers, and what its plans say and hold."""

from __future__ import annotations

from dataclasses import replace

import aiter_stand_in
import pytest
import torch
from aiter_cases import (
    CFG,
    MI300,
    NAN,
    SEQUENCE,
    TOLERANCE,
    assert_right,
    make,
    poison,
    routing,
    rows,
)
from aiter_stand_in import StandIn
from expert_cases import relative_error

from moert import ExpertWeights, MoEConfig, MoERuntime, TopK
from moert.arena import Arena, layout
from moert.backends.aiter import AiterBackend, most_tokens, sort_rows_at_once
from moert.backends.aiter_sequences import block_m
from moert.errors import ConfigError
from moert.plan import Choice
from moert.share import Options
from moert.steps.experts_reference import experts_reference
from moert.steps.sorting.layout import padded_rows
from moert.tuning.check import Check, new_call


@pytest.mark.parametrize(
    "tokens", [1, 2, 4, 5, 6, 13]
)  # buckets, between, and two chunks and a row
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_right_numbers(aiter: StandIn, tokens: int, ids: torch.dtype, dtype: str) -> None:
    cfg = replace(CFG, dtype=dtype)
    rt = make(cfg)
    x, topk, out = rows(cfg, tokens), routing(cfg, tokens, ids), rows(cfg, tokens, NAN)
    poison(rt)
    assert rt.forward(x, topk, out) is out
    assert_right(out, x, topk, rt)
    chunks = -(-tokens // 6)
    assert [call.name for call in aiter.calls] == SEQUENCE * chunks
    assert aiter.allocated == 0


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("storage", ["interleaved", "transposed"])
def test_storage_and_activation(aiter: StandIn, activation: str, storage: str) -> None:
    cfg = replace(CFG, activation=activation)
    plain = ExpertWeights.random(cfg, seed=2)
    weights = replace(plain, interleaved=storage == "interleaved")
    if storage == "transposed":
        w13, w2 = (t.transpose(1, 2).contiguous() for t in (plain.w13, plain.w2))
        weights = ExpertWeights.from_tensors(w13, w2, transposed=True)
    rt = make(cfg, weights=weights)
    x, topk = rows(cfg, 4), routing(cfg, 4)
    poison(rt)
    assert_right(rt.forward(x, topk), x, topk, rt)


def test_weights_of_the_models_dtype(aiter: StandIn) -> None:
    rt, x, topk = make(), rows(CFG, 4), routing(CFG, 4)
    topk = TopK(topk.weights.half(), topk.ids)
    assert_right(rt.forward(x, topk), x, topk, rt)


def test_nobody_is_routed_here(aiter: StandIn) -> None:
    rt, x = make(), rows(CFG, 3)
    topk = TopK(torch.full((3, 2), NAN), torch.full((3, 2), -1, dtype=torch.int32))
    assert not rt.forward(x, topk, rows(CFG, 3, NAN)).any()


@pytest.mark.parametrize("pad", ["keep", "zero"])
@pytest.mark.parametrize("live", [-1, 0, 1, 3, 4, 9])
def test_rows_that_are_not_live(aiter: StandIn, pad: str, live: int) -> None:
    """They are full of NaN, have ids of any experts, and keep what they hold or become zero."""
    rt, x, topk, out = make(), rows(CFG, 4), routing(CFG, 4), rows(CFG, 4, 7.0)
    count = max(0, min(live, 4))
    x[count:], topk.weights[count:] = NAN, NAN
    poison(rt)
    rt.forward(x, topk, out, num_valid=torch.tensor(live, dtype=torch.int32), pad=pad)
    assert (out[count:] == (7.0 if pad == "keep" else 0.0)).all()
    if count:
        few = TopK(topk.weights[:count], topk.ids[:count])
        assert_right(out[:count], x[:count], few, rt)
    moe_buf = aiter.calls[0].args["moe_buf"]
    assert moe_buf.shape == ((0, 0) if pad == "keep" else (4, 128))


@pytest.mark.parametrize("where", ["x", "out", "one-row"])
def test_rows_with_gaps(aiter: StandIn, where: str) -> None:
    """AITER reads no strides; the direct kernels compute such calls, in the same arena."""
    rt, tokens = make(), 1 if where == "one-row" else 3
    wide = torch.zeros(tokens, 160, dtype=torch.float16)[:, :128]
    x, topk, out = rows(CFG, tokens), routing(CFG, tokens), rows(CFG, tokens, NAN)
    if where == "out":
        out = wide
    else:
        x = wide.copy_(x)
    poison(rt)
    assert_right(rt.forward(x, topk, out), x, topk, rt)
    assert len(aiter.calls) == (3 if where == "one-row" else 0)  # one row has no gap


def test_calls_that_are_not_aligned_get_a_program_of_ours(aiter: StandIn) -> None:
    rt = make()
    backend, plan = rt._built.backend, rt.plan().plans[-1]
    assert rt._group.arena is not None
    views = rt._group.arena.views(plan.fields)
    program = backend.program(plan.tokens, plan.choice, views, aligned=False)
    assert program.kernels if hasattr(program, "kernels") else True
    assert [launch.name for launch in program.launches] == [  # type: ignore[attr-defined]
        "gate_up_direct_kernel",
        "down_direct_kernel",
    ]


def test_what_the_plan_says(aiter: StandIn) -> None:
    report = make(graphs="own").plan()
    assert (report.backend, report.same_bits) == ("aiter", False)
    assert not any(plan.captured for plan in report)
    assert {plan.choice.strategy for plan in report} == {"one_shot"}
    assert all(p.kernels == ("checked_rows_kernel", *SEQUENCE) for p in report)
    text = str(report)
    for said in (
        "sums in no fixed order",
        "a second copy of the weights, 491544 bytes",
        "no graphs",
    ):
        assert said in text, said


def test_memory_counts_the_second_copy(aiter: StandIn) -> None:
    weights = ExpertWeights.random(CFG, seed=1)
    assert make(weights=weights).memory()["weights"] == weights.nbytes + 491544


def test_own_graphs_become_those_of_the_host(
    aiter: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the option is not "off" by itself."""
    monkeypatch.setattr(
        "moert.build.plan_options", lambda *_, **__: Options(4, (1, 4), "own", 0, "auto")
    )
    report = make().plan()
    assert report.graphs == "host"
    assert not any(plan.captured for plan in report)


def test_a_sort_that_allocates_is_refused(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    old = StandIn(opus=False).install(monkeypatch)
    with pytest.raises(
        ConfigError, match=r"sort_policy=2 .* moe_sorting_fwd allocates its scratch"
    ):
        make(sort_policy=2)
    rt, x, topk = make(), rows(CFG, 5), routing(CFG, 5)
    report = rt.plan()
    assert {plan.choice.strategy for plan in report} == {"one_shot"}
    assert any("multi_phase: refused, moe_sorting_fwd allocates" in note for note in report.notes)
    assert_right(rt.forward(x, topk), x, topk, rt)
    assert [call.name for call in old.calls] == ["moe_sorting_fwd", *SEQUENCE[1:]]
    assert old.calls[0].args["dispatch_policy"] == 1 and old.allocated == 0
    many = replace(CFG, num_experts=1000)
    assert "needs the multi-phase sort" in (AiterBackend.supports(many, MI300) or "")


def test_without_sorted_rows_it_cannot(aiter: StandIn) -> None:
    with pytest.raises(ConfigError, match="AITER's GEMMs need sorted rows"):
        make(sort_policy=3)


@pytest.mark.parametrize(
    ("experts", "tokens"),
    [(8, 904), (32, 240), (64, 120), (128, 56), (256, 24), (384, 16), (900, 0)],
)
def test_how_many_tokens_one_workgroup_sorts(experts: int, tokens: int) -> None:
    assert sort_rows_at_once(experts) == tokens


def backend_of(cfg: MoEConfig) -> AiterBackend:
    return AiterBackend(cfg, ExpertWeights.random(cfg, seed=1), MI300)


def test_candidates_are_the_policies_the_default_first(aiter: StandIn) -> None:
    backend = backend_of(replace(CFG, num_experts=128))
    strategies = ("none", "one_shot", "multi_phase")
    for tokens, order in ((1, [1, 2]), (56, [1, 2]), (57, [2, 1]), (4096, [2, 1])):
        choices = [Choice(("one_shot", "multi_phase")[policy - 1]) for policy in order]
        assert backend.candidates(tokens, strategies) == choices
        assert backend.default_choice(tokens) == choices[0]


def test_the_workspace_serves_every_smaller_call(aiter: StandIn) -> None:
    """The size asked for is smaller at 512 tokens than at 511."""
    backend, size = backend_of(CFG), aiter_stand_in.moe_sorting_opus_get_workspace_size
    for tokens in (1, 511, 512, 700, 2100):
        fields = {f.name: f for f in backend.fields(tokens, Choice("multi_phase"))}
        assert fields["workspace"].shape[0] == max(size(t, 6, 2, 2) for t in range(1, tokens + 1))
        fields = {f.name: f for f in backend.fields(tokens, Choice("one_shot"))}
        assert "workspace" not in fields


@pytest.mark.parametrize("tokens", [1, 3, 64, 4096])
def test_lists_are_long_enough(aiter: StandIn, tokens: int) -> None:
    backend = backend_of(CFG)
    fields = {f.name: f.shape for f in backend.fields(tokens, Choice("one_shot"))}
    block = block_m(CFG, MI300, tokens)
    assert fields["sorted_token_ids"][0] >= padded_rows(tokens, 2, 5, block)
    assert fields["sorted_expert_ids"][0] * block >= fields["sorted_token_ids"][0]


def test_blocks_by_aiters_rule() -> None:
    cfg = MoEConfig(128, 8, 2048, 768)
    assert [block_m(cfg, MI300, t) for t in (1, 64, 512, 4096)] == [32, 32, 64, 128]


def test_a_weight_update_reaches_the_second_copy(aiter: StandIn) -> None:
    rt, x, topk = make(), rows(CFG, 4), routing(CFG, 4)
    backend = rt._built.backend
    assert isinstance(backend, AiterBackend)
    before = (backend.packed.w1.data_ptr(), backend.packed.w2.data_ptr())
    new = ExpertWeights.random(CFG, seed=9)
    rt.update_weights(w13=new.w13, w2=new.w2)
    assert (backend.packed.w1.data_ptr(), backend.packed.w2.data_ptr()) == before
    y = rt.forward(x, topk)
    assert relative_error(y, experts_reference(x, topk, new, CFG)) <= TOLERANCE[y.dtype]


def test_layers_share_an_arena(aiter: StandIn) -> None:
    first = make()
    second = make_shared(first)
    x, topk = rows(CFG, 4), routing(CFG, 4)
    for rt in (first, second, first):
        assert_right(rt.forward(x, topk), x, topk, rt)


def make_shared(rt: MoERuntime) -> MoERuntime:
    return MoERuntime(CFG, ExpertWeights.random(CFG, seed=3), share=rt)


@pytest.mark.parametrize("strategy", ["one_shot", "multi_phase"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tuning_finds_both_policies_right_and_a_broken_one_wrong(
    aiter: StandIn, strategy: str, dtype: str
) -> None:
    """Its check has ids of nobody, and rows that are not live: full of NaN, and not to be written."""
    backend, choice = backend_of(replace(CFG, dtype=dtype)), Choice(strategy)
    fields = backend.fields(9, choice)
    arena = Arena(torch.device("cpu"), layout(fields)[1])
    program = backend.program(9, choice, arena.views(fields))
    check = Check(backend.cfg, backend.weights, 9)
    call = new_call(backend.cfg, torch.device("cpu"))
    assert check.fault(lambda call: program.run(call, 0), call, arena) is None
    policies = {c.args["dispatch_policy"] for c in aiter.calls if "dispatch_policy" in c.args}
    assert policies == {1 if strategy == "one_shot" else 2}
    aiter.change = lambda call: [] if call.name == "ck_moe_stage2_fwd" else [call]
    fault = check.fault(lambda call: program.run(call, 0), call, arena)
    assert fault is not None and "relative error" in fault


def test_operands_past_32_bits_of_offsets_are_not_shown_to_aiter(aiter: StandIn) -> None:
    assert most_tokens(replace(CFG, hidden_size=2**14)) == 2**16 - 1
    assert most_tokens(replace(CFG, intermediate_size=2**12, top_k=4)) == 2**16 - 1
    rt = make()
    x, topk = rows(CFG, 5), routing(CFG, 5)
    rt._executor._programs[-1]._most = 4
    assert_right(rt.forward(x, topk), x, topk, rt)
    assert aiter.calls == []
