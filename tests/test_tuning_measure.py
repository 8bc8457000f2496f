"""Rotation over the weights, halving, the margin, and the check that comes before any time counts."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tuning_fakes import CFG, CHOICES, DEFAULT, FakeBackend, FakeProbes

from moert.arena import Arena
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES
from moert.steps.experts_reference import experts_reference
from moert.topk import TopK
from moert.tuning.check import (
    TOLERANCE,
    WORST_ROW,
    Check,
    new_call,
    reference_on_host,
    relative_error,
)
from moert.tuning.layer import copied
from moert.tuning.measure import (
    BARELY_COLD,
    COLD_CACHES,
    MAX_CALLS,
    MIN_CALLS,
    Rotation,
    cache_bytes,
    contenders,
    pick,
    plan_rotation,
    rotated_ids,
    steadiest,
    successive_halving,
)
from moert.tuning.progress import Progress
from moert.weights import ExpertWeights

MB = 1 << 20


@pytest.mark.parametrize(
    ("layer", "hit", "free", "copies", "cold", "why"),
    [
        (1200 * MB, 75 * MB, 1 << 40, 1, True, "a large layer rotates over its own experts"),
        (1200 * MB, 75 * MB, 0, 1, True, "and needs no memory for that"),
        (100 * MB, 100 * MB, 1 << 40, 3, True, "a small one is copied up to four caches"),
        (100 * MB, 100 * MB, 1000 * MB, 1, False, "unless that is over 10% of the free memory"),
        (200 * MB, 200 * MB, 0, 1, True, "three caches of its own still are cold"),
        (1 * MB, 1 * MB, 1 << 40, 1, False, "no number of copies helps a toy"),
        (20 * MB, 20 * MB, 1 << 40, 12, True, "many copies of a small layer"),
        (1200 * MB, MB, 1 << 40, 1, False, "too few bytes a call to get round in one graph"),
    ],
)
def test_rotation(layer: int, hit: int, free: int, copies: int, cold: bool, why: str) -> None:
    cache = 60 * MB
    rotation = plan_rotation(layer, hit, cache, free)
    assert (rotation.copies, rotation.cold) == (copies, cold), why
    assert max(MIN_CALLS, copies) <= rotation.calls <= MAX_CALLS
    # the extra memory is bounded by what it is for
    assert (copies - 1) * layer <= COLD_CACHES * cache
    if cold:
        assert min(rotation.calls * hit, copies * layer) >= BARELY_COLD * cache


def test_caches_behind_the_l2_count() -> None:
    assert cache_bytes(KNOWN_DEVICES["sm_90"]) == 60 << 20
    assert cache_bytes(KNOWN_DEVICES["gfx942"]) == 256 << 20


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens"), [(32, 4, 1), (33, 3, 2), (8, 8, 3), (16, 2, 64)]
)
def test_rotated_routings_are_routings(experts: int, top_k: int, tokens: int) -> None:
    routings = list(rotated_ids(experts, top_k, tokens, Rotation(9, 2, True)))
    assert [copy for copy, _ in routings] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    for _, ids in routings:
        assert ids.shape == (tokens, top_k) and ids.dtype is torch.int32
        assert int(ids.min()) >= 0 and int(ids.max()) < experts
        # distinct experts a token
        assert all(row.unique().numel() == top_k for row in ids)
    assert not torch.equal(routings[0][1], routings[-1][1]) or experts == top_k
    again = rotated_ids(experts, top_k, tokens, Rotation(9, 2, True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(routings, again, strict=True))


def test_rotated_routings_of_a_shard() -> None:
    """Fewer experts than K: all of them for every token, and nobody for the other slots."""
    for _, ids in rotated_ids(3, 5, 4, Rotation(6, 2, True)):
        assert ids.shape == (4, 5) and ids.dtype is torch.int32
        assert all(sorted(row) == [-1, -1, 0, 1, 2] for row in ids.tolist())


def test_rotation_takes_what_was_unused_longest() -> None:
    used: list[set[int]] = [
        set(ids.flatten().tolist()) for _, ids in rotated_ids(32, 4, 1, Rotation(16, 1, True))
    ]
    for start in range(0, 16, 8):
        # eight calls of four experts go once round all 32
        assert set().union(*used[start : start + 8]) == set(range(32))


def test_rotation_ignores_the_callers_defaults() -> None:
    expected = [ids for _, ids in rotated_ids(16, 2, 3, Rotation(4, 1, True))]
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)  # as engines do while they load a model
    try:
        found = [ids for _, ids in rotated_ids(16, 2, 3, Rotation(4, 1, True))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def planted(us: dict[int, float]) -> tuple[Callable[..., list[list[float]]], list[list[int]]]:
    stages: list[list[int]] = []

    def time(entrants: Sequence[int], groups: int) -> list[list[float]]:
        stages.append(list(entrants))
        # one outlier in each: medians, not means, decide
        return [[us[e]] * (groups - 1) + ([us[e]] if groups < 3 else [1e6]) for e in entrants]

    return time, stages


def test_halving_keeps_the_best_third_and_the_anchor() -> None:
    us = {n: 100.0 - n for n in range(30)}  # 29 is the fastest, the anchor 0 the slowest
    time, stages = planted(us)
    medians = successive_halving(list(us), 0, time, lambda: False)
    assert [len(stage) for stage in stages] == [30, 11, 5]
    assert all(0 in stage for stage in stages)
    assert medians == {n: us[n] for n in (0, 26, 27, 28, 29)}


def test_halving_ends_in_time() -> None:
    time, stages = planted({n: 100.0 - n for n in range(30)})
    medians = successive_halving(range(30), 0, time, lambda: True)
    assert len(stages) == 1 and len(medians) == 30


@pytest.mark.parametrize(
    ("us", "anchor", "picked"),
    [
        ({0: 100.0, 1: 97.9}, 0, 1),
        ({0: 100.0, 1: 98.1}, 0, 0),  # faster, but within the margin
        ({0: 100.0, 1: 98.1, 2: 90.0}, 0, 2),
        ({1: 100.0, 2: 99.9}, 0, 2),  # the anchor was not fit to be timed
        ({1: 100.0, 2: 99.9}, None, 2),
        ({0: 1.0, 1: 2.0}, 0, 0),
    ],
)
def test_margin(us: dict[int, float], anchor: int | None, picked: int) -> None:
    assert pick(us, anchor) == picked


def test_copies_have_the_same_strides() -> None:
    weights = ExpertWeights.random(CFG)
    padded = torch.zeros(8, 32, 48)[:, :, :32]  # [E, 2I, H] inside wider rows
    padded.copy_(weights.w13)
    views = replace(weights, w13=padded, w2=weights.w2.transpose(1, 2).contiguous().transpose(1, 2))
    copy = copied(views)
    for name in ("w13", "w2"):
        old, new = getattr(views, name), getattr(copy, name)
        assert new.stride() == old.stride() and torch.equal(new, old)
        assert new.data_ptr() != old.data_ptr()


@pytest.mark.parametrize(
    ("got", "want", "whole", "worst"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0, 0.0),
        ([[3.0, 5.0], [0.0, 5.0]], [[3.0, 4.0], [0.0, 5.0]], 1 / 50**0.5, 0.2),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0, 0.0),  # zero weights give zeros
        # scale-free: tiny values are no excuse
        ([[2e-6, 0.0]], [[1e-6, 0.0]], 1.0, 1.0),
    ],
)
def test_relative_error(
    got: list[list[float]], want: list[list[float]], whole: float, worst: float
) -> None:
    assert relative_error(torch.tensor(got), torch.tensor(want)) == pytest.approx((whole, worst))


def test_relative_error_of_nan_and_of_something_instead_of_zero() -> None:
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert not relative_error(torch.full((1, 2), float("nan")), one)[0] <= 1e9
    assert not relative_error(one, zero)[0] <= 1e9


Spoil = Callable[[torch.Tensor, object, dict[str, torch.Tensor]], torch.Tensor]


def one_element_wrong(y: torch.Tensor, *_: object) -> torch.Tensor:
    y[-1, -1] += 0.01 * y.norm()
    return y


def every_row_slightly_wrong(y: torch.Tensor, *_: object) -> torch.Tensor:
    # within what one row may be wrong by, but all rows are
    return y * (1.0 + 0.75 * WORST_ROW * TOLERANCE[torch.float32])


def one_row_slightly_wrong(y: torch.Tensor, *_: object) -> torch.Tensor:
    # lost among the others when all rows are taken together
    y[0] *= 1.0 + 1.25 * WORST_ROW * TOLERANCE[torch.float32]
    return y


def reads_scratch(y: torch.Tensor, _: object, views: dict[str, torch.Tensor]) -> torch.Tensor:
    # poison is NaN in every float format
    return y + views["h"][:4].view(torch.float32)


def skips_last_row(y: torch.Tensor, *_: object) -> torch.Tensor:
    return y[:-1]


def reads_padding(y: torch.Tensor, call: object, *_: object) -> torch.Tensor:
    return y + 0.0 * call.x.sum()  # type: ignore[attr-defined]


def writes_padding(y: torch.Tensor, call: object, *_: object) -> torch.Tensor:
    return torch.cat((y, torch.zeros(call.tokens - y.shape[0], y.shape[1])))  # type: ignore[attr-defined]


def raises(y: torch.Tensor, *_: object) -> torch.Tensor:
    raise RuntimeError("launch failed")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (None, None),
        (one_element_wrong, "relative error"),
        (every_row_slightly_wrong, "relative error"),
        (one_row_slightly_wrong, "relative error"),
        (reads_scratch, "relative error nan"),
        (skips_last_row, "relative error nan"),
        (reads_padding, "relative error nan"),
        (writes_padding, "rows from"),
    ],
)
@pytest.mark.parametrize("tokens", [4, 33], ids=["every row", "sampled rows"])
def test_check(spoil: Spoil | None, fault: str | None, tokens: int) -> None:
    backend = FakeBackend()
    check, call = Check(CFG, backend.weights, tokens), new_call(CFG, torch.device("cpu"))
    arena = Arena(torch.device("cpu"), 4096)
    good = backend.program(tokens, DEFAULT, arena.views(backend.fields(tokens, DEFAULT)))
    probes = FakeProbes()
    assert check.fault(lambda c: probes.run(good, c), call, arena) is None
    if spoil is not None:
        backend.spoil[CHOICES[1]] = spoil
    other = backend.program(tokens, CHOICES[1], arena.views(backend.fields(tokens, CHOICES[1])))
    found = check.fault(lambda c: probes.run(other, c), call, arena)
    assert (found or "None").startswith(str(fault))
    # and the inputs are as before
    assert check.fault(lambda c: probes.run(good, c), call, arena) is None


def test_check_of_a_row_outside_the_sample() -> None:
    """Row 1 of 64 is not compared with the reference, but with what a checked candidate gave."""
    backend = FakeBackend()
    check, call = Check(CFG, backend.weights, 64), new_call(CFG, torch.device("cpu"))
    assert 1 not in check.rows.tolist()
    arena = Arena(torch.device("cpu"), 4096)
    programs = [backend.program(64, c, arena.views(backend.fields(64, c))) for c in CHOICES[:2]]

    def swap(y: torch.Tensor, *_: object) -> torch.Tensor:
        y[1] = y[2]
        return y

    backend.spoil[CHOICES[1]] = swap
    found = [check.fault(lambda c, p=p: p.run(c, 0), call, arena) for p in programs]  # type: ignore[misc]
    assert found[0] is None
    assert "against a checked candidate" in str(found[1])


def test_check_of_ids_that_nobody_has() -> None:
    """A candidate that gives -1 to expert 0 and E to the last one is wrong."""
    backend = FakeBackend()
    check, call = Check(CFG, backend.weights, 33), new_call(CFG, torch.device("cpu"))
    arena = Arena(torch.device("cpu"), 4096)

    def clamped(y: torch.Tensor, call: Any, *_: object) -> torch.Tensor:
        weights, ids = (tensor[: y.shape[0]] for tensor in call.topk)
        topk = TopK(weights, ids.clamp(0, CFG.num_experts - 1))
        return experts_reference(call.x[: y.shape[0]], topk, backend.weights, CFG)

    backend.spoil[DEFAULT] = clamped
    program = backend.program(33, DEFAULT, arena.views(backend.fields(33, DEFAULT)))
    fault = check.fault(lambda c: program.run(c, 0), call, arena)
    assert str(fault).startswith("relative error")


def test_check_of_unfilled_weights() -> None:
    weights = ExpertWeights.random(CFG)
    weights.w13.fill_(float("nan"))
    assert not Check(CFG, weights, 4).possible


@pytest.mark.parametrize("bias", [False, True])
def test_reference_on_host(bias: bool) -> None:
    cfg = MoEConfig(12, 3, 16, 8, bias=bias, dtype="float32")
    weights = ExpertWeights.random(cfg)
    ids = torch.tensor([[1, 11, -1], [12, 5, 1]], dtype=torch.int32)
    topk = TopK(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.7, 0.2]]), ids)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    expected = experts_reference(x, topk, weights, cfg)
    assert relative_error(reference_on_host(x, topk, weights, cfg), expected)[1] < 1e-6
    nowhere = TopK(topk.weights, torch.full_like(ids, -1))
    assert not reference_on_host(x, nowhere, weights, cfg).any()


class Terminal(io.StringIO):
    """A stream that says what it is told to say."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def test_progress() -> None:
    stream, clock = Terminal(True), iter([0.0, 30.0])
    progress = Progress("E8", 4, stream, lambda: next(clock))
    progress.update(1, "16 tokens")
    assert stream.getvalue() == "\rmoert: tuning E8, 16 tokens: 25%, 1:30 left"
    progress.close()
    assert stream.getvalue().endswith("\r" + " " * 43 + "\r")
    assert "\n" not in stream.getvalue()


def test_progress_is_silent_in_a_log() -> None:
    stream = Terminal(False)
    progress = Progress("E8", 4, stream)
    progress.update(1, "16 tokens")
    progress.close()
    assert stream.getvalue() == ""


def test_contenders() -> None:
    times = {"a": 100.0, "b": 101.0, "c": 102.5, "default": 103.5, "default*": 104.0}
    assert contenders(times, "a", "default", ["c"]) == ["a", "b"]
    # the default, kept, is replaced by its own variants alone, of those that were timed
    assert contenders(times, "default", "default", ["default*", "untimed"]) == [
        "default",
        "default*",
    ]
    assert contenders({**times, "default*": 106.0}, "default", "default", ["default*"]) == [
        "default"
    ]
    # others have to beat the default by the margin, as the base does
    assert contenders({**times, "default": 102.5}, "a", "default") == ["a"]
    assert contenders(times, "a", None) == ["a", "b"]


def test_steadiest() -> None:
    times = {"a": 100.0, "b": 101.0, "c": 101.5}
    assert steadiest("a", times, {"a": 50.0, "b": 49.5, "c": 60.0}) == "a"
    assert steadiest("a", times, {"a": 50.0, "b": 30.0, "c": 20.0}) == "c"
    # level there: the faster by even routing
    assert steadiest("a", times, {"a": 50.0, "b": 20.3, "c": 20.0}) == "b"
    assert steadiest("a", times, {"b": 20.0}) == "a"
