"""Whether figures got worse: before against now, above a stated percentage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

PERCENT: Final = 10.0  # of a median on a quiet GPU; two machines of one kind differ by about 2


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure, smaller is better.

    Args:
        value: the median, in `unit`.
        unit: for the reader: "us", "bytes".
        percent: growth from which on it counts as a regression; None for the general one.
        judged: False for figures that are only shown, as those of other projects.
    """

    value: float
    unit: str = "us"
    percent: float | None = None
    judged: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and now."""

    name: str
    before: float
    now: float
    unit: str
    limit: float
    judged: bool = True

    @property
    def percent(self) -> float:
        if self.before == 0:
            return float("inf") if self.now else 0.0
        return (self.now / self.before - 1.0) * 100.0

    @property
    def regressed(self) -> bool:
        return self.judged and self.percent > self.limit

    def __str__(self) -> str:
        mark = "SLOWER" if self.unit == "us" else "LARGER"
        number = ".2f" if self.unit == "us" else ",.0f"
        text = f"{self.before:{number}} -> {self.now:{number}} {self.unit} ({self.percent:+.1f}%)"
        return f"{mark if self.regressed else 'ok':<6}  {self.name}: {text}, limit {self.limit:g}%"


def changes(
    before: Mapping[str, Figure], now: Mapping[str, Figure], percent: float = PERCENT
) -> list[Change]:
    """Every figure that both have, in the order of `now`.

    Args:
        before, now: figures by name.
        percent: growth from which on a figure counts as a regression, unless it names its own.
    """
    return [
        Change(
            name,
            before[name].value,
            figure.value,
            figure.unit,
            max(percent, figure.percent or 0.0),
            figure.judged,
        )
        for name, figure in now.items()
        if name in before
    ]


def better_of(first: Mapping[str, Figure], again: Mapping[str, Figure]) -> dict[str, Figure]:
    """The smaller of two measurements of the same code: what disturbs only ever adds."""
    return {
        name: min(figure, again.get(name, figure), key=lambda f: f.value)
        for name, figure in first.items()
    }


def missing(
    before: Mapping[str, Figure], now: Mapping[str, Figure], without: Iterable[str] = ()
) -> list[str]:
    """Judged figures that were there before and are not now."""
    left = set(now) | set(without)
    return [name for name, figure in before.items() if figure.judged and name not in left]
