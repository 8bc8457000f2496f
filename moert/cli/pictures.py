"""The pictures of `moert plot`; the same figures give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moert.cli.results import crossover, limits_of, points_of

INK, GRID, QUIET = "#24292f", "#e4e7eb", "#8c959f"
STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "moert",
}
# one-shot grows on with the square of T; what is above is of no interest
MAX_SORT_US, SORT_TICKS = 100.0, (1, 2, 5, 10, 20, 50, 100)
DASHED = (0, (4, 2))
Draw = Callable[[Axes, dict[str, Any]], None]


def save(draw: Draw, report: dict[str, Any], stem: Path, formats: Iterable[str]) -> list[Path]:
    """Draw a report and write it as `stem` with each format's suffix."""
    paths = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.8), layout="constrained", facecolor="white")
        axes = figure.subplots()
        draw(axes, report)
        for form in formats:
            paths.append(stem.with_name(f"{stem.name}.{form}"))
            metadata = {"Date": None} if form == "svg" else {"Software": None}
            figure.savefig(paths[-1], dpi=150, metadata=metadata)
    return paths


def colors(count: int) -> list[Any]:
    shades = matplotlib.colormaps["viridis"]
    return [shades(0.88 * index / max(1, count - 1)) for index in range(count)]


def frame(axes: Axes, title: str, x: str, y: str) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)


def tick_tokens(axes: Axes, tokens: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{t}" for t in tokens])
    axes.minorticks_off()
    axes.set_xlim(tokens[0] * 0.9, tokens[-1] * 1.1)


def side_legend(axes: Axes, reverse: bool = False) -> None:
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        handlelength=1.2,
        reverse=reverse,
    )


def floor(axes: Axes, report: dict[str, Any]) -> None:
    """Times the floor over T, one line a shape."""
    shapes = report["shapes"]
    for (name, shape), color in zip(shapes.items(), colors(len(shapes)), strict=True):
        cells = sorted((int(t), cell["times the floor"]) for t, cell in shape["tokens"].items())
        axes.plot(*zip(*cells, strict=True), "o-", color=color, lw=1.7, ms=4, label=name)
    tick_tokens(axes, sorted({int(t) for s in shapes.values() for t in s["tokens"]}))
    axes.axhline(1.0, color=INK, linewidth=1)
    axes.set_ylim(bottom=0.95)
    frame(
        axes,
        f"A layer in {report['dtype']} on an {report['device']}: how far from one pass over its weights",
        "T, tokens of a call",
        "device time, times the floor",
    )
    side_legend(axes)


def roofline(axes: Axes, report: dict[str, Any]) -> None:
    """Operations a second over operations a byte, under what the device can do at most."""
    limits, shapes = limits_of(report), report["shapes"]
    assert limits is not None
    ridge = limits.matmul_flops / limits.read_bytes_per_second
    points = {name: points_of(shape, limits) for name, shape in shapes.items()}
    every = [p.flops / p.nbytes for row in points.values() for p in row]
    low, high = min(every) / 1.5, max(ridge * 2, *every) * 1.5
    roof = [
        (x, min(limits.matmul_flops, x * limits.read_bytes_per_second) / 1e12)
        for x in (low, ridge, high)
    ]
    axes.plot(*zip(*roof, strict=True), color=INK, linewidth=1.4)
    for (name, row), color in zip(points.items(), colors(len(points)), strict=True):
        line = [(p.flops / p.nbytes, p.flops / p.us / 1e6) for p in row]
        axes.plot(*zip(*line, strict=True), "o-", color=color, lw=1.2, ms=4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    note = (
        f"{limits.read_bytes_per_second / 1e12:.2f} TB/s read, "
        f"{limits.matmul_flops / 1e12:.0f} TFLOP/s matrix product, both measured"
    )
    axes.annotate(note, (0.02, 0.95), xycoords="axes fraction")
    first, last = (sorted({p.tokens for row in points.values() for p in row})[i] for i in (0, -1))
    frame(
        axes,
        f"Roofline of a layer in {report['dtype']} on an {report['device']}, T={first} to {last}",
        "operations a byte read",
        "TFLOP/s",
    )
    side_legend(axes)


def sort(axes: Axes, report: dict[str, Any]) -> None:
    """One colour for each E: solid one-shot, dashed multi-phase, a dot where they cross."""
    cells = report["us"]
    for (experts, rows), color in zip(cells.items(), colors(len(cells)), strict=True):
        tokens = sorted(map(int, rows))
        for strategy, dashes in (("one_shot", "-"), ("multi_phase", DASHED)):
            found = [(t, us) for t in tokens if (us := rows[str(t)].get(strategy)) is not None]
            axes.plot(*zip(*found, strict=True), color=color, linestyle=dashes, linewidth=1.7)
        if crossing := crossover(rows):
            axes.plot(*crossing, "o", color=color, markersize=8, mec="white", mew=1.3, zorder=5)
        axes.plot([], [], color=color, linewidth=4, label=f"E = {experts}")
    tick_tokens(axes, sorted({int(t) for rows in cells.values() for t in rows}))
    axes.set_yscale("log")
    axes.set_yticks(SORT_TICKS, [f"{us}" for us in SORT_TICKS])
    axes.minorticks_off()
    least = min(us for rows in cells.values() for times in rows.values() for us in times.values())
    axes.set_ylim(0.9 * least, MAX_SORT_US)
    frame(
        axes,
        f"Sorting rows by expert on an {report['device']}: which strategy wins where",
        f"T, tokens of a call (K = {report['top_k']} experts a token)",
        "device time of one sort, µs",
    )
    kinds = [
        Line2D([], [], color=INK, linestyle="-", label="one-shot, 1 kernel"),
        Line2D([], [], color=INK, linestyle=DASHED, label="multi-phase, 3 kernels"),
        Line2D([], [], color=INK, marker="o", linestyle="", mec="white", ms=8, label="crossover"),
    ]
    first = axes.legend(handles=kinds, loc="upper left", frameon=False, borderaxespad=0.2)
    axes.add_artist(first)
    # from the top down as the lines lie
    side_legend(axes, reverse=True)
