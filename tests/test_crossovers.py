"""Which sort the public function takes under policy 0."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moert.device import KNOWN_DEVICES, DeviceFacts
from moert.steps.sorting import crossovers
from moert.steps.sorting.crossovers import (
    MEASURED,
    RULE_ROWS,
    default_strategy,
    one_shot_rows,
    record,
    record_path,
    rows_from_times,
)

H200 = KNOWN_DEVICES["sm_90"]
UNMEASURED = dataclasses.replace(H200, name="NVIDIA Something")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty one, and nothing remembered of what was read before."""
    monkeypatch.setattr(
        crossovers.platformdirs, "user_cache_dir", lambda name, appauthor: str(tmp_path / name)
    )
    crossovers._recorded.cache_clear()
    yield
    crossovers._recorded.cache_clear()


def test_an_unmeasured_device_follows_the_rule() -> None:
    assert one_shot_rows(128, UNMEASURED) == RULE_ROWS
    assert default_strategy(256, 128, 8, UNMEASURED) == "one_shot"
    assert default_strategy(257, 128, 8, UNMEASURED) == "multi_phase"


def test_a_measured_device_follows_its_own_table() -> None:
    table = json.loads(MEASURED.read_text())[H200.name]
    for experts, rows in table.items():
        assert one_shot_rows(int(experts), H200) == rows
        assert default_strategy(rows, int(experts), 1, H200) == "one_shot"
        assert default_strategy(rows + 1, int(experts), 1, H200) == "multi_phase"


@pytest.mark.parametrize(("experts", "listed"), [(1, "8"), (9, "32"), (60, "64"), (1024, "512")])
def test_experts_between_measured_ones_take_the_next_larger(experts: int, listed: str) -> None:
    assert one_shot_rows(experts, H200) == json.loads(MEASURED.read_text())[H200.name][listed]


def test_the_table_is_what_the_results_say() -> None:
    for path in ROOT.glob("bench/results/*/sort.json"):
        report = json.loads(path.read_text())
        rows = rows_from_times(report["us"], report["top_k"])
        assert json.loads(MEASURED.read_text())[report["device"]] == rows


def test_rows_from_times() -> None:
    us = {
        "8": {
            "16": {"one_shot": 3.0, "multi_phase": 2.0},
            "4": {"one_shot": 1.0, "multi_phase": 2.0},
        },
        # a strategy that cannot run is not the faster one; what comes behind does not count
        "32": {"1": {"multi_phase": 2.0}, "2": {"one_shot": 1.0, "multi_phase": 2.0}},
        "64": {"9": {"one_shot": 1.0, "multi_phase": 2.0}},
    }
    assert rows_from_times(us, 3) == {"8": 12, "32": 0, "64": 27}


@pytest.mark.parametrize("facts", [H200, UNMEASURED])
def test_what_was_measured_here_comes_first(facts: DeviceFacts) -> None:
    path = record(facts, {"16": 100, "64": 50})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert [one_shot_rows(e, facts) for e in (1, 16, 17, 64, 65)] == [100, 100, 50, 50, 50]
    other = dataclasses.replace(facts, name="NVIDIA Other")
    assert one_shot_rows(16, other) == RULE_ROWS
    crossovers._recorded.cache_clear()
    record(facts, {"16": 7})
    assert one_shot_rows(64, facts) == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"device": "NVIDIA Something"}',
        '{"device": "NVIDIA Something", "one_shot_rows": {"16": "many"}}',
        '{"device": "NVIDIA Something", "one_shot_rows": {"few": 16}}',
        '{"device": "NVIDIA Something", "one_shot_rows": {"16": -1}}',
        '{"device": "NVIDIA Else", "one_shot_rows": {"16": 100}}',
    ],
)
def test_a_damaged_record_is_ignored_once(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = record_path(UNMEASURED)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "moert"):
        assert [one_shot_rows(16, UNMEASURED) for _ in range(3)] == [RULE_ROWS] * 3
    assert [str(path) in line.getMessage() for line in caplog.records] == [True]


def test_one_shot_where_it_cannot_run_is_never_taken() -> None:
    tiny = dataclasses.replace(UNMEASURED, shared_memory=4096)
    assert default_strategy(8, 128, 8, tiny) == "multi_phase"
