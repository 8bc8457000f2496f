"""What the committed results of bench/ say, as numbers: read by `moert plot` and by the README's tables."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moert.errors import ConfigError

Cells = Mapping[str, Mapping[str, float]]  # T to strategy to microseconds


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device can do at most, as measured on it.

    Args:
        read_bytes_per_second: of the best read kernel over GiBs.
        matmul_flops: of a large matrix product.
    """

    read_bytes_per_second: float
    matmul_flops: float


@dataclass(frozen=True, slots=True)
class Point:
    """One layer at one T: its bytes and operations, and how long it took."""

    tokens: int
    us: float
    floor_us: float
    nbytes: float
    flops: float


def read_results(path: Path) -> dict[str, Any]:
    """A JSON file of results.

    Raises:
        ConfigError: no such file, or no such JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict) or kind_of(found) is None:
        raise ConfigError(
            f"{path}: neither results of layers (bench/bench_layer.py) nor of sorting (bench/bench_sort.py)"
        )
    return found


def kind_of(report: Mapping[str, Any]) -> str | None:
    """ "layers" or "sort", by what is in a report; None for something else."""
    if {"device", "dtype", "shapes"} <= report.keys():
        return "layers"
    return "sort" if {"device", "top_k", "us"} <= report.keys() else None


def crossover(cells: Cells) -> tuple[float, float] | None:
    """(T, us) where multi-phase becomes the faster sort, between measured T on logarithmic axes."""
    found = sorted(
        (int(t), c["one_shot"], c["multi_phase"]) for t, c in cells.items() if len(c) > 1
    )
    for (t0, one0, multi0), (t1, one1, multi1) in pairwise(found):
        before, after = math.log(one0 / multi0), math.log(one1 / multi1)
        if before < 0 <= after:
            part = before / (before - after)
            return t0 * (t1 / t0) ** part, multi0 * (multi1 / multi0) ** part
    return None


def limits_of(report: Mapping[str, Any]) -> Limits | None:
    """The device's limits where the report tells them."""
    found = report.get("limits")
    return None if found is None else Limits(**found)


def points_of(shape: Mapping[str, Any], limits: Limits) -> list[Point]:
    """Every measured T of one shape of a report of layers, ascending.

    The floor is the larger of the bytes at read bandwidth and the operations at the matrix rate, so where the
    bytes decide it tells them.
    """
    fields = config_fields(shape["config"])
    inner, hidden = fields["intermediate_size"], fields["hidden_size"]
    matrices = 3 if fields.get("gated", True) else 2
    points = []
    for tokens, cell in sorted(shape["tokens"].items(), key=lambda item: int(item[0])):
        floor = cell["floor us"]
        flops = 2.0 * int(tokens) * fields["top_k"] * matrices * inner * hidden
        nbytes = cell.get("bytes", floor * 1e-6 * limits.read_bytes_per_second)
        points.append(Point(int(tokens), cell["us"], floor, nbytes, flops))
    return points


def config_fields(text: str) -> dict[str, Any]:
    """The plain fields of a `MoEConfig` by its repr; nothing is evaluated."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    return {
        keyword.arg: keyword.value.value
        for keyword in call.keywords
        if keyword.arg is not None and isinstance(keyword.value, ast.Constant)
    }
