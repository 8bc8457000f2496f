"""The tuning records in the package: whole, complete, and plans that their device can hold."""

from __future__ import annotations

import logging

import pytest
import torch

from moert import MoEConfig
from moert.backends.triton_tiles import shared_bytes
from moert.build import DEFAULT_BUCKETS, DEFAULT_MAX_TOKENS, plan_sizes
from moert.device import KNOWN_DEVICES
from moert.share import Options
from moert.steps.sorting.launches import feasible
from moert.tuning.store import SHIPPED, Store, geometry
from moert.weights import ExpertWeights

H200 = KNOWN_DEVICES["sm_90"]
# E, K, H, I of mixtral-8x7b, qwen3-30b-a3b, gpt-oss-120b, deepseek-v3 and minimax-m2.5 on 8 and 4 GPUs,
# qwen3-next-80b
SHAPES = [
    (8, 2, 4096, 14336),
    (128, 8, 2048, 768),
    (128, 4, 2880, 2880),
    (256, 8, 7168, 256),
    (256, 8, 3072, 384),
    (512, 10, 2048, 512),
]
OPTIONS = Options(DEFAULT_MAX_TOKENS, DEFAULT_BUCKETS, "own", 0, "auto")


def shipped(cfg: MoEConfig) -> Store:
    shape = (cfg.num_experts, cfg.w13_rows, cfg.hidden_size)
    other = (cfg.num_experts, cfg.hidden_size, cfg.intermediate_size)
    meta = {"dtype": cfg.torch_dtype, "device": "meta"}
    weights = ExpertWeights(torch.empty(shape, **meta), torch.empty(other, **meta))
    return Store(H200, geometry(cfg, weights), {}, [(SHIPPED, "shipped")])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_default_runtime_finds_every_bucket(
    shape: tuple[int, int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = MoEConfig(*shape)
    with caplog.at_level(logging.WARNING, "moert"):
        store = shipped(cfg)
        found = {tokens: store.find(tokens, 0) for tokens, _ in plan_sizes(OPTIONS)}
    assert caplog.text == ""
    assert [tokens for tokens, records in found.items() if not records] == []
    for tokens, (record,) in found.items():
        choice = record.choice
        assert choice.gate_up is not None and choice.down is not None
        assert feasible(choice.strategy, tokens, cfg.num_experts, cfg.top_k, H200) is None
        if choice.strategy != "none":
            assert shared_bytes(choice.gate_up, cfg, H200) <= H200.shared_memory
        # the default is only replaced by what is clearly faster
        if record.default_us is not None and record.us != record.default_us:
            assert record.us <= 0.981 * record.default_us
        assert {"moert", "triton", "torch", "driver"} <= record.made_with.keys()


def test_every_file_is_one_of_these() -> None:
    names = {shipped(MoEConfig(*shape)).path for shape in SHAPES}
    assert set(SHIPPED.rglob("*.json")) == names
