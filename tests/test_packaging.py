"""What pip sees: one version, honest requirements, typed, with its data."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import moert

ROOT = Path(__file__).resolve().parent.parent


def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("moert")
    except metadata.PackageNotFoundError:
        pytest.skip("moert runs from its source tree here, it is not installed")


def test_versions_agree() -> None:
    assert installed().version == moert.__version__


def test_license_and_python() -> None:
    meta = installed().metadata
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.10"
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_requirements() -> None:
    required = installed().requires or []
    names = {re.split(r"[\s<>=;\[]", line)[0] for line in required}
    base = {re.split(r"[\s<>=;\[]", line)[0] for line in required if "extra ==" not in line}
    assert base == {"torch", "numpy", "safetensors", "platformdirs"}
    # `aiter` on the index is an unrelated asynchronous-iterator library
    assert "amd-aiter" in names
    assert "aiter" not in names


def test_extras() -> None:
    extras = set(installed().metadata.get_all("Provides-Extra") or [])
    assert extras == {"rocm", "hf", "bench", "plot", "test", "dev"}
    required = [line for line in installed().requires or [] if "extra ==" in line]
    for extra, name in (("rocm", "amd-aiter"), ("hf", "transformers"), ("plot", "matplotlib")):
        names = [line for line in required if f'"{extra}"' in line.replace("'", '"')]
        assert [re.split(r"[\s<>=;\[]", line)[0] for line in names] == [name]


def test_typed() -> None:
    assert (ROOT / "moert" / "py.typed").is_file()
