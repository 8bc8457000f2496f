"""Time until a layer is ready, in a process of its own: nothing cached and tuning, then caches warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from matrix import Matrix

CHILD = Path(__file__).parent / "start_up_child.py"
WARM_STARTS = 3


def start(folder: Path, smoke: bool, tune: str) -> dict[str, Any]:
    """One process; all caches are under the folder."""
    env = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "MOERT_TUNING_DIR": str(folder / "records"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, str(CHILD), "--tune", tune, *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@cache
def starts(folder: Path, smoke: bool) -> dict[str, list[dict[str, Any]]]:
    return {
        "cold": [start(folder, smoke, "force")],
        "warm": [start(folder, smoke, "auto") for _ in range(1 if smoke else WARM_STARTS)],
    }


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.mark.parametrize("caches_are", ["cold", "warm"])
def test_first_layer(
    caches_are: str, caches: Path, matrix: Matrix, record: Callable[..., None]
) -> None:
    found = starts(caches, matrix.smoke)[caches_are]
    # one process is one sample: other programs of the machine disturb it
    extra = {"sources": found[0]["sources"], "regression_percent": 60}
    record([run["first_us"] for run in found], "start-up", **extra)


def test_further_layer(caches: Path, matrix: Matrix, record: Callable[..., None]) -> None:
    found = starts(caches, matrix.smoke)["warm"]
    samples = [us for run in found for us in run["further_us"]]
    record(samples, "start-up", regression_percent=60)
