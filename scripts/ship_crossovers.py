"""Writes the crossovers of the sorting strategies that the package ships, from bench/results/*/sort.json."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "moert" / "steps" / "sorting" / "crossovers.json"


def one_shot_rows(report: dict) -> dict[str, int]:
    """By E: the most rows S = T*K up to which one-shot was the faster one at every measured T."""
    limits = {}
    for experts, cells in report["us"].items():
        rows = 0
        for tokens, us in sorted(cells.items(), key=lambda cell: int(cell[0])):
            if us.get("one_shot", float("inf")) >= us["multi_phase"]:
                break
            rows = int(tokens) * report["top_k"]
        limits[experts] = rows
    return limits


def main() -> None:
    reports = [json.loads(p.read_text()) for p in sorted(ROOT.glob("bench/results/*/sort.json"))]
    table = {report["device"]: one_shot_rows(report) for report in reports}
    TARGET.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
