"""Which backend is taken, and why others are not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from moert.backends.registry import NAMES, backend_class, select_backend
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES, device_facts
from moert.env import BACKENDS
from moert.errors import ConfigError, UnsupportedError

CFG = MoEConfig(8, 2, 64, 64)
MANY = MoEConfig(1025, 2, 64, 64)  # more experts than the kernels take
CPU = device_facts(torch.device("cpu"))
H200 = KNOWN_DEVICES["sm_90"]


def test_names_agree_with_the_environment() -> None:
    assert set(BACKENDS) == {"auto", *NAMES}


@pytest.mark.parametrize(
    ("name", "cfg", "facts", "chosen"),
    [
        ("auto", CFG, CPU, "torch"),  # though the interpreter could
        ("torch", CFG, CPU, "torch"),
        ("auto", MANY, CPU, "torch"),
        ("auto", CFG, H200, "triton"),
        ("auto", CFG, KNOWN_DEVICES["gfx942"], "triton"),
        ("triton", CFG, KNOWN_DEVICES["gfx1151"], "triton"),
    ],
)
def test_chosen(name: str, cfg: MoEConfig, facts: Any, chosen: str) -> None:
    kind, notes = select_backend(name, cfg, facts)
    assert kind.name == chosen
    assert notes == ()


@pytest.mark.parametrize(
    ("name", "cfg", "facts", "reasons"),
    [
        (
            "torch",
            CFG,
            H200,
            ["backend torch: reads expert ids on the host, so it runs on a CPU only"],
        ),
        (
            "triton",
            MANY,
            H200,
            ["backend triton: num_experts=1025 exceeds the kernels' limit of 1024"],
        ),
        (
            "auto",
            MANY,
            H200,
            ["backend triton: num_experts=1025", "backend aiter: ", "backend torch: "],
        ),
    ],
)
def test_nobody_can(name: str, cfg: MoEConfig, facts: Any, reasons: list[str]) -> None:
    with pytest.raises(UnsupportedError) as raised:
        select_backend(name, cfg, facts)
    message = str(raised.value)
    assert message.startswith(f"no backend for {facts.name}: ")
    assert all(reason in message for reason in reasons)


@pytest.mark.parametrize("name", ["cuda", "Triton", "", "auto ", None, 3, ["torch"]])
def test_unknown_names(name: Any) -> None:
    with pytest.raises(ConfigError, match="is not one of auto, triton, aiter, torch"):
        select_backend(name, CFG, CPU)


def test_without_an_interpreter_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UnsupportedError, match="only under Triton's interpreter"):
        select_backend("triton", CFG, CPU)


def test_triton_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "moert.backends.triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [n for n in sys.modules if n.startswith("moert.") and n.endswith("triton")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("moert.launch", "moert.steps.call_args"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    reason = backend_class("triton")
    assert isinstance(reason, str) and reason.startswith("triton cannot be imported: ")
    with pytest.raises(UnsupportedError, match="backend triton: triton cannot be imported"):
        select_backend("triton", CFG, H200)
    assert select_backend("auto", CFG, CPU)[0].name == "torch"
