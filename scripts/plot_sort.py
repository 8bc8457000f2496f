"""Draws how the sorting strategies cross over T, from bench/results/<device>/sort.json, as SVG and PNG.

python scripts/plot_sort.py [DEVICE]        (needs matplotlib: pip install ".[plot]")
"""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from readme_tables import RESULTS, crossover

INK, GRID = "#24292f", "#e4e7eb"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8c959f",
    "xtick.color": INK,
    "ytick.color": INK,
    # the same figures give the same bytes
    "svg.hashsalt": "moert",
}
# one-shot grows on with the square of T; what is above is of no interest
MAX_US, TICKS_US = 100.0, (1, 2, 5, 10, 20, 50, 100)


def draw(axes: Axes, cells: dict[str, dict[str, dict[str, float]]]) -> None:
    """One colour for each E: solid one-shot, dashed multi-phase, a dot where they cross."""
    shades = plt.get_cmap("viridis")
    for index, (experts, rows) in enumerate(cells.items()):
        color = shades(0.88 * index / max(1, len(cells) - 1))
        tokens = sorted(map(int, rows))
        for strategy, dashes in (("one_shot", "-"), ("multi_phase", (0, (4, 2)))):
            found = [(t, us) for t in tokens if (us := rows[str(t)].get(strategy)) is not None]
            axes.plot(*zip(*found, strict=True), color=color, linestyle=dashes, linewidth=1.7)
        if crossing := crossover(rows):
            axes.plot(*crossing, "o", color=color, markersize=8, mec="white", mew=1.3, zorder=5)
        axes.plot([], [], color=color, linewidth=4, label=f"E = {experts}")


def decorate(axes: Axes, report: dict, tokens: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{t}" for t in tokens])
    axes.set_yticks(TICKS_US, [f"{us}" for us in TICKS_US])
    axes.minorticks_off()
    axes.set_xlim(tokens[0] * 0.9, tokens[-1] * 1.1)
    axes.set_ylim(0.9, MAX_US)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"T, tokens of a call (K = {report['top_k']} experts a token)")
    axes.set_ylabel("device time of one sort, µs")
    axes.set_title(
        f"Sorting rows by expert on an {report['device']}: which strategy wins where",
        loc="left",
        fontsize=12,
        fontweight="bold",
        pad=12,
    )
    kinds = [
        Line2D([], [], color=INK, linestyle="-", label="one-shot, 1 kernel"),
        Line2D([], [], color=INK, linestyle=(0, (4, 2)), label="multi-phase, 3 kernels"),
        Line2D([], [], color=INK, marker="o", linestyle="", mec="white", ms=8, label="crossover"),
    ]
    first = axes.legend(handles=kinds, loc="upper left", frameon=False, borderaxespad=0.2)
    axes.add_artist(first)
    # from the top down as the lines lie
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=1.2, reverse=True
    )


def main() -> None:
    results = RESULTS / (sys.argv[1] if len(sys.argv) > 1 else "nvidia-h200")
    report = json.loads((results / "sort.json").read_text())
    tokens = sorted({int(t) for rows in report["us"].values() for t in rows})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained", facecolor="white")
        draw(axes, report["us"])
        decorate(axes, report, tokens)
        figure.savefig(results / "sort.svg", metadata={"Date": None})
        figure.savefig(results / "sort.png", dpi=150)


if __name__ == "__main__":
    main()
