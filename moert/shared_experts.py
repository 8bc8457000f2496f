"""Shared experts as experts of the routed ones' size, behind them in the same tensors.

A shared expert computes w2 @ (act(gate @ x) * (up @ x)) with S inner columns, whatever I is. Cut into parts
of I columns it is a sum of experts of size I, so the launches of the routed experts can compute it: every
token has these as well. The last part is filled up with zeros, which add nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moert.errors import WeightsError

if TYPE_CHECKING:
    from moert.weights import ExpertWeights


def parts_of(size: int, inner: int) -> int:
    """How many experts of size I a shared expert of some size is."""
    return -(-size // inner)


def fill_shared(
    w13: torch.Tensor,
    w2: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
) -> None:
    """Write a shared expert of size S in n = ceil(S / I) parts.

    Args:
        w13: [n, 2I, H] ([n, I, H] without a gate), w2: [n, H, I]; written entirely.
        gate, up: [S, H], down: [H, S], any floating dtype and device.
    """
    parts, _, inner = w2.shape
    size = up.shape[0]
    for part in range(parts):
        columns = slice(part * inner, (part + 1) * inner)
        count = min(inner, size - part * inner)
        for first, rows in ((w13.shape[1] - inner, up), (0, gate)):
            if rows is not None:
                w13[part, first : first + count].copy_(rows[columns])
                w13[part, first + count : first + inner].zero_()
        w2[part, :, :count].copy_(down[:, columns])
        w2[part, :, count:].zero_()


def appended(
    weights: ExpertWeights, w13: torch.Tensor, w2: torch.Tensor, gate: torch.Tensor | None
) -> dict[str, Any]:
    """The fields that `ExpertWeights.append_shared` changes; arguments and errors are told there."""
    if not (isinstance(weights.w13, torch.Tensor) and isinstance(weights.w2, torch.Tensor)):
        raise WeightsError("w13: int4; append shared experts first, then quantize")
    (experts, rows, hidden), inner = weights.w13.shape, weights.w2.shape[2]
    gated = rows == 2 * inner
    size = w2.shape[1] if isinstance(w2, torch.Tensor) and w2.ndim == 2 else 0
    shapes = {"w13": ((1 + gated) * size, hidden), "w2": (hidden, size), "gate": (1, hidden)}
    for name, given in (("w13", w13), ("w2", w2), ("gate", gate)):
        if name == "gate" and given is None:
            continue
        if not isinstance(given, torch.Tensor) or tuple(given.shape) != shapes[name] or not size:
            what = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            rows_of = "2S" if gated else "S"
            need = {"w13": f"[{rows_of}, H={hidden}]", "w2": f"[H={hidden}, S]"}
            raise WeightsError(
                f"shared {name}: got {what}, need {need.get(name, f'[1, H={hidden}]')} of one S >= 1"
            )
    count = parts_of(size, inner)
    made13 = weights.w13.new_empty(experts + count, rows, hidden)
    made2 = weights.w2.new_empty(experts + count, hidden, inner)
    made13[:experts].copy_(weights.w13)
    made2[:experts].copy_(weights.w2)
    fill_shared(made13[experts:], made2[experts:], w13[:size] if gated else None, w13[-size:], w2)
    if weights.interleaved:
        shared = made13[experts:].unflatten(1, (2, inner)).transpose(1, 2)
        made13[experts:] = shared.flatten(1, 2)
    changed: dict[str, Any] = {"w13": made13, "w2": made2, "shared_gate": gate}
    for name in ("b13", "b2"):
        bias = getattr(weights, name)
        if bias is not None:
            changed[name] = torch.cat((bias, bias.new_zeros(count, bias.shape[1])))
    if gate is not None:
        changed["shared_gate"] = gate.detach().to(weights.device)
    return changed
