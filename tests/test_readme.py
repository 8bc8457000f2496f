"""The README: its figures are the committed ones, its commands and names exist, its code runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from code_size import ROOT
from int4_checkpoints import Stored, quantized_checkpoint

import moert
from moert.integrations.transformers import Prepared

README = (ROOT / "README.md").read_text(encoding="utf-8")
# (needs a GPU, code)
BLOCKS = [
    (bool(mark), code)
    for mark, code in re.findall(r"(<!-- needs a GPU -->\n)?```python\n(.*?)```", README, re.DOTALL)
]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = ROOT / "scripts" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_the_committed_ones() -> None:
    command = [sys.executable, "scripts/readme_tables.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_policies(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.policies(tmp_path) == "Not measured on this device yet."
    report = {
        "device": "A",
        "made_with": {"torch": "2"},
        "shape": {"K": 8, "H": 64, "I": 32, "dtype": "bfloat16"},
        "cells": {
            "8": {
                "1": {"us": {"measured": 9.94}, "behind": -0.004, "choice": {"measured": "none a"}},
                "64": {
                    "us": {"measured": 120.2},
                    "behind": 0.021,
                    "choice": {"measured": "one_shot b"},
                },
            },
            "32": {
                "64": {"us": {"measured": 50}, "behind": 0, "choice": {"measured": "multi_phase"}}
            },
        },
    }
    (tmp_path / "policies.json").write_text(json.dumps(report))
    text = tables.policies(tmp_path)
    assert "| E | T=1 | T=64 |" in text
    assert "| 8 | 9.9 none (-0.4%) | 120 one-shot (+2.1%) |" in text
    assert "| 32 |  | 50.0 multi-phase (+0.0%) |" in text
    assert "at most +2.1%. A, torch 2." in text


def test_check_notices_another_figure(tables: ModuleType) -> None:
    marker = "<!-- table:nvidia-h200/layers -->\n"
    assert marker in README
    spoiled = README.replace(marker, marker + "9.9 (0.10)\n")
    assert tables.rewritten(spoiled) == README != spoiled


def test_every_result_is_shown(tables: ModuleType) -> None:
    """Each marker names a part, and each device with results has all of its parts in the README."""
    marked = {(device, part) for _, device, part, _ in tables.MARKED.findall(README)}
    parts = {*tables.PARTS}
    if not list((ROOT / "bench" / "results").glob("*/cases.json")):
        parts.remove("cases")
    assert {part for _, part in marked} == parts
    for path in (ROOT / "bench" / "results" / "nvidia-h200").glob("layer-*.json"):
        assert f"**{json.loads(path.read_text())['dtype']}**" in README


def test_paths_exist() -> None:
    found = set(re.findall(r"(?<![\w/.-])((?:scripts|bench|tests|moert)/[\w./-]+)", README))
    missing = [path for path in found if not (ROOT / path.rstrip("./")).exists()]
    assert len(found) > 10
    assert missing == []


def test_options_of_commands_exist() -> None:
    """An option that the README gives to a Python script, or names beside it, is in that script."""
    lines = re.findall(r"^python (\S+\.py)(.*)$", README, re.MULTILINE)
    assert len(lines) >= 4
    for script, rest in lines:
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z]\w*", rest):
            assert f'"{option}"' in source, f"{script} has no {option}"


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        there = link[1:] in anchors if link.startswith("#") else (ROOT / link).exists()
        assert there, link


@pytest.mark.parametrize("name", moert.__all__)
def test_public_name_is_mentioned(name: str) -> None:
    assert re.search(rf"\b{name}\b", README)


def test_known_families_are_listed() -> None:
    from moert.checkpoint.families import FAMILIES

    paragraph = re.search(r"Known values of `model_type`:(.*?)\n\n", README, re.DOTALL)
    assert paragraph is not None
    assert re.findall(r"`(\w+)`", paragraph[1]) == sorted(FAMILIES)


def test_the_machine_limits_are_those_of_the_benchmark() -> None:
    source = (ROOT / "bench" / "layer_chain.py").read_text(encoding="utf-8")
    for constant, text in (("4.58e12", "4.58 TB/s"), ("788e12", "788 TFLOP/s")):
        assert constant in source and text in README


@pytest.mark.parametrize("code", [code for _, code in BLOCKS])
def test_code_parses(code: str) -> None:
    ast.parse(code)


def test_code_runs(
    tiny_checkpoint: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks in order, as somebody who types them in; the paths in them are tiny checkpoints."""
    model = tmp_path / "path" / "to" / "model"
    model.parent.mkdir(parents=True)
    source = tiny_checkpoint("mixtral", "bfloat16")
    model.symlink_to(source, target_is_directory=True)
    int4, _ = quantized_checkpoint(source, tmp_path, Stored("awq", 32, symmetric=False))
    (model.parent / "int4-model").symlink_to(int4, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOERT_TUNE", "off")
    names: dict[str, object] = {}
    for needs_gpu, code in BLOCKS:
        if not needs_gpu or torch.cuda.is_available():
            exec(compile(code, "README.md", "exec"), names)
    tokens = names["tokens"]
    assert isinstance(tokens, torch.Tensor)
    assert tokens.shape == (1, 12)
    for value in names.values():
        if isinstance(value, (moert.MoERuntime, Prepared)):
            value.close()


def test_versus(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BASELINES", tmp_path)
    assert tables.versus(Path("a-device")) == "Not measured on this device yet."
    row = {"group": "versus T=8", "extra_info": {"tokens": 8}}
    benches = [
        {**row, "param": "T8-moert", "stats": {"median": 20e-6}},
        {**row, "param": "T8-torch-grouped_mm", "stats": {"median": 123.4e-6}},
        {"group": "decode T=8", "param": "x", "extra_info": {"tokens": 8}, "stats": {"median": 1}},
    ]
    machine = {"device": "A", "torch": "2", "triton": "3"}
    report = {"machine_info": machine, "benchmarks": benches}
    (tmp_path / "a-device.json").write_text(json.dumps(report))
    text = tables.versus(Path("a-device"))
    assert "| moert | 20.0 |" in text
    assert "| torch-grouped_mm | 123 |" in text
    assert "decode" not in text
    assert "A,\ntorch 2, triton 3." in text
