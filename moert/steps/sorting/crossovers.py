"""Up to how many rows one workgroup's sort is the faster one: measured where we have, a rule elsewhere.

Looked up in what `record` wrote on this machine (bench/bench_sort.py measures and records), then in what the
package ships (scripts/ship_crossovers.py); failing both a rule.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs

from moert.device import DeviceFacts
from moert.steps.sorting.launches import feasible

log = logging.getLogger("moert")

# where nothing was measured: between what the devices measured so far have at small and at large E
RULE_ROWS = 2048
MEASURED = Path(__file__).with_name("crossovers.json")


def rows_from_times(
    us: Mapping[str, Mapping[str, Mapping[str, float]]], top_k: int
) -> dict[str, int]:
    """By E: the most rows S = T*K up to which one-shot was the faster one at every measured T.

    Args:
        us: microseconds by E, T and strategy; a strategy that cannot run is absent.
        top_k: K of all of them.
    """
    limits = {}
    for experts, cells in us.items():
        rows = 0
        for tokens, times in sorted(cells.items(), key=lambda cell: int(cell[0])):
            if times.get("one_shot", float("inf")) >= times["multi_phase"]:
                break
            rows = int(tokens) * top_k
        limits[experts] = rows
    return limits


def record_path(facts: DeviceFacts) -> Path:
    """Where this user's measurement of a device is kept."""
    user = Path(platformdirs.user_cache_dir("moert", appauthor=False))
    return user / facts.slug / "sort-crossovers.json"


def record(facts: DeviceFacts, rows: Mapping[str, int]) -> Path:
    """Keep a measurement for the sorts of later processes; the file is replaced as a whole.

    Args:
        rows: as `rows_from_times` gives them.

    Raises:
        OSError: the user's cache cannot be written.
    """
    path = record_path(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"device": facts.name, "one_shot_rows": dict(rows)}, file, indent=1)
    os.replace(name, path)
    return path


@lru_cache(maxsize=8)
def _recorded(facts: DeviceFacts) -> dict[int, int]:
    """What was recorded here, by E; nothing where there is no file, or a damaged one (said once)."""
    path = record_path(facts)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["device"] != facts.name:
            raise ValueError(f"device is {report['device']!r}, here it is {facts.name!r}")
        return {int(experts): _count(rows) for experts, rows in report["one_shot_rows"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("sort crossovers %s: ignored: %s: %s", path, type(error).__name__, error)
        return {}


def _count(rows: Any) -> int:
    if type(rows) is not int or rows < 0:
        raise ValueError(f"{rows!r} is no number of rows")
    return rows


@lru_cache(maxsize=1)
def _shipped() -> dict[str, dict[int, int]]:
    """By device name and E: rows S = T*K; written by scripts/ship_crossovers.py."""
    table = json.loads(MEASURED.read_text())
    return {
        device: {int(experts): rows for experts, rows in by_experts.items()}
        for device, by_experts in table.items()
    }


def one_shot_rows(num_experts: int, facts: DeviceFacts) -> int:
    """The most rows S for which one-shot is taken: measured at the next larger E, else the rule."""
    by_experts = _recorded(facts) or _shipped().get(facts.name)
    if not by_experts:
        return RULE_ROWS
    larger = [experts for experts in by_experts if experts >= num_experts]
    return by_experts[min(larger, default=max(by_experts))]


def default_strategy(tokens: int, num_experts: int, top_k: int, facts: DeviceFacts) -> str:
    """One-shot up to `one_shot_rows`, where it can run, else multi-phase; pure but for the tables."""
    few = tokens * top_k <= one_shot_rows(num_experts, facts)
    fits = feasible("one_shot", tokens, num_experts, top_k, facts) is None
    return "one_shot" if few and fits else "multi_phase"
