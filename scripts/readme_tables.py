"""Rewrites the measured figures in README.md from the committed results.

    python scripts/readme_tables.py [--check]

Between `<!-- table:DEVICE/PART -->` and `<!-- end -->` stands what the function of that name in PARTS makes
of bench/results/DEVICE/*.json. With --check nothing is written: exit code 1 if the README is out of date.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from cases_table import cases_table  # noqa: E402
from table_parts import NOT_YET, made_with, number, span, table  # noqa: E402

from moert.cli.results import crossover  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BASELINES = ROOT / "bench" / "baselines"
MARKED = re.compile(r"(<!-- table:([\w.-]+)/([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SORT_COLUMNS = (1, 16, 64, 128, 256, 512, 1024, 4096)
STRATEGIES = {"none": "none", "one_shot": "one-shot", "multi_phase": "multi-phase"}


def strategy_ranges(cells: dict[str, dict[str, Any]]) -> str:
    """Which sorting strategy the tuner chose up to which measured T."""
    last: dict[str, int] = {}
    for tokens in sorted(map(int, cells)):
        last[cells[str(tokens)]["choice"].split()[0]] = tokens
    *first, (final, _) = last.items()
    return ", ".join([*(f"{STRATEGIES[s]} to {t}" for s, t in first), f"then {STRATEGIES[final]}"])


def all_cells(report: dict[str, Any]) -> list[tuple[dict[str, Any], str, int]]:
    """(cell, shape, T) of everything measured."""
    shapes = report["shapes"].items()
    return [(cell, name, int(t)) for name, s in shapes for t, cell in s["tokens"].items()]


def layer_reports(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("layer-*.json"))]


def headline(results: Path) -> str:
    """One sentence a dtype: how far a layer is from one pass over its weights."""
    lines = []
    for report in layer_reports(results):
        cells = all_cells(report)
        times = [cell["times the floor"] for cell, _, _ in cells]
        tokens = [t for _, _, t in cells]
        lines.append(
            f"On an {report['device']}, {len(report['shapes'])} layers of public models take, in "
            f"{report['dtype']} at T={min(tokens)} to {max(tokens)}, "
            f"**{statistics.median(times):.2f} times** the time that one pass\nover the weights of the "
            f"experts hit takes at full bandwidth (median; {span(times)}): see [Measured](#measured)."
        )
    return "\n\n".join(lines)


def layer_table(report: dict[str, Any]) -> str:
    shapes = {name: shape["tokens"] for name, shape in report["shapes"].items()}
    columns = sorted({int(t) for cells in shapes.values() for t in cells})
    rows = []
    for name, cells in shapes.items():
        found = [cells.get(str(t)) for t in columns]
        texts = [f"{number(c['us'])} ({c['times the floor']:.2f})" if c else "" for c in found]
        rows.append([name, *texts, strategy_ranges(cells)])
    ratios = [
        [c["us"] / c["read us"] for cells in shapes.values() if (c := cells.get(str(t)))]
        for t in columns
    ]
    rows.append(["*times R*", *(f"*{span(r)}*" for r in ratios), ""])
    head = ["shape", *(f"T={t}" for t in columns), "sort chosen"]
    every = all_cells(report)
    worst, name, tokens = max(every, key=lambda cell: cell[0]["times the floor"])
    error = max(cell["error"] for cell, _, _ in every)
    return (
        f"**{report['dtype']}**, microseconds a layer (times the floor); {made_with(report)}:\n\n"
        f"{table(head, rows)}\n\n"
        f"Furthest from the floor: {name} at T={tokens}, {worst['times the floor']:.2f} times.\n"
        f"Largest relative L2 error against the fp32 reference: {error:.1e}."
    )


def layers(results: Path) -> str:
    """One table for each dtype that was measured."""
    return "\n\n".join(map(layer_table, layer_reports(results)))


def sort(results: Path) -> str:
    """Both strategies that sort, over E and T, and where they cross."""
    report = json.loads((results / "sort.json").read_text())
    rows = []
    for experts, cells in report["us"].items():
        row = [experts]
        for tokens in SORT_COLUMNS:
            times = [cells[str(tokens)].get(s, math.inf) for s in ("one_shot", "multi_phase")]
            best = min(times)
            texts = ["-" if t == math.inf else f"{t:.1f}" if t < 100 else f"{t:.0f}" for t in times]
            row.append(
                " / ".join(
                    f"**{x}**" if t == best else x for x, t in zip(texts, times, strict=True)
                )
            )
        crossing = crossover(cells)
        rows.append([*row, f"{crossing[0]:.0f}" if crossing else "none"])
    head = ["E", *(f"T={t}" for t in SORT_COLUMNS), "crossover T"]
    both = {int(t): row for t, row in report["routing and sort us"].items()}
    last = max(both)
    return (
        f"{table(head, rows)}\n\n"
        f"One-shot / multi-phase, K={report['top_k']}, blocks of {report['block_m']} rows, microseconds, "
        f"launches included (an empty kernel: {report['empty kernel us']}).\nRouting (E=128) takes "
        f"{span([row['routing'] for row in both.values()])}, routing and a one-shot sort together "
        f"{both[1]['both']:.2f} at T=1 and {both[last]['both']:.2f} at T={last}."
    )


def versus(results: Path) -> str:
    """moert's layer beside those of other projects, from the device's baseline."""
    path = BASELINES / f"{results.name}.json"
    if not path.exists():
        return NOT_YET
    report = json.loads(path.read_text())
    cells: dict[str, dict[int, float]] = {}
    for bench in report["benchmarks"]:
        if bench["group"].startswith("versus "):
            name = bench["param"].split("-", 1)[1]
            cells.setdefault(name, {})[bench["extra_info"]["tokens"]] = (
                bench["stats"]["median"] * 1e6
            )
    columns = sorted({t for row in cells.values() for t in row})
    rows = [
        [name, *(number(row[t]) if t in row else "" for t in columns)]
        for name, row in cells.items()
    ]
    machine = report["machine_info"]
    return (
        f"{table(['layer', *(f'T={t}' for t in columns)], rows)}\n\n"
        "Microseconds a layer, bfloat16, E=128, K=8, H=2048, I=768; all replayed from graphs, taking turns. "
        f"{machine['device']},\ntorch {machine['torch']}, triton {machine['triton']}."
    )


def policies(results: Path) -> str:
    """The tuner's choice against the best of the three strategies forced, over E and T."""
    path = results / "policies.json"
    if not path.exists():
        return NOT_YET
    report = json.loads(path.read_text())
    shape, cells = report["shape"], report["cells"]
    columns = sorted({int(t) for row in cells.values() for t in row})
    rows = []
    for experts, row in cells.items():
        texts = []
        for t in columns:
            cell = row.get(str(t))
            texts.append(policy_cell(cell) if cell else "")
        rows.append([experts, *texts])
    behind = [cell["behind"] for row in cells.values() for cell in row.values()]
    return (
        f"{table(['E', *(f'T={t}' for t in columns)], rows)}\n\n"
        f"Microseconds a layer (K={shape['K']}, H={shape['H']}, I={shape['I']}, {shape['dtype']}) with the "
        "measured choice, which strategy that is, and how far it is\nbehind the best of the three, each "
        f"forced and tuned by itself: at most {max(behind):+.1%}. {made_with(report)}."
    )


def policy_cell(cell: dict[str, Any]) -> str:
    chosen = STRATEGIES[cell["choice"]["measured"].split()[0]]
    return f"{number(cell['us']['measured'])} {chosen} ({cell['behind']:+.1%})"


def host_lines(part: dict[str, Any]) -> list[str]:
    rows = [row for name, row in part.items() if name.startswith("T=")]
    bare, known, new = (
        span([row[key] for row in rows], ".1f")
        for key in ("bare replay us", "forward us", "forward, new addresses us")
    )
    return [
        f"Host time of a replayed `forward`: {known} us with the tensors of the last call, {new} us with new "
        f"addresses; a bare graph replay, measured beside it: {bare} us"
        + ("." if part["passed"] else "; the check wants at most 4 and 10 more.")
    ]


def chain_lines(part: dict[str, Any]) -> list[str]:
    rows = {name: row for name, row in part.items() if name.startswith("T=")}
    extra: dict[str, list[float]] = {}
    for row in rows.values():
        for stream, times in row.items():
            extra.setdefault(stream, []).append(times["chained"] - times["one graph"])
    texts = [f"{span(values, '.1f')} us on a {stream}" for stream, values in extra.items()]
    return [
        "48 layers as 48 chained replays, against one graph of all 48: "
        f"{', '.join(texts).replace('a null stream', 'the null stream')} more a layer ({', '.join(rows)})"
        + ("." if part["passed"] else "; the check wants at most 2.")
    ]


def start_lines(part: dict[str, Any]) -> list[str]:
    cold, warm = part["cold"], part["warm"]
    lacking = "with nothing cached or shipped (tuning every bucket and compiling)"
    if "shipped" in cold["sources"]:
        lacking = "with plans shipped for the buckets, and nothing cached"
    return [
        f"Start-up of one geometry: {cold['first s']:.0f} s {lacking}, {warm['first s']} s with warm "
        f"caches; each further layer that shares: {warm['further ms']:.0f} ms. Graphs of 48 layers: "
        f"{warm['graphs MiB']} MiB."
    ]


def verdict_lines(parts: dict[str, Any]) -> list[str]:
    lines = []
    for part, what in (
        ("contract tests", "Tests that need a GPU"),
        ("every choice", "Tests of whole blocks and of every choice that plans may make"),
    ):
        if tests := parts.get(part):
            counts = re.findall(r"\d+ (?:failed|passed|errors?)", tests["summary"])
            counts.sort(key=lambda count: "passed" not in count)
            names = [
                f"`{line.split('::')[-1].split(' - ')[0]}`" for line in tests.get("failed", [])
            ]
            lines.append(
                f"{what}: {', '.join(counts)}" + (f" ({', '.join(names)})." if names else ".")
            )
    checker = parts.get("memory checker", {})
    if found := re.search(r"(\d+) errors?", checker.get("summary", "")):
        lines.append(f"Memory checker over eager launches, replays and routing: {found[0]}.")
    return lines


def checks(results: Path) -> str:
    """Host cost, chained replays, start-up and verdicts of scripts/gpu_check.sh."""
    report = json.loads((results / "gpu_check.json").read_text())
    parts = report["parts"]
    lines = verdict_lines(parts)
    for name, render in (
        ("host cost", host_lines),
        ("chained replays", chain_lines),
        ("start-up", start_lines),
    ):
        part = parts.get(name)
        if part and "error" not in part:
            lines += render(part)
    return f"{made_with(report)}:\n\n" + "\n".join(f"- {line}" for line in lines)


PARTS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "layers": layers,
    "sort": sort,
    "versus": versus,
    "policies": policies,
    "cases": cases_table,
    "checks": checks,
}


def rewritten(text: str) -> str:
    """The README with every marked part made anew.

    Raises:
        KeyError: a marker that names no part.
    """

    def part(match: re.Match[str]) -> str:
        start, device, name, end = match.groups()
        return f"{start}{PARTS[name](RESULTS / device)}\n{end}"

    return MARKED.sub(part, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = rewritten(text)
    if args.check and new != text:
        print("README.md is out of date: run python scripts/readme_tables.py", file=sys.stderr)
        return 1
    if new != text:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
