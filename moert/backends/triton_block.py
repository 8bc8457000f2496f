"""The steps before a whole block's experts on a GPU: two launches, or one where the caller routed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moert.arena import Field
from moert.backends.base import BlockSteps, Program
from moert.backends.triton_tile_limits import is_rdna
from moert.call import Call
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.labels import Labels
from moert.launch import Launch, in_a_row
from moert.steps.block.triton import (
    routed_slots_kernel,
    router_logits_kernel,
    router_logits_tiled_kernel,
)
from moert.steps.routing.triton import routing_fwd_kernel, routing_launch
from moert.weights import ExpertWeights

Views = dict[str, torch.Tensor]
Bind = Callable[[list[Launch], bool], Program]

SLOT_ROWS = 256  # (token, slot) pairs that a program of routed_slots_kernel takes
LEAST_PART = 256  # columns of H: shorter parts are not worth a program's start


@dataclass(frozen=True, slots=True)
class Tier:
    """How the router's logits of up to `tokens` rows are made.

    Args:
        tokens: the largest T.
        bm, bn, bk: tile; bm = 0 stands for one value a program, without matrix units.
        parts: of H, summed by the routing kernel.
        part: columns of a part, a multiple of bk.
        num_warps: of a program.
    """

    tokens: int
    bm: int
    bn: int
    bk: int
    parts: int
    part: int
    num_warps: int


def router_tiers(cfg: MoEConfig, facts: DeviceFacts, rows: int) -> tuple[Tier, ...]:
    """Tiers for 1..rows tokens, ascending; pure.

    Parts are as many as give all compute units work, at the tokens for which the tier is typical.
    """
    hidden, columns = cfg.hidden_size, cfg.num_experts + cfg.shared_gate
    whole = max(16, 1 << (hidden - 1).bit_length())
    long = min(whole, 8192)
    tiers = [Tier(2, 0, 1, long, 1, hidden, 8 if long > 4096 else 4)]
    for tokens, bm, typical in ((16, 16, 16), (256, 64, 128), (1 << 24, 64, 1024)):
        bn, bk = 32, min(whole, 128 if bm == 16 else 64)
        tiles = -(-columns // bn) * (typical // bm)
        most = max(1, min(16, facts.compute_units // tiles, hidden // LEAST_PART))
        part = -(-hidden // most)
        part = -(-part // bk) * bk
        tiers.append(Tier(tokens, bm, bn, bk, -(-hidden // part), part, 2 if bm == 16 else 4))
    needed = 1 + bisect_left([tier.tokens for tier in tiers], rows)
    return tuple(tiers[:needed])


def unaligned_tier(tiers: tuple[Tier, ...]) -> Tier:
    """For any tokens, where nothing is known of the caller's addresses: one kernel that is always right."""
    last = tiers[-1]
    bk = min(last.bk, 64)
    return Tier(last.tokens, 16, 32, bk, 1, -(-last.part * last.parts // bk) * bk, 2)


def logits_field(cfg: MoEConfig, facts: DeviceFacts, rows: int) -> Field:
    """The partial logits of whichever tier has most of them."""
    columns = cfg.num_experts + cfg.shared_gate
    tiers = router_tiers(cfg, facts, rows)
    return Field(
        "logits", (max(min(t.tokens, rows) * t.parts for t in tiers), columns), torch.float32
    )


def route_launches(
    cfg: MoEConfig, facts: DeviceFacts, weights: ExpertWeights, tier: Tier, rows: int, views: Views
) -> list[Launch]:
    """Router logits, then routing with the shared experts' slots; calls of up to `rows` tokens."""
    _, routing, warps = routing_launch(cfg, min(tier.tokens, rows), shared=True, parts=tier.parts)
    bias = weights.correction_bias if cfg.routing.correction_bias else None
    block_t = routing["BLOCK_T"]
    launches = [
        _logits_launch(cfg, facts, weights, tier, views["logits"]),
        Launch(
            routing_fwd_kernel,
            lambda tokens: (-(-tokens // block_t), 1, 1),
            {
                "logits_ptr": views["logits"],
                "correction_bias_ptr": bias,
                "routed_weights_ptr": views["slot_weights"],
                "routed_ids_ptr": views["slot_ids"],
                "logits_stride": cfg.num_experts + cfg.shared_gate,
            },
            routing,
            warps,
            num_stages=1,
        ),
    ]
    return in_a_row(launches, facts.dependent_launch)


def _logits_launch(
    cfg: MoEConfig, facts: DeviceFacts, weights: ExpertWeights, tier: Tier, logits: torch.Tensor
) -> Launch:
    router, gate = weights.router_weight, weights.shared_gate
    assert router is not None
    columns = cfg.num_experts + cfg.shared_gate
    args = {
        "router_ptr": router,
        "router_bias_ptr": weights.router_bias,
        "gate_ptr": gate if cfg.shared_gate else None,
        "logits_ptr": logits,
    }
    constants = {
        "E": cfg.num_experts,
        "COLUMNS": columns,
        "H": cfg.hidden_size,
        "R_E": router.stride(0),
        "R_H": router.stride(1),
        "G_H": 0 if gate is None else gate.stride(1),
        "BK": tier.bk,
    }
    if not tier.bm:
        grid = lambda tokens: (tokens * columns, 1, 1)  # noqa: E731
        return Launch(router_logits_kernel, grid, args, constants, tier.num_warps, num_stages=1)
    dtypes = {cfg.torch_dtype, router.dtype, *(() if gate is None else (gate.dtype,))}
    wide = len(dtypes) > 1 or cfg.torch_dtype == torch.float32
    # RDNA multiplies fp32 without matrix units, every product in registers
    bk = min(tier.bk, 16) if wide and is_rdna(facts) else tier.bk
    programs = -(-columns // tier.bn) * tier.parts
    return Launch(
        router_logits_tiled_kernel,
        lambda tokens: (programs * -(-tokens // tier.bm), 1, 1),
        args,
        {
            **constants,
            "BK": bk,
            "PARTS": tier.parts,
            "PART": tier.part,
            "WIDE": wide,
            "BM": tier.bm,
            "BN": tier.bn,
        },
        tier.num_warps,
        num_stages=2,
    )


def take_launch(cfg: MoEConfig, views: Views) -> Launch:
    """The caller's K slots, and n of nobody."""
    slots = cfg.top_k + cfg.shared_experts
    return Launch(
        routed_slots_kernel,
        lambda tokens: (-(-tokens * slots // SLOT_ROWS), 1, 1),
        {"slot_ids_ptr": views["slot_ids"], "slot_weights_ptr": views["slot_weights"]},
        {"E": cfg.num_experts, "K": cfg.top_k, "SLOTS": slots, "ROWS": SLOT_ROWS},
        num_warps=2,
        num_stages=1,
    )


class TritonBlockSteps(BlockSteps):
    """The launches, bound to the views.

    Args:
        cfg: the layer, shared experts apart.
        rows: the most tokens of a call.
        views: of `slot_fields` and `logits_field`.
        bind: launches, and whether calls are aligned, to a program.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        facts: DeviceFacts,
        weights: ExpertWeights,
        rows: int,
        views: Views,
        bind: Bind,
    ) -> None:
        tiers = router_tiers(cfg, facts, rows)
        self._limits = [tier.tokens for tier in tiers]
        self._route: list[Program] = []
        self._unaligned: Program | None = None
        if weights.router_weight is not None and cfg.can_route:
            chains = [
                route_launches(cfg, facts, weights, tier, rows, views)
                for tier in (*tiers, unaligned_tier(tiers))
            ]
            self._route = [bind(chain, True) for chain in chains[:-1]]
            self._unaligned = bind(chains[-1], False)
        # its accesses are as narrow as ids are, whatever the addresses
        self._take = bind([take_launch(cfg, views)], False) if cfg.shared_experts else None

    def route(self, call: Call, stream: int, labels: Labels) -> None:
        assert self._unaligned is not None
        program = self._unaligned
        if call.aligned:
            program = self._route[bisect_left(self._limits, call.tokens)]
        program.launch(call, stream, labels)

    def take(self, call: Call, stream: int, labels: Labels) -> None:
        assert self._take is not None
        self._take.launch(call, stream, labels)
