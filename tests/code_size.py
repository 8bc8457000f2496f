"""The source files of the repository, and a report of the longest of them at the end of a test run."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moert", "tests", "bench", "scripts")


def source_files(*folders: str) -> list[Path]:
    """Python and shell files below the folders (all four by default), sorted."""
    found = (path for name in folders or FOLDERS for path in (ROOT / name).rglob("*"))
    return sorted(path for path in found if path.suffix in (".py", ".sh"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, file:line name) of every function, decorators and docstring not counted."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            first = node.body[0]
            has_doc = ast.get_docstring(node, clean=False) is not None
            doc = (first.end_lineno or 0) - first.lineno + 1 if has_doc else 0
            where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            found.append((node.end_lineno - node.lineno + 1 - doc, where))
    return found


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the ten longest files and functions, so that growth is seen before it hurts."""
    files = [(lines(path), str(path.relative_to(ROOT))) for path in source_files()]
    bodies = [f for path in source_files() if path.suffix == ".py" for f in functions(path)]
    for title, rows in (("files", files), ("functions", bodies)):
        terminalreporter.section(f"longest {title} (lines)")
        for count, where in sorted(rows, reverse=True)[:10]:
            terminalreporter.write_line(f"{count:5}  {where}")
