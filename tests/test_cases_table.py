"""The README's tables of cases beyond the table of shapes, from a small report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from code_size import ROOT

sys.path.append(str(ROOT / "scripts"))

from cases_table import cases_table

GOALS = {
    "prefill at 4096": 1.33,
    "prefill at 16384, share of the matmul rate": 0.75,
    "skew": 1.3,
    "odd": 1.15,
    "fp16": 1.02,
    "shared": 1.05,
}


def cell(met: bool | None, *times: float, names: str = "ab", **more: Any) -> dict[str, Any]:
    layers = {
        name: {"us": 100 * t, "times the floor": t} for name, t in zip(names, times, strict=False)
    }
    return {"layers": layers, "met": met, **more}


def kept(**cells: dict[str, Any]) -> dict[str, Any]:
    return {"configs": {}, "tokens": {name[1:]: one for name, one in cells.items()}}


PREFILL = {
    "mixtral": {
        "bfloat16": kept(
            T1024=cell(None, 0.5, **{"matmul share": 0.4}),
            T4096=cell(False, 1.345, **{"matmul share": 0.7}),
        ),
        "int4": kept(T4096=cell(True, 1.2, **{"matmul share": 0.75})),
    },
    "qwen3": {"bfloat16": kept(T4096=cell(False, 12.3, **{"matmul share": 0.081}))},
}


def skewed(met: bool, hot: float, same: float) -> dict[str, Any]:
    found = cell(met, hot, same)
    return {
        **found,
        "layers": {"one hot expert": found["layers"]["a"], "same K experts": found["layers"]["b"]},
    }


PARTS = {
    "prefill": PREFILL,
    "skew": {"qwen3": {"bfloat16": kept(T16=skewed(True, 1.1, 1.25), T64=skewed(False, 1.2, 1.5))}},
    "fp16": {"mixtral": {"float16": kept(T1=cell(True, 1, 1, ratio=0.994))}},
    "odd": {
        "E=60 I=1408": {
            "bfloat16": kept(
                T1=cell(True, 1.2, 1.1, ratio=1.0909), T256=cell(True, 1, 1, ratio=0.97)
            )
        },
        "kimi": {"bfloat16": kept(T1=cell(None, 1.4)), "int4": kept(T4=cell(None, 2.0))},
    },
    "shared": {"qwen1.5-moe": {"bfloat16": kept(T8=cell(False, 1.3, 1.1, ratio=1.182))}},
}


def rendered(tmp_path: Path, parts: dict[str, Any]) -> str:
    report = {"device": "A", "made_with": {"torch": "2"}, "goals": GOALS, "parts": parts}
    (tmp_path / "cases.json").write_text(json.dumps(report))
    return cases_table(tmp_path)


def test_nothing_measured(tmp_path: Path) -> None:
    assert cases_table(tmp_path) == "Not measured on this device yet."


def test_every_part(tmp_path: Path) -> None:
    text = rendered(tmp_path, PARTS)
    assert (
        "| shape | prefill, bfloat16, T=1024/4096 | prefill, int4, T=4096 | one hot expert, T=16/64 | "
        "same K experts, T=16/64 | float16 : bfloat16, T=1 |"
    ) in text
    assert "| mixtral | 50.0 (0.50, 40%) / 134 (1.34, 70%) | 120 (1.20, 75%) |  |  | 0.99 |" in text
    assert "| qwen3 | - / 1230 (12.30, 8%) |  | 1.10 / 1.20 | 1.25 / 1.50 |  |" in text
    assert "| layer | T=1 | T=4 | T=8 | T=256 |" in text
    assert "| E=60 I=1408 | 1.20 (+9%) |  |  | 1.00 (-3%) |" in text
    assert "| kimi | 1.40 |  |  |  |\n| kimi, int4 |  | 2.00 |  |  |" in text
    assert "| qwen1.5-moe, shared experts |  |  | 1.30 (+18%) |  |" in text
    assert "at T=16384 75% of the matmul rate;" in text
    assert (
        "Met in prefill 1 of 3, skew 1 of 2, fp16 1 of 1, odd 2 of 2, shared 0 of 1. A, torch 2."
        in text
    )


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    text = rendered(tmp_path, {"odd": PARTS["odd"], "skew": {"qwen3": {"bfloat16": kept()}}})
    assert "shape" not in text.split("Goals")[0]
    assert text.startswith("| layer | T=1 |")
    assert "Met in odd 2 of 2. A, torch 2." in text
