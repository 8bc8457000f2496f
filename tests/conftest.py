"""Fixtures that more than one test file needs."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_stand_in import StandIn
from code_size import pytest_terminal_summary as pytest_terminal_summary

from moert.device import KNOWN_DEVICES

if not torch.cuda.is_available():
    # read by triton when a kernel is decorated, so it must be there before any kernel module is
    os.environ.setdefault("TRITON_INTERPRET", "1")


# no test reads or writes the user's tuning records
os.environ["MOERT_TUNING_DIR"] = tempfile.mkdtemp(prefix="moert-tuning-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def _script(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(family, dtype)`: a small random transformers model, the same one each time."""
    pytest.importorskip("transformers")
    make_model, made = _script("make_tiny_checkpoint").make_model, {}

    def get(family: str, dtype: str = "float32") -> Any:
        if (family, dtype) not in made:
            made[family, dtype] = make_model(family, dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`tiny_checkpoint(family, dtype)`: a read-only directory where that model is saved."""
    saved: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str = "float32") -> Path:
        if (family, dtype) not in saved:
            saved[family, dtype] = tmp_path_factory.mktemp(f"{family}-{dtype}")
            tiny_model(family, dtype).save_pretrained(saved[family, dtype])
        return saved[family, dtype]

    return get


@pytest.fixture
def aiter(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """AITER is installed, and the CPU passes for a device that it serves."""
    monkeypatch.setattr("moert.build.device_facts", lambda place: KNOWN_DEVICES["gfx942"])
    return StandIn().install(monkeypatch)
