"""Writes the crossovers of the sorting strategies that the package ships, from bench/results/*/sort.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "moert" / "steps" / "sorting" / "crossovers.json"
sys.path[:0] = [str(ROOT)]

from moert.steps.sorting.crossovers import rows_from_times  # noqa: E402


def main() -> None:
    reports = [json.loads(p.read_text()) for p in sorted(ROOT.glob("bench/results/*/sort.json"))]
    table = {report["device"]: rows_from_times(report["us"], report["top_k"]) for report in reports}
    TARGET.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
