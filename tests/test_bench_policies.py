"""The comparison of policies on a layer for Triton's interpreter: what is run and what is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from code_size import ROOT

from moert import MoEConfig
from moert.backends.triton import TritonBackend

CFG = MoEConfig(4, 2, 16, 8, dtype="float32")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("times a GPU where there is one")
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    spec = importlib.util.spec_from_file_location(
        "bench_policies", ROOT / "bench/bench_policies.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_policy_runs_its_own_strategy(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past DIRECT_ROWS rows the way without a sort has fewer layers and is not tuned."""
    monkeypatch.setattr(bench, "DIRECT_ROWS", 2)
    candidates = TritonBackend.candidates
    # the interpreter takes its time for each of them
    monkeypatch.setattr(TritonBackend, "candidates", lambda *given: candidates(*given)[:2])
    asked: list[tuple[int, tuple[int, ...], str, int]] = []
    share_group = bench.share_group

    def spied(cfg: Any, weights: Any, tokens: Any, **options: Any) -> Any:
        asked.append((options["sort_policy"], tuple(tokens), options["tune"], len(weights)))
        return share_group(cfg, weights, tokens, **options)

    monkeypatch.setattr(bench, "share_group", spied)
    found = bench.cells(CFG, (1, 3), layers=3, backend="triton")
    sorted_ones = [(policy, (1, 3), "force", 3) for policy in (0, 1, 2)]
    assert asked == [*sorted_ones, (3, (1,), "force", 3), (3, (3,), "off", 2)]
    assert list(found) == ["1", "3"]
    for cell in found.values():
        for name in ("one_shot", "multi_phase", "none"):
            assert cell["choice"][name].split()[0] == name
        us = cell["us"]
        best = min(us[name] for name in us if name != "measured")
        assert cell["behind"] == pytest.approx(us["measured"] / best - 1, abs=1e-4)


def test_the_report_is_taken_up_where_it_ends(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[int, list[int]]] = []

    def cells(cfg: MoEConfig, tokens: list[int]) -> dict[str, Any]:
        made.append((cfg.num_experts, list(tokens)))
        if cfg.num_experts == 64:
            raise KeyboardInterrupt
        return {str(t): {"behind": 0.01} for t in tokens}

    monkeypatch.setattr(bench, "cells", cells)
    path = tmp_path / "policies.json"
    with pytest.raises(KeyboardInterrupt):
        bench.measure(path, (8, 64), (1, 4), None, again=False)
    assert list(json.loads(path.read_text())["cells"]) == ["8"]
    bench.measure(path, (8, 32), (1, 2, 4), None, again=False)
    assert made == [(8, [1, 4]), (64, [1, 4]), (8, [2]), (32, [1, 2, 4])]
    assert list(json.loads(path.read_text())["cells"]["8"]) == ["1", "2", "4"]
    bench.measure(path, (8,), (1,), None, again=True)
    assert made[-1] == (8, [1])
    bench.measure(path, (16,), (1,), budget=-1.0, again=False)
    assert made[-1] == (8, [1])  # nothing more is begun
