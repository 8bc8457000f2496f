"""What the README's tables are put together from."""

from __future__ import annotations

from typing import Any

NOT_YET = "Not measured on this device yet."


def table(head: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """A Markdown table; columns from `numbers_from` on are aligned to the right."""
    rule = ["---"] * numbers_from + ["---:"] * (len(head) - numbers_from)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def span(values: list[float], form: str = ".2f") -> str:
    """ "a to b", or a alone where both print alike."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def made_with(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["made_with"].items())
    return f"{report['device']}, {versions}"
