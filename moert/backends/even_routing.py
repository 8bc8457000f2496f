"""What to expect of an expert where routing is even."""

from __future__ import annotations

import math


def rows_of_nearly_all(mean: float) -> float:
    """Rows that nearly no expert has more of: the mean and two standard deviations."""
    return mean + 2.0 * math.sqrt(mean)
