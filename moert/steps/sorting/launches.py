"""Which sort strategies a device can run, the buffers they need, and their launches. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moert.device import DeviceFacts
from moert.launch import Launch, in_a_row
from moert.steps.sorting.few_rows import MAX_PLACES, sort_one_shot_few_kernel
from moert.steps.sorting.few_rows import MAX_ROWS as FEW_ROWS
from moert.steps.sorting.layout import (
    MAX_SHARES,
    MAX_TOKENS,
    MAX_TOP_K,
    PHASE_TILE,
    max_blocks,
    num_shares,
    padded_experts,
    padded_rows,
    scratch_shape,
)
from moert.steps.sorting.triton import (
    sort_count_kernel,
    sort_one_shot_kernel,
    sort_place_kernel,
    sort_scan_kernel,
)

MAX_EXPERTS = 1024
MAX_ROWS = 2**30  # positions are int32
MAX_ONE_SHOT_ROWS = 65536  # every workgroup counts all rows: the work grows with their square
# us on an H200 (E=128, K=8), one-shot and multi-phase: 3.1 and 7.6 at 1024 rows, 5.3 and 7.7 at 2048,
# 10 and 7.7 at 2560
ONE_SHOT_TILE = 1024  # rows counted at a time, at most
SCAN_COLUMNS = 8
PADDED_EXPERTS = 16  # whose padding a multi-phase workgroup stores at a time


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def one_shot_tile(rows: int) -> int:
    """C: S as a power of two, within bounds."""
    return max(64, min(ONE_SHOT_TILE, _power_of_two(rows)))


def one_shot_share(rows: int) -> int:
    """Rows a workgroup compares with all others and places.

    Best on an H200: 4 at 64 rows, 8 at 512 and 1024, 16 at 4096 (32 is as fast, but spills registers).
    """
    return max(4 if rows <= 256 else 8, min(16, _power_of_two(-(-rows // 128))))


def shared_bytes(tile: int, num_experts: int) -> int:
    """Upper bound of a kernel's shared memory, checked by compiling the kernels for every target.

    Counts and places of all experts, [EP] int32, go through it, and the tile's C rows where a layout changes.
    """
    return 4 * (padded_experts(num_experts) + tile) + 4096


def feasible(
    strategy: str, tokens: int, num_experts: int, top_k: int, facts: DeviceFacts
) -> str | None:
    """Why a device cannot run a strategy for up to `tokens` rows of K ids; None if it can."""
    if strategy == "none":
        return None
    rows = tokens * top_k
    need = shared_bytes(
        PHASE_TILE if strategy == "multi_phase" else one_shot_tile(rows), num_experts
    )
    reasons = {
        f"unknown strategy {strategy!r}": strategy not in ("one_shot", "multi_phase"),
        f"E={num_experts} exceeds {MAX_EXPERTS}": num_experts > MAX_EXPERTS,
        f"K={top_k} exceeds {MAX_TOP_K}": top_k > MAX_TOP_K,
        f"T={tokens} is not below 2^24": tokens >= MAX_TOKENS,
        f"S={rows} exceeds 2^30": rows > MAX_ROWS,
        f"S={rows} exceeds {MAX_ONE_SHOT_ROWS}, too many for every workgroup to count": (
            strategy == "one_shot" and rows > MAX_ONE_SHOT_ROWS
        ),
        f"needs {need} bytes of shared memory, {facts.name} has {facts.shared_memory}": (
            facts.kind != "cpu" and need > facts.shared_memory
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def sort_fields(
    strategy: str,
    tokens: int,
    num_experts: int,
    top_k: int,
    block_m: int,
    crowded_block_m: int = 0,
    least_block_m: int = 0,
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of the buffers that a sort of up to `tokens` rows writes.

    Args:
        crowded_block_m: larger than `block_m`, or 0; see `moert.steps.sorting.block_size`.
        least_block_m: of another sort that writes the same buffers, or 0.
    """
    if strategy == "none":
        return ()
    blocks = [block for block in (block_m, crowded_block_m, least_block_m) if block]
    rows = max(padded_rows(tokens, top_k, num_experts, block) for block in blocks)
    fields: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = (
        ("sorted_token_ids", (rows,), torch.int32),
        ("sorted_weights", (rows,), torch.float32),
        ("sorted_expert_ids", (max_blocks(tokens, top_k, num_experts, min(blocks)),), torch.int32),
        ("num_valid_ids", (2,), torch.int32),
    )
    if crowded_block_m:
        fields += (("crowded_valid_ids", (2,), torch.int32),)
    if strategy == "multi_phase":
        fields += (("sort_scratch", scratch_shape(tokens, top_k, num_experts), torch.int32),)
    return fields


def sort_launches(
    strategy: str,
    facts: DeviceFacts,
    tokens: int,
    num_experts: int,
    top_k: int,
    block_m: int,
    views: Mapping[str, torch.Tensor],
    expert_mask: torch.Tensor | None = None,
    dependent: bool = False,
    crowded_block_m: int = 0,
    reach: int = 0,
) -> list[Launch]:
    """Launches that sort up to `tokens` rows into `views` (the arrays of `sort_fields`, or larger ones).

    Args:
        tokens: of the bucket or call; a launch with fewer is bounded by the count on the device.
        expert_mask: [E] int32, 0 for experts to leave out; None to keep all.
        dependent: each launch starts while its predecessor drains.
        crowded_block_m: as for `sort_fields`.
        reach: rows that one reading of an expert's weights serves in blocks of `block_m`, if more than that.
    """
    if strategy == "none":
        return []
    outputs: dict[str, torch.Tensor | None] = {
        f"{name}_ptr": views[name]
        for name in ("sorted_token_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")
    }
    outputs["crowded_valid_ids_ptr"] = views["crowded_valid_ids"] if crowded_block_m else None
    experts, tallest = padded_experts(num_experts), max(block_m, crowded_block_m)
    sizes = {"K": top_k, "EP": experts}
    rest = {
        "E": num_experts,
        "BM": block_m,
        "CROWDED_BM": crowded_block_m,
        "REACH": reach or block_m,
        "WIDTH": _power_of_two(tallest),
    }
    masked = {"expert_mask_ptr": expert_mask}
    if strategy == "one_shot":
        few = tokens * top_k <= min(FEW_ROWS, ONE_SHOT_TILE)
        few = few and padded_rows(tokens, top_k, num_experts, tallest) < MAX_PLACES
        plan = _few_rows if few else _one_shot
        one = plan(facts, tokens, top_k, {**outputs, **masked}, {**sizes, **rest})
        return in_a_row([one], dependent)

    def grid(rows: int) -> tuple[int, int, int]:
        return num_shares(min(rows, tokens), top_k), 1, 1

    sizes |= {"C": PHASE_TILE, "SHARES": MAX_SHARES}
    scratch = views["sort_scratch"]
    depth = max(16, _power_of_two(num_shares(tokens, top_k)))
    counts = {"counts_ptr": scratch}
    totals = {"totals_ptr": scratch[num_shares(tokens, top_k)]}
    phases = [
        Launch(
            sort_count_kernel,
            grid,
            {**masked, **counts},
            {**sizes, "E": num_experts},
            _warps(128, facts),
        ),
        Launch(
            sort_scan_kernel,
            lambda _: (experts // SCAN_COLUMNS, 1, 1),
            {**counts, **totals},
            {**sizes, "COLUMNS": SCAN_COLUMNS, "DEPTH": depth},
            _warps(128, facts),
        ),
        Launch(
            sort_place_kernel,
            grid,
            {**outputs, **masked, **counts, **totals},
            {**sizes, **rest, "EXPERTS": PADDED_EXPERTS},
            # where experts are padded, 4 warps spill two registers on NVIDIA
            _warps(256 if facts.kind == "cuda" and experts > num_experts else 128, facts),
        ),
    ]
    return in_a_row(phases, dependent)


def _one_shot(
    facts: DeviceFacts, tokens: int, top_k: int, args: dict[str, Any], sizes: dict[str, int]
) -> Launch:
    rows = tokens * top_k
    tile, share = one_shot_tile(rows), one_shot_share(rows)
    # 64 threads were best on an H200 at 64 rows, 128 at 512, 256 from 1024 on
    threads = 64 if tile <= 128 else 128 if tile <= 512 else 256
    options = {}
    if facts.arch == "sm_90" and sizes["WIDTH"] > 64:
        share = min(share, 8)  # 16 spill
    if facts.kind == "cuda" and (facts.arch != "sm_90" or sizes["EP"] > sizes["E"]):
        # the compiler would rather spill a register or two and have more warps
        options = {"maxnreg": 128}

    def grid(rows: int) -> tuple[int, int, int]:
        return max(1, -(-min(rows, tokens) * top_k // share)), 1, 1

    constants = {**sizes, "C": tile, "SHARE": share, "ONE_TILE": rows <= tile}
    return Launch(
        sort_one_shot_kernel, grid, args, constants, _warps(threads, facts), options=options
    )


def _few_rows(
    facts: DeviceFacts, tokens: int, top_k: int, args: dict[str, Any], sizes: dict[str, int]
) -> Launch:
    """One warp of 32 lanes for each row that a program places."""
    rows = tokens * top_k
    share = 4 if rows <= 128 else 8

    def grid(rows: int) -> tuple[int, int, int]:
        # one row more than there are
        return min(rows, tokens) * top_k // share + 1, 1, 1

    constants = {name: sizes[name] for name in ("E", "K", "BM", "CROWDED_BM", "REACH")}
    constants |= {"EP": max(32, sizes["EP"]), "C": max(32, _power_of_two(rows)), "SHARE": share}
    return Launch(sort_one_shot_few_kernel, grid, args, constants, _warps(32 * share, facts))


def _warps(threads: int, facts: DeviceFacts) -> int:
    return max(1, threads // facts.warp_size)
