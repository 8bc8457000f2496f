"""Int4 checkpoints that cannot be loaded: which tensor, what it is, what is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from int4_checkpoints import Stored, Tensors, quantized_checkpoint

from moert.checkpoint.loader import load_layer
from moert.cli.check import examine
from moert.config import MoEConfig, Quant
from moert.errors import MoertError, UnsupportedError, WeightsError

Change = Callable[[Tensors], Tensors]
GPTQ = Stored("gptq", 32)
ASYMMETRIC = Stored("gptq", 32, symmetric=False)
ORDERED = Stored("gptq", 32, act_order=True)
AWQ = Stored("awq", 32, symmetric=False)
CT = Stored("compressed-tensors", 32, symmetric=False)
EXPERT = "model.layers.0.mlp.experts.5."


def drop(suffix: str) -> Change:
    return lambda tensors: {n: t for n, t in tensors.items() if n != EXPERT + suffix}


def put(suffix: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: {**tensors, EXPERT + suffix: make(tensors[EXPERT + suffix])}


def swapped_groups(index: torch.Tensor) -> torch.Tensor:
    """The columns of another permutation: as many of each group, other ones."""
    return index.roll(7)


def uneven(index: torch.Tensor) -> torch.Tensor:
    changed = index.clone()
    changed[(index == 1).nonzero()[0]] = 0
    return changed


def dense_experts(tensors: Tensors) -> Tensors:
    """Layer 0's experts left alone by the quantisation."""
    kept = {n: t for n, t in tensors.items() if "layers.0.mlp.experts" not in n}
    for e in range(8):
        for leaf, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            kept[f"model.layers.0.mlp.experts.{e}.{leaf}_proj.weight"] = torch.randn(shape)
    return kept


# id, format, change, error, words; headers: the error is seen without reading data, by `moert check` too
BAD: list[tuple[str, Stored, Change, type[MoertError], list[str], bool]] = [
    (
        "no-scales",
        GPTQ,
        drop("up_proj.scales"),
        WeightsError,
        [EXPERT + "up_proj.scales", "missing", "near", "experts.6.up_proj.scales"],
        True,
    ),
    (
        "no-zeros",
        AWQ,
        drop("down_proj.qzeros"),
        WeightsError,
        [EXPERT + "down_proj.qzeros", "missing"],
        True,
    ),
    (
        "no-codes",
        GPTQ,
        drop("gate_proj.qweight"),
        WeightsError,
        ["gate_proj.qweight", "missing"],
        True,
    ),
    (
        "ct-no-scale",
        CT,
        drop("gate_proj.weight_scale"),
        WeightsError,
        [EXPERT + "gate_proj.weight_scale", "missing"],
        True,
    ),
    (
        "ct-no-zeros",
        CT,
        drop("gate_proj.weight_zero_point"),
        WeightsError,
        ["gate_proj.weight_zero_point", "missing"],
        True,
    ),
    # 8-bit codes take twice the words, 3-bit ones three quarters
    (
        "8-bit",
        GPTQ,
        put("up_proj.qweight", lambda t: torch.cat((t, t))),
        WeightsError,
        [EXPERT + "up_proj.qweight", "[16, 96]", "[8, 96]"],
        True,
    ),
    (
        "3-bit",
        GPTQ,
        put("up_proj.qweight", lambda t: t[:6]),
        WeightsError,
        ["up_proj.qweight", "[6, 96]", "[8, 96]"],
        True,
    ),
    (
        "awq-like-gptq",
        AWQ,
        put("up_proj.qweight", lambda t: t.t()),
        WeightsError,
        ["up_proj.qweight", "[12, 64]", "[64, 12]"],
        True,
    ),
    (
        "other-group",
        GPTQ,
        put("down_proj.scales", lambda t: t[:2]),
        WeightsError,
        ["down_proj.scales", "[2, 64]", "[3, 64]"],
        True,
    ),
    (
        "zeros-shape",
        ASYMMETRIC,
        put("down_proj.qzeros", lambda t: t[:, :4]),
        WeightsError,
        ["down_proj.qzeros", "[3, 4]", "[3, 8]"],
        True,
    ),
    (
        "scales-dtype",
        GPTQ,
        put("up_proj.scales", lambda t: t.to(torch.int8)),
        UnsupportedError,
        [EXPERT + "up_proj.scales", "I8"],
        True,
    ),
    (
        "codes-dtype",
        GPTQ,
        put("up_proj.qweight", lambda t: t.float()),
        WeightsError,
        ["up_proj.qweight", "F32", "I32"],
        True,
    ),
    (
        "g-idx-shape",
        GPTQ,
        put("up_proj.g_idx", lambda t: t[:-1]),
        WeightsError,
        ["up_proj.g_idx", "[63]", "[64]"],
        True,
    ),
    (
        "one-expert-more",
        GPTQ,
        lambda t: {**t, "model.layers.0.mlp.experts.8.down_proj.qweight": torch.zeros(1)},
        WeightsError,
        ["experts.8.down_proj.qweight", "num_experts=8"],
        True,
    ),
    (
        "not-quantised",
        GPTQ,
        dense_experts,
        WeightsError,
        ["experts.0.down_proj.weight", "not quantised", "quant=None"],
        True,
    ),
    # stored 15 in the first format
    (
        "zero-16",
        ASYMMETRIC,
        put("up_proj.qzeros", lambda t: torch.full_like(t, -1)),
        WeightsError,
        [EXPERT + "up_proj.qzeros", "16", "0..15", "gptq_v2"],
        False,
    ),
    # the second format under the first one's name: 9 instead of 8
    (
        "zero-9",
        GPTQ,
        put("up_proj.qzeros", lambda t: t + 0x11111111),
        WeightsError,
        [EXPERT + "up_proj.qzeros", "zero point of 9", "sym=True means 8"],
        False,
    ),
    (
        "g-idx-range",
        GPTQ,
        put("down_proj.g_idx", lambda t: t + 1),
        WeightsError,
        [EXPERT + "down_proj.g_idx", "1..3", "0..2"],
        False,
    ),
    (
        "g-idx-uneven",
        ORDERED,
        put("down_proj.g_idx", uneven),
        WeightsError,
        [EXPERT + "down_proj.g_idx", "33 columns", "groups of 32"],
        False,
    ),
    (
        "two-orders",
        ORDERED,
        put("up_proj.g_idx", swapped_groups),
        UnsupportedError,
        [EXPERT + "gate_proj", EXPERT + "up_proj", "different orders", "g_idx"],
        False,
    ),
    (
        "ct-shape",
        CT,
        put("up_proj.weight_shape", lambda t: t.flip(0)),
        WeightsError,
        [EXPERT + "up_proj.weight_shape", "[64, 96]", "[96, 64]"],
        False,
    ),
]


@pytest.mark.parametrize(
    ("stored", "change", "kind", "words", "headers"), [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_bad_tensors(
    stored: Stored,
    change: Change,
    kind: type[MoertError],
    words: list[str],
    headers: bool,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    int4, _ = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, stored, change=change)
    with pytest.raises(kind) as error:
        load_layer(int4, 0)
    for word in words:
        assert word in str(error.value)
    load_layer(int4, 2)  # the other layer is fine
    problems = examine(int4).all_problems
    assert bool(problems) == headers
    for word in words if headers else []:
        assert any(word in text for text in problems), (word, problems)


@pytest.mark.parametrize(
    ("fields", "stored", "words"),
    [
        ({"moe_intermediate_size": 92}, GPTQ, ["gate_proj", "92 rows", "multiple of 8", "GPTQ"]),
        ({"hidden_size": 60}, GPTQ, ["60 columns", "multiple of 8", "GPTQ"]),
        ({"moe_intermediate_size": 92}, AWQ, ["92 rows", "multiple of 8", "AWQ"]),
        ({"moe_intermediate_size": 92}, CT, ["gate_proj.weight_packed", "[96, 8]", "[92, 8]"]),
    ],
)
def test_sizes_that_words_cannot_hold(
    fields: dict[str, Any],
    stored: Stored,
    words: list[str],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def narrow(tensors: Tensors) -> Tensors:
        gate = "model.layers.0.mlp.gate.weight"
        return {**tensors, gate: tensors[gate][:, : fields.get("hidden_size", 64)]}

    int4, _ = quantized_checkpoint(
        tiny_checkpoint("qwen3_moe"), tmp_path, stored, change=narrow, **fields
    )
    with pytest.raises(WeightsError) as error:
        load_layer(int4, 0)
    for word in words:
        assert word in str(error.value)
    assert any(words[0] in text for text in examine(int4).all_problems)


def test_a_config_that_contradicts_the_checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    int4, _ = quantized_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, GPTQ)
    cfg = MoEConfig.from_pretrained(str(int4))
    other = replace(cfg, quant=Quant("int4", 64))
    with pytest.raises(WeightsError, match=r"group_size=64.*gptq: int4, groups of 32, symmetric"):
        load_layer(int4, 0, cfg=other)
    with pytest.raises(WeightsError, match=r"gate_proj.weight: missing.*gate_proj.qweight"):
        load_layer(int4, 0, cfg=replace(cfg, quant=None))


def test_experts_that_were_left_alone_load_without_quant(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    int4, _ = quantized_checkpoint(
        tiny_checkpoint("qwen3_moe"), tmp_path, GPTQ, change=dense_experts
    )
    cfg = replace(MoEConfig.from_pretrained(str(int4)), quant=None)
    assert load_layer(int4, 0, cfg=cfg)["w13"].shape == (8, 192, 64)
