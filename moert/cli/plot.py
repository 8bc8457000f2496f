"""`moert plot`: pictures of results: times the floor over T, the roofline, where the sorts cross."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moert.cli.arguments import print_json
from moert.cli.results import kind_of, read_results
from moert.errors import ConfigError, UnsupportedError

EXAMPLES = """examples:
  moert plot bench/results/nvidia-h200               every result of a directory, pictures beside them
  moert plot sort.json --out pictures --format svg
  moert plot layer-bfloat16.json --json              floor-bfloat16 and roofline-bfloat16, .png and .svg

Results are what bench/bench_layer.py and bench/bench_sort.py write. Needs matplotlib:
pip install "moert[plot]"
"""
FORMATS = ("png", "svg")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="FILE|DIR", help="JSON of results, or directories"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of the pictures (beside the results)"
    )
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: both")
    parser.add_argument("--json", action="store_true", help="print the pictures' paths as JSON")


def run(args: argparse.Namespace) -> int:
    found = list(reports(args.results))  # all of them, before anything is drawn
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError('pictures need matplotlib: pip install "moert[plot]"')
    written = [
        str(path)
        for file, report in found
        for path in draw(report, args.out or file.parent, args.format or FORMATS)
    ]
    if args.json:
        print_json({"written": written})
    else:
        print(*written, sep="\n")
    return 0


def reports(paths: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files named, and those of the directories named that hold results.

    Raises:
        ConfigError: a file that is no result, or a directory without any.
    """
    for path in paths:
        if not path.is_dir():
            yield path, read_results(path)
            continue
        files = [*sorted(path.glob("layer-*.json")), *sorted(path.glob("sort.json"))]
        if not files:
            raise ConfigError(f"{path}: no layer-*.json and no sort.json in it")
        yield from ((file, read_results(file)) for file in files)


def draw(report: dict[str, Any], folder: Path, formats: list[str] | tuple[str, ...]) -> list[Path]:
    """All pictures of one report."""
    from moert.cli import pictures

    folder.mkdir(parents=True, exist_ok=True)
    if kind_of(report) == "sort":
        return pictures.save(pictures.sort, report, folder / "sort", formats)
    written = pictures.save(pictures.floor, report, folder / f"floor-{report['dtype']}", formats)
    if "limits" in report:
        stem = folder / f"roofline-{report['dtype']}"
        written += pictures.save(pictures.roofline, report, stem, formats)
    return written
