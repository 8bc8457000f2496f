"""One experts module of transformers by itself: layouts, gate functions, input forms, what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moert import ConfigError, InputError, MoEConfig, StateError, UnsupportedError
from moert.integrations import experts_runtimes
from moert.integrations.experts_module import describe, parameters
from moert.integrations.transformers import Prepared, prepare, register


@pytest.fixture(autouse=True)
def reference_backend_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the hook is tested here; Triton's interpreter would make each test a hundred times slower
    monkeypatch.setenv("MOERT_BACKEND", "torch")
    register()
    with torch.no_grad():
        yield


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def make_module(
    *,
    act: str = "silu",
    limit: float | None = None,
    apply_gate: Callable[..., torch.Tensor] | None = None,
    **flags: Any,
) -> Any:
    """An experts module as transformers' decorator makes it: E=5, H=12, I=7, odd on purpose."""
    gated, bias = flags.get("has_gate", True), flags.get("has_bias", False)

    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = 5
            self.act_fn = ACT2FN[act]
            self.limit = limit
            name, rows = ("gate_up_proj", 14) if gated else ("up_proj", 7)
            shapes = {name: (rows, 12), "down_proj": (12, 7)}
            generator = torch.Generator().manual_seed(3)
            for key, (out, inner) in shapes.items():
                shape = (inner, out) if flags.get("is_transposed") else (out, inner)
                values = torch.randn(5, *shape, generator=generator)
                setattr(self, key, torch.nn.Parameter(values))
                if bias:
                    values = torch.randn(5, out, generator=generator)
                    setattr(self, f"{key}_bias", torch.nn.Parameter(values))

        def forward(self, *_: Any) -> None:
            raise AssertionError("the interface chooses the forward")

    if apply_gate is not None:
        Experts._apply_gate = apply_gate  # type: ignore[attr-defined]
    elif not flags.get("is_concatenated", True):
        Experts._apply_gate = lambda self, h: self.act_fn(h[..., ::2]) * h[..., 1::2]  # type: ignore[attr-defined]
    config = SimpleNamespace(_experts_implementation="moert", num_experts_per_tok=2)
    return use_experts_implementation(Experts, **flags)(config)


def clamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def clamped_after(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def shifted(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * (up + 1e-3)


def wrong_way_round(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    up, gate = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def failing(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("needs a batch")


def call(module: Any, name: str, *inputs: torch.Tensor) -> torch.Tensor:
    module.config._experts_implementation = name
    return module(*inputs)


def routing(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, 5, generator=generator).argsort(1)[:, :2]
    return ids, torch.rand(tokens, 2, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("arguments", "activation", "limit"),
    [
        ({}, "silu", None),
        ({"has_bias": True}, "silu", None),
        ({"is_transposed": True}, "silu", None),
        ({"is_transposed": True, "has_bias": True, "is_concatenated": False}, "silu", None),
        ({"is_concatenated": False}, "silu", None),
        ({"has_gate": False, "act": "relu2"}, "relu2", None),
        ({"has_gate": False, "has_bias": True, "is_transposed": True}, "silu", None),
        ({"act": "gelu"}, "gelu", None),
        ({"act": "gelu_pytorch_tanh"}, "gelu_tanh", None),
        ({"act": "gelu_new"}, "gelu_tanh", None),
        ({"limit": 0.5}, "silu", None),  # a number that the gate function does not use
        ({"limit": 0.5, "apply_gate": clamped}, "silu", 0.5),
        ({"limit": 10, "apply_gate": clamped, "act": "gelu"}, "gelu", 10),
    ],
    # a function's own text holds its address, which differs between test processes
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_layouts_and_activations(
    arguments: dict[str, Any], activation: str, limit: float | None
) -> None:
    module = make_module(**arguments)
    cfg, _ = describe(module, top_k=2)
    assert cfg == MoEConfig(
        5,
        2,
        12,
        7,
        activation=activation,
        activation_limit=limit,
        gated=arguments.get("has_gate", True),
        bias=arguments.get("has_bias", False),
        dtype="float32",
    )
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1)) * 3
    ids, weights = routing(9)
    expected = call(module, "batched_mm", x, ids, weights)
    assert relative(call(module, "moert", x, ids, weights), expected) < 1e-5


def test_inputs_of_other_forms() -> None:
    """Strided rows, columns in memory order, other dtypes, sentinel ids, no rows at all."""
    module = make_module()
    base = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    x, (ids, weights) = base[:, 3:15], routing(9)
    expected = call(module, "batched_mm", x.contiguous(), ids, weights)
    for rows in (x, x.contiguous(), x.t().contiguous().t()):
        out = call(module, "moert", rows, ids, weights)
        assert relative(out, expected) < 1e-6 and out.is_contiguous()
    by_columns = [t.t().contiguous().t() for t in (ids, weights)]
    assert relative(call(module, "moert", x, *by_columns), expected) < 1e-6
    assert (
        relative(call(module, "moert", x, ids.to(torch.int16), weights.double()), expected) < 1e-6
    )
    assert relative(call(module, "moert", x, ids, weights.bfloat16()), expected) < 1e-2
    # autocast hands over activations of another dtype than the weights
    low = call(module, "moert", x.bfloat16(), ids, weights)
    assert low.dtype == torch.bfloat16 and relative(low.float(), expected) < 1e-2
    assert call(module, "moert", x[:0], ids[:0], weights[:0]).shape == (0, 12)
    # expert parallelism: an id of E or more is another rank's
    elsewhere = ids.clone()
    elsewhere[:, 1] = 5
    alone = call(module, "batched_mm", x, ids, weights * torch.tensor([1.0, 0.0]))
    assert relative(call(module, "moert", x, elsewhere, weights), alone) < 1e-6


def test_bf16_model_with_float32_and_bf16_routing_weights() -> None:
    module = make_module().bfloat16()
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        ids, weights = routing(9, dtype)
        expected = call(
            copy.deepcopy(module).float(), "batched_mm", x.float(), ids, weights.float()
        )
        out = call(module, "moert", x, ids, weights)
        assert out.dtype == torch.bfloat16 and relative(out.float(), expected) < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"apply_gate": shifted}, r"gate function shifted.*none that moert computes: silu, gelu"),
        ({"apply_gate": wrong_way_round}, "none that moert computes"),
        ({"apply_gate": clamped_after, "limit": 7.0}, "none that moert computes"),
        ({"apply_gate": failing}, "failed on float32.*needs a batch"),
        ({"apply_gate": lambda self, h: h}, r"does not give \[n, I\]"),
        ({"act": "relu"}, r"act_fn=ReLU.*none that moert computes"),
        ({"act": "gelu_10"}, "none that moert computes"),  # differs beyond 10 only
        ({"has_gate": False, "act": "quick_gelu"}, "none that moert computes"),
        ({"post_norm": True}, "norm between each expert and its routing weight"),
    ],
    ids=[
        "shifted",
        "swapped",
        "clamped-after",
        "fails",
        "shape",
        "relu",
        "gelu_10",
        "quick",
        "norm",
    ],
)
def test_modules_it_cannot_compute_are_refused(arguments: dict[str, Any], message: str) -> None:
    flags = dict(arguments)
    norm = flags.pop("post_norm", False)
    module = make_module(**flags)
    module.has_post_expert_norm = norm  # an argument of the decorator only after transformers 5.17
    with pytest.raises(UnsupportedError, match=f"Experts: .*{message}"):
        call(module, "moert", torch.randn(3, 12), *routing(3))
    with pytest.raises(UnsupportedError, match=message):
        prepare(module)
    assert len(Prepared([module])) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_dtypes_it_cannot_compute_are_refused(dtype: torch.dtype) -> None:
    module = make_module()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    with pytest.raises(
        UnsupportedError, match=f"Parameter of {dtype}; need plain tensors of bfloat16"
    ):
        prepare(module)


def test_meta_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="meta device"):
        prepare(make_module().to("meta"))


def test_gradients_are_refused() -> None:
    module = make_module()
    inputs = (torch.randn(3, 12), *routing(3))
    call(module, "moert", *inputs)  # parameters may require them where none are recorded
    with torch.enable_grad():
        with pytest.raises(InputError, match=r"requires_grad=True.*torch.no_grad\(\)"):
            call(module, "moert", *inputs)
        module.requires_grad_(False)
        assert not call(module, "moert", *inputs).requires_grad
        with pytest.raises(InputError, match="no gradients"):
            call(module, "moert", inputs[0].requires_grad_(), *inputs[1:])
    call(module, "moert", *inputs)


def test_bad_arguments_of_prepare() -> None:
    with pytest.raises(ConfigError, match=r"unknown option\(s\) bucket, share; known: backend"):
        prepare(make_module(), bucket=[1], share=None)
    with pytest.raises(UnsupportedError, match="Linear: no module whose forward"):
        prepare(torch.nn.Linear(2, 2))
    module = make_module()
    del module.config.num_experts_per_tok
    with pytest.raises(ConfigError, match=r"num_experts_per_tok.*give prepare\(model, top_k=...\)"):
        prepare(module)
    assert prepare(module, top_k=3)[0].cfg.top_k == 3
    with pytest.raises(ConfigError, match="max_tokens=0"):
        prepare(module, top_k=3, max_tokens=0)
    assert len(Prepared([module])) == 0


def test_another_number_of_experts_per_token_is_another_runtime() -> None:
    module = make_module()
    x, (ids, weights) = torch.randn(3, 12), routing(3)
    call(module, "moert", x, ids, weights)
    expected = call(module, "batched_mm", x, ids[:, :1], weights[:, :1])
    assert relative(call(module, "moert", x, ids[:, :1], weights[:, :1]), expected) < 1e-6


def test_modules_with_the_same_parameters() -> None:
    """Either may be freed while the other goes on."""
    first, second = make_module(), make_module()
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    inputs = (torch.randn(3, 12), *routing(3))
    expected = call(first, "moert", *inputs)
    layers = prepare(second)
    assert torch.equal(call(first, "moert", *inputs), expected)
    layers.close()
    assert torch.equal(call(first, "moert", *inputs), expected)
    assert torch.equal(call(second, "moert", *inputs), expected)


@pytest.mark.usefixtures("dynamo")
def test_compiled_function_for_many_modules() -> None:
    """What was traced with one module must not run its runtime for another one."""
    first = make_module()
    second = copy.deepcopy(first)
    second.down_proj.mul_(2)
    inputs = (torch.randn(3, 12), *routing(3))
    expected = call(first, "batched_mm", *inputs)
    first.config._experts_implementation = second.config._experts_implementation = "moert"
    run = torch.compile(lambda module: module(*inputs), fullgraph=True, backend="eager")
    for module, factor in ((first, 1), (second, 2), (first, 1)):
        assert relative(run(module), factor * expected) < 1e-6


def test_operator_with_unknown_parameters() -> None:
    """As in a program that was exported and loaded elsewhere."""
    module = make_module()
    x, (ids, weights) = torch.randn(3, 12), routing(3)
    out = torch.empty_like(x)
    arguments = (out, x, ids, weights, parameters(module))
    with pytest.raises(
        StateError, match=r"no runtime for these parameters; call .*prepare\(model\)"
    ):
        torch.ops.moert.experts(*arguments)
    prepare(module)
    torch.ops.moert.experts(*arguments)
    assert torch.equal(out, call(module, "moert", x, ids, weights))


def test_without_an_experts_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.moe as interface

    monkeypatch.delattr(interface, "ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(UnsupportedError, match=r"need transformers >= 5\.17"):
        register()


def test_nothing_is_built_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    inputs = (torch.randn(3, 12), *routing(3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(StateError, match=r"while a stream is capturing; call .*prepare\(model\)"):
        call(module, "moert", *inputs)
    assert experts_runtimes.find(experts_runtimes.key_of(parameters(module), 2)) is None
