"""What to expect of an expert where routing is even."""

from __future__ import annotations

import math


def rows_of_nearly_all(mean: float) -> float:
    """Rows that nearly no expert has more of: the mean and two standard deviations."""
    return mean + 2.0 * math.sqrt(mean)


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Expected number of experts that T uniformly routed tokens hit: E * (1 - (1 - K/E)^T)."""
    missed = max(0.0, 1.0 - top_k / num_experts)
    return float(num_experts * (1.0 - missed**tokens))
