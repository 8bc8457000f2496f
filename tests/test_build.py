"""From what a user hands over to a runtime: configs of all kinds, options, weights, devices, sharing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moert import ExpertWeights, MoEConfig, MoERuntime
from moert.build import DEFAULT_BUCKETS, resolve_config
from moert.env import SORT_POLICIES, TUNE_MODES, VARIABLES
from moert.errors import ConfigError, StateError, UnsupportedError, WeightsError

CFG = MoEConfig(6, 2, 40, 24, dtype="float32")
WEIGHTS = ExpertWeights.random(CFG)
HF = {
    "model_type": "mixtral",
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def make(**options: Any) -> MoERuntime:
    return MoERuntime(options.pop("cfg", CFG), options.pop("weights", WEIGHTS), **options)


@pytest.mark.parametrize(
    "given",
    [
        CFG,
        {k: v for k, v in asdict(CFG).items() if k != "routing"},
        asdict(CFG),
        HF,
        SimpleNamespace(to_dict=lambda: HF),
    ],
    ids=["config", "dict", "dict of dicts", "hugging face dict", "object"],
)
def test_every_kind_of_config(given: Any) -> None:
    cfg = resolve_config(given)
    same = ("num_experts", "top_k", "hidden_size", "intermediate_size", "dtype", "activation")
    assert [getattr(cfg, name) for name in same] == [getattr(CFG, name) for name in same]
    assert MoERuntime(given, WEIGHTS).cfg == cfg


def test_a_path_is_a_config_and_with_a_layer_the_weights(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    path = tiny_checkpoint("mixtral")
    for given in (path, str(path), MoEConfig.from_pretrained(str(path))):
        rt = MoERuntime(given, layer=1)
        assert rt.cfg.path == str(path)
        assert torch.equal(rt.weights.w13, ExpertWeights.from_checkpoint(path, 1).w13)
        with pytest.raises(WeightsError, match="layer: missing, need the number of a layer of"):
            MoERuntime(given)


@pytest.mark.parametrize("given", [None, 3, [CFG], MoEConfig, object(), b"path"], ids=type)
def test_what_is_no_config(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"model_cfg: got {type(given).__name__}, need a MoEConfig"
    ):
        MoERuntime(given, WEIGHTS)


@pytest.mark.parametrize(
    "given", ["/nowhere/at/all", {"num_experts": 6}, {"model_type": "bert"}, {}]
)
def test_configs_that_lead_nowhere(given: Any) -> None:
    with pytest.raises(ConfigError):
        MoERuntime(given, WEIGHTS)


BAD_OPTIONS: list[dict[str, Any]] = [
    *({"max_tokens": bad} for bad in (0, -1, 2**24, 4.0, "8", True, [8])),
    *({"buckets": bad} for bad in ((), (0,), (4097,), ("1",), (True,), (1.0,), 5, "12", [[1]])),
    {"buckets": (1, 9), "max_tokens": 8},
    *({"graphs": bad} for bad in ("on", "OWN", "", True, ["own"])),
    *({"sort_policy": bad} for bad in (4, -1, "0", True, 1.0, [1])),
    *({"tune": bad} for bad in ("yes", "", True, 0)),
    *({"backend": bad} for bad in ("cuda", "", 3, ["torch"])),
    *({"device": bad} for bad in ("gpu", "", 1.5, "cpu:x")),
    *({"share": bad} for bad in ("rt", CFG, WEIGHTS)),
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(options: dict[str, Any]) -> None:
    """The option and what was given; and refused before weights are read from anywhere."""
    with pytest.raises(ConfigError) as raised:
        make(**options)
    name, value = next(iter(options.items()))
    assert name in str(raised.value)
    assert repr(value) in str(raised.value) or type(value).__name__ in str(raised.value)
    with pytest.raises(ConfigError):
        MoERuntime(replace(CFG, path="/nowhere"), layer=0, **options)


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_devices_that_nothing_runs_on(device: str) -> None:
    with pytest.raises(UnsupportedError, match=f"device={device}"):
        make(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", torch.device("cuda")])
def test_a_gpu_that_is_not_there(device: Any) -> None:
    with pytest.raises(UnsupportedError, match="torch sees no GPU here"):
        make(device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_has_no_index(device: Any) -> None:
    """Tensors on the CPU say "cpu", so a runtime on "cpu:0" would refuse them all."""
    assert make(device=device).device == torch.device("cpu") == make().device


def test_weights_missing_says_how_to_give_them() -> None:
    with pytest.raises(WeightsError) as raised:
        MoERuntime(CFG)
    for way in (
        "ExpertWeights.from_tensors",
        ".random(cfg)",
        ".from_checkpoint(path, layer)",
        "layer=",
    ):
        assert way in str(raised.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"w13": WEIGHTS.w13}, "weights: got dict, need an ExpertWeights"),
        (3, "weights: got int, need an ExpertWeights"),
        (
            ExpertWeights.random(replace(CFG, num_experts=5)),
            r"w13: shape \[5, 48, 40\], need \[6, 48, 40\]",
        ),
        (
            ExpertWeights.random(replace(CFG, dtype="float16")),
            "w13: dtype torch.float16, need torch.float32",
        ),
    ],
)
def test_weights_that_do_not_fit(weights: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        make(weights=weights)


@pytest.mark.parametrize(
    ("max_tokens", "buckets", "sizes"),
    [
        (None, None, (*DEFAULT_BUCKETS, 1024, 2048, 4096)),
        (1, None, (1,)),
        (5, None, (1, 2, 4, 5)),
        (100, (40, 3, 3), (3, 40, 80, 100)),
        (512, None, DEFAULT_BUCKETS),
        (600, (600,), (600,)),
    ],
)
def test_plans_cover_every_size(
    max_tokens: int | None, buckets: tuple[int, ...] | None, sizes: tuple[int, ...]
) -> None:
    rt = make(max_tokens=max_tokens, buckets=buckets)
    assert tuple(plan.tokens for plan in rt.plan()) == sizes
    arena = max(plan.scratch_bytes for plan in rt.plan())
    assert rt.memory()["arena"] == arena


def test_options_arrive() -> None:
    for graphs in ("own", "host", "off"):
        report = make(graphs=graphs).plan()
        assert report.graphs == "off" and not any(plan.captured for plan in report)  # on a CPU
    for policy in SORT_POLICIES:
        assert make(sort_policy=policy)._group.options.sort_policy == policy
    for tune in TUNE_MODES:
        assert make(tune=tune)._group.options.tune == tune


def test_the_environment_is_read_at_start_and_an_argument_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOERT_SORT_POLICY", "2")
    monkeypatch.setenv("MOERT_TUNE", "off")
    monkeypatch.setenv("MOERT_BACKEND", "aiter")
    options = make(backend="torch")._group.options
    assert (options.sort_policy, options.tune) == (2, "off")
    options = make(backend="torch", sort_policy=0, tune="force")._group.options
    assert (options.sort_policy, options.tune) == (0, "force")
    with pytest.raises(UnsupportedError, match="backend aiter"):
        make()
    monkeypatch.setenv("MOERT_TUNE", "never")
    with pytest.raises(ConfigError, match="MOERT_TUNE='never'"):
        make()


def test_one_arena_for_all_that_share() -> None:
    first = make(max_tokens=16, buckets=(1, 4))
    second = make(share=first, weights=ExpertWeights.random(CFG, seed=1))
    third = make(share=second, device="cpu")
    assert first._group is second._group is third._group
    assert second.plan().plans is first.plan().plans
    assert second.memory()["arena"] == first.memory()["arena"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 16},
        {"buckets": (1, 4)},
        {"graphs": "own"},
        {"sort_policy": 0},
        {"tune": "off"},
        {"backend": "torch"},
    ],
    ids=str,
)
def test_options_of_a_shared_runtime_are_settled(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"share: {next(iter(options))} come.s. from"):
        make(share=make(max_tokens=16, buckets=(1, 4)), **options)


@pytest.mark.parametrize(
    "change",
    [{"top_k": 3}, {"intermediate_size": 25}, {"activation": "gelu"}, {"dtype": "float16"}],
)
def test_sharing_needs_the_same_geometry(change: dict[str, Any]) -> None:
    cfg = replace(CFG, **change)
    with pytest.raises(ConfigError, match="differs from the shared runtime's"):
        make(cfg=cfg, weights=ExpertWeights.random(cfg), share=make(max_tokens=16))


def test_sharing_does_not_compare_paths() -> None:
    make(cfg=replace(CFG, path="layer-1"), share=make(max_tokens=16))


@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_sharing_across_devices(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device={device}: the shared runtime is on cpu"):
        make(share=make(max_tokens=16), device=device)


def test_sharing_with_the_closed() -> None:
    rt = make(max_tokens=16)
    rt.close()
    with pytest.raises(StateError, match="share: the runtime is closed"):
        make(share=rt)
