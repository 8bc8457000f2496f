"""`moert demo`: what it shows, and that its checks can fail."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

pytest.importorskip("transformers")

from moert.cli import demo
from moert.cli.main import main

Capture = pytest.CaptureFixture[str]
QUICK = ["demo", "--quick", "--tokens", "4", "--device", "cpu"]


def test_both_dtypes_pass(capsys: Capture) -> None:
    assert main([*QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert list(found["dtypes"]) == ["float32", "bfloat16"]
    exact = found["dtypes"]["float32"]
    assert exact["tokens"]["eager"] == exact["tokens"]["moert"]
    assert len(exact["tokens"]["moert"]) == 4
    assert exact["layers"] == 2
    assert exact["steps"]["eager"] > 0
    assert exact["memory"]["arena"] > 0
    assert all(speed > 0 for speed in exact["tokens_per_second"].values())


def test_text(capsys: Capture) -> None:
    assert main([*QUICK, "--dtype", "float32", "--family", "mixtral"]) == 0
    text = capsys.readouterr().out
    for part in ("checkpoint mixtral", "== float32", "memory", "tokens/s", "all checks passed"):
        assert part in text
    assert "bfloat16 " not in text


def test_a_difference_fails_it(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo.generate
    calls = [0]

    def spoiled(*args: object) -> torch.Tensor:
        calls[0] += 1
        return real(*args) + (calls[0] > 2)  # the second implementation's

    monkeypatch.setattr(demo, "generate", spoiled)
    assert main([*QUICK, "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: sequence 0 differs from token 0 on" in text
    assert "all checks passed" not in text


def test_without_transformers(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert 'pip install "moert[hf]"' in capsys.readouterr().err
