"""The regression command on made-up samples: what it measures again, what fails it, what it writes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from code_size import ROOT

from moert.cli.regression import Change, Figure, better_of, changes, missing

pytest.importorskip("pytest_benchmark")
sys.path.append(str(ROOT / "bench"))

import regress

Rows = dict[str, list[list[float]]]
# one outlier, which a median does not see
STEADY = [100.0, 101.0, 99.0, 100.5, 250.0]


class Runs:
    """Stands in for pytest: a run plays every benchmark's next row of microseconds, the last for good."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.extra, self.code = folder, dict[str, Any](), 0
        self.rows: Rows = {}
        self.ran: list[list[str]] = []

    def run(self, suite: Path, targets: Sequence[str], result: Path, options: object) -> int:
        names = [t.removeprefix("t.py::") for t in targets] or list(self.rows)
        self.ran.append(names)
        benches = []
        for name in names:
            turn = min(sum(name in names for names in self.ran), len(self.rows[name])) - 1
            data = [us * 1e-6 for us in self.rows[name][turn]]
            benches.append(
                {
                    "name": name,
                    "fullname": f"t.py::{name}",
                    **dict.fromkeys(("group", "param", "params")),
                    "extra_info": self.extra,
                    "stats": {"median": statistics.median(data), "data": data},
                }
            )
        report = {"machine_info": {"driver": "2.0"}, "bytes": {}, "benchmarks": benches}
        result.write_text(json.dumps(report))
        return self.code

    def command(self, *words: str, **rows: list[list[float]]) -> int:
        self.rows, self.ran = {"steady": [STEADY], **rows}, []
        where = ["--baseline", str(self.folder / "base.json"), "--out", str(self.folder / "out")]
        return regress.main([*where, *words])


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """With a baseline of 100.5 and 50 microseconds."""
    made = Runs(tmp_path)
    monkeypatch.setattr(regress, "run_benchmarks", made.run)
    assert made.command("--save", other=[[50.0, 51.0, 49.0]]) == 0
    return made


@pytest.mark.parametrize(
    ("rows", "words", "code", "again"),
    [
        ([[53.0, 54.0, 52.0]], [], 0, False),  # 6 per cent: noise
        ([[80.0, 81.0, 79.0]], [], 1, True),  # planted, and there again
        ([[80.0, 81.0, 79.0], [51.0]], [], 0, True),  # disturbed once, not again
        ([[53.0, 54.0, 52.0]], ["--percent", "4"], 1, True),  # the stated percentage decides
        ([[20.0]], [], 0, False),  # faster is no regression
    ],
    ids=["noise", "planted", "disturbed", "stricter", "faster"],
)
def test_what_fails_the_command(
    runs: Runs,
    rows: list[list[float]],
    words: list[str],
    code: int,
    again: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert runs.command(*words, other=rows) == code
    # only what looked worse is measured again, and once
    assert runs.ran == [["steady", "other"], *([["other"]] if again else [])]
    verdict = capsys.readouterr().out.rpartition("compared 2 figures")[2]
    assert ("SLOWER  t.py::other" in verdict) == (code == 1)


@pytest.mark.parametrize(
    "extra",
    [{"reference": True}, {"regression_percent": 70}],
    ids=["of another project", "noisier by its own word"],
)
def test_figures_that_may_grow(runs: Runs, extra: dict[str, Any]) -> None:
    runs.extra = extra
    assert runs.command(other=[[80.0]]) == 0


def test_a_benchmark_that_vanished(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.command() == 1
    assert "measured before, not now:\n  t.py::other" in capsys.readouterr().out
    assert runs.command("-k", "steady") == 0  # asked for some, so some are missing


def test_a_benchmark_that_failed(runs: Runs) -> None:
    runs.code = 1
    before = (runs.folder / "base.json").read_text()
    assert runs.command(other=[[50.0]]) == 1
    assert runs.command("--save", other=[[20.0]]) == 1
    assert (runs.folder / "base.json").read_text() == before  # none is made of half a run


def test_without_a_baseline_nothing_is_measured(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs.folder / "base.json").unlink()
    assert runs.command(other=[[50.0]]) == 2
    assert runs.ran == []
    assert "--save" in capsys.readouterr().err


def test_other_machines_and_plans_are_named(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.folder / "base.json"
    base = json.loads(path.read_text())
    base["machine_info"]["driver"] = "1.2.3"
    base["benchmarks"][1]["extra_info"]["plan"] = "one"
    path.write_text(json.dumps(base))
    runs.extra = {"plan": "two"}
    assert runs.command(other=[[50.0]]) == 0
    said = capsys.readouterr().out
    assert "driver: baseline 1.2.3, here 2.0" in said
    assert "t.py::other: plan was one, is two" in said


# what follows runs pytest-benchmark itself

SUITE = """
import json
from pathlib import Path
import pytest
from playback import PLAYBACK, play

@pytest.mark.benchmark(timer=PLAYBACK)
def test_fake(benchmark):
    play(benchmark, json.loads((Path(__file__).parent / "samples.json").read_text()))
"""
MACHINE = 'def pytest_benchmark_generate_machine_info():\n    return {"device": "made up"}\n'


def environment(*paths: Path) -> dict[str, str]:
    """Of a run of its own, not of a worker of this one: pytest-benchmark measures nothing in those."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """`suite(samples, command...)`: one fake benchmark under a real command; its exit code."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_fake.py").write_text(SUITE)
    (folder / "conftest.py").write_text(MACHINE)

    def run(samples: list[float], *words: object) -> int:
        (folder / "samples.json").write_text(json.dumps(samples))
        command = [sys.executable, *map(str, words)]
        env = environment(ROOT, ROOT / "bench")
        return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode

    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_a_planted_regression_through_and_through(suite: Any) -> None:
    """Samples arrive as measured; the command and the plugin's own comparison find the regression."""
    command = [ROOT / "bench" / "regress.py", "--suite", suite.folder, "--out", "out"]
    command += ["--baseline", "base.json"]
    assert suite(STEADY, *command, "--save") == 0
    (bench,) = json.loads((suite.folder / "out" / "run.json").read_text())["benchmarks"]
    assert bench["stats"]["data"] == pytest.approx([us * 1e-6 for us in STEADY], rel=1e-12)
    (kept,) = json.loads((suite.folder / "base.json").read_text())["benchmarks"]
    assert kept["stats"]["median"] == pytest.approx(100.5e-6)
    assert "data" not in kept["stats"]
    own = ["-m", "pytest", "-p", "no:cacheprovider", "--benchmark-compare=base.json"]
    own += ["--benchmark-compare-fail=median:10%", "test_fake.py"]
    assert suite([us * 1.06 for us in STEADY], *own) == 0
    assert suite([us * 1.30 for us in STEADY], *own) == 1
    assert suite([us * 1.30 for us in STEADY], *command) == 1
    assert (suite.folder / "out" / "again.json").is_file()


def test_what_was_not_measured_is_refused(suite: Any) -> None:
    assert suite([0.0, 1.0], "-m", "pytest", "test_fake.py") == 1
    assert suite([], "-m", "pytest", "test_fake.py") == 1


def test_smoke_run_of_the_benchmarks_here(tmp_path: Path) -> None:
    """The files that measure on a GPU run here, on tiny layers; bytes and machine are in the JSON."""
    path = tmp_path / "run.json"
    words = ["-m", "pytest", "-q", "--smoke", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
    done = subprocess.run(
        [sys.executable, *words, "bench"],
        cwd=ROOT,
        env=environment(ROOT),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "moert"} <= set(report["machine_info"])
    groups = {b["group"].split(" ")[0] for b in report["benchmarks"]}
    assert {"decode", "host", "routing", "sort", "start-up", "versus"} <= groups
    decode = [b for b in report["benchmarks"] if b["group"].startswith("decode")]
    assert all({"tokens", "plan", "GB_per_s"} <= set(b["extra_info"]) for b in decode)
    others = [b["name"] for b in report["benchmarks"] if b["extra_info"].get("reference")]
    assert any("torch-grouped_mm" in name for name in others)
    assert any("transformers-grouped_mm" in name for name in others)
    (sizes,) = report["bytes"].values()
    assert sizes["arena"] > 0


def test_changes() -> None:
    before = {"a": Figure(10.0), "b": Figure(0.0, "bytes"), "gone": Figure(1.0)}
    now = {"a": Figure(11.5), "b": Figure(8.0, "bytes"), "new": Figure(1.0)}
    found = changes(before, now, 10.0)
    assert [(c.name, c.regressed) for c in found] == [("a", True), ("b", True)]
    assert missing(before, now) == ["gone"]
    assert not changes(before, now, 20.0)[0].regressed
    assert better_of(now, {"a": Figure(9.0), "x": Figure(1.0)})["a"].value == 9.0
    assert str(Change("a", 10, 12, "us", 5)).startswith("SLOWER  a: 10.00 -> 12.00 us (+20.0%)")
    assert Change("a", 0, 0, "us", 5).percent == 0.0
