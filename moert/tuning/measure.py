"""How candidates are timed: on which weights, how often, and what it takes to beat the default.

Decode reads weights from memory, so a timing on weights that a cache still holds is a timing of something
else. Successive calls of a timed graph therefore route to the experts that were used longest ago.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from moert.device import DeviceFacts
from moert.topk import all_as_first, distinct_ids

T = TypeVar("T")

MARGIN: Final = 0.02  # the default is only replaced by what is faster by this fraction of its time
COLD_CACHES: Final = 4  # bytes between two uses of an expert, in caches, that a graph should reach
BARELY_COLD: Final = 2  # and below this many it is called warm
MIN_CALLS, MAX_CALLS = 4, 64  # calls in one graph
GRAPH_BYTES: Final = 1 << 30  # read by one graph of short calls, so that its launch is hidden
MAX_COPIES: Final = 16
COPY_FRACTION: Final = 0.1  # of the free device memory

# bytes of the memory-side cache behind the L2, which torch does not report (AMD's CDNA 3, CDNA 4 and RDNA 3
# white papers: "Infinity Cache"); gfx1201: RX 9070 XT data sheet
_MEMORY_SIDE_CACHE: Final = {
    "gfx942": 256 << 20,
    "gfx950": 256 << 20,
    "gfx1100": 96 << 20,
    "gfx1151": 32 << 20,
    "gfx1201": 64 << 20,
}


def cache_bytes(facts: DeviceFacts) -> int:
    """The largest cache that weights could stay in."""
    return max(facts.l2_bytes, _MEMORY_SIDE_CACHE.get(facts.arch, 0), 1 << 20)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How the calls of one timed graph spread over the weights.

    Args:
        calls: in one graph, each with its own routing.
        copies: of the layer's weights, its own tensors included.
        cold: no cache holds an expert until its next use.
    """

    calls: int
    copies: int
    cold: bool


def plan_rotation(layer_bytes: int, hit_bytes: int, cache: int, free_bytes: int) -> Rotation:
    """Spread calls over the layer's own experts; copy the weights only where those few are too small.

    Args:
        layer_bytes: of all experts' weights.
        hit_bytes: of the weights that one call reads.
        cache: bytes of the largest cache.
        free_bytes: of device memory.
    """
    wanted = COLD_CACHES * cache
    copies = 1
    if layer_bytes < wanted:
        copies = min(MAX_COPIES, -(-wanted // layer_bytes))
        extra = (copies - 1) * layer_bytes
        reached = min(copies * layer_bytes, MAX_CALLS * hit_bytes)
        if extra > COPY_FRACTION * free_bytes or reached < BARELY_COLD * cache:
            copies = 1
    calls = -(-max(wanted, GRAPH_BYTES) // max(hit_bytes, 1))
    calls = max(MIN_CALLS, copies, min(calls, MAX_CALLS))
    touched = min(calls * hit_bytes, copies * layer_bytes)
    return Rotation(calls, copies, touched >= BARELY_COLD * cache)


def rotated_ids(
    num_experts: int, top_k: int, tokens: int, rotation: Rotation, seed: int = 0
) -> Iterator[tuple[int, torch.Tensor]]:
    """(copy of the weights, ids [T, K] int32 on the CPU) of each call of a graph.

    Every routing is uniformly random; only which experts carry the names it uses is chosen, so that a call
    takes the experts of its copy that were used longest ago.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def shuffled(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")

    ages = [shuffled(num_experts) for _ in range(rotation.copies)]  # longest unused first
    for call in range(rotation.calls):
        copy = call % rotation.copies
        scores = torch.rand(
            tokens, num_experts, generator=generator, dtype=torch.float32, device="cpu"
        )
        drawn = distinct_ids(scores, top_k).long()
        used = drawn[drawn >= 0].unique()
        fresh, rest = ages[copy][: used.numel()], ages[copy][used.numel() :]
        names = torch.empty(num_experts, dtype=torch.int64, device="cpu")
        names[used] = fresh[shuffled(used.numel())]
        ages[copy] = torch.cat((rest, fresh))
        # K - E of the ids of a shard with fewer experts than K are nobody's
        yield copy, torch.where(drawn >= 0, names[drawn.clamp_min(0)], -1).to(torch.int32)


# (groups of replays that each entrant is timed for, then the fraction that stays): a rough look at all, a
# closer one at a third, a long one at the last few
STAGES: Final = ((2, 1 / 3), (6, 1 / 3), (20, 1.0))
MIN_SURVIVORS: Final = 3


def same_experts(
    routings: Sequence[tuple[int, torch.Tensor]],
) -> Iterator[tuple[int, torch.Tensor]]:
    """The routings of `rotated_ids` if all tokens took the experts of the first one."""
    for copy, ids in routings:
        yield copy, all_as_first(ids)


def successive_halving(
    entrants: Sequence[T],
    anchor: T | None,
    time: Callable[[Sequence[T], int], Sequence[Sequence[float]]],
    out_of_time: Callable[[], bool],
) -> dict[T, float]:
    """Median time of the entrants that were worth timing to the end, the anchor and those level with the
    fastest always among them.

    Args:
        entrants: distinct, hashable.
        anchor: an entrant that is never dropped.
        time: (entrants, groups) to the times of each entrant's groups, taken in turns.
        out_of_time: asked between stages; after a yes the last stage's medians stand.
    """
    left = list(entrants)
    medians: dict[T, float] = {}
    for groups, keep in STAGES:
        times = time(left, groups)
        medians = {e: statistics.median(t) for e, t in zip(left, times, strict=True)}
        if out_of_time():
            break
        count = max(MIN_SURVIVORS, round(len(left) * keep))
        best = {*sorted(left, key=medians.__getitem__)[:count], *level(medians)}
        left = [e for e in left if e in best or e == anchor]
    return medians


def level(medians: dict[T, float], margin: float = MARGIN) -> dict[T, float]:
    """Those within the margin of the fastest."""
    limit = min(medians.values()) / (1.0 - margin)
    return {entrant: us for entrant, us in medians.items() if us <= limit}


def contenders(
    medians: dict[T, float], base: T, anchor: T | None, of_base: Collection[T] = ()
) -> list[T]:
    """The base, and what may stand in for it: no slower than by the margin, and if the base is not the
    anchor, faster than that by the margin.

    Args:
        medians: by even routing.
        base: as `pick` says.
        of_base: variants of the base. The anchor is replaced by no others.
    """
    limit = medians[base] / (1.0 - MARGIN)
    if base == anchor:
        able = [e for e in of_base if medians.get(e, math.inf) <= limit]
    else:
        if anchor in medians:
            limit = min(limit, (1.0 - MARGIN) * medians[anchor])
        able = [e for e, us in medians.items() if us <= limit]
    return [base, *(e for e in able if e != base)]


def steadiest(base: T, medians: dict[T, float], skewed: dict[T, float]) -> T:
    """The base, or of its contenders one that is faster by the margin where routing is as uneven as can be;
    of those that are level there, the one that is fastest by even routing.

    Args:
        medians: by even routing.
        skewed: of the base and its contenders, by uneven routing; what could not be timed so is missing.
    """
    if base not in skewed:
        return base
    able = {e: us for e, us in skewed.items() if us <= (1.0 - MARGIN) * skewed[base]}
    return min(level(able), key=medians.__getitem__) if able else base


def pick(medians: dict[T, float], anchor: T | None, margin: float = MARGIN) -> T:
    """The fastest, or the anchor unless it is beaten by more than the margin."""
    best = min(medians, key=medians.__getitem__)
    if anchor in medians and medians[best] > (1.0 - margin) * medians[anchor]:
        return anchor
    return best
