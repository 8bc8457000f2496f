"""The tuning records in the package: whole, complete, and plans that their device can hold."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from moert import MoEConfig, Quant
from moert.backends.fixed_tiles import fixed_shape
from moert.backends.int4_tiles import shared_bytes as int4_shared_bytes
from moert.backends.specialised_tiles import specialised_int4_shape, specialised_shape
from moert.backends.stream_tiles import stream_shape
from moert.backends.triton import TritonBackend
from moert.backends.triton_tiles import shared_bytes
from moert.build import DEFAULT_BUCKETS, DEFAULT_MAX_TOKENS, plan_sizes
from moert.cli.absent import absent_weights
from moert.device import KNOWN_DEVICES
from moert.plan import Choice
from moert.share import Options
from moert.steps.sorting.launches import feasible
from moert.tuning.store import SHIPPED, Store, geometry

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


FORMATS = (None, Quant("int4", 128))


def shipped(cfg: MoEConfig) -> Store:
    return Store(H200, geometry(cfg, absent_weights(cfg)), {}, [(SHIPPED, "shipped")])


def in_format(shape: tuple[int, int, int, int], quant: Quant | None) -> MoEConfig:
    """int4 in groups of 32 where rows are no whole groups of 128."""
    whole = all(columns % 128 == 0 for columns in shape[2:])
    return MoEConfig(*shape, quant=quant if quant is None or whole else Quant("int4", 32))


def holds(choice: Choice, cfg: MoEConfig) -> bool:
    """Whether the shared memory of the device is enough for both tiles."""
    for number, tile in enumerate(choice.tiles):
        up = number % 2 == 0
        if tile.kernel in ("stream", "gathered"):
            direct = choice.strategy == "none" and tile.kernel == "stream"
            needed = stream_shape(cfg, tile, up=up, direct=direct).shared_bytes(direct)
        elif tile.kernel == "fixed":
            needed = fixed_shape(cfg, H200, tile, up=up).shared_bytes
        elif tile.kernel == "specialised":
            shaped = specialised_shape if cfg.quant is None else specialised_int4_shape
            needed = shaped(cfg, H200, tile, up=up).shared_bytes
        elif cfg.quant is not None:
            needed = int4_shared_bytes(tile)
        else:
            needed = 0 if choice.strategy == "none" else shared_bytes(tile, cfg, H200)
        if needed > H200.shared_memory:
            return False
    return True


@pytest.mark.parametrize("quant", FORMATS, ids=["bfloat16", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_default_runtime_finds_every_bucket(
    shape: tuple[int, int, int, int], quant: Quant | None, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = in_format(shape, quant)
    with caplog.at_level(logging.WARNING, "moert"):
        store = shipped(cfg)
        # what is not captured is measured where it is used
        sizes = [tokens for tokens, captured in plan_sizes(OPTIONS) if captured]
        found = {tokens: store.find(tokens, 0) for tokens in sizes}
    assert caplog.text == ""
    assert [tokens for tokens, records in found.items() if not records] == []
    for tokens, (record,) in found.items():
        choice = record.choice
        assert choice.gate_up is not None and choice.down is not None
        assert feasible(choice.strategy, tokens, cfg.num_experts, cfg.top_k, H200) is None
        backend = TritonBackend(cfg, absent_weights(cfg), H200)
        assert backend.can_run(choice, tokens) and holds(choice, cfg)
        # the default is only replaced by what is clearly faster, or by itself with tiles for crowds
        if record.default_us is not None and record.us != record.default_us:
            own = replace(choice, crowded=None) == backend.default_choice(tokens)
            assert record.us <= (1.021 if own else 0.981) * record.default_us
        assert {"moert", "triton", "torch", "driver"} <= record.made_with.keys()


def test_every_file_is_one_of_these() -> None:
    names = {shipped(in_format(shape, quant)).path for shape in SHAPES for quant in FORMATS}
    assert set(SHIPPED.rglob("*.json")) == names
