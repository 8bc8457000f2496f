"""What to expect of an expert where routing is even."""

from __future__ import annotations

import math


def rows_of_nearly_all(mean: float) -> float:
    """Rows that nearly no expert has more of: the mean and two standard deviations."""
    return mean + 2.0 * math.sqrt(mean)


def experts_hit(experts: int, top_k: int, tokens: int) -> float:
    """How many experts have a row: none of T tokens, each of which takes K of E, takes one of the others."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)
