"""Sizes of rows of fixed-point numbers. Pure."""

from __future__ import annotations

STEP = 128  # columns that share an exponent, that rows are filled up to, and that kernels take at a time
BITS = 13  # of a number's fraction: q = x * 2^(BITS - e)


def padded_columns(columns: int) -> int:
    """Columns of a stored row."""
    return -(-columns // STEP) * STEP
