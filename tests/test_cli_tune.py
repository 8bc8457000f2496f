"""`moert tune`: the real tuner and real record files, on a device whose times are planted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fakes import DEFAULT, FACTS, FAST, FakeBackend, FakeProbes

from moert.cli import tune
from moert.cli.main import main
from moert.tuning.tuner import plan_buckets

SHAPE = ["tune", "8,2,32,16", "--dtype", "float32", "--buckets", "1", "8", "--max-tokens", "12"]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> FakeProbes:
    """A GPU where FAST takes 10 microseconds and everything else 100."""
    made = FakeProbes({FAST: 10.0})
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "device_facts", lambda device: FACTS)
    monkeypatch.setattr(tune, "select_backend", lambda *_: (FakeBackend, ("a note",)))
    monkeypatch.setattr(tune, "plan_buckets", functools.partial(plan_buckets, probes=made))
    return made


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_measures_once_and_keeps_records(
    probes: FakeProbes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*SHAPE, "--out", str(tmp_path)]
    found = answer(capsys, *words)
    assert [(p["tokens"], p["source"]) for p in found["plans"]] == [
        (1, "tuned"),
        (8, "tuned"),
        (12, "tuned"),
    ]
    assert found["measured"] == 3
    assert found["plans"][0]["choice"] == FAST.to_json()
    assert (found["plans"][0]["us"], found["plans"][0]["default_us"]) == (10.0, 100.0)
    assert "a note" in found["notes"]
    path = Path(found["records"])
    assert path.is_relative_to(tmp_path)
    assert set(json.loads(path.read_text())["entries"]) == {"1", "8", "12"}
    timed = len(probes.timed)
    again = answer(capsys, *words)
    assert again["measured"] == 0
    assert {p["source"] for p in again["plans"]} == {"cache"}
    assert len(probes.timed) == timed
    assert main([*words, "--force"]) == 0
    assert len(probes.timed) > timed
    text = capsys.readouterr().out
    assert "3 of 3 plans measured" in text
    assert str(path) in text


def test_a_policy_is_kept_to(
    probes: FakeProbes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = answer(capsys, *SHAPE, "--out", str(tmp_path), "--sort-policy", "2")
    assert {p["choice"]["strategy"] for p in found["plans"]} == {"multi_phase"}
    assert DEFAULT.strategy == "one_shot"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_else_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SHAPE) == 1
    assert "moert plan --device ARCH" in capsys.readouterr().err


def test_records_are_of_what_is_launched(
    probes: FakeProbes,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """With shared experts that is E + n experts and K + n slots, as a runtime looks it up."""
    path = str(tiny_checkpoint("deepseek_v3"))
    words = ["--buckets", "1", "--max-tokens", "2", "--out", str(tmp_path)]
    found = answer(capsys, "tune", path, *words)
    assert Path(found["records"]).name.startswith("E17-K5-H64-I96-")
