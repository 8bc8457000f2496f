"""Tile choices: pure, and within what every known device can hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from moert.backends.triton_tiles import (
    candidates,
    default_choice,
    portable_rows,
    shared_bytes,
    unaligned_choice,
)
from moert.config import DTYPES, MoEConfig
from moert.device import KNOWN_DEVICES, DeviceFacts
from moert.plan import STRATEGIES, Choice, Tile
from moert.steps.sorting.launches import feasible

CPU = replace(KNOWN_DEVICES["sm_90"], kind="cpu", name="cpu", arch="", shared_memory=0)
TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 31, 64, 100, 128, 256, 333, 512, 1000, 2048, 4096)


def random_configs(count: int) -> list[MoEConfig]:
    """From one expert to 512, odd sizes included, gated or not."""
    rng = random.Random(0)
    configs = [MoEConfig(1, 1, 1, 1), MoEConfig(512, 10, 8192, 16384), MoEConfig(512, 127, 7, 3)]
    while len(configs) < count:
        experts = rng.randint(1, 512)
        sizes = (rng.choice([rng.randint(1, 9000), 64 * rng.randint(1, 128)]) for _ in range(2))
        top_k = rng.randint(1, min(experts, rng.choice([2, 8, 127])))
        gated, dtype = rng.random() < 0.8, rng.choice(DTYPES)
        configs.append(MoEConfig(experts, top_k, *sizes, gated=gated, dtype=dtype))
    return configs


CONFIGS = random_configs(40)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_choice(choice: Choice, cfg: MoEConfig, facts: DeviceFacts) -> None:
    assert choice.strategy in STRATEGIES
    for tile in (choice.gate_up, choice.down):
        assert tile is not None
        # blocks and their reductions are powers of two, but for specialised ones of two products; matrix
        # units take 16 in every direction; where tokens are their columns, or on NVIDIA, 8
        least = 1 if choice.strategy == "none" else 8 if facts.kind == "cuda" else 16
        rows = tile.bm * 4 // 5 if tile.kernel == "specialised" and tile.bm % 5 == 0 else tile.bm
        assert all(is_power_of_two(n) for n in (rows, tile.bn, tile.bk, tile.num_warps))
        assert min(tile.bn, tile.bm) >= least and tile.bk >= 16
        assert tile.num_warps <= 16 and 1 <= tile.num_stages <= 8
        if choice.strategy != "none" and tile.kernel == "tile":
            assert shared_bytes(tile, cfg, facts) <= facts.shared_memory
            # the sort pads to the rows of one, the other reads them
            assert tile.bm == choice.gate_up.bm  # type: ignore[union-attr]


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_defaults_fit_and_can_be_sorted(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    for cfg in CONFIGS:
        for tokens in TOKENS:
            choice = default_choice(cfg, facts, tokens)
            check_choice(choice, cfg, facts)
            sizes = (tokens, cfg.num_experts, cfg.top_k, facts)
            assert feasible(choice.strategy, *sizes) is None
            assert default_choice(cfg, facts, tokens) == choice


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_candidates_fit_without_repeats_the_default_first(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    for cfg in CONFIGS:
        for tokens in TOKENS[::3]:
            found = candidates(cfg, facts, tokens, STRATEGIES)
            assert found[0] == default_choice(cfg, facts, tokens)
            assert len(found) == len(set(found))
            assert len(found) < 200  # each costs a compilation
            for choice in found:
                check_choice(choice, cfg, facts)


def test_there_is_something_to_choose_from() -> None:
    cfg = MoEConfig(128, 8, 2048, 768)
    for arch, facts in KNOWN_DEVICES.items():
        for tokens in (1, 16, 256, 4096):
            found = candidates(cfg, facts, tokens, STRATEGIES)
            assert len(found) >= 5, (arch, tokens)
            assert {"one_shot", "multi_phase"} <= {choice.strategy for choice in found}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_strategies_asked_for_beside_the_default(strategy: str) -> None:
    cfg, facts = MoEConfig(128, 8, 2048, 768), KNOWN_DEVICES["gfx942"]
    for tokens in (1, 16, 512):
        found = candidates(cfg, facts, tokens, (strategy,))
        assert {choice.strategy for choice in found[1:]} == {strategy}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_asked_for_alone_is_offered(strategy: str) -> None:
    """Whatever the default, and where none but the smallest tile fits: a forced policy is never ignored."""
    tiny = replace(KNOWN_DEVICES["sm_90"], shared_memory=24 << 10)
    for facts in (CPU, tiny, *KNOWN_DEVICES.values()):
        for cfg in CONFIGS:
            for tokens in TOKENS[::3]:
                found = candidates(cfg, facts, tokens, (strategy,))
                assert strategy in {choice.strategy for choice in found}


def test_direct_plans_are_for_few_rows() -> None:
    """Each routed row reads its expert's weights again; alone, the strategy has to do nevertheless."""
    cfg, facts = MoEConfig(128, 8, 2048, 768), KNOWN_DEVICES["sm_90"]
    assert "none" in {c.strategy for c in candidates(cfg, facts, 8, STRATEGIES)}
    assert "none" not in {c.strategy for c in candidates(cfg, facts, 9, STRATEGIES)}
    assert len(candidates(cfg, facts, 4096, ("none",))) > 1
    many = replace(cfg, num_experts=512)
    assert "none" in {c.strategy for c in candidates(many, facts, 32, STRATEGIES)}
    assert "none" not in {c.strategy for c in candidates(many, facts, 33, STRATEGIES)}


def test_block_rows_follow_the_mean_rows_of_an_expert() -> None:
    """From 16 on they hold the rows of nearly every expert: of 64 rows where 32 are the mean; on sm_90 of 160
    where 128 are."""
    cfg = MoEConfig(8, 2, 4096, 4096)
    for arch, least in (("gfx942", 1), ("sm_90", 8)):
        facts = KNOWN_DEVICES[arch]
        rows = [default_choice(cfg, facts, tokens).gate_up.bm for tokens in TOKENS]  # type: ignore[union-attr]
        whole = [min(bm, 128) for bm in rows]
        assert whole == sorted(whole)
        assert rows[0] == least and rows[-1] == 128
        tall = [t for t, bm in zip(TOKENS, rows, strict=True) if bm == 160]
        assert tall == ([512] if arch == "sm_90" else [])
        assert default_choice(cfg, facts, 128).gate_up.bm == 64  # type: ignore[union-attr]


def kinds(cfg: MoEConfig, arch: str, copied: bool = True) -> dict[int, str]:
    found = {
        t: default_choice(cfg, KNOWN_DEVICES[arch], t, copied) for t in (1, 2, 4, 8, 16, 24, 512)
    }
    return {t: choice.gate_up.kernel for t, choice in found.items() if choice.gate_up}


def test_defaults_where_streams_were_measured() -> None:
    """One program for all rows of an expert where tokens share experts, sorted streams up to a row each."""
    qwen, mixtral = MoEConfig(128, 8, 2048, 768), MoEConfig(8, 2, 4096, 14336)
    kernels = ["stream", "stream", "gathered", "gathered", "stream", "tile", "specialised"]
    assert list(kinds(qwen, "sm_90").values()) == kernels
    kernels = ["stream", "gathered", "gathered", "gathered", "tile", "tile", "specialised"]
    assert list(kinds(mixtral, "sm_90").values()) == kernels
    assert default_choice(qwen, KNOWN_DEVICES["sm_90"], 16).strategy == "one_shot"
    for cfg, arch, copied in (
        (qwen, "sm_80", True),
        (qwen, "gfx942", True),
        (qwen, "sm_90", False),
        (replace(qwen, dtype="float32"), "sm_90", True),
    ):
        assert set(kinds(cfg, arch, copied).values()) == {"tile"}
    # so many rows for so few experts are sorted, be tokens ever so few
    assert (
        default_choice(replace(qwen, num_experts=32, top_k=16), KNOWN_DEVICES["sm_90"], 8).strategy
        != "none"
    )


def test_a_device_with_little_memory_gets_the_smallest_tile() -> None:
    choice = default_choice(MoEConfig(8, 2, 4096, 4096), CPU, 512)
    assert choice.gate_up == choice.down == Tile(16, 16, 32, 4, 1)


def tiles(*shapes: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*shape) for shape in shapes]


@pytest.mark.parametrize(
    ("arch", "direct", "grouped"),
    [
        (
            "gfx942",
            tiles((1, 8, 256, 4, 6), (1, 8, 256, 4, 4)),
            # 64 KiB: the widest tile of 64 rows or more would need 80
            tiles((16, 64, 128, 4, 2), (32, 64, 128, 4, 2), (64, 64, 64, 4, 3), (128, 64, 64, 4, 3)),
        ),
        (
            "gfx950",
            tiles((1, 8, 256, 4, 6), (1, 8, 256, 4, 4)),
            tiles((16, 64, 128, 4, 2), (32, 64, 128, 4, 2), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
        ),
        (
            "gfx1151",
            tiles((1, 8, 256, 4, 3), (1, 8, 256, 4, 3)),
            # 256 registers: flat tiles, and twice the warps for twice the rows
            tiles((16, 64, 32, 4, 2), (32, 64, 32, 4, 2), (64, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
        ),
    ],
)  # fmt: skip
def test_default_plans_of_amd(arch: str, direct: list[Tile], grouped: list[Tile]) -> None:
    """By the rule that `default_choice` states: 2, 64, 200, 1024 and 4096 tokens."""
    cfg, facts = MoEConfig(128, 8, 2048, 768), KNOWN_DEVICES[arch]
    choices = [default_choice(cfg, facts, tokens) for tokens in (2, 64, 200, 1024, 4096)]
    assert (choices[0].gate_up, choices[0].down) == tuple(direct)
    assert [choice.gate_up for choice in choices[1:]] == grouped
    strategies = ["none", "one_shot", "multi_phase", "multi_phase", "multi_phase"]
    assert [choice.strategy for choice in choices] == strategies
    assert not any(choice.dependent for choice in choices)


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_unaligned_calls_use_the_same_arena_and_kernels(arch: str) -> None:
    facts = KNOWN_DEVICES[arch]
    for cfg in CONFIGS:
        for tokens in TOKENS[::3]:
            for choice in candidates(cfg, facts, tokens, STRATEGIES)[::5]:
                other = unaligned_choice(choice, cfg, facts)
                check_choice(other, cfg, facts)
                kept = ("strategy", "dependent")
                assert all(getattr(other, name) == getattr(choice, name) for name in kept)
                if choice.strategy != "none":  # rows are padded to it, or to a power of two below
                    rows = portable_rows(choice.gate_up.bm)  # type: ignore[union-attr]
                    assert other.gate_up.bm == rows  # type: ignore[union-attr]
                    assert rows == choice.gate_up.bm or rows in (64, 128)  # type: ignore[union-attr]
    assert unaligned_choice(Choice("none"), CONFIGS[0], facts) == Choice("none")


@pytest.mark.parametrize(("gated", "copies"), [(True, 2), (False, 1)])
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_shared_bytes(gated: bool, copies: int, dtype: str, size: int) -> None:
    cfg = MoEConfig(8, 2, 64, 64, gated=gated, dtype=dtype)
    one = 64 * (16 + copies * 32) * size
    for arch, stages, kept in (
        ("sm_90", 3, 3),
        ("gfx942", 3, 2),
        ("gfx942", 1, 1),
        ("sm_80", 1, 1),
    ):
        tile = Tile(16, 32, 64, 4, stages)
        assert shared_bytes(tile, cfg, KNOWN_DEVICES[arch]) == kept * one


@pytest.mark.parametrize(
    ("arch", "able"), [("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)]
)
def test_dependent_launches_only_where_the_device_has_them(arch: str, able: bool) -> None:
    for tokens in (1, 64):
        found = candidates(MoEConfig(128, 8, 2048, 768), KNOWN_DEVICES[arch], tokens, STRATEGIES)
        assert any(choice.dependent for choice in found) == able
