"""Up to how many rows one workgroup's sort is the faster one: measured where we have, a rule elsewhere."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from moert.device import DeviceFacts
from moert.steps.sorting.launches import feasible

# where nothing was measured: between what the devices measured so far have at small and at large E
RULE_ROWS = 2048
MEASURED = Path(__file__).with_name("crossovers.json")


@lru_cache(maxsize=1)
def _measured() -> dict[str, dict[int, int]]:
    """By device name and E: rows S = T*K; written by scripts/ship_crossovers.py."""
    table = json.loads(MEASURED.read_text())
    return {
        device: {int(experts): rows for experts, rows in by_experts.items()}
        for device, by_experts in table.items()
    }


def one_shot_rows(num_experts: int, facts: DeviceFacts) -> int:
    """The most rows S for which one-shot is taken: measured at the next larger E, else the rule."""
    by_experts = _measured().get(facts.name)
    if not by_experts:
        return RULE_ROWS
    larger = [experts for experts in by_experts if experts >= num_experts]
    return by_experts[min(larger, default=max(by_experts))]


def default_strategy(tokens: int, num_experts: int, top_k: int, facts: DeviceFacts) -> str:
    """One-shot up to `one_shot_rows`, where it can run, else multi-phase; pure but for the shipped table."""
    few = tokens * top_k <= one_shot_rows(num_experts, facts)
    fits = feasible("one_shot", tokens, num_experts, top_k, facts) is None
    return "one_shot" if few and fits else "multi_phase"
