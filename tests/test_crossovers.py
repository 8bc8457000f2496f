"""Which sort the public function takes under policy 0."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from moert.device import KNOWN_DEVICES
from moert.steps.sorting.crossovers import MEASURED, RULE_ROWS, default_strategy, one_shot_rows

H200 = KNOWN_DEVICES["sm_90"]
UNMEASURED = dataclasses.replace(H200, name="NVIDIA Something")
ROOT = Path(__file__).parent.parent


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
    sys.path.insert(0, str(ROOT / "scripts"))
    from ship_crossovers import one_shot_rows as from_report

    for path in ROOT.glob("bench/results/*/sort.json"):
        report = json.loads(path.read_text())
        assert json.loads(MEASURED.read_text())[report["device"]] == from_report(report)


def test_one_shot_where_it_cannot_run_is_never_taken() -> None:
    tiny = dataclasses.replace(UNMEASURED, shared_memory=4096)
    assert default_strategy(8, 128, 8, tiny) == "multi_phase"
