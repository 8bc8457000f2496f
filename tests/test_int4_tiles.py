"""Tile choice for int4 weights: pure functions, what every choice has to keep to on every device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moert.backends.int4_tiles import (
    candidates,
    default_choice,
    direct_choice,
    group_of,
    shared_bytes,
    step_of,
    unaligned_choice,
)
from moert.backends.triton_tiles import portable_rows
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES, DeviceFacts, device_facts
from moert.plan import STRATEGIES, Choice, Tile

CFG = MoEConfig(128, 8, 2048, 768, quant=Quant("int4", 128))
CONFIGS = {
    "g128": CFG,
    "g32": replace(CFG, quant=Quant("int4", 32, symmetric=False)),
    "g96, odd": replace(CFG, hidden_size=200, intermediate_size=41, quant=Quant("int4", 96)),
    "a group a row": replace(CFG, hidden_size=528, quant=Quant("int4", -1)),
    "float32": replace(CFG, dtype="float32"),
    "tiny": MoEConfig(1, 1, 1, 1, quant=Quant("int4", 32)),
    "few experts": MoEConfig(8, 2, 4096, 14336, quant=Quant("int4", 128)),
}
DEVICES = {**KNOWN_DEVICES, "cpu": device_facts(torch.device("cpu"))}
TOKENS = (1, 4, 8, 64, 512, 8192)


def portable(choice: Choice) -> list[Tile]:
    return [t for t in (choice.gate_up, choice.down) if t is not None and t.kernel == "tile"]


@pytest.mark.parametrize(
    ("group", "most", "step"),
    [
        *((32, 128, 32), (64, 128, 64), (96, 128, 32), (128, 128, 128), (160, 128, 32)),
        *((256, 128, 128), (320, 128, 64), (128, 64, 64), (2880, 128, 64)),
    ],
)
def test_the_widest_step_within_a_group(group: int, most: int, step: int) -> None:
    assert step_of(group, most) == step


def test_a_group_a_row_is_whole_blocks() -> None:
    cfg = CONFIGS["a group a row"]
    assert [group_of(cfg, columns) for columns in (1, 64, 528)] == [64, 64, 576]
    assert group_of(CFG, 528) == 128


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_choice(name: str, arch: str) -> None:
    """The default first, once each; steps within groups, shared memory, one BM for both GEMMs."""
    cfg, facts = CONFIGS[name], DEVICES[arch]
    for tokens in TOKENS:
        found = candidates(cfg, facts, tokens, STRATEGIES)
        assert found[0] == default_choice(cfg, facts, tokens)
        # every pair of kernels through registers is one, where a row a program can pay
        assert len(set(found)) == len(found) <= (80 if tokens <= 8 else 60)
        # what has to be compiled for them
        assert len({c.gate_up for c in found}) + len({c.down for c in found}) <= 64
        for choice in found:
            assert choice.gate_up is not None and choice.down is not None
            assert choice.gate_up.bm == choice.down.bm
            assert facts.dependent_launch or not choice.dependent
            check_tiles(choice, cfg, facts)
        assert any(portable(choice) for choice in found)


def check_tiles(choice: Choice, cfg: MoEConfig, facts: DeviceFacts) -> None:
    sizes = (cfg.hidden_size, cfg.intermediate_size)
    for tile, columns in zip((choice.gate_up, choice.down), sizes, strict=True):
        assert tile is not None
        if tile.kernel != "tile":
            assert facts.kind == "cuda"
            continue
        assert group_of(cfg, columns) % tile.bk == 0
        assert tile.bn % 16 == 0 and tile.bk in (16, 32, 64, 128)
        if choice.strategy != "none":
            assert tile.bm >= 16
            assert facts.kind == "cpu" or shared_bytes(tile) <= facts.shared_memory


@pytest.mark.parametrize("strategies", [("none",), ("one_shot",), ("multi_phase",)])
def test_strategies_that_were_not_asked_for_appear_as_the_default_alone(
    strategies: tuple[str, ...],
) -> None:
    for tokens in TOKENS:
        default, *others = candidates(CFG, KNOWN_DEVICES["gfx942"], tokens, strategies)
        assert {choice.strategy for choice in others} <= {*strategies}
        assert others or default.strategy in strategies


def test_few_rows_are_not_sorted() -> None:
    facts = KNOWN_DEVICES["sm_90"]
    strategies = [default_choice(CFG, facts, tokens).strategy for tokens in (1, 4, 8, 128, 129)]
    assert strategies == ["none", "none", "one_shot", "one_shot", "multi_phase"]


@pytest.mark.parametrize("arch", DEVICES)
def test_direct_choice_is_portable(arch: str) -> None:
    choice = direct_choice(CFG, DEVICES[arch])
    assert choice.strategy == "none" and len(portable(choice)) == 2 and not choice.dependent


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_unaligned_calls_take_portable_kernels_on_the_same_views(arch: str) -> None:
    """The same strategy and BM, for the sort has been laid out for it."""
    facts = KNOWN_DEVICES[arch]
    for cfg in CONFIGS.values():
        for tokens in TOKENS:
            for choice in candidates(cfg, facts, tokens, STRATEGIES):
                other = unaligned_choice(choice, cfg, facts)
                assert len(portable(other)) == 2
                assert (other.strategy, other.dependent) == (choice.strategy, choice.dependent)
                assert choice.gate_up is not None and other.gate_up is not None
                if choice.strategy != "none":
                    # or the power of two below it
                    assert other.gate_up.bm == portable_rows(choice.gate_up.bm)
