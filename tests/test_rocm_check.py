"""The script for whoever has an AMD GPU: what it says where there is none, and how it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

import rocm_check  # noqa: E402

pytest.importorskip("triton")
import gpu_check  # noqa: E402

from moert.device import KNOWN_DEVICES  # noqa: E402

needs_no_rocm = pytest.mark.skipif(
    torch.version.hip is not None and torch.cuda.is_available(), reason="a ROCm device is here"
)


@needs_no_rocm
@pytest.mark.parametrize("shell", [False, True])
def test_without_a_rocm_device_it_says_so_and_writes_nothing(tmp_path: Path, shell: bool) -> None:
    script = ROOT / "scripts" / ("rocm_check.sh" if shell else "rocm_check.py")
    command = ["bash" if shell else sys.executable, script, "--out", tmp_path / "r.json"]
    environment = {**os.environ, "MOERT_PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("rocm_check: nothing was run: torch ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@needs_no_rocm
def test_aiter_that_cannot_be_used_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_support  # noqa: F401

    import moert.device

    monkeypatch.setattr(moert.device, "device_facts", lambda device: KNOWN_DEVICES["gfx1151"])
    part: dict[str, object] = {}
    assert rocm_check.aiter_backend(part)
    assert "CDNA" in str(part["why not"]) and len(part) == 1


@pytest.mark.parametrize("arguments", [["--only", "no such part"], ["--unknown"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        rocm_check.main(arguments)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        rocm_check.main(["--help"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(part in text for part in rocm_check.PARTS)


@pytest.mark.parametrize(
    ("version", "available", "reason"),
    [
        (SimpleNamespace(hip=None), True, "not built for ROCm"),
        (SimpleNamespace(hip="7.0"), False, "no ROCm device"),
        (SimpleNamespace(hip="7.0"), True, None),
    ],
)
def test_why_not(
    version: SimpleNamespace, available: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    said = rocm_check.why_not()
    assert said is None if reason is None else reason in str(said)


def test_every_part_has_a_check() -> None:
    assert tuple(rocm_check.all_parts()) == rocm_check.PARTS


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part fails by exception, one by its answer: both are in the file, with the good one."""

    def good(part: dict[str, object]) -> bool:
        part["figure"] = 1.5
        return True

    def broken(part: dict[str, object]) -> bool:
        raise ZeroDivisionError("nothing to divide")

    parts = {"good": good, "broken": broken, "bad": lambda part: False}
    monkeypatch.setattr(rocm_check, "why_not", lambda: None)
    monkeypatch.setattr(rocm_check, "machine", lambda: {"torch": "2"})
    monkeypatch.setattr(rocm_check, "all_parts", lambda: parts)
    out = tmp_path / "report.json"
    assert rocm_check.main(["--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["torch"] == "2"
    assert report["parts"] == {
        "good": {"passed": True, "figure": 1.5},
        "broken": {"passed": False, "error": "ZeroDivisionError: nothing to divide"},
        "bad": {"passed": False},
    }
    monkeypatch.setattr(rocm_check, "all_parts", lambda: {"good": good})
    assert rocm_check.main(["--out", str(out)]) == 0


def test_a_benchmark_as_a_part(tmp_path: Path) -> None:
    """Its file is taken over; one that ends badly fails the part with what it said."""
    script = tmp_path / "bench.py"
    script.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[-1], 'x.json').write_text('[1]')\n"
        "sys.exit('no device' if sys.argv[1] == 'bad' else 0)\n"
    )
    part: dict[str, object] = {}
    assert rocm_check.from_bench(str(script), "x.json", "good")(part)
    assert part == {"result": [1]}
    part = {}
    assert not rocm_check.from_bench(str(script), "x.json", "bad")(part)
    assert part == {"result": [1], "error": "no device\n"}
    assert not rocm_check.from_bench(str(script), "y.json", "good")({})


def test_gpu_check_runs_only_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"a": lambda part: True, "b": lambda part: False}
    assert gpu_check.run_parts(parts, ["b"]) == {"b": {"passed": False}}
    assert capsys.readouterr().out == "FAIL  b  {} (0 s)\n"


def test_gpu_check_keeps_what_was_not_asked_for(tmp_path: Path) -> None:
    """Of the same device and versions; of others, or of no report at all, nothing."""
    file, heading = tmp_path / "gpu_check.json", {"device": "A", "made_with": {"torch": "1"}}
    assert gpu_check.kept(file, heading) == {}
    file.write_text(
        '{"device": "A", "made_with": {"torch": "1"}, "parts": {"a": {"passed": true}}}'
    )
    assert gpu_check.kept(file, heading) == {"a": {"passed": True}}
    assert gpu_check.kept(file, {**heading, "device": "B"}) == {}
    for text in ("{", "[]", "7", '{"device": "A", "made_with": {"torch": "1"}}'):
        file.write_text(text)
        assert gpu_check.kept(file, heading) == {}


def test_runs_at_different_parts_share_a_report(tmp_path: Path) -> None:
    heading = {"device": "A", "made_with": {"torch": "1"}}
    first, second = "host cost", "start-up"
    gpu_check.write_report(tmp_path, heading, {second: {"passed": True, "n": 1}}, True)
    gpu_check.write_report(tmp_path, heading, {first: {"passed": False}}, True)
    gpu_check.write_report(tmp_path, heading, {second: {"passed": True, "n": 2}}, True)
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["parts"] == {first: {"passed": False}, second: {"passed": True, "n": 2}}
    text = (tmp_path / "gpu_check.txt").read_text()
    assert text == 'FAIL  host cost  {}\nPASS  start-up  {"n": 2}\n'
    # a run of everything begins anew
    gpu_check.write_report(tmp_path, heading, {first: {"passed": True}}, False)
    assert gpu_check.kept(tmp_path / "gpu_check.json", heading) == {first: {"passed": True}}
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_check.json", "gpu_check.txt"}
