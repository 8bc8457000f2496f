"""Plans and choices as data: JSON, margins, which plan a call takes, the printed table."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
import torch

from moert.arena import Field
from moert.plan import STRATEGIES, Choice, Plan, PlanReport, Tile

TILE = Tile(16, 64, 128, 8, 3)
STREAM = Tile(8, 64, 128, 8, 3, "stream", 4, 2)
GOOD = Choice("one_shot", TILE, Tile(1, 8, 256)).to_json()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "rest",
    [(None, None), (TILE, None), (Tile(1, 4, 512), TILE, True), (STREAM, TILE), (STREAM,) * 2],
)
def test_a_choice_survives_json(strategy: str, rest: tuple[Any, ...]) -> None:
    choice = Choice(strategy, *rest)
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    assert eval(repr(choice)) == choice


def test_rows_of_an_expert_survive_json() -> None:
    """Gathered without a sort, taken together after one; the text says which."""
    gathered = Tile(8, 64, 128, 8, 3, "gathered", 4, 2)
    together = Tile(8, 64, 128, 8, 3, "stream", 4, 2, 4)
    for choice in (Choice("none", gathered, STREAM), Choice("one_shot", together, together)):
        assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    assert str(gathered).endswith("k4r2 gathered") and str(together).endswith("k4r2t4 stream")


CROWD = Tile(64, 256, 64, 8, 5, "specialised")
CROWDED = Choice("multi_phase", TILE, TILE, True, (CROWD, CROWD))


def test_tiles_for_crowds_survive_json() -> None:
    """In the order of their launches; where there are none, nothing is said of them."""
    assert Choice.from_json(json.loads(json.dumps(CROWDED.to_json()))) == CROWDED
    assert eval(repr(CROWDED)) == CROWDED
    assert CROWDED.tiles == (CROWD, CROWD, TILE, TILE)
    assert (CROWDED.crowded_bm, CROWDED.reach) == (64, 16)
    assert f"crowded={CROWD}, {CROWD} dependent" in str(CROWDED)
    plain = Choice("one_shot", TILE, TILE)
    assert "crowded" not in plain.to_json() and "crowded" not in str(plain)
    assert (plain.crowded_bm, plain.tiles) == (0, (TILE, TILE))
    together = Tile(8, 64, 128, 4, 3, "stream", together=4)
    alone = Tile(8, 64, 64, kernel="stream")
    # whichever of the two reaches further
    assert Choice("one_shot", together, alone).reach == 32
    assert Choice("one_shot", alone, together).reach == 32


@pytest.mark.parametrize(
    "data",
    [
        CROWDED.to_json() | {"strategy": "none"},
        *(
            CROWDED.to_json() | {"crowded": bad}
            for bad in (
                *([], [CROWD], "64x64", 7),
                [asdict(CROWD)],
                [asdict(CROWD)] * 3,
                [asdict(CROWD), asdict(TILE)],
                [asdict(TILE)] * 2,
                [asdict(CROWD) | {"bm": -64}] * 2,
                [asdict(CROWD) | {"kernel": "tall"}] * 2,
            )
        ),
        GOOD | {"gate_up": None, "down": None, "crowded": [asdict(CROWD)] * 2},
        GOOD | {"strategy": "sorted"},
        GOOD | {"strategy": None},
        GOOD | {"strategy": ["none"]},
        {k: v for k, v in GOOD.items() if k != "strategy"},
        {k: v for k, v in GOOD.items() if k != "down"},
        GOOD | {"gate_up": "16x64x128"},
        GOOD | {"gate_up": [16, 64, 128]},
        GOOD | {"gate_up": {"bm": 16, "bn": 64}},  # no bk
        GOOD | {"gate_up": GOOD["gate_up"] | {"bl": 3}},
        *(
            GOOD | {"down": GOOD["down"] | {field: bad}}
            for field in ("bm", "num_warps", "num_stages", "split", "repeats", "together")
            for bad in (0, -4, 2.0, "4", None, True)
        ),
        *(GOOD | {"down": GOOD["down"] | {"kernel": bad}} for bad in ("streams", "", None, 1)),
        # kernels that follow a sort, and that follow none
        *(
            GOOD | {"strategy": "none", "gate_up": GOOD["gate_up"] | more}
            for more in ({"kernel": "specialised"}, {"kernel": "stream", "together": 2})
        ),
        GOOD | {"down": GOOD["down"] | {"kernel": "gathered"}},
        GOOD | {"down": GOOD["down"] | {"kernel": "stream", "together": 3}},
        GOOD | {"dependent": 1},
        [],
        None,
        "none",
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Choice.from_json(data)


def test_a_choice_without_launch_options_is_an_older_one() -> None:
    data = {k: v for k, v in GOOD.items() if k != "dependent"}
    assert Choice.from_json(data) == Choice.from_json(GOOD)


def test_tiles_without_a_kernel_are_portable_ones() -> None:
    old = {k: GOOD["gate_up"][k] for k in ("bm", "bn", "bk", "num_warps", "num_stages")}
    assert Choice.from_json(GOOD | {"gate_up": old}) == Choice.from_json(GOOD)
    assert Choice.from_json(GOOD | {"gate_up": old}).gate_up == TILE


def test_streams_are_told_apart_in_tables() -> None:
    assert [str(tile) for tile in (TILE, STREAM)] == ["16x64x128/w8s3", "8x64x128/w8s3k4r2 stream"]


def make_plan(tokens: int, **changes: Any) -> Plan:
    fields = (Field("h", (tokens, 100), torch.float32), Field("y", (3,), torch.int32))
    return Plan(tokens, tokens <= 4, Choice("none", TILE, TILE), ("up", "down"), fields, **changes)


@pytest.mark.parametrize(
    ("us", "default_us", "margin"),
    [
        (None, None, None),
        (None, 10.0, None),
        (10.0, None, None),
        (10.0, 0.0, None),
        (8.0, 10.0, 0.2),
        (10.0, 10.0, 0.0),
        (12.0, 10.0, -0.2),
    ],
)
def test_margin(us: float | None, default_us: float | None, margin: float | None) -> None:
    assert make_plan(4, us=us, default_us=default_us).margin == (
        None if margin is None else pytest.approx(margin)
    )


def test_scratch_bytes_counts_the_alignment() -> None:
    assert make_plan(2).scratch_bytes == 1024 + 256


def test_plans_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_plan(2).tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tokens", "plan"), [(0, 1), (1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 16), (999, 16)]
)
def test_the_plan_of_a_call(tokens: int, plan: int) -> None:
    plans = tuple(make_plan(t) for t in (1, 4, 16))
    report = PlanReport("triton", True, "own", (), plans)
    assert len(report) == 3
    assert tuple(report) == plans
    assert report.for_tokens(tokens).tokens == plan


def test_the_table_says_everything() -> None:
    plans = (make_plan(4, source="tuned", us=7.25, default_us=10.0), make_plan(16))
    text = str(PlanReport("aiter", False, "host", ("one thing", "another"), plans))
    lines = text.splitlines()
    assert lines[0] == "backend aiter, graphs host, sums in no fixed order"
    assert lines[1:3] == ["note: one thing", "note: another"]
    assert lines[4].split()[:6] == ["4", "graph", "tuned", "7.2", "28%", "2048"]
    assert lines[5].split()[:6] == ["16", "eager", "heuristic", "-", "-", "6656"]
    assert lines[5].endswith("none gate_up=16x64x128/w8s3 down=16x64x128/w8s3; up, down")
    assert "same bits every time" in str(PlanReport("torch", True, "off", (), plans))
