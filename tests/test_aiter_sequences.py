"""Further formats of weights are further sequences: one that quantises x runs through the same backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import aiter_stand_in
import pytest
import torch
from aiter_cases import CFG, MI300, make, poison, routing, rows
from aiter_stand_in import StandIn, demand, sorted_rows
from expert_cases import relative_error

from moert import ExpertWeights
from moert.arena import Field
from moert.backends import aiter_sequences
from moert.backends.aiter import AiterBackend
from moert.backends.aiter_ops import AiterOps
from moert.backends.aiter_sequences import SEQUENCES, Packed, Plain, Sequence, Step, sequence_of
from moert.config import MoEConfig, Quant
from moert.steps.experts_reference import experts_reference

BITS8 = 2e-2  # relative error of rows and weights in 8 bits


def quantise(out: torch.Tensor, input: torch.Tensor, scales: torch.Tensor) -> None:
    """Rows in 8 bits, a scale each."""
    demand(out.shape == input.shape and scales.shape == (len(input), 1), "a scale a row")
    scales.copy_(input.float().abs().amax(1, keepdim=True) / 127)
    out.copy_((input.float() / scales).round())


def scaled_stage1(
    x8: torch.Tensor,
    w1: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    out: torch.Tensor,
    a1_scale: torch.Tensor,
    w1_scale: torch.Tensor,
    block_m: int,
) -> None:
    """Gate/up of 8-bit rows and weights, one scale a row and one a weight row."""
    lists, inner = (sorted_token_ids, sorted_expert_ids, num_valid_ids), out.shape[2]
    for _, expert, token, slot in sorted_rows(*lists, len(x8), block_m):
        y = (w1[expert].float() @ x8[token].float()) * w1_scale[expert] * a1_scale[token]
        gate, up = y.split(inner)
        out[token, slot] = torch.nn.functional.silu(gate) * up


@dataclass(frozen=True)
class Scaled(Packed):
    w1_scale: torch.Tensor


class EightBits(Sequence):
    """x and w13 in 8 bits, the rest as `Plain` has it."""

    operators: ClassVar = {
        "quantise": ("out", "input", "scales"),
        "scaled_stage1": ("x8", "w1", "a1_scale", "w1_scale", "block_m"),
        "ck_moe_stage2_fwd": Plain.operators["ck_moe_stage2_fwd"],
    }
    refuses = Plain.refuses

    @staticmethod
    def fields(cfg: MoEConfig, tokens: int, block: int) -> tuple[Field, ...]:
        return (
            *Plain.fields(cfg, tokens, block),
            Field("x8", (tokens, cfg.hidden_size), torch.int8),
            Field("x_scale", (tokens, 1), torch.float32),
        )

    @staticmethod
    def pack(ops: AiterOps, weights: ExpertWeights, into: Packed | None = None) -> Packed:
        plain = Plain.pack(ops, weights)
        scale = weights.w13.float().abs().amax(2) / 127
        w1 = (weights.w13.float() / scale[..., None]).round().to(torch.int8)
        packed = Scaled(w1, plain.w2, plain.expert_mask, scale)
        if into is None:
            return packed
        for name in ("w1", "w2", "w1_scale"):
            getattr(into, name).copy_(getattr(packed, name))
        return into

    @staticmethod
    def steps(
        cfg: MoEConfig, ops: AiterOps, packed: Packed, views: Any, tokens: int, block: int
    ) -> tuple[Step, ...]:
        assert isinstance(packed, Scaled)
        x8, scale = views["x8"][:tokens], views["x_scale"][:tokens]
        lists = [views[n] for n in ("sorted_token_ids", "sorted_expert_ids", "num_valid_ids")]
        h = views["h"][: tokens * cfg.top_k].view(tokens, cfg.top_k, cfg.intermediate_size)

        def quantised(x: torch.Tensor, out: torch.Tensor) -> None:
            ops.module.quantise(x8, x, scale)

        def gate_up(x: torch.Tensor, out: torch.Tensor) -> None:
            weights, scales = packed.w1, packed.w1_scale
            ops.module.scaled_stage1(x8, weights, *lists, h, scale, scales, block)

        return quantised, gate_up, Plain.steps(cfg, ops, _plain(packed), views, tokens, block)[1]


def _plain(packed: Packed) -> Packed:
    """As stage 2 is shown it: w1 for its shape alone."""
    w1 = torch.empty(packed.w1.shape, dtype=packed.w2.dtype)
    return Packed(w1, packed.w2, packed.expert_mask)


@pytest.fixture
def eight_bits(aiter: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:

    for operator in (quantise, scaled_stage1):
        monkeypatch.setattr(aiter_stand_in, operator.__name__, operator, raising=False)
        monkeypatch.setattr(aiter, operator.__name__, aiter._recorded(operator), raising=False)
        # told by its own signature, as operators that are compiled are not
        recorded = getattr(aiter, operator.__name__)
        recorded.__wrapped__ = operator
    monkeypatch.setitem(aiter_sequences.SEQUENCES, "float16", EightBits)
    return aiter


@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_a_format_with_quantised_rows(eight_bits: StandIn, tokens: int) -> None:
    rt = make()
    x, topk, out = rows(CFG, tokens), routing(CFG, tokens), rows(CFG, tokens, torch.nan)
    poison(rt)
    rt.forward(x, topk, out)
    assert relative_error(out, experts_reference(x, topk, rt.weights, CFG)) <= BITS8
    order = ["moe_sorting_opus_fwd", "quantise", "scaled_stage1", "ck_moe_stage2_fwd"]
    assert [call.name for call in eight_bits.calls] == order
    plan = rt.plan().for_tokens(tokens)
    assert plan.kernels == ("checked_rows_kernel", *order)
    quantised = eight_bits.calls[1].args
    assert rt._group.arena is not None
    assert all(rt._group.arena.contains(quantised[name]) for name in ("out", "scales"))
    assert quantised["input"].data_ptr() == x.data_ptr()


def test_its_weights_are_counted_and_written_again(eight_bits: StandIn) -> None:
    rt, x, topk = make(), rows(CFG, 4), routing(CFG, 4)
    backend = rt._built.backend
    assert isinstance(backend, AiterBackend) and isinstance(backend.packed, Scaled)
    # w1 [5, 256, 128] of 1 byte, w2 [5, 128, 128] of 2, a scale a row of w1, the mask
    assert backend.packed_bytes == 5 * (256 * 128 + 128 * 128 * 2 + 256 * 4) + 6 * 4
    new = ExpertWeights.random(CFG, seed=9)
    rt.update_weights(w13=new.w13, w2=new.w2)
    assert relative_error(rt.forward(x, topk), experts_reference(x, topk, new, CFG)) <= BITS8


def test_an_operator_that_it_needs_and_that_is_missing_is_named(
    eight_bits: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(eight_bits, "quantise")
    assert AiterBackend.supports(CFG, MI300) == "this aiter has no quantise"


def test_sequences_are_found_by_the_format_of_the_weights() -> None:
    assert sequence_of(CFG) is Plain
    assert sequence_of(replace(CFG, dtype="float32")) == (
        f"dtype='float32' is not one of {', '.join(SEQUENCES)}"
    )
    said = sequence_of(replace(CFG, quant=Quant("int4")))
    assert said == f"quant.format='int4' is not one of {', '.join(SEQUENCES)}"
