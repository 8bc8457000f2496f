"""One call of a choice's program under the interpreter, and what its arrays hold after it."""

from __future__ import annotations

import torch
from expert_cases import relative_error
from runtime_cases import NAN, TOLERANCE, Case

from moert import MoEConfig
from moert.arena import Arena, layout
from moert.backends.triton import TritonBackend
from moert.call import Call, call_key
from moert.plan import Choice
from moert.steps.activation import activate_reference
from moert.steps.experts_reference import split_gate_up
from moert.weights import ExpertWeights

CPU = torch.device("cpu")
NO_LIMIT = torch.tensor(2**31 - 1, dtype=torch.int32)


def run(
    backend: TritonBackend,
    choice: Choice,
    case: Case,
    *,
    bucket: int | None = None,
    live: int | None = None,
    pad: str = "keep",
) -> dict[str, torch.Tensor]:
    """The arena's arrays after one call that found them full of NaN and -1.

    Args:
        bucket: rows of the plan and its grids; those of the call by default.
        live: count in a tensor.
    """
    bucket = bucket or case.x.shape[0]
    fields = backend.fields(bucket, choice)
    arena = Arena(CPU, layout(fields)[1])
    arena.poison()
    views = arena.views(fields)
    call = Call(NO_LIMIT, 1)
    count = None if live is None else torch.tensor(live, dtype=torch.int32)
    key = call_key(case.x, case.topk, case.out, count, pad)
    call.set(key, case.x, case.topk, case.out, count)
    call.tokens = bucket
    backend.program(bucket, choice, views).run(call, 0)
    return views


def intermediates(
    cfg: MoEConfig, weights: ExpertWeights, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [S, I] and y [S, H] in float32, NaN for rows whose id no expert has."""
    slots = case.x.shape[0] * cfg.top_k
    h = torch.full((slots, cfg.intermediate_size), NAN)
    y = torch.full((slots, cfg.hidden_size), NAN)
    for row, expert in enumerate(case.topk.ids.reshape(-1).tolist()):
        if not 0 <= expert < cfg.num_experts:
            continue
        up = case.x[row // cfg.top_k].float() @ weights.w13[expert].float().T
        if weights.b13 is not None:
            up = up + weights.b13[expert].float()
        gate, up = split_gate_up(up[None], cfg.gated, weights.interleaved)
        h[row] = activate_reference(gate, up, cfg)[0].to(cfg.torch_dtype)
        y[row] = h[row] @ weights.w2[expert].float().T
        if weights.b2 is not None:
            y[row] += weights.b2[expert].float()
        y[row] *= case.topk.weights.reshape(-1)[row]
    return h, y


def assert_rows(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Close where there is a row, untouched (still NaN) where there is none."""
    rows = ~expected.isnan().any(1)
    assert got[~rows].isnan().all()
    if rows.any():
        assert relative_error(got[rows], expected[rows]) < TOLERANCE[got.dtype]
