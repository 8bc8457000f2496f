"""Whole blocks of transformers models on moert: same logits, and their own forward where it must be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from moert import MoERuntime, UnsupportedError
from moert.integrations import blocks as blocks_module
from moert.integrations.block_module import parts_of_block
from moert.integrations.transformers import prepare

# family -> blocks, shared experts, gate
FAMILIES = {
    "mixtral": (2, 0, False),
    "qwen2_moe": (2, 1, True),
    "qwen3_moe": (2, 0, False),
    "qwen3_next": (2, 1, True),
    "deepseek_v3": (1, 1, False),
    "olmoe": (2, 0, False),
    "minimax_m2": (2, 0, False),
}
PROMPT = torch.randint(2, 256, (3, 7), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"max_tokens": 32, "buckets": [1, 8]}


@pytest.fixture(autouse=True)
def reference_backend_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the hook is tested here; Triton's interpreter would make each test a hundred times slower
    monkeypatch.setenv("MOERT_BACKEND", "torch")
    with torch.no_grad():
        yield


@pytest.fixture
def fresh(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`fresh(family, dtype)`: a model of one's own, its experts by transformers' own loop."""

    def get(family: str, dtype: str = "float32") -> Any:
        model = copy.deepcopy(tiny_model(family, dtype))
        model.set_experts_implementation("eager")
        return model

    return get


def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits.float()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def blocks_of(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if parts_of_block(module) is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits(family: str, fresh: Callable[..., Any]) -> None:
    model = fresh(family)
    expected = logits(model)
    layers = prepare(model, blocks=True, **SMALL)
    tried = layers.stats()["calls"]
    assert relative(logits(model), expected) < 1e-5
    count, shared, gate = FAMILIES[family]
    assert [(rt.cfg.shared_experts, rt.cfg.shared_gate) for rt in layers] == [
        (shared, gate)
    ] * count
    # every block is one call: nobody ran the experts alone
    assert layers.stats()["calls"] == tried + count
    assert len({id(rt._group) for rt in layers}) == 1


def test_bf16_is_as_good_as_eager(fresh: Callable[..., Any]) -> None:
    model = fresh("deepseek_v3", "bfloat16")
    exact = logits(copy.deepcopy(model).float())
    eager = relative(logits(model), exact)
    prepare(model, blocks=True, **SMALL)
    assert 0 < relative(logits(model), exact) <= 1.5 * eager


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_router_logits_are_still_recorded(family: str, fresh: Callable[..., Any]) -> None:
    """By a hook inside the block, which then runs its own forward."""
    model = fresh(family)
    expected = model(PROMPT, output_router_logits=True).router_logits
    model = fresh(family)
    prepare(model, blocks=True, **SMALL)
    before = logits(model)
    given = model(PROMPT, output_router_logits=True).router_logits
    assert len(given) == len(expected) == 2
    for ours, theirs in zip(given, expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(logits(model), before) < 1e-5


def test_blocks_that_return_more_are_refused(fresh: Callable[..., Any]) -> None:
    """gpt-oss's gives its routing weights, too; nothing is left behind."""
    model = fresh("gpt_oss")
    expected = logits(model)
    with pytest.raises(UnsupportedError, match=r"GptOssMLP: its forward gives tuple.*blocks=False"):
        prepare(model, blocks=True, **SMALL)
    assert torch.equal(logits(model), expected)
    assert model.config._experts_implementation == "eager"


def test_a_block_that_computes_something_else(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh("olmoe")
    kind = type(blocks_of(model)[0])
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) + 0.1 * x)
    monkeypatch.setattr(blocks_module, "_PATCHED", set())
    expected = logits(model)
    with pytest.raises(UnsupportedError, match="computes something else than router"):
        prepare(model, blocks=True, **SMALL)
    assert torch.equal(logits(model), expected)


def test_a_block_with_another_part(fresh: Callable[..., Any]) -> None:
    model = fresh("qwen3_moe")
    blocks_of(model)[0].norm = torch.nn.LayerNorm(64)
    with pytest.raises(UnsupportedError, match="more than a router"):
        prepare(model, blocks=True, **SMALL)


def test_parameters_are_used_in_place(fresh: Callable[..., Any]) -> None:
    """Also those of shared experts, which are copied behind the others: a change is seen."""
    for family in ("qwen2_moe", "qwen3_moe"):
        model, twin = fresh(family), fresh(family)
        layers = prepare(model, blocks=True, **SMALL)
        for runtime, block in zip(layers, blocks_of(model), strict=True):
            assert runtime.weights.w13.data_ptr() == block.experts.gate_up_proj.data_ptr()
            assert runtime.weights.router_weight.data_ptr() == block.gate.weight.data_ptr()
        built = list(layers)
        for changed in (model, twin):
            for block in blocks_of(changed):
                block.experts.down_proj.mul_(2)
                block.gate.weight.mul_(1.5)
                if family == "qwen2_moe":
                    block.shared_expert.down_proj.weight.mul_(3)
                    block.shared_expert.up_proj.weight.add_(0.1)
                    block.shared_expert_gate.weight.neg_()
        assert relative(logits(model), logits(twin)) < 1e-5
        assert list(layers) == built


def test_parameters_that_moved(fresh: Callable[..., Any]) -> None:
    """A converted model gets new runtimes at its next forward."""
    model, twin = fresh("deepseek_v3"), fresh("deepseek_v3")
    layers = prepare(model, blocks=True, **SMALL)
    old = layers[0]
    for changed in (model, twin):
        changed.to(torch.float16).float()
    assert relative(logits(model), logits(twin)) < 1e-5
    assert layers[0] is not old and layers[0].stats()["calls"] == 1


def test_copies_and_saved_models(fresh: Callable[..., Any], tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = fresh("qwen2_moe")
    expected = logits(model)
    layers = prepare(model, blocks=True, **SMALL)
    calls = layers.stats()["calls"]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    # neither of them is prepared
    for other in (copy.deepcopy(model), again):
        other.set_experts_implementation("eager")
        assert relative(logits(other), expected) < 1e-5
    assert layers.stats()["calls"] == calls


def test_prepared_again_without_blocks(fresh: Callable[..., Any]) -> None:
    model = fresh("qwen2_moe")
    expected = logits(model)
    first = prepare(model, blocks=True, **SMALL)
    second = prepare(model, **SMALL)
    assert len(first) == 0 and len(second) == 2
    assert relative(logits(model), expected) < 1e-5
    assert second.stats()["calls"] == 2
    third = prepare(model, blocks=True, **SMALL)
    tried = third.stats()["calls"]
    assert relative(logits(model), expected) < 1e-5
    assert len(second) == 0 and third.stats()["calls"] == tried + 2


def test_calls_that_are_not_for_moert(fresh: Callable[..., Any]) -> None:
    """Training, another dtype, hooks: the block's own forward."""
    model = fresh("mixtral")
    layers = prepare(model, blocks=True, **SMALL)
    block, x = blocks_of(model)[0], torch.randn(1, 4, 64)
    expected, calls = block(x), layers[0].stats()["calls"]
    model.set_experts_implementation("eager")
    handle = block.experts.register_forward_hook(lambda *_: None)
    assert relative(block(x), expected) < 1e-5
    handle.remove()
    block.train()
    assert relative(block(x), expected) < 1e-5
    block.eval()
    with torch.enable_grad():
        assert block(x.clone().requires_grad_()).requires_grad
    assert layers[0].stats()["calls"] == calls
    assert relative(block(x.expand(2, 4, 64)), expected.expand(2, 4, 64)) < 1e-5
    assert layers[0].stats()["calls"] == calls + 1


def test_nothing_keeps_a_model_alive(fresh: Callable[..., Any]) -> None:
    model = fresh("qwen2_moe")
    layers = prepare(model, blocks=True, **SMALL)
    logits(model)
    ref = weakref.ref(blocks_of(model)[0])
    del model
    gc.collect()
    assert ref() is None and len(layers) == 0


def test_a_closed_one_is_made_again(fresh: Callable[..., Any]) -> None:
    model = fresh("deepseek_v3")
    expected = logits(model)
    with prepare(model, blocks=True, **SMALL) as layers:
        runtime = layers[0]
    assert len(layers) == 0 and isinstance(runtime, MoERuntime)
    assert relative(logits(model), expected) < 1e-5
    assert layers.stats()["calls"] == 1
