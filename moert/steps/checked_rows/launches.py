"""Launches of the kernels that make a call fit for operators which check nothing."""

from __future__ import annotations

import torch

from moert.config import MoEConfig
from moert.launch import Launch
from moert.steps.checked_rows.triton import checked_rows_kernel, clear_live_rows_kernel

ROWS = 128  # routed rows a program takes
COLUMNS = 2048  # of a row cleared at a time, at most


def checked_rows_launch(cfg: MoEConfig, ids: torch.Tensor, weights: torch.Tensor) -> Launch:
    """Write checked ids (int32, E for rows of nobody) and fp32 weights, [T, K] each."""
    top_k = cfg.top_k
    return Launch(
        checked_rows_kernel,
        lambda tokens: (-(-tokens * top_k // ROWS), 1, 1),
        {"checked_ids_ptr": ids, "checked_weights_ptr": weights},
        {"E": cfg.num_experts, "K": top_k, "ROWS": ROWS},
        num_warps=2,
    )


def clear_live_rows_launch(cfg: MoEConfig) -> Launch:
    """Clear the rows of the caller's `out` that are live."""
    width = min(COLUMNS, 1 << (cfg.hidden_size - 1).bit_length())
    return Launch(
        clear_live_rows_kernel,
        lambda tokens: (tokens, 1, 1),
        {},
        {"H": cfg.hidden_size, "BN": width},
        num_warps=4,
    )
