"""The contract of a runtime on a GPU: allocation, copies, device-side counts, captures, bits, streams."""

from __future__ import annotations

import random

import pytest
import torch
from gpu_support import (
    BLOCK,
    DEVICE,
    ODD,
    REAL,
    UPDATES_ARE_LIMITED,
    assert_close,
    assert_nothing_is_allocated,
    device_kernels,
    guarded,
    make_case,
    rows,
    runtime,
    variant,
)

from moert import InputError, MoERuntime, StateError, TopK
from moert.config import Quant

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[None, Quant("int4", 32)], ids=str)
def odd(request: pytest.FixtureRequest) -> MoERuntime:
    return runtime(variant(ODD, quant=request.param))


@pytest.fixture(scope="module")
def real() -> MoERuntime:
    return runtime(REAL, max_tokens=600, buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int4"])
@pytest.mark.parametrize("graphs", ["own", "off"])
def test_every_token_count(dtype: str, graphs: str) -> None:
    """Every T from none to past max_tokens, with stale NaN in scratch, results and graphs' old arguments."""
    changes = {"quant": Quant("int4", 64, symmetric=False)} if dtype == "int4" else {"dtype": dtype}
    cfg = variant(ODD, **changes)
    with runtime(cfg, graphs=graphs) as rt:
        for tokens in [*range(67), 96, 97, 200]:
            case = make_case(cfg, tokens)
            rt._group.arena.poison()
            rt.forward(case.x, case.topk, case.out)
            if tokens:
                assert_close(case.out, case.expected(rt), cfg.torch_dtype)
        replayed = rt.stats()["replays"]
        least = 0 if graphs == "off" or UPDATES_ARE_LIMITED else 60
        assert least <= replayed and (graphs == "own" or not replayed)


def test_every_token_count_to_past_the_largest_bucket(real: MoERuntime) -> None:
    """T = 0..513 on a full-size layer; the reference is sampled, all rows are compared with eager bits."""
    for tokens in range(514):
        case = make_case(REAL, tokens)
        real.forward(case.x, case.topk, case.out)
        assert not case.out.isnan().any()
        if tokens and tokens % 64 in (0, 1, 63):
            rows = slice(0, tokens, max(1, tokens // 8))
            case.x, case.topk = case.x[rows], TopK(case.topk.weights[rows], case.topk.ids[rows])
            assert_close(case.out[rows], case.expected(real), REAL.torch_dtype)


def test_no_device_allocation_in_10000_calls(real: MoERuntime) -> None:
    """Fresh addresses and T from 0 to past the largest bucket: no allocation by any account."""
    rng = random.Random(0)
    pool = make_case(REAL, 2048)
    logits = torch.randn(2048, REAL.num_experts, device=DEVICE)
    counts = torch.tensor([3, 600], dtype=torch.int32, device=DEVICE)

    def call() -> None:
        tokens = rng.randrange(0, 521)
        a, b, c = (rng.randrange(0, 2048 - tokens) for _ in range(3))
        topk = TopK(pool.topk.weights[b : b + tokens], pool.topk.ids[b : b + tokens])
        if rng.random() < 0.3:
            topk = real.route(logits[c : c + tokens])
        out = None if rng.random() < 0.3 else pool.out[c : c + tokens]
        live = counts[rng.randrange(2)] if rng.random() < 0.3 else None
        real.forward(pool.x[a : a + tokens], topk, out, num_valid=live)

    assert_nothing_is_allocated(call, 200, 10_000)


def test_no_device_allocation_in_calls_of_whole_blocks() -> None:
    """Of a block and of its routed experts in turns."""
    rng = random.Random(0)
    pool, case = rows(BLOCK, 2048), make_case(BLOCK, 1024)
    out = torch.empty_like(pool)
    with runtime(BLOCK, max_tokens=1024, buckets=(1, 2, 8, 64, 512)) as block:

        def call() -> None:
            tokens = rng.randrange(0, 600)
            start = rng.randrange(0, 2048 - tokens)
            to = None if rng.random() < 0.3 else out[start : start + tokens]
            block.forward_block(pool[start : start + tokens], to)
            topk = TopK(case.topk.weights[:tokens], case.topk.ids[:tokens])
            block.forward(pool[start : start + tokens], topk)

        assert_nothing_is_allocated(call, 100, 2000)


@pytest.mark.parametrize("tokens", [1, 3, 8, 40, 200, 512])
def test_a_trace_holds_exactly_the_planned_kernels(real: MoERuntime, tokens: int) -> None:
    """Replayed on new and on old addresses, with the caller's x, routing and out: nothing but the plan."""
    cases = [make_case(REAL, tokens, seed=s) for s in range(3)]
    plan = real.plan().for_tokens(tokens)
    real.forward(cases[0].x, cases[0].topk, cases[0].out)
    replays = real.stats()["replays"]

    def run() -> None:
        for case in (*cases, cases[2]):
            real.forward(case.x, case.topk, case.out)

    assert device_kernels(run) == list(plan.kernels) * 4
    assert UPDATES_ARE_LIMITED or real.stats()["replays"] == replays + 4


def test_replay_equals_eager_bit_for_bit(real: MoERuntime) -> None:
    eager = runtime(REAL, share=real)
    eager._executor._graphs = [None] * len(eager._executor._graphs)
    for tokens in (1, 2, 3, 5, 8, 31, 100, 256, 511):
        case = make_case(REAL, tokens)
        other = torch.full_like(case.out, float("nan"))
        real.forward(case.x, case.topk, case.out)
        eager.forward(case.x, case.topk, other)
        again = torch.full_like(case.out, float("nan"))
        real.forward(case.x, case.topk, again)
        assert torch.equal(case.out, other)
        assert torch.equal(case.out, again)
    assert eager.stats()["replays"] == 0


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 13, 16, 33, 64])
@pytest.mark.parametrize("pad", ["keep", "zero"])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_live_count_on_the_device(
    odd: MoERuntime, tokens: int, pad: str, id_dtype: torch.dtype
) -> None:
    """Rows from num_valid on hold NaN and wild ids: not read; out's are kept or cleared; guards stay."""
    for live in sorted({0, 1, tokens // 2, tokens - 1, tokens, tokens + 7, -3}):
        case = make_case(ODD, tokens, id_dtype=id_dtype)
        kept = max(0, min(live, tokens))
        x, x_buffer = guarded(tokens, ODD.hidden_size, ODD.torch_dtype, float("nan"))
        out, out_buffer = guarded(tokens, ODD.hidden_size, ODD.torch_dtype, 7.0)
        x[:kept] = case.x[:kept]
        weights, ids = case.topk.weights.clone(), case.topk.ids.clone()
        weights[kept:], ids[kept:] = float("nan"), 5
        before = x_buffer.clone()
        count = torch.tensor(live, dtype=torch.int32, device=DEVICE)
        odd.forward(x, TopK(weights, ids), out, num_valid=count, pad=pad)
        if kept:
            case.x, case.topk = x[:kept], TopK(weights[:kept], ids[:kept])
            assert_close(out[:kept], case.expected(odd), ODD.torch_dtype)
        assert (out[kept:] == (0.0 if pad == "zero" else 7.0)).all()
        inner = (out_buffer.numel() - out.numel()) // 2
        assert (out_buffer[:inner] == 7.0).all()
        assert (out_buffer[-inner:] == 7.0).all()
        assert torch.equal(x_buffer.nan_to_num(3.0), before.nan_to_num(3.0))


def test_a_replay_sees_the_count_of_its_own_time(odd: MoERuntime) -> None:
    """The same addresses and another live count between replays, written on the device."""
    case = make_case(ODD, 16)
    count = torch.zeros((), dtype=torch.int32, device=DEVICE)
    for live in (16, 3, 0, 9):
        count.fill_(live)
        case.out.fill_(7.0)
        odd.forward(case.x, case.topk, case.out, num_valid=count)
        assert (case.out[live:] == 7.0).all()
        assert not (case.out[:live] == 7.0).all(1).any()


@pytest.mark.parametrize("tokens", [1, 4, 8, 64, 96])
@pytest.mark.parametrize("offset", [1, 3, 8, 24])
def test_unaligned_addresses(odd: MoERuntime, tokens: int, offset: int) -> None:
    """An odd element offset breaks 16-byte alignment; 8 and 24 elements of bf16 keep it."""
    case = make_case(ODD, tokens)
    x, _ = guarded(tokens, ODD.hidden_size, ODD.torch_dtype, float("nan"), offset)
    out, buffer = guarded(tokens, ODD.hidden_size, ODD.torch_dtype, 7.0, offset)
    x.copy_(case.x)
    replays = odd.stats()["replays"]
    odd.forward(x, case.topk, out)
    assert_close(out, case.expected(odd), ODD.torch_dtype)
    assert (buffer[: 4096 + offset] == 7.0).all()
    assert (buffer[4096 + offset + out.numel() :] == 7.0).all()
    replayed = odd.stats()["replays"] - replays
    assert UPDATES_ARE_LIMITED or replayed == (offset % 8 == 0 and tokens <= 64)


def test_rows_with_strides(odd: MoERuntime) -> None:
    """x and out as columns of wider buffers, routing as columns of a wider table."""
    for tokens in (1, 5, 64):
        case = make_case(ODD, tokens)
        wide = torch.full((tokens, 3 * ODD.hidden_size), 7.0, device=DEVICE).to(ODD.torch_dtype)
        x, out = wide[:, : ODD.hidden_size], wide[:, 2 * ODD.hidden_size :]
        x.copy_(case.x)
        table = torch.cat([case.topk.ids, case.topk.ids], 1)
        topk = TopK(case.topk.weights, table[:, ODD.top_k :])
        odd.forward(x, topk, out)
        assert_close(out, case.expected(odd), ODD.torch_dtype)
        assert (wide[:, ODD.hidden_size : 2 * ODD.hidden_size] == 7.0).all()


def test_inside_somebody_elses_capture(real: MoERuntime) -> None:
    """Captured with two layers, replayed after both runtimes used their arenas and results."""
    second = runtime(REAL, seed=1, share=real)
    case = make_case(REAL, 24)
    graph = torch.cuda.CUDAGraph()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.cuda.graph(graph):
        first = real.forward(case.x, case.topk)
        second.forward(first, case.topk, case.out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    expected_first = case.expected(real).to(REAL.torch_dtype)
    for seed in range(3):
        other = make_case(REAL, 512, seed=seed)
        real.forward(other.x, other.topk)
        second.forward(other.x, other.topk)
        real._group.arena.poison()
        case.out.fill_(float("nan"))
        graph.replay()
        assert_close(first, expected_first.float(), REAL.torch_dtype)
        middle = make_case(REAL, 24)
        middle.x, middle.topk = first, case.topk
        assert_close(case.out, middle.expected(second), REAL.torch_dtype)
        mine = real.forward(other.x, other.topk)
        keep = mine.clone()
        graph.replay()
        assert torch.equal(mine, keep)
    assert real.stats()["captured"] == 1


def test_a_capture_refuses_what_it_cannot_hold(real: MoERuntime, odd: MoERuntime) -> None:
    case = make_case(REAL, 513)
    off = runtime(ODD, graphs="off")
    small = make_case(ODD, 2)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(StateError, match="513 rows inside a capture"):
            real.forward(case.x, case.topk, case.out)
        with pytest.raises(StateError, match="graphs='off'"):
            off.forward(small.x, small.topk, small.out)
        with pytest.raises(StateError, match="while the current stream is capturing"):
            MoERuntime(ODD, odd.weights, tune="off")
        for name, use in (("close", odd.close), ("update_weights", odd.update_weights)):
            with pytest.raises(StateError, match=f"{name}: not possible while the current stream"):
                use()


def test_two_runtimes_two_streams_interleaved(real: MoERuntime) -> None:
    """Layers that share an arena, called from two streams without any ordering by the caller."""
    second = runtime(REAL, seed=1, share=real)
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()]
    cases = [make_case(REAL, tokens, seed=tokens) for tokens in (1, 30, 64, 200, 500, 530)]
    expected = []
    for case in cases:
        real.forward(case.x, case.topk, case.out)
        first = case.out.clone()
        second.forward(case.x, case.topk, case.out)
        expected.append((first, case.out.clone()))
    outs = [[torch.full_like(c.out, float("nan")) for _ in range(18)] for c in cases]
    torch.cuda.synchronize()
    for turn in range(18):
        for index, case in enumerate(cases):
            layer = (real, second)[(turn + index) % 2]
            with torch.cuda.stream(streams[(turn * 7 + index) % 3]):
                layer.forward(case.x, case.topk, outs[index][turn])
    torch.cuda.synchronize()
    for index in range(len(cases)):
        for turn in range(18):
            assert torch.equal(outs[index][turn], expected[index][(turn + index) % 2])


def test_null_stream_orders_replays_after_its_own_work(real: MoERuntime) -> None:
    """x written and out read by kernels on the null stream around each replay, behind a slow one."""
    case = make_case(REAL, 4)
    real.forward(case.x, case.topk, case.out)
    expected = case.out.clone()
    x = torch.zeros_like(case.x)
    seen = []
    for _ in range(20):
        x.fill_(float("nan"))
        torch.cuda._sleep(200_000)
        x.copy_(case.x)
        real.forward(x, case.topk, case.out)
        seen.append(case.out.clone())
        case.out.fill_(float("nan"))
    assert all(torch.equal(out, expected) for out in seen)


def test_external_stream_that_dies(odd: MoERuntime) -> None:
    """A stream made and destroyed by its owner between two calls."""
    from moert.graph_nodes import GraphDriver

    driver = GraphDriver(hip=torch.version.hip is not None)
    case = make_case(ODD, 8)
    for _ in range(3):
        raw = driver.create_blocking_stream()
        with torch.cuda.stream(torch.cuda.ExternalStream(raw)):
            odd.forward(case.x, case.topk, case.out)
        torch.cuda.synchronize()
        driver.destroy_stream(raw)
        odd.forward(case.x, case.topk, case.out)
    assert_close(case.out, case.expected(odd), ODD.torch_dtype)


def test_refused_calls_launch_nothing(odd: MoERuntime) -> None:
    case = make_case(ODD, 4)
    bad = [
        (case.x.float(), case.topk, case.out),
        (case.x[:, :-1], case.topk, case.out),
        (case.x.cpu(), case.topk, case.out),
        (case.x, TopK(case.topk.weights, case.topk.ids.cpu()), case.out),
        (case.x, TopK(case.topk.weights[:2], case.topk.ids), case.out),
        (case.x, case.topk, case.x),
        (case.x, case.topk, case.out.t().contiguous().t()),
        (case.x.clone().requires_grad_(), case.topk, case.out),
    ]

    def run() -> None:
        for x, topk, out in bad:
            with pytest.raises(InputError):
                odd.forward(x, topk, out)

    bad[-1][0].detach()
    stats = odd.stats()
    assert device_kernels(run) == []
    assert odd.stats() == stats


def test_update_weights_keeps_graphs_valid() -> None:
    with runtime(ODD) as rt:
        case = make_case(ODD, 8)
        rt.forward(case.x, case.topk, case.out)
        before = case.out.clone()
        pointer = rt.weights.w2.data_ptr()
        rt.update_weights(w2=-rt.weights.w2.clone())
        rt.forward(case.x, case.topk, case.out)
        assert torch.equal(case.out, -before)
        assert rt.weights.w2.data_ptr() == pointer


def test_memory_says_what_the_device_says() -> None:
    """memory()'s total against the drop of the device's free memory; kernels' own code is not in it."""
    runtime(REAL).close()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    with runtime(REAL) as rt:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        used = free - torch.cuda.mem_get_info()[0]
        assert abs(used - rt.memory()["total"]) <= 0.02 * used + (24 << 20)


def test_arena_is_what_the_plans_need(real: MoERuntime) -> None:
    """Nothing is added for graphs, layers or buckets: the largest plan's fields, and no more."""
    second = runtime(REAL, seed=1, share=real)
    needed = max(sum(f.nbytes for f in plan.fields) for plan in real.plan())
    assert real.memory()["arena"] <= 1.1 * needed
    assert second._group.arena is real._group.arena
