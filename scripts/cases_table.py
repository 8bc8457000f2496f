"""The README's tables of what bench/bench_cases.py measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table_parts import NOT_YET, made_with, number, table

Cell = dict[str, Any]
Cells = dict[str, Cell]  # by T


def cases_table(results: Path) -> str:
    """Prefill, skew and float16 by shape; odd sizes and shared experts by T; which goals are missed."""
    path = results / "cases.json"
    if not path.exists():
        return NOT_YET
    report = json.loads(path.read_text())
    tables = [made(report["parts"]) for made in (by_shape, by_tokens)]
    text = "\n\n".join(made for made in tables if made)
    return f"{text}\n\n{verdict(report)} {made_with(report)}."


def by_shape(parts: dict[str, Any]) -> str:
    columns: dict[str, dict[str, str]] = {}

    def column(title: str, part: str, form: str, render: Any) -> None:
        found = {
            name: forms[form]["tokens"]
            for name, forms in parts.get(part, {}).items()
            if form in forms and forms[form]["tokens"]
        }
        sizes = sorted({int(t) for cells in found.values() for t in cells})
        if found:
            columns[f"{title}, T={'/'.join(map(str, sizes))}"] = {
                name: " / ".join(render(cells[str(t)]) if str(t) in cells else "-" for t in sizes)
                for name, cells in found.items()
            }

    for form in formats(parts, "prefill"):
        column(f"prefill, {form}", "prefill", form, prefill_text)
    for form in formats(parts, "skew"):
        suffix = "" if form == "bfloat16" else f", {form}"
        for name in ("one hot expert", "same K experts"):
            column(name + suffix, "skew", form, lambda cell, name=name: skew_text(cell, name))
    column("float16 : bfloat16", "fp16", "float16", lambda cell: f"{cell['ratio']:.2f}")
    names = list(dict.fromkeys(name for texts in columns.values() for name in texts))
    rows = [[name, *(texts.get(name, "") for texts in columns.values())] for name in names]
    return table(["shape", *columns], rows) if rows else ""


def formats(parts: dict[str, Any], part: str) -> list[str]:
    return list(dict.fromkeys(form for forms in parts.get(part, {}).values() for form in forms))


def prefill_text(cell: Cell) -> str:
    (layer,) = cell["layers"].values()
    texts = [f"{layer['times the floor']:.2f}", f"{cell['matmul share']:.0%}"]
    if "share beside" in cell:
        texts.append(f"{cell['share beside']:.0%}")
    return f"{number(layer['us'])} ({', '.join(texts)})"


def skew_text(cell: Cell, name: str) -> str:
    return f"{cell['layers'][name]['times the floor']:.2f}"


def by_tokens(parts: dict[str, Any]) -> str:
    found: dict[str, Cells] = {}
    for part, what in (("odd", ""), ("shared", ", shared experts")):
        for name, forms in parts.get(part, {}).items():
            for form, kept in forms.items():
                suffix = "" if form == "bfloat16" else f", {form}"
                if kept["tokens"]:
                    found[f"{name}{what}{suffix}"] = kept["tokens"]
    sizes = sorted({int(t) for cells in found.values() for t in cells})
    rows = [
        [name, *(pair_text(cells[str(t)]) if str(t) in cells else "" for t in sizes)]
        for name, cells in found.items()
    ]
    return table(["layer", *(f"T={t}" for t in sizes)], rows) if rows else ""


def pair_text(cell: Cell) -> str:
    """Times the floor, and by how much more that is than the other layer's."""
    first, *others = (layer["times the floor"] for layer in cell["layers"].values())
    return f"{first:.2f} ({cell['ratio'] - 1:+.0%})" if others else f"{first:.2f}"


def verdict(report: dict[str, Any]) -> str:
    """The goals, and in how many cells of each part they are met."""
    counts = []
    for part, names in report["parts"].items():
        found = [
            cell["met"]
            for forms in names.values()
            for kept in forms.values()
            for cell in kept["tokens"].values()
            if cell["met"] is not None
        ]
        if found:
            counts.append(f"{part} {sum(found)} of {len(found)}")
    goals = report["goals"]
    return (
        f"Goals: prefill at most {goals['prefill at 4096']} times the floor at T=4096, at T=16384 "
        f"{goals['prefill at 16384, share of the matmul rate']:.0%} of the matmul rate;\n"
        f"skew at most {goals['skew']} times the floor; at most {goals['odd'] - 1:.0%} (odd sizes) and "
        f"{goals['shared'] - 1:.0%} (shared experts) further\nfrom it than the other layer; float16 as "
        f"fast as bfloat16 within {goals['fp16'] - 1:.0%}. Met in {', '.join(counts) or 'no cell'}."
    )
