"""moert as transformers' experts implementation: same logits and tokens, on the model's own parameters."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moert import MoERuntime, StateError, TopK
from moert.integrations.experts_module import is_experts_module, parameters
from moert.integrations.transformers import Prepared, experts_forward, prepare, register

FAMILIES = {
    # family: (activation, layers with experts)
    "mixtral": ("silu", 2),
    "qwen2_moe": ("silu", 2),
    "qwen3_moe": ("silu", 2),  # and a dense one between them
    "qwen3_next": ("silu", 2),
    "deepseek_v3": ("silu", 1),
    "olmoe": ("silu", 2),
    "minimax_m2": ("silu", 2),
    "gpt_oss": ("swiglu_oai", 2),  # transposed, interleaved, with biases
}
PROMPT = torch.randint(2, 256, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def reference_backend_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the hook is tested here; Triton's interpreter would make each test a hundred times slower
    monkeypatch.setenv("MOERT_BACKEND", "torch")
    register()
    with torch.no_grad():
        yield


@pytest.fixture
def fresh(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`fresh(family, dtype)`: a model of one's own; the session's is never changed."""

    def get(family: str, dtype: str = "float32", implementation: str = "moert") -> Any:
        model = copy.deepcopy(tiny_model(family, dtype))
        model.set_experts_implementation(implementation)
        return model

    return get


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if is_experts_module(module)]


def logits(model: Any, implementation: str | None = None) -> torch.Tensor:
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model(PROMPT).logits.float()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def greedy(model: Any, implementation: str) -> list[list[int]]:
    model.set_experts_implementation(implementation)
    out = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_and_tokens(family: str, fresh: Callable[..., Any]) -> None:
    model = fresh(family)
    expected = logits(model, "eager")
    assert relative(logits(model, "moert"), expected) < 1e-5
    assert greedy(model, "moert") == greedy(model, "eager")
    runtimes = Prepared(experts_of(model))
    activation, layers = FAMILIES[family]
    assert [runtime.cfg.activation for runtime in runtimes] == [activation] * layers
    assert runtimes.stats()["calls"] == 13 * layers  # one for the logits, one for each new token


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bf16_is_as_good_as_eager(family: str, fresh: Callable[..., Any]) -> None:
    model = fresh(family, "bfloat16")
    exact = logits(copy.deepcopy(model).float(), "eager")  # the very same weights
    own, eager = (relative(logits(model, name), exact) for name in ("moert", "eager"))
    assert 0 < own <= 1.5 * eager


def test_from_pretrained(tiny_checkpoint: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moert")
    ours = logits(model)
    assert Prepared(experts_of(model)).stats()["calls"] == 2
    assert relative(ours, logits(model, "eager")) < 1e-5


def test_register_twice() -> None:
    register()
    register()
    assert ALL_EXPERTS_FUNCTIONS["moert"] is experts_forward


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_weights_are_the_models_own(family: str, fresh: Callable[..., Any]) -> None:
    """By address; and a change of the parameters in place is seen by the next call."""
    model = fresh(family)
    layers = prepare(model)
    for runtime, module in zip(layers, experts_of(model), strict=True):
        tensors = [t for name, t in runtime.weights.tensors().items()]
        assert [t.data_ptr() for t in tensors] == [p.data_ptr() for p in parameters(module)]
        assert sum(t.numel() for t in tensors) == sum(p.numel() for p in module.parameters())
    before = logits(model)
    for module in experts_of(model):
        module.down_proj.mul_(2)
    after = logits(model)
    assert relative(after, before) > 1e-2
    assert relative(after, logits(model, "eager")) < 1e-5


def test_prepare_builds_all_and_counts_what_is_shared_once(fresh: Callable[..., Any]) -> None:
    model = fresh("mixtral", implementation="eager")
    layers = prepare(model, max_tokens=32, buckets=[1, 8], backend="torch")
    assert model.config._experts_implementation == "moert"
    assert len(layers) == 2 and len(list(layers)) == 2
    assert layers.stats()["calls"] == 0
    assert [plan.tokens for plan in layers.plan()[0]] == [1, 8, 16, 32] and len(layers.plan()) == 1
    single, both = layers[0].memory(), layers.memory()
    assert both["weights"] == 2 * single["weights"]
    assert both["arena"] == single["arena"] > 0
    assert both["total"] == single["total"] + single["weights"]
    built = list(layers)
    logits(model)
    assert layers.stats()["calls"] == 2
    assert list(prepare(model, max_tokens=32, buckets=[1, 8], backend="torch")) == built
    other = prepare(model, max_tokens=16)
    assert not set(other) & set(built)
    with pytest.raises(StateError, match="closed"):
        built[0].plan()
    other.close()
    other.close()
    assert len(other) == 0 and other.memory()["total"] == 0 and other.stats() == {}
    assert relative(logits(model), logits(model, "eager")) < 1e-5  # made anew on demand


def test_models_do_not_share(fresh: Callable[..., Any]) -> None:
    """Graphs captured around two models may run at the same time."""
    models = [fresh("mixtral"), fresh("mixtral")]
    first, second = (prepare(model) for model in models)
    assert first[0]._group is first[1]._group
    assert first[0]._group is not second[0]._group


def test_moved_parameters_are_noticed(
    fresh: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh("mixtral")
    layers = prepare(model, max_tokens=64)
    former = list(layers)
    storages = [weakref.ref(p.untyped_storage()) for m in experts_of(model) for p in m.parameters()]
    model.to(torch.bfloat16)
    logits(model)
    assert {runtime.cfg.dtype for runtime in layers} == {"bfloat16"}
    assert len(layers.plan()) == 1  # they share again
    assert layers.plan()[0].plans[-1].tokens == 64  # with the options of prepare
    for runtime in former:
        with pytest.raises(StateError, match="closed"):
            runtime.plan()
    del former, runtime
    gc.collect()
    assert [ref() for ref in storages] == [None] * len(storages)  # nothing keeps the former weights

    module = experts_of(model.float())[0]
    logits(model)
    module.down_proj = torch.nn.Parameter(module.down_proj * 3)
    assert relative(logits(model), logits(model, "eager")) < 1e-5
    with caplog.at_level(logging.WARNING, "moert"):
        module.down_proj.data = module.down_proj.data.clone()
        logits(model, "moert")
    assert "parameters moved again, runtime built 4 times" in caplog.text


def test_copies_and_pickles_build_their_own(fresh: Callable[..., Any]) -> None:
    model = fresh("gpt_oss")
    layers = prepare(model)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for module in experts_of(other):
            module.down_proj.zero_()
        assert relative(logits(other), expected) > 1e-2
        theirs = Prepared(experts_of(other))
        assert len(theirs) == 2 and not set(theirs) & set(layers)
    assert torch.equal(logits(model), expected)


def test_a_model_is_not_kept_alive(fresh: Callable[..., Any]) -> None:
    model = fresh("mixtral")
    layers = prepare(model)
    module, runtime = weakref.ref(experts_of(model)[0]), weakref.ref(layers[0])
    del model
    gc.collect()
    assert module() is None and runtime() is None
    assert len(layers) == 0


def test_outputs_may_be_kept(fresh: Callable[..., Any]) -> None:
    model, kept = fresh("mixtral"), []
    for module in experts_of(model):
        module.register_forward_hook(
            lambda _m, _args, output: kept.append((output, output.clone()))
        )
    for _ in range(3):
        logits(model)
    assert len({output.data_ptr() for output, _ in kept}) == len(kept) == 6
    assert all(torch.equal(output, clone) for output, clone in kept)


def test_nothing_is_copied_on_the_way(
    fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By address: the runtime reads what the module was given and writes what the module returns."""
    model = fresh("mixtral")
    seen: dict[str, list[int]] = {"module": [], "runtime": []}

    def spy(self: MoERuntime, x: torch.Tensor, topk: TopK, out: torch.Tensor) -> torch.Tensor:
        seen["runtime"] += [t.data_ptr() for t in (x, topk.ids, topk.weights, out)]
        return forward(self, x, topk, out)

    def hook(_: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["module"] += [t.data_ptr() for t in (*given, output)]

    forward = MoERuntime.forward
    monkeypatch.setattr(MoERuntime, "forward", spy)
    for module in experts_of(model):
        module.register_forward_hook(hook)
    logits(model)
    assert len(seen["module"]) == 8 and seen["module"] == seen["runtime"]


@pytest.mark.parametrize("inside", [True, False], ids=["made-in-inference-mode", "made-outside"])
def test_inference_mode_and_no_grad_mix(inside: bool, fresh: Callable[..., Any]) -> None:
    model = fresh("mixtral")
    results = []
    for mode in (inside, not inside):
        with torch.inference_mode(mode), torch.no_grad():
            results.append(logits(model).clone())
    assert torch.equal(*results)


def test_default_dtype_and_device_do_not_matter(fresh: Callable[..., Any]) -> None:
    model = fresh("mixtral")
    expected = logits(model, "eager")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            prepare(model)
        assert relative(logits(model), expected) < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("family", "backend"), [("gpt_oss", "eager"), ("mixtral", "aot_eager")])
def test_compiled_in_one_piece(family: str, backend: str, fresh: Callable[..., Any]) -> None:
    model = fresh(family)
    expected = logits(model, "eager")
    model.set_experts_implementation("moert")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert relative(compiled(PROMPT).logits, expected) < 1e-5
    layers = Prepared(experts_of(model))
    assert layers.stats()["calls"] == 2
    assert relative(compiled(PROMPT[:2]).logits, expected[:2]) < 1e-5  # another T
    # the code stays, the parameters are others
    for module in experts_of(model):
        module.down_proj.data = module.down_proj.data * 2
    assert relative(compiled(PROMPT).logits, logits(model, "eager")) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_on_a_gpu(family: str, fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOERT_BACKEND")
    model = fresh(family, "bfloat16").cuda()
    exact = copy.deepcopy(model).float()
    prompt = PROMPT.cuda()
    exact.set_experts_implementation("eager")
    expected = exact(prompt).logits
    layers = prepare(model, buckets=[3, 21, 32], max_tokens=64, tune="off")
    own = relative(model(prompt).logits.float(), expected)
    assert layers.stats()["replays"] == 2
    if family == "gpt_oss":
        return  # its own attention code copies from the host, which no capture allows
    # somebody else's capture around the whole model
    graph, static = torch.cuda.CUDAGraph(), prompt.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(static, use_cache=False)
        with torch.cuda.graph(graph, stream=stream):
            captured = model(static, use_cache=False).logits
    graph.replay()
    torch.cuda.synchronize()
    assert relative(captured.float(), expected) <= 1.1 * own
    model.set_experts_implementation("eager")
    assert own <= 1.5 * relative(model(prompt).logits.float(), expected)
