"""Prefill, skew, odd sizes, float16, shared experts: routings, floors, judgements, runs on tiny layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from code_size import ROOT

from moert import MoEConfig
from moert.config import Quant, Routing
from moert.steps.block.reference import block_routing_reference

sys.path.append(str(ROOT / "bench"))

import bench_cases
import block_chain
import cases
import layer_chain
from taken_up import Budget, save, taken_up

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="times a GPU where there is one")

TINY = MoEConfig(6, 2, 64, 32)
BLOCK = replace(
    TINY, shared_experts=2, shared_gate=True, routing=Routing("sigmoid", correction_bias=True)
)


def layers_of(cfg: MoEConfig, count: int, tokens: int) -> list[Any]:
    return layer_chain.make_layers(cfg, count, max_tokens=tokens, buckets=(tokens,))


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 1), (5, 7, 3), (16, 8, 8)])
def test_skewed_routings(tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    hot = layer_chain.one_hot_expert_ids(tokens, experts, top_k)
    same = layer_chain.same_ids(tokens, experts, top_k)
    for ids in (hot, same):
        assert ids.shape == (tokens, top_k) and ids.dtype == torch.int32
        assert all(row.unique().numel() == top_k for row in ids)
        assert int(ids.min()) >= 0 and int(ids.max()) < experts
    assert (hot == 0).sum() == tokens
    assert same.unique().numel() == top_k


def test_the_floor_of_a_skewed_routing_counts_the_experts_hit() -> None:
    matrices = 3 * 64 * 32 * 2
    for tokens in (1, 9):
        rows = 2 * tokens * 64 * 2 + tokens * 2 * 8
        ids = layer_chain.same_ids(tokens, 6, 2)
        assert layer_chain.hit_bytes(TINY, ids) == 2 * matrices + rows
        assert layer_chain.flops(TINY, ids) == 2 * tokens * 2 * 3 * 64 * 32
    ids = layer_chain.one_hot_expert_ids(400, 6, 2)
    assert layer_chain.hit_bytes(TINY, ids) == 6 * matrices + 2 * 400 * 64 * 2 + 400 * 2 * 8
    assert layer_chain.limit_us(4.58e6, 0) == pytest.approx(1.0)
    assert layer_chain.limit_us(4.58e6, 788e6 * 3) == pytest.approx(3.0)


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_the_floor_of_a_block(form: str) -> None:
    """Routed experts that are hit, all shared ones, the router with its bias and gate; no ids."""
    cfg = cases.in_format(BLOCK, form)
    layers = layers_of(cfg, 2, 3)
    chain = block_chain.make_block_chain(layers, 3, seed=1)
    expert = 3 * 64 * 32 * 2
    if form == "int4":
        assert cfg.quant == Quant("int4", group_size=32)
        expert = 3 * 64 * 32 // 2 + (64 * 2 + 64 * 1) * 2
    for layer, x, work in zip(layers, chain.rows[::2], chain.work(), strict=True):
        routed = block_routing_reference(x, layer.weights, cfg).ids[:, :2].unique().numel()
        router = 6 * 64 * 2 + 64 * 2 + 6 * 4
        assert work == (
            (routed + 2) * expert + 2 * 3 * 64 * 2 + router,
            2 * 3 * (2 + 2) * 3 * 64 * 32 + 2 * 3 * (6 + 1) * 64,
        )
    for layer in layers:
        layer.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_a_levelled_chain_keep_their_size(dtype: str) -> None:
    """Without it they grow with the square of their size: in float16 beyond all numbers."""
    layers = layers_of(replace(TINY, dtype=dtype), 8, 5)
    chain = layer_chain.make_chain(layers, 5, seed=0)
    chain.run()
    assert not 0.1 < chain.rows[-1].float().square().mean().sqrt() < 10.0
    chain.level()
    chain.run()
    for row in chain.rows[1:]:
        torch.testing.assert_close(
            row.float().square().mean(1).sqrt(), torch.ones(5), atol=0.02, rtol=0
        )
    assert layer_chain.check(chain) < 5e-3
    chain.topks[0].weights.zero_()
    with pytest.raises(AssertionError, match="layer 0: rows of size 0"):
        chain.level()
    for layer in layers:
        layer.close()


@pytest.mark.parametrize("make", [layer_chain.make_chain, block_chain.make_block_chain])
def test_a_wrong_result_is_not_timed(make: Callable[..., Any]) -> None:
    layers = layers_of(BLOCK if make is block_chain.make_block_chain else TINY, 1, 3)
    chain = make(layers, 3, seed=0)
    assert layer_chain.check(chain) < 5e-3
    wanted = chain.expected
    chain.expected = lambda rows: wanted(rows) * 1.02
    with pytest.raises(AssertionError, match="wrong result"):
        layer_chain.check(chain)
    layers[0].close()


def test_cases_are_the_ones_asked_for() -> None:
    names = {part: [case.name for case in cases.cases([part])] for part in cases.PARTS}
    assert names["prefill"] == [*cases.SHAPES] * 2  # in both formats
    assert names["skew"] == names["fp16"] == [*cases.SHAPES]
    assert names["odd"] == [*cases.ODD] and names["shared"] == [*cases.SHARED]
    one, two = cases.cases(["prefill", "skew"], ["gpt-oss-120b"], ["int4"], (64, 16))
    assert one.tokens == ((16,), (64,)) and two.tokens == ((16, 64),)
    assert [*one.variants] == ["uniform"]
    assert [*two.variants] == ["one hot expert", "same K experts"]
    assert one.variants["uniform"].cfg.quant == Quant("int4", group_size=32)
    (fp16,) = cases.cases(["fp16"], ["mixtral-8x7b"], ["int4"])
    assert [v.cfg.dtype for v in fp16.variants.values()] == ["float16", "bfloat16"]
    assert cases.cases(["odd"], ["mixtral-8x7b"]) == []
    for case in cases.cases(["shared"]):
        with_, without = (variant.cfg for variant in case.variants.values())
        assert with_.shared_experts and not without.shared_experts and not without.shared_gate
        assert with_.routing == without.routing and with_.num_experts == without.num_experts


def cell(us: float, times: float = 1.0, nbytes: float = 0.0, flops: float = 0.0) -> dict[str, Any]:
    return {"us": us, "times the floor": times, "bytes": nbytes, "flops": flops}


# 788e6 operations take a microsecond
JUDGED = [
    ("prefill", 1024, [cell(2.0, 9.0, flops=788e6)], {"met": None, "matmul share": 0.5}),
    ("prefill", 4096, [cell(4.0, 1.33, flops=788e6)], {"met": True, "matmul share": 0.25}),
    ("prefill", 4096, [cell(4.0, 1.34, flops=788e6)], {"met": False}),
    (
        "prefill",
        1024,
        [cell(2.0, 9.0, flops=788e6) | {"matmul flops": 394e12}],
        {"share beside": 1.0},
    ),
    ("prefill", 16384, [cell(4.0, 9.0, flops=788e6 * 3)], {"met": True, "matmul share": 0.75}),
    ("prefill", 16384, [cell(4.0, 1.0, flops=788e6 * 2.9)], {"met": False}),
    ("prefill", 16384, [cell(9.0, 1.0, 4.59e6, 788e6)], {"met": None}),  # reading is the limit
    ("skew", 16, [cell(1, 1.1), cell(1, 1.3)], {"met": True}),
    ("skew", 16, [cell(1, 1.31), cell(1, 1.0)], {"met": False}),
    ("odd", 1, [cell(9, 1.38), cell(1, 1.2)], {"met": True, "ratio": 1.15}),
    ("odd", 1, [cell(9, 1.4), cell(1, 1.2)], {"met": False, "ratio": 1.1667}),
    ("odd", 1, [cell(9, 1.4)], {"met": None}),  # nothing to compare it with
    ("fp16", 8, [cell(101, 9.0), cell(100, 1.0)], {"met": True, "ratio": 1.01}),
    ("fp16", 8, [cell(103, 1.0), cell(100, 9.0)], {"met": False, "ratio": 1.03}),
    ("shared", 8, [cell(9, 1.155), cell(1, 1.1)], {"met": True, "ratio": 1.05}),
    ("shared", 8, [cell(9, 1.16), cell(1, 1.1)], {"met": False, "ratio": 1.0545}),
]


@pytest.mark.parametrize(("part", "tokens", "given", "wanted"), JUDGED)
def test_judgements(
    part: str, tokens: int, given: list[dict[str, Any]], wanted: dict[str, Any]
) -> None:
    layers = {str(number): layer for number, layer in enumerate(given)}
    found = cases.judged(part, tokens, layers)
    assert found["layers"] == layers
    assert ("ratio" in found) == ("ratio" in wanted)
    assert {key: found[key] for key in wanted} == wanted


def test_a_report_is_taken_up(tmp_path: Path) -> None:
    path, fresh = tmp_path / "a.json", {"device": "A", "parts": {}}
    assert taken_up(path, fresh) is fresh
    save(path, {"device": "A", "parts": {"x": 1}})
    assert taken_up(path, fresh)["parts"] == {"x": 1}
    assert taken_up(path, {"device": "B", "parts": {}})["parts"] == {}
    assert taken_up(path, {**fresh, "goals": {"a": 1}})["parts"] == {}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("taken_up.time.perf_counter", lambda: now[0])
    endless, budget = Budget(None), Budget(10.0)
    with budget.on_one("long"):
        now[0] = 6.0
    assert budget.allows("another", "short") and not budget.allows("another", "long")
    now[0] = 11.0
    assert not budget.allows("another", "short") and endless.allows("another", "long")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every part on tiny layers, two in a chain, with a clock that counts chains: the first takes 4 us."""
    monkeypatch.setattr(cases, "SHAPES", {"a": TINY, "b": replace(TINY, top_k=1)})
    pair = (replace(TINY, intermediate_size=24), TINY)
    monkeypatch.setattr(cases, "ODD", {"pair": pair, "alone": pair[:1]})
    monkeypatch.setattr(cases, "SHARED", {"block": BLOCK})
    monkeypatch.setattr(bench_cases, "layer_count", lambda cfg: 2)
    for name, changes in {"prefill": {"tokens": (3, 9)}, "skew": {"tokens": (2, 5)}}.items():
        monkeypatch.setitem(cases.PARTS, name, replace(cases.PARTS[name], **changes))
    runs = {"count": 0}

    def device_us(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        for run in variants.values():
            run()
            runs["count"] += 1
        return {name: 8.0 + 2.0 * number for number, name in enumerate(variants)}

    monkeypatch.setattr(layer_chain, "device_us", device_us)
    return runs


def test_a_run_of_everything(
    tiny: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_cases.main(["--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "cases.json").read_text())
    parts = report["parts"]
    assert set(parts) == set(cases.PARTS)
    assert report["goals"] == cases.GOALS and report["limits"]["matmul_flops"] == 788e12
    assert {*parts["prefill"]["a"]} == {"bfloat16", "int4"}
    one = parts["prefill"]["b"]["int4"]["tokens"]["9"]["layers"]["uniform"]
    assert one["us"] == 4.0 and 0 < one["error"] < 5e-3
    assert one["times the floor"] == pytest.approx(4.0 / (one["bytes"] / 4.58e6), rel=1e-3)
    # the product takes turns as the second: 10 us
    assert one["matmul flops"] == pytest.approx(2 * layer_chain.MATMUL_SIZE**3 / 10e-6)
    share = one["flops"] / 4e-6 / one["matmul flops"]
    found = parts["prefill"]["b"]["int4"]["tokens"]["9"]
    assert found["share beside"] == pytest.approx(share, abs=1e-3)
    skewed = parts["skew"]["a"]["bfloat16"]["tokens"]["5"]["layers"]
    assert "matmul flops" not in skewed["same K experts"]
    expert = 3 * 64 * 32 * 2
    assert skewed["same K experts"]["bytes"] // expert == 2 < skewed["one hot expert"]["bytes"]
    assert parts["odd"]["pair"]["bfloat16"]["tokens"]["1"]["ratio"] > 0
    assert "ratio" not in parts["odd"]["alone"]["bfloat16"]["tokens"]["1"]
    assert parts["fp16"]["a"]["float16"]["tokens"]["8"]["ratio"] == 0.8
    blocks = parts["shared"]["block"]["bfloat16"]["tokens"]
    assert [*blocks] == ["1", "8", "64"]
    router = 6 * 64 * 2 + 6 * 4
    for name, experts, gate in (("with", 8, 64 * 2), ("without", 6, 0)):
        nbytes = experts * expert + 2 * 64 * 64 * 2 + router + gate
        assert blocks["64"]["layers"][name]["bytes"] == nbytes
    said = capsys.readouterr().out
    assert "shared block bfloat16 T=64: with 4.0 us" in said
    assert "skew: 0 of 4 meet the goal: not a bfloat16 T=2" in said
    # nothing is left to do, and nothing is done, but what is asked for again
    before = tiny["count"]
    assert bench_cases.main(["--out", str(tmp_path)]) == 0
    assert tiny["count"] == before
    again = ["--part", "fp16", "--shape", "b", "--tokens", "8", "2", "--again"]
    assert bench_cases.main([*again, "--out", str(tmp_path)]) == 0
    assert tiny["count"] == before + 4
    kept = json.loads((tmp_path / "cases.json").read_text())["parts"]
    assert [*kept["fp16"]["b"]["float16"]["tokens"]] == ["1", "2", "8", "64", "512"]
    assert kept["skew"] == parts["skew"]


def test_a_budget_that_is_spent(tiny: dict[str, int], tmp_path: Path) -> None:
    assert bench_cases.main(["--out", str(tmp_path), "--budget", "-1"]) == 0
    assert tiny["count"] == 0 and not (tmp_path / "cases.json").exists()


def test_what_fails_is_left_out(
    tiny: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cells that were done before it are kept, other shapes are measured, a later run tries again."""
    check, calls = layer_chain.check, [0]

    def failing(chain: Any) -> float:
        calls[0] += 1
        assert calls[0] != 3, "wrong result"
        return check(chain)

    monkeypatch.setattr(layer_chain, "check", failing)
    asked = ["--part", "skew", "--out", str(tmp_path)]
    assert bench_cases.main(asked) == 1
    assert (
        "FAILED skew a bfloat16 T=[2, 5]: AssertionError: wrong result" in capsys.readouterr().out
    )
    parts = json.loads((tmp_path / "cases.json").read_text())["parts"]
    assert [*parts["skew"]["a"]["bfloat16"]["tokens"]] == ["2"]
    assert [*parts["skew"]["b"]["bfloat16"]["tokens"]] == ["2", "5"]
    assert bench_cases.main(asked) == 0
    parts = json.loads((tmp_path / "cases.json").read_text())["parts"]
    assert [*parts["skew"]["a"]["bfloat16"]["tokens"]] == ["2", "5"]


def test_cells_of_another_layer_are_not_taken_up(tiny: dict[str, int], tmp_path: Path) -> None:
    asked = ["--part", "fp16", "--shape", "a", "--tokens", "1", "--out", str(tmp_path)]
    bench_cases.main(asked)
    cases.SHAPES["a"] = replace(TINY, top_k=3)
    bench_cases.main(asked)
    assert tiny["count"] == 4
    parts = json.loads((tmp_path / "cases.json").read_text())["parts"]
    assert "top_k=3" in parts["fp16"]["a"]["float16"]["configs"]["bfloat16"]
