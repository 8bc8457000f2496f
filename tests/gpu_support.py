"""What the GPU tests share: layers, random calls, guarded buffers, traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moert import ExpertWeights, MoEConfig, MoERuntime, TopK
from moert.steps.experts_reference import experts_reference

DEVICE = torch.device("cuda")
# HIP's graphs take over new addresses a limited number of times: there, any call may be an eager one
UPDATES_ARE_LIMITED = torch.version.hip is not None
# relative L2 error against the fp32 reference: two roundings of intermediates to the model's dtype
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}

GUARD = 7.0

# small, and no dimension a multiple of a tile
ODD = MoEConfig(num_experts=20, top_k=3, hidden_size=200, intermediate_size=104)
# as an engine would run it; large enough that two kernels overlap if anything lets them
REAL = MoEConfig(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=768)
BLOCK = replace(REAL, shared_experts=1, shared_gate=True)


@dataclass
class Case:
    """The tensors of one call; `behind`: rows after those of out, where nobody may write."""

    x: torch.Tensor
    topk: TopK
    out: torch.Tensor
    behind: torch.Tensor

    def expected(self, rt: MoERuntime) -> torch.Tensor:
        """What out holds after a call; asserts that what is behind it was left alone."""
        assert (self.behind == GUARD).all(), "rows behind out were written"
        return experts_reference(self.x, self.topk, rt.weights, rt.cfg)


def make_case(
    cfg: MoEConfig, tokens: int, seed: int = 0, id_dtype: torch.dtype = torch.int32
) -> Case:
    """Random routing with some ids that no expert has, out filled with NaN.

    Behind the rows of x and the routing weights there is NaN, behind the ids a valid one.
    """
    g = torch.Generator(DEVICE).manual_seed(seed * 100_003 + tokens)
    x = torch.randn(tokens, cfg.hidden_size, generator=g, device=DEVICE).to(cfg.torch_dtype)
    nan = float("nan")
    ids = torch.randint(0, cfg.num_experts, (tokens, cfg.top_k), generator=g, device=DEVICE)
    strange = torch.tensor([-1, cfg.num_experts, 1 << 30, -(1 << 31)], device=DEVICE)
    swap = torch.rand(ids.shape, generator=g, device=DEVICE) < 0.1
    which = torch.randint(0, 4, ids.shape, generator=g, device=DEVICE)
    ids = torch.where(swap, strange[which], ids).to(id_dtype)
    weights = torch.rand(tokens, cfg.top_k, generator=g, device=DEVICE)
    out, behind = before(torch.full_like(x, nan), GUARD)
    topk = TopK(before(weights, nan)[0], before(ids, 0)[0])
    return Case(before(x, nan)[0], topk, out, behind)


def rows(cfg: MoEConfig, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random x."""
    g = torch.Generator(DEVICE).manual_seed(seed * 1009 + tokens)
    return torch.randn(tokens, cfg.hidden_size, generator=g, device=DEVICE).to(cfg.torch_dtype)


def assert_nothing_is_allocated(call: Callable[[], None], first: int, calls: int) -> None:
    """By no account, in `calls` calls after the `first` ones. The device's free memory is one of them: no
    other process may use the device meanwhile."""
    for _ in range(first):
        call()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    free = torch.cuda.mem_get_info()[0]
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert torch.cuda.mem_get_info()[0] == free


def before(rows: torch.Tensor, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows at the start of a buffer that goes on with a few of `fill`, and those."""
    buffer = torch.full((rows.shape[0] + 5, rows.shape[1]), fill, dtype=rows.dtype, device=DEVICE)
    buffer[: rows.shape[0]] = rows
    return buffer[: rows.shape[0]], buffer[rows.shape[0] :]


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative L2 error within the dtype's tolerance; NaN never passes."""
    error = (out.float() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], f"relative L2 error {error.item():.2e}"


def guarded(rows: int, width: int, dtype: torch.dtype, fill: float, offset: int = 0) -> Any:
    """(view [rows, width] at an element offset, its whole buffer): `fill` before, after and in it."""
    guard = 4096
    buffer = torch.full((guard + offset + rows * width + guard,), fill, dtype=dtype, device=DEVICE)
    start = guard + offset
    return buffer[start : start + rows * width].view(rows, width), buffer


def runtime(cfg: MoEConfig, seed: int = 0, **options: Any) -> MoERuntime:
    """A runtime that never tunes, with few buckets unless told otherwise."""
    weights = ExpertWeights.random(cfg, seed=seed, device=DEVICE)
    options = {"tune": "off", "max_tokens": 96, "buckets": (1, 2, 4, 8, 16, 64), **options}
    if "share" in options:
        options = {"share": options["share"]}
    return MoERuntime(cfg, weights, **options)


def device_kernels(run: Callable[[], None]) -> list[str]:
    """Everything the device executed during `run`, in order: kernels, copies, fills."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run()
        torch.cuda.synchronize()
    # the profiler shows the ranges of `moert.labels` on the device's line too
    events = [
        event
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith("fused_moe_")
    ]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


def variant(cfg: MoEConfig, **changes: Any) -> MoEConfig:
    return replace(cfg, **changes)
