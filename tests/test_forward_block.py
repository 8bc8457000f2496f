"""`forward_block` and `forward` of layers with shared experts, on both backends of a CPU."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from runtime_cases import BACKENDS, BUCKETS, MAX_TOKENS, assert_close, make_case, poison

from moert import (
    ExpertWeights,
    InputError,
    MoEConfig,
    MoERuntime,
    StateError,
    UnsupportedError,
    WeightsError,
)
from moert.config import Routing
from moert.steps.block.reference import block_reference
from moert.steps.experts_reference import experts_reference

NAN = float("nan")
CFG = MoEConfig(5, 2, 40, 24, dtype="float32", shared_experts=1)
DEEPSEEK = Routing("sigmoid", correction_bias=True, num_groups=3, top_groups=2, scaling_factor=2.5)
LAYERS: dict[str, MoEConfig] = {
    "none": replace(CFG, shared_experts=0),
    "one": CFG,
    "qwen2": replace(CFG, shared_experts=3, shared_gate=True, routing=Routing(renormalize=False)),
    # E + n is no multiple of the groups
    "deepseek": MoEConfig(6, 3, 40, 24, dtype="float32", shared_experts=2, routing=DEEPSEEK),
    "router-bias": replace(CFG, bias=True, routing=Routing("softmax_topk")),
    "half": replace(CFG, dtype="float16", shared_gate=True),
    "top-1": replace(CFG, top_k=1, shared_experts=2),
}


def make_weights(cfg: MoEConfig, seed: int = 0) -> ExpertWeights:
    return ExpertWeights.random(cfg, seed)


def make_runtime(backend: str, cfg: MoEConfig = CFG, **options: Any) -> MoERuntime:
    if "share" not in options:
        options = {"backend": backend, "max_tokens": MAX_TOKENS, "buckets": BUCKETS, **options}
    return MoERuntime(cfg, options.pop("weights", None) or make_weights(cfg), **options)


def sizes(backend: str) -> tuple[int, ...]:
    """Calls of every plan and one in chunks; fewer where each takes a second."""
    return (
        (1, 2, 3, MAX_TOKENS, 2 * MAX_TOKENS + 1) if backend == "torch" else (1, 5, MAX_TOKENS + 1)
    )


def spoil(rt: MoERuntime) -> None:
    """NaN and -1 wherever a call may leave something."""
    poison(rt)
    rt._group.block.arena.poison()


def rows(cfg: MoEConfig, tokens: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 100 * tokens)
    return torch.randn(tokens, cfg.hidden_size, generator=g).to(cfg.torch_dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_block_is_router_experts_and_shared_experts(backend: str, name: str) -> None:
    cfg = LAYERS[name]
    with make_runtime(backend, cfg) as rt:
        for tokens in sizes(backend):
            x = rows(cfg, tokens)
            spoil(rt)
            out = torch.full_like(x, NAN)
            assert rt.forward_block(x, out) is out
            assert_close(out, block_reference(x, rt.weights, cfg))
        last = sizes(backend)[-1]
        assert rt.stats()["calls"] == len(sizes(backend))
        assert rt.stats()["chunks"] == -(-last // MAX_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_router_tensors_of_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    """A checkpoint may keep the router in float32, and its gate in the model's dtype, or transposed."""
    cfg = LAYERS["half"]
    weights = make_weights(cfg)
    router = torch.randn(40, 5, dtype=dtype).T
    gate = torch.randn(1, 40, dtype=torch.float32)
    weights = replace(weights, router_weight=router, shared_gate=gate, router_bias=router[:, 3])
    with make_runtime(backend, cfg, weights=weights) as rt:
        for tokens in (2, 7):
            x = rows(cfg, tokens)
            assert_close(rt.forward_block(x), block_reference(x, weights, cfg))


@pytest.mark.parametrize(
    ("name", "ids"), [("one", torch.int32), ("deepseek", torch.int64), ("half", torch.int64)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_computes_the_routed_experts_alone(
    backend: str, ids: torch.dtype, name: str
) -> None:
    """Also where an id names an expert that is not there: a shared one must not be taken for it."""
    cfg = LAYERS[name]
    with make_runtime(backend, cfg) as rt:
        for tokens in sizes(backend)[::2]:
            case = make_case(cfg, tokens, ids=ids, weights=cfg.torch_dtype, wide=3)
            case.topk.ids[0, 0] = cfg.num_experts
            spoil(rt)
            case.call(rt)
            assert_close(case.out, experts_reference(case.x, case.topk, rt.weights, cfg))
            routed = rt.route(torch.randn(min(tokens, MAX_TOKENS), cfg.num_experts))
            assert routed.ids.shape[1] == cfg.top_k and int(routed.ids.max()) < cfg.num_experts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["forward_block", "forward"])
def test_rows_that_are_not_live(backend: str, way: str) -> None:
    """They are neither read nor written, or zero."""
    with make_runtime(backend) as rt:
        counts = ((1, 0), (6, 4), (6, 9), (6, -1), (2 * MAX_TOKENS, MAX_TOKENS + 2))
        for tokens, live in counts if backend == "torch" else ((4, 3), (MAX_TOKENS + 1, 2)):
            case, count = make_case(CFG, tokens), max(0, min(live, tokens))
            case.x[count:] = NAN
            case.topk.weights[count:] = NAN
            num_valid = torch.tensor(live, dtype=torch.int32)
            if way == "forward":
                expected = experts_reference(case.x[:count], case.rows(count).topk, rt.weights, CFG)
            else:
                expected = block_reference(case.x[:count], rt.weights, CFG)
            for pad, rest in (("keep", 7.0), ("zero", 0.0)):
                spoil(rt)
                case.out.fill_(7.0)
                if way == "forward":
                    case.call(rt, num_valid=num_valid, pad=pad)
                else:
                    rt.forward_block(case.x, case.out, num_valid=num_valid, pad=pad)
                assert (case.out[count:] == rest).all()
                assert_close(case.out[:count], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_without_out_and_no_tokens(backend: str) -> None:
    with make_runtime(backend) as rt:
        x = rows(CFG, 3)
        first, second = rt.forward_block(x), rt.forward_block(-x)
        assert first.data_ptr() != second.data_ptr()
        assert first.data_ptr() == rt.forward_block(x).data_ptr()
        assert torch.equal(first, rt.forward_block(x.clone(), torch.empty_like(x)))
        assert rt.forward_block(x[:0]).shape == (0, CFG.hidden_size)


def test_nothing_is_allocated() -> None:
    """On the CPU: neither tensors nor Python objects that stay."""
    cfg = LAYERS["qwen2"]
    with make_runtime("torch", cfg) as rt:
        calls = []
        for tokens in (1, 2, MAX_TOKENS):
            case = make_case(cfg, tokens)
            calls += [lambda c=case: c.call(rt), lambda c=case: rt.forward_block(c.x, c.out)]
        for call in calls:
            call()
        with torch.profiler.profile(profile_memory=True) as trace:
            for call in calls:
                call()
        taken = [e for e in trace.events() if e.name == "[memory]" and e.self_cpu_memory_usage > 0]
        assert taken == []
        tracemalloc.start()
        try:
            for call in calls:
                call()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(20):
                for call in calls:
                    call()
            assert tracemalloc.get_traced_memory()[0] - before < 4096
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_weights_are_seen(backend: str) -> None:
    cfg = LAYERS["qwen2"]
    with make_runtime(backend, cfg) as rt:
        x = rows(cfg, 3)
        before = rt.forward_block(x).clone()
        other = make_weights(cfg, seed=7)
        rt.update_weights(
            **{n: t for n, t in other.tensors().items() if n in ("router_weight", "shared_gate")}
        )
        after = rt.forward_block(x)
        assert_close(after, block_reference(x, rt.weights, cfg))
        assert not torch.allclose(after, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_share(backend: str) -> None:
    with make_runtime(backend) as first:
        other = make_weights(CFG, seed=3)
        second = MoERuntime(CFG, other, share=first)
        x = rows(CFG, 3)
        one, two = first.forward_block(x), second.forward_block(x)
        assert_close(one, block_reference(x, first.weights, CFG))
        assert_close(two, block_reference(x, other, CFG))
        assert second.memory()["block"] == first.memory()["block"] > 0
        assert "1 shared expert(s) are among E=6, K=3" in str(first.plan())


def test_memory_holds_what_is_there() -> None:
    """Slots, logits and scratch of one set; without a router nothing is kept for blocks."""
    with make_runtime("torch", LAYERS["none"]) as rt:
        group = rt._group
        assert rt.memory()["block"] == group.block.arena.nbytes
    bare = replace(make_weights(LAYERS["none"]), router_weight=None)
    with make_runtime("torch", LAYERS["none"], weights=bare) as rt:
        assert rt.memory()["block"] == 0


BAD_CALLS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("rank", {"x": torch.zeros(40)}, ["x", "[40]"]),
    ("not-a-tensor", {"x": [1.0]}, ["x", "list"]),
    ("hidden", {"x": torch.zeros(3, 41)}, ["x", "[3, 41]"]),
    ("dtype", {"x": torch.zeros(3, 40).half()}, ["x", "float16"]),
    ("out", {"out": torch.zeros(2, 40)}, ["out", "[2, 40]"]),
    ("out-none", {"out": "out"}, ["out", "str"]),
    ("gradients", {"x": torch.zeros(3, 40, requires_grad=True)}, ["requires_grad"]),
    ("pad", {"pad": "zeros"}, ["pad", "'zeros'"]),
    ("count", {"num_valid": torch.tensor(1)}, ["num_valid", "int64"]),
]


@pytest.mark.parametrize("given", [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_bad_calls(given: tuple[dict[str, Any], list[str]]) -> None:
    """Refused in one piece and in chunks, with nothing written."""
    arguments, words = given
    with make_runtime("torch") as rt:
        for tokens in (3, MAX_TOKENS + 1):
            if "x" in arguments and tokens != 3:
                continue  # x of three rows is no chunked call
            call = {"x": rows(CFG, tokens), "out": torch.full((tokens, 40), 7.0), **arguments}
            with pytest.raises(InputError) as error:
                rt.forward_block(call.pop("x"), **call)
            assert all(word in str(error.value) for word in words), error.value
            if "out" not in arguments:
                assert (call["out"] == 7.0).all()


def test_out_over_x_is_refused() -> None:
    with make_runtime("torch") as rt:
        x = rows(CFG, 3)
        with pytest.raises(InputError, match="out: overlaps x"):
            rt.forward_block(x, x)


def test_forward_refuses_another_number_of_slots() -> None:
    with make_runtime("torch") as rt:
        case = make_case(CFG.as_launched, 3)
        with pytest.raises(InputError, match="topk"):
            case.call(rt)


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"router_weight": None}, WeightsError, "router_weight"),
        ({"shared_gate": None}, WeightsError, "shared_gate"),
        ({"correction_bias": None}, WeightsError, "correction_bias"),
    ],
)
def test_what_a_block_needs(changes: dict[str, Any], kind: type[Exception], word: str) -> None:
    """`forward` works without."""
    cfg = replace(CFG, shared_gate=True, routing=Routing("sigmoid", correction_bias=True))
    with make_runtime("torch", cfg, weights=replace(make_weights(cfg), **changes)) as rt:
        with pytest.raises(kind, match=word):
            rt.forward_block(rows(cfg, 2))
        case = make_case(cfg, 2)
        case.call(rt)
        assert_close(case.out, experts_reference(case.x, case.topk, rt.weights, cfg))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_of_fewer_than_k_experts(backend: str) -> None:
    cfg = replace(CFG, top_k=7)
    with make_runtime(backend, cfg) as rt:
        with pytest.raises(UnsupportedError, match="forward_block: top_k=7"):
            rt.forward_block(rows(cfg, 2))
        case = make_case(cfg, 3)
        assert_close(case.call(rt), experts_reference(case.x, case.topk, rt.weights, cfg))


def test_a_shared_runtime_without_a_router() -> None:
    cfg = LAYERS["none"]
    bare = replace(make_weights(cfg), router_weight=None)
    with make_runtime("torch", cfg, weights=bare) as first:
        second = MoERuntime(cfg, make_weights(cfg), share=first)
        with pytest.raises(WeightsError, match="shared was made without"):
            second.forward_block(rows(cfg, 2))


def test_a_closed_runtime() -> None:
    rt = make_runtime("torch")
    rt.close()
    with pytest.raises(StateError, match="forward_block"):
        rt.forward_block(rows(CFG, 1))
