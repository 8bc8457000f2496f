"""Which of two backends serves a layer: both are tuned, then their times are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from moert.backends.base import Backend
from moert.errors import MoertError
from moert.plan import Plan
from moert.tuning.measure import MARGIN

Planner = Callable[[Backend], tuple[Plan, ...]]


def contest(
    first: Backend, rival: type[Backend] | str | None, planner: Planner
) -> tuple[Backend, tuple[Plan, ...], tuple[str, ...]]:
    """The faster backend, its plans, and what is to be said of the other.

    A layer runs on one backend, whatever the size of its calls: what counts is the geometric mean over all
    sizes of the ratio of times. The rival has to be faster by the margin that any candidate has to be.

    Args:
        first: taken where nothing can be said.
        rival: another backend that can serve the layer, a note why none is timed, or None.
        planner: tunes a backend; plans of one come in the order of the other's.
    """
    plans = planner(first)
    if rival is None or isinstance(rival, str):
        return first, plans, () if rival is None else (rival,)
    name = rival.name
    try:
        other = rival(first.cfg, first.weights, first.facts)
        others = planner(other)
    except torch.OutOfMemoryError:
        note = f"backend {name}: not timed, no memory for its copy of the weights"
        return first, plans, (note,)
    except MoertError as error:
        return first, plans, (f"backend {name}: not timed: {error}",)
    ratio = mean_ratio(plans, others)
    if ratio is None:
        note = f"backend {name}: could not be timed at every size: {first.name} taken"
        return first, plans, (note,)
    said = f"takes {ratio:.2f} times as long as {first.name} (mean of {len(plans)} sizes)"
    if ratio > 1.0 - MARGIN:
        return first, plans, (f"backend {name}: {said}",)
    return other, others, (f"backend {first.name}: passed over, {name} {said}",)


def mean_ratio(plans: Sequence[Plan], others: Sequence[Plan]) -> float | None:
    """The geometric mean of the others' times over the plans'; None where one was not measured."""
    logs = []
    for plan, other in zip(plans, others, strict=True):
        if not plan.us or not other.us:
            return None
        logs.append(math.log(other.us / plan.us))
    return math.exp(sum(logs) / len(logs))
