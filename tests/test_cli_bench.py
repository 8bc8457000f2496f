"""`moert bench`: figures of a layer, compared with a file of earlier ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moert.cli.layer_times import LayerTimes
from moert.cli.main import main

SHAPE = ["bench", "8,2,64,48", "--dtype", "float32"]
Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, *words: str, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`plant({T: [microseconds of each time it is measured]})` gives the T's in the order of measuring."""

    def planted(us: dict[int, list[float]]) -> list[int]:
        asked: list[int] = []

        def measure(self: LayerTimes, tokens: int) -> dict[str, Any]:
            asked.append(tokens)
            turn = min(asked.count(tokens), len(us[tokens])) - 1
            facts = {"plan": "p", "source": "s", "bytes": 1, "GB_per_s": 1.0}
            return {"us": us[tokens][turn], **facts}

        monkeypatch.setattr(LayerTimes, "measure", measure)
        return asked

    return planted


def test_what_a_layer_takes_here(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    found = answer(capsys, *SHAPE, "--tokens", "5", "1", "--out", str(path))
    assert list(found["tokens"]) == ["1", "5"]
    one = found["tokens"]["1"]
    assert 0 < one["min_us"] <= one["us"] < 1e6
    # two experts of three matrices in float32, x and out
    assert one["bytes"] == 2 * 3 * 64 * 48 * 4 + 2 * 64 * 4
    assert one["GB_per_s"] == pytest.approx(one["bytes"] / one["us"] / 1e3)
    assert found["layers"] == 2
    assert {"device", "backend", "how", "made_with"} <= set(found)
    written = json.loads(path.read_text())
    assert {**written, "compared": []} == found
    assert main([*SHAPE, "--tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert "us a layer" in text and "MoEConfig(num_experts=8" in text


@pytest.mark.parametrize(
    ("now", "words", "code", "asked"),
    [
        ({1: [105.0], 8: [200.0]}, [], 0, [1, 8]),
        ({1: [130.0], 8: [200.0]}, [], 1, [1, 8, 1]),
        ({1: [130.0, 101.0], 8: [200.0]}, [], 0, [1, 8, 1]),
        ({1: [105.0], 8: [200.0]}, ["--percent", "3"], 1, [1, 8, 1]),
    ],
    ids=["noise", "slower", "disturbed once", "stricter"],
)
def test_compare(
    now: dict[int, list[float]],
    words: list[str],
    code: int,
    asked: list[int],
    plant: Callable[..., list[int]],
    capsys: Capture,
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "before.json")
    plant({1: [100.0], 8: [200.0]})
    answer(capsys, *SHAPE, "--tokens", "1", "8", "--out", path)
    measured = plant(now)
    run = [*SHAPE, "--tokens", "1", "8", "--compare", path, *words]
    found = answer(capsys, *run, code=code)
    assert measured == asked
    assert [c["tokens"] for c in found["compared"]] == [1, 8]
    assert found["compared"][0]["regressed"] == bool(code)
    assert not found["compared"][1]["regressed"]
    measured.clear()
    assert main(run) == code
    assert ("SLOWER  T=1" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "FileNotFoundError"),
        ("not json", "not written by"),
        ('{"format": 2, "config": {}, "tokens": {}}', "format 2, need 1"),
        (
            '{"format": 1, "tokens": {"1": {"us": 1}}, "config": {"num_experts": 4, "top_k": 2, '
            '"hidden_size": 64, "intermediate_size": 48, "dtype": "float32"}}',
            "of another layer, MoEConfig(num_experts=4",
        ),
    ],
    ids=["absent", "no json", "newer", "another layer"],
)
def test_a_file_that_cannot_be_compared_with(
    content: str | None, said: str, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "before.json"
    if content is not None:
        path.write_text(content)
    assert main([*SHAPE, "--tokens", "1", "--compare", str(path)]) == 1
    assert said in capsys.readouterr().err


def test_a_checkpoint_by_its_config(capsys: Capture, tiny_checkpoint: Callable[..., Path]) -> None:
    found = answer(capsys, "bench", str(tiny_checkpoint("mixtral")), "--tokens", "1")
    assert found["config"]["num_experts"] == 8
    assert "path" not in found["config"]
