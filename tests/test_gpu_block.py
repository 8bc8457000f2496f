"""Whole blocks and layers with shared experts on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_support import (
    BLOCK,
    DEVICE,
    ODD,
    REAL,
    assert_close,
    before,
    device_kernels,
    make_case,
    rows,
    runtime,
    variant,
)

from moert import MoERuntime
from moert.config import Routing
from moert.steps.block.reference import block_reference, block_routing_reference
from moert.steps.experts_reference import experts_reference

pytestmark = pytest.mark.gpu

NOAUX = Routing("sigmoid", correction_bias=True, num_groups=4, top_groups=2, scaling_factor=2.5)
LAYERS = {
    "none": ODD,
    "one": variant(ODD, shared_experts=1),
    "qwen2": variant(ODD, shared_experts=3, shared_gate=True, routing=Routing(renormalize=False)),
    "deepseek": variant(ODD, shared_experts=1, routing=NOAUX),
    "bias-fp16": variant(ODD, shared_experts=1, bias=True, dtype="float16"),
    "fp32": variant(ODD, shared_experts=1, shared_gate=True, dtype="float32"),
    "wide": variant(
        REAL, num_experts=512, intermediate_size=64, shared_experts=1, shared_gate=True
    ),
}


def expected(x: torch.Tensor, rt: MoERuntime) -> torch.Tensor:
    return block_reference(x, rt.weights, rt.cfg)


def router_kernels(tokens: int) -> list[str]:
    values = "router_logits_kernel" if tokens <= 2 else "router_logits_tiled_kernel"
    return [values, "routing_fwd_kernel"]


@pytest.mark.parametrize("name", LAYERS)
def test_blocks(name: str) -> None:
    """Every tier of the router, graphs, eager sizes, chunks; NaN behind what is live."""
    cfg = LAYERS[name]
    with runtime(cfg, max_tokens=600, buckets=(1, 2, 8, 64)) as rt:
        for tokens in (1, 2, 3, 8, 16, 17, 64, 65, 256, 257, 600, 1300):
            x, _ = before(rows(cfg, tokens), float("nan"))
            out, behind = before(torch.full_like(x, float("nan")), 7.0)
            rt._group.arena.poison()
            rt._group.block.arena.poison()
            rt.forward_block(x, out)
            assert_close(out, expected(x, rt), cfg.torch_dtype)
            assert (behind == 7.0).all()


@pytest.mark.parametrize("name", ["one", "qwen2", "wide"])
def test_slots_are_the_references(name: str) -> None:
    """Ids exactly but where two logits are as good as equal, weights closely."""
    cfg = LAYERS[name]
    with runtime(cfg, max_tokens=300) as rt:
        for tokens in (1, 2, 16, 64, 300):
            x = rows(cfg, tokens, seed=3)
            rt.forward_block(x)
            slots = rt._group.block.slots(tokens)
            wanted = block_routing_reference(x, rt.weights, cfg)
            same = (slots.ids == wanted.ids).all(1)
            assert same.float().mean() > 0.99
            error = (slots.weights - wanted.weights)[same].norm() / wanted.weights[same].norm()
            assert error < 1e-4


def test_unaligned_rows() -> None:
    with runtime(LAYERS["qwen2"]) as rt:
        for tokens in (1, 2, 20, 96):
            buffer = torch.zeros(tokens, ODD.hidden_size + 3, device=DEVICE).to(ODD.torch_dtype)
            x = buffer[:, 1 : 1 + ODD.hidden_size].copy_(rows(ODD, tokens))
            assert_close(rt.forward_block(x), expected(x, rt), ODD.torch_dtype)


def test_forward_is_of_the_routed_experts() -> None:
    cfg = LAYERS["qwen2"]
    with runtime(cfg) as rt:
        for tokens in (1, 5, 64, 96, 200):
            for ids in (torch.int32, torch.int64):
                case = make_case(cfg, tokens, id_dtype=ids)
                rt.forward(case.x, case.topk, case.out)
                assert_close(case.out, case.expected(rt), cfg.torch_dtype)


@pytest.mark.parametrize("way", ["forward", "forward_block"])
def test_the_live_count_is_on_the_device(way: str) -> None:
    cfg = LAYERS["qwen2"]
    with runtime(cfg) as rt:
        live = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        case = make_case(cfg, 20)
        for count in (20, 0, 7, 30, 1):
            live.fill_(count)
            n = min(count, 20)
            x = case.x.clone()
            x[n:] = float("nan")
            out = torch.full_like(x, 7.0)
            if way == "forward":
                rt.forward(x, case.topk, out, num_valid=live)
                want = experts_reference(x[:n], case.topk._replace(
                    weights=case.topk.weights[:n], ids=case.topk.ids[:n]
                ), rt.weights, cfg)  # fmt: skip
            else:
                rt.forward_block(x, out, num_valid=live)
                want = expected(x[:n], rt)
            assert (out[n:] == 7.0).all()
            if n:
                assert_close(out[:n], want, cfg.torch_dtype)


@pytest.fixture(scope="module")
def block() -> MoERuntime:
    return runtime(BLOCK, max_tokens=1024, buckets=(1, 2, 8, 64, 512))


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 64, 512, 600])
def test_a_trace_holds_the_router_and_the_plan(block: MoERuntime, tokens: int) -> None:
    """No copy, no fill, no conversion, whatever the addresses."""
    xs = [rows(BLOCK, tokens, seed) for seed in range(3)]
    outs = [torch.empty_like(x) for x in xs]
    plan = list(block.plan().for_tokens(tokens).kernels)
    block.forward_block(xs[0], outs[0])

    def run() -> None:
        for x, out in zip(xs, outs, strict=True):
            block.forward_block(x, out)

    assert device_kernels(run) == (router_kernels(tokens) + plan) * 3
    case = make_case(BLOCK, tokens)
    block.forward(case.x, case.topk, case.out)
    kernels = device_kernels(lambda: block.forward(case.x, case.topk, case.out))
    assert kernels == ["routed_slots_kernel", *plan]


def test_the_same_bits(block: MoERuntime) -> None:
    for tokens in (1, 16, 64, 300):
        x = rows(BLOCK, tokens)
        first = block.forward_block(x).clone()
        for _ in range(5):
            assert torch.equal(block.forward_block(x.clone()), first)


@pytest.mark.parametrize("tokens", [1, 2, 16, 200])
def test_inside_somebody_elses_capture(block: MoERuntime, tokens: int) -> None:
    """Replayed with other values, between calls of the runtime's own that use its own rows."""
    x, out = rows(BLOCK, tokens), torch.empty(tokens, BLOCK.hidden_size, device=DEVICE)
    out = out.to(BLOCK.torch_dtype)
    block.forward_block(x, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block.forward_block(x, out)
        block.forward_block(out, out.new_empty(out.shape))
    for seed in (1, 2):
        x.copy_(rows(BLOCK, tokens, seed))
        other = rows(BLOCK, tokens, seed + 10)
        mine = block.forward_block(other)
        graph.replay()
        assert_close(mine, expected(other, block), BLOCK.torch_dtype)
        assert_close(out, expected(x, block), BLOCK.torch_dtype)


def test_calls_on_many_streams(block: MoERuntime) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    xs = [rows(BLOCK, tokens) for tokens in (1, 40, 300)]
    wanted = [block.forward_block(x).clone() for x in xs]
    outs = [torch.empty_like(x) for x in xs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, x, out in zip(streams, xs, outs, strict=True):
            with torch.cuda.stream(stream):
                block.forward_block(x, out)
    torch.cuda.synchronize()
    for out, want in zip(outs, wanted, strict=True):
        assert torch.equal(out, want)


def test_new_router_weights_are_seen(block: MoERuntime) -> None:
    old = {n: block.weights.tensors()[n].clone() for n in ("router_weight", "shared_gate")}
    x = rows(BLOCK, 8)
    try:
        block.update_weights(**{name: -tensor for name, tensor in old.items()})
        assert_close(block.forward_block(x), expected(x, block), BLOCK.torch_dtype)
    finally:
        block.update_weights(**old)


def test_a_router_in_another_dtype() -> None:
    """Multiplied in float32: the error is the layer's own."""
    with runtime(LAYERS["qwen2"]) as first:
        weights = replace(first.weights, router_weight=first.weights.router_weight.float())
        with MoERuntime(first.cfg, weights, max_tokens=300, buckets=(1, 8), tune="off") as rt:
            for tokens in (1, 8, 100, 300):
                x = rows(rt.cfg, tokens)
                assert_close(rt.forward_block(x), expected(x, rt), ODD.torch_dtype)
