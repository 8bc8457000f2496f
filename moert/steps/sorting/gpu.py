"""The public sort on a GPU: compile once a geometry, then launch on the caller's stream."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from moert.call import NAMES
from moert.device import device_facts
from moert.errors import StateError, UnsupportedError
from moert.launch import CompiledLaunch, Launch, compile_launch
from moert.steps.sorting.crossovers import default_strategy
from moert.steps.sorting.launches import feasible, sort_launches
from moert.steps.sorting.layout import SortedRows, scratch_shape

_compiled: dict[tuple[Any, ...], Any] = {}


def sort_gpu(
    strategy: str,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    block_size: int,
    num_valid: torch.Tensor | None,
    expert_mask: torch.Tensor | None,
    rows: SortedRows,
    scratch: torch.Tensor | None,
) -> None:
    """Launch a sort into `rows` on the current stream; the arguments are taken as checked.

    Args:
        strategy: "auto", "one_shot" or "multi_phase".
        scratch: for the multi-phase strategy, or None to take it from torch's allocator.

    Raises:
        UnsupportedError, StateError: as for `moert.sort`.
    """
    tokens, top_k = topk_ids.shape
    device = topk_ids.device
    facts = device_facts(device)
    if strategy == "auto":
        strategy = default_strategy(tokens, num_experts, top_k, facts)
    if reason := feasible(strategy, tokens, num_experts, top_k, facts):
        raise UnsupportedError(f"sort: {strategy} cannot run here: {reason}")
    with torch.cuda.device(device):
        views = rows._asdict()
        if strategy == "multi_phase":
            shape = scratch_shape(tokens, top_k, num_experts)
            if scratch is None:
                scratch = torch.empty(shape, dtype=torch.int32, device=device)
            views["sort_scratch"] = scratch.view(-1)[: shape[0] * shape[1]].view(shape)
        launches = sort_launches(
            strategy, facts, tokens, num_experts, top_k, block_size, views, expert_mask
        )
        limit = _no_limit(device) if num_valid is None else num_valid
        values = _call_values(topk_ids, topk_weights, limit)
        aligned = not (topk_ids.data_ptr() | topk_weights.data_ptr()) & 15
        stream = torch.cuda.current_stream(device).cuda_stream
        for launch in launches:
            compiled = _compile(launch, topk_weights.dtype, aligned, device)
            CompiledLaunch(launch, compiled).run(values, tokens, stream)


def _compile(launch: Launch, dtype: torch.dtype, aligned: bool, device: torch.device) -> Any:
    fixed = tuple(None if t is None else t.data_ptr() % 16 == 0 for t in launch.args.values())
    constants = tuple(launch.constants.items())
    key = (launch.name, constants, launch.num_warps, dtype, aligned, fixed, device.index)
    if key not in _compiled:
        _refuse_in_capture()
        _compiled[key] = compile_launch(launch, dtype, aligned=aligned, row_multiple=1)
    return _compiled[key]


@lru_cache(maxsize=64)
def _no_limit(device: torch.device) -> torch.Tensor:
    _refuse_in_capture()
    return torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)


def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise StateError(
            "sort: first use of these sizes, dtypes and alignments inside a stream capture; "
            "call it once with the same arguments before capturing"
        )


def _call_values(ids: torch.Tensor, weights: torch.Tensor, limit: torch.Tensor) -> list[int]:
    words = 2 if ids.dtype is torch.int64 else 1
    given = {
        "ids_ptr": ids.data_ptr(),
        "ids_stride": ids.stride(0) * words,
        "ids_words": words,
        "weights_f32_ptr": weights.data_ptr(),
        "weights_ptr": weights.data_ptr(),
        "weights_stride": weights.stride(0),
        "weights_are_f32": int(weights.dtype is torch.float32),
        "num_valid_ptr": limit.data_ptr(),
        "num_tokens": ids.shape[0],
    }
    return [given.get(name, 0) for name in NAMES]
