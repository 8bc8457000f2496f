"""Plans: what was decided for each bucket before any token arrived. Pure data.

A `Choice` is the part that tuning searches over and caches keep (strategy and tiles); a `Plan`
adds the bucket, the kernels in launch order, the arena fields, and where the choice came from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from moert.arena import Field, layout

STRATEGIES = ("none", "one_shot", "multi_phase")
# weights streamed through shared memory (moert/steps/streaming), the same for all rows of an expert where
# nothing is sorted, and weights streamed through registers, a row a program (moert/steps/registers)
STREAMS = ("stream", "gathered", "registers")
# warps that copy beside warps that multiply (moert/steps/specialised), and these with fixed-point inputs
# (moert/steps/fixed_point)
SPECIALISED = ("specialised", "fixed")
KERNELS = ("tile", *STREAMS, *SPECIALISED)  # the first are portable


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile of one GEMM and launch options.

    Args:
        bm: BM, rows of inputs.
        bn: BN, output columns; of int4 weights, of streams and of specialised warps, rows of the weights,
            where a gate row and an up row make one output column.
        bk: BK, reduction columns a step; of streams, those of one warp.
        num_warps, num_stages: warps of a program, steps in flight; of specialised warps, those of each of the
            two partitions that multiply.
        kernel: one of `KERNELS`.
        split: of streams, parts of the reduction that warps work on side by side.
        repeats: of streams, tiles that a program takes one after the other.
        together: of streams, blocks of BM sorted rows of one expert that a program takes at a time, at most.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int = 4
    num_stages: int = 2
    kernel: str = "tile"
    split: int = 1
    repeats: int = 1
    together: int = 1

    def __str__(self) -> str:
        text = f"{self.bm}x{self.bn}x{self.bk}/w{self.num_warps}s{self.num_stages}"
        if self.kernel in STREAMS:
            text += f"k{self.split}r{self.repeats}"
        if self.together > 1:
            text += f"t{self.together}"
        return text if self.kernel == "tile" else f"{text} {self.kernel}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What is tuned of a plan.

    Args:
        strategy: how rows are sorted.
        gate_up, down: tiles of the two GEMMs; None on backends that have none to choose.
        dependent: each launch starts while its predecessor drains (programmatic dependent launch).
        crowded: tiles of both GEMMs, of one BM, for calls whose rows crowd on few experts; launched too, and
            the sort tells on the device which pair has something to do. None: the first two serve all.
    """

    strategy: str
    gate_up: Tile | None = None
    down: Tile | None = None
    dependent: bool = False
    crowded: tuple[Tile, Tile] | None = None

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All there are, in the order of their launches."""
        return tuple(filter(None, (*(self.crowded or ()), self.gate_up, self.down)))

    @property
    def kernels(self) -> frozenset[str]:
        """Of `KERNELS`, the kinds of all tiles."""
        return frozenset(tile.kernel for tile in self.tiles)

    @property
    def crowded_bm(self) -> int:
        """BM of the crowded tiles; 0 without."""
        return self.crowded[0].bm if self.crowded else 0

    @property
    def reach(self) -> int:
        """Rows of an expert that one reading of its weights serves, crowds apart."""
        return max((t.bm * t.together for t in (self.gate_up, self.down) if t), default=0)

    def __str__(self) -> str:
        text = f"{self.strategy} gate_up={self.gate_up} down={self.down}"
        if self.crowded:
            text += f" crowded={self.crowded[0]}, {self.crowded[1]}"
        return f"{text} dependent" if self.dependent else text

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.crowded is None:
            del data["crowded"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Choice:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: not a choice.
        """
        if data["strategy"] not in STRATEGIES:
            raise ValueError(f"strategy={data['strategy']!r} is not one of {', '.join(STRATEGIES)}")
        tiles = {k: None if data[k] is None else Tile(**data[k]) for k in ("gate_up", "down")}
        crowded = data.get("crowded")
        if crowded is not None:
            up, down = crowded
            crowded = Tile(**up), Tile(**down)
        choice = cls(data["strategy"], tiles["gate_up"], tiles["down"], crowded=crowded)
        for tile in choice.tiles:
            sizes = {name: value for name, value in asdict(tile).items() if name != "kernel"}
            if not all(type(v) is int and v > 0 for v in sizes.values()):
                raise ValueError(f"tile {tile} has a field that is no positive integer")
            if tile.kernel not in KERNELS:
                raise ValueError(f"tile {tile}: kernel is not one of {', '.join(KERNELS)}")
            if tile.together & (tile.together - 1):
                raise ValueError(f"tile {tile}: together is no power of two")
            follows_sort = tile.kernel in SPECIALISED or tile.together > 1
            if follows_sort and data["strategy"] == "none":
                raise ValueError(f"tile {tile}: its kernels follow a sort")
            if tile.kernel in ("gathered", "registers") and data["strategy"] != "none":
                raise ValueError(f"tile {tile}: its kernels follow no sort")
        dependent = data.get("dependent", False)
        if type(dependent) is not bool:
            raise ValueError(f"dependent={dependent!r}: need true or false")
        if crowded is not None:
            blocks = {tile.bm for tile in crowded}
            if choice.gate_up is None or data["strategy"] == "none" or len(blocks) != 1:
                raise ValueError(f"{choice}: crowded tiles have one BM, and follow a sort")
            if choice.crowded_bm <= choice.gate_up.bm:
                raise ValueError(f"{choice}: crowded tiles have a larger BM than the others")
        return replace(choice, dependent=dependent)


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs for up to `tokens` rows.

    Args:
        tokens: the bucket B (captured), or the largest T of an eager range.
        captured: replayed as a graph, else launched kernel by kernel.
        choice: strategy and tiles.
        kernels: kernel names in launch order: exactly what a trace of one call shows.
        fields: the arena views it uses.
        source: "heuristic", "shipped", "cache" or "tuned".
        us: measured device time of one call in microseconds, where it was measured.
        default_us: the same for the heuristic choice.
    """

    tokens: int
    captured: bool
    choice: Choice
    kernels: tuple[str, ...]
    fields: tuple[Field, ...]
    source: str = "heuristic"
    us: float | None = None
    default_us: float | None = None

    @property
    def scratch_bytes(self) -> int:
        return layout(self.fields)[1]

    @property
    def margin(self) -> float | None:
        """How much faster than the heuristic default, as a fraction of its time."""
        if self.us is None or not self.default_us:
            return None
        return 1.0 - self.us / self.default_us


@dataclass(frozen=True, slots=True)
class PlanReport:
    """All plans of a runtime, with what holds for all of them; `str()` is a table."""

    backend: str
    same_bits: bool
    graphs: str
    notes: tuple[str, ...]
    plans: tuple[Plan, ...]

    def __iter__(self) -> Any:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def for_tokens(self, tokens: int) -> Plan:
        """The plan that a call of `tokens` rows runs (the largest one's chunks beyond the last)."""
        return next((p for p in self.plans if p.tokens >= tokens), self.plans[-1])

    def __str__(self) -> str:
        bits = "same bits every time" if self.same_bits else "sums in no fixed order"
        lines = [f"backend {self.backend}, graphs {self.graphs}, {bits}"]
        lines += [f"note: {note}" for note in self.notes]
        head = f"{'tokens':>7} {'run as':<7} {'source':<9} {'us':>8} {'margin':>7} {'scratch':>11}  choice"
        lines.append(head)
        for p in self.plans:
            us = "-" if p.us is None else f"{p.us:.1f}"
            margin = "-" if p.margin is None else f"{p.margin:.0%}"
            how = "graph" if p.captured else "eager"
            lines.append(
                f"{p.tokens:>7} {how:<7} {p.source:<9} {us:>8} {margin:>7} {p.scratch_bytes:>11}  "
                f"{p.choice}; {', '.join(p.kernels)}"
            )
        return "\n".join(lines)
