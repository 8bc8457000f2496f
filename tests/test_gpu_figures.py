"""The order of the steps that renew a GPU's figures, and what becomes of them at the end of their time."""

from __future__ import annotations

import os
import sys
import tarfile
import time
from pathlib import Path

import pytest
from code_size import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import gpu_figures
from gpu_figures import STEPS, Step, next_step, run_all, shares, visible


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with one result."""
    root = tmp_path / "root"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "bench" / "results" / "found.json").write_text("{}")
    monkeypatch.setattr(gpu_figures, "ROOT", root)
    return root


def script(root: Path, name: str, text: str) -> Step:
    (root / f"{name}.py").write_text(text)
    return Step(name, (f"{name}.py",))


def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir(exist_ok=True)
    return folder


def test_every_step_is_a_script_that_exists_and_waits_for_steps_before_it() -> None:
    names: list[str] = []
    for step in STEPS:
        assert (ROOT / step.command[0]).exists(), step
        assert set(step.after) <= set(names), step
        names.append(step.name)
    assert len(set(names)) == len(names)


def test_what_can_begin() -> None:
    first, second, third = Step("a", ()), Step("b", (), ("a",)), Step("c", ())
    assert next_step([first, second, third], {"a", "b", "c"}) == first
    # "a" still runs
    assert next_step([second, third], {"a", "b", "c"}) == third
    assert next_step([second], {"a", "b"}) is None
    assert next_step([second], {"b"}) == second


def test_gpus_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible(0), visible(1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [visible(0), visible(1)] == ["3", "GPU-5"]


def test_cores_are_shared_out() -> None:
    assert shares([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3]]
    assert shares([5], 2) == [[5], [5]]


def test_steps_run_beside_and_after_each_other(
    held: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say = (
        "import os, pathlib; gpu = os.environ['CUDA_VISIBLE_DEVICES']; "
        "pathlib.Path(__file__).with_suffix('.gpu').write_text(gpu)"
    )
    good = script(held, "good", say + "; print('measured')")
    bad = script(held, "bad", say + "; raise SystemExit(3)")
    last = Step("last", script(held, "last", "open('good.gpu'); " + say).command, ("good", "bad"))
    archive = tmp_path / "found.tar.gz"
    assert run_all([good, bad, last], 2, 60.0, archive, logs(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "bad          exit code 3" in said and said.count(" ok, ") == 2
    assert {(held / f"{n}.gpu").read_text() for n in ("good", "bad")} == {"0", "1"}
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert {"bench/results/found.json", "logs/good.txt", "logs/last.txt"} <= set(names)
        output = tar.extractfile("logs/good.txt")
        assert output is not None and output.read() == b"measured\n"


def test_what_is_late_is_stopped_with_its_children(held: Path, tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(c.pid)); time.sleep(60)"
    )
    slow = script(held, "slow", child)
    never = Step("never", ("never.py",), ("slow",))
    begin = time.monotonic()
    assert run_all([slow, never], 1, 3.0, tmp_path / "found.tar.gz", logs(tmp_path)) == 2
    assert time.monotonic() - begin < 20
    pid = int((held / "child").read_text())
    for _ in range(50):
        if not os.path.exists(f"/proc/{pid}") or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child runs on")


def test_without_a_gpu_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_figures, "count_gpus", lambda: 0)
    assert gpu_figures.main([]) == 2
