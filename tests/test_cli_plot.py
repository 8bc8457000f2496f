"""`moert plot`: pictures of the committed results, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from code_size import ROOT

from moert.cli.main import main
from moert.cli.results import (
    Limits,
    config_fields,
    crossover,
    kind_of,
    limits_of,
    points_of,
    read_results,
)
from moert.config import MoEConfig
from moert.errors import ConfigError

RESULTS = ROOT / "bench" / "results" / "nvidia-h200"
Capture = pytest.CaptureFixture[str]


def test_every_picture_of_a_directory(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", str(RESULTS), "--out", str(tmp_path / "new"), "--json"]) == 0
    written = [Path(path) for path in json.loads(capsys.readouterr().out)["written"]]
    names = {path.name for path in written}
    assert {"sort.svg", "sort.png", "floor-bfloat16.svg", "roofline-bfloat16.png"} <= names
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    for path in written:
        start = path.read_bytes()[:200]
        assert b"<?xml" in start if path.suffix == ".svg" else start[1:4] == b"PNG"
    text = (tmp_path / "new" / "floor-bfloat16.svg").read_text()
    assert len(text) > 10_000


def test_the_same_figures_give_the_same_bytes(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        file = str(RESULTS / "sort.json")
        assert main(["plot", file, "--out", str(tmp_path / name), "--format", "svg"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["sort.svg"]
    assert (tmp_path / "one/sort.svg").read_bytes() == (tmp_path / "two/sort.svg").read_bytes()
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "one" / "sort.svg")


def test_results_without_limits_have_no_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = json.loads((RESULTS / "layer-bfloat16.json").read_text())
    del report["limits"]
    (tmp_path / "layer-x.json").write_text(json.dumps(report))
    assert main(["plot", str(tmp_path), "--format", "png"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["floor-bfloat16.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "FileNotFoundError"),
        ("nonsense", "JSONDecodeError"),
        ("{}", "neither results of layers"),
        ("[]", "neither results of layers"),
    ],
)
def test_files_that_are_no_results(
    content: str | None, said: str, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert main(["plot", str(path)]) == 1
    assert said in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 1
    assert "no layer-*.json" in capsys.readouterr().err


def test_without_matplotlib(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plot", str(RESULTS)]) == 1
    assert 'pip install "moert[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        # equal ratios on both sides: the geometric mean
        ({"64": (1.0, 2.0), "256": (4.0, 2.0)}, (128.0, 2.0)),
        ({"1": (1.0, 4.0), "2": (2.0, 4.0)}, None),  # one-shot wins everywhere
        ({"1": (5.0, 4.0), "2": (9.0, 4.0)}, None),  # nowhere
        ({"1": (1.0, 4.0), "2": (4.0, 4.0), "4": (None, 4.0)}, (2.0, 4.0)),  # not feasible at 4
    ],
    ids=["between", "never", "before", "infeasible"],
)
def test_crossover(cells: dict[str, tuple[float | None, float]], expected: object) -> None:
    times = {
        t: {n: us for n, us in zip(("one_shot", "multi_phase"), row, strict=True) if us is not None}
        for t, row in cells.items()
    }
    found = crossover(times)
    assert found == (None if expected is None else pytest.approx(expected))


def test_points_count_what_the_layer_does() -> None:
    """Bytes where they are told, else from the floor; operations from the shape."""
    cfg = MoEConfig(8, 2, 64, 32)
    cells = {
        "16": {"us": 9.0, "floor us": 4.0, "bytes": 100},
        "2": {"us": 3.0, "floor us": 2.0},
    }
    points = points_of({"config": repr(cfg), "tokens": cells}, Limits(1e9, 1e12))
    assert [p.tokens for p in points] == [2, 16]
    assert [p.nbytes for p in points] == [2000, 100]
    assert points[0].flops == 2 * 2 * 2 * 3 * 64 * 32
    ungated = MoEConfig(8, 2, 64, 32, activation="relu2", gated=False)
    (point, _) = points_of({"config": repr(ungated), "tokens": cells}, Limits(1e9, 1e12))
    assert point.flops == 2 * 2 * 2 * 2 * 64 * 32


def test_config_fields_evaluate_nothing() -> None:
    fields = config_fields(repr(MoEConfig(8, 2, 64, 32)))
    assert fields["hidden_size"] == 64
    assert config_fields("F(a=1, b=exit())") == {"a": 1}


def test_kinds() -> None:
    layers = read_results(RESULTS / "layer-bfloat16.json")
    assert kind_of(layers) == "layers"
    assert limits_of(layers) == Limits(4.58e12, 788e12)
    assert kind_of(read_results(RESULTS / "sort.json")) == "sort"
    with pytest.raises(ConfigError, match="neither"):
        read_results(RESULTS / "gpu_check.json")
