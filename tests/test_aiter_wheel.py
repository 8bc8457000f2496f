"""AITER's sources, as its wheel has them: parsed, never imported. Skipped where the wheel cannot be had."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from aiter_signatures import OPERATORS, signature, signatures  # noqa: E402

RECORD = json.loads((ROOT / "tests" / "aiter_signatures.json").read_text())
NAME, VERSION = RECORD["source"].split()
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version that was recorded, from the package index: 40 MB, seconds, kept by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--retries", "0", "--dest", str(folder), f"{NAME}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        done = SimpleNamespace(returncode=1, stderr="no answer")  # type: ignore[assignment]
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        said = done.stderr.strip().splitlines() or ["pip is not here"]
        pytest.skip(f"{NAME} cannot be had: {said[-1]}; its recorded signatures stand for it")
    return found[0]


def test_the_record_is_what_the_wheel_says(wheel: Path) -> None:
    """`test_aiter_ops` holds the stand-in to the record."""
    assert signatures(wheel) == RECORD["operators"]


def test_the_sort_allocates_only_what_a_policy_needs(wheel: Path) -> None:
    """`moe_sorting_fwd` takes no scratch from the caller: it makes its own where the size is not zero.

    So its one-shot policy, which needs none, may be called inside a capture, and its multi-phase one not.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith("py_itfs_ck/moe_sorting_kernels.cu")]
        source = archive.read(names[0]).decode()
    body = source.partition("moe_sorting_fwd(")[2]
    size = "moe_sorting_get_workspace_size(num_tokens, num_experts, topk, dispatch_policy)"
    assert size in " ".join(body.split())
    condition, _, allocation = body.partition("if(workspace_size > 0)")
    assert "torch::empty" not in condition and "torch::empty" in allocation


def test_what_routes_in_the_wheel_makes_its_scratch_itself(wheel: Path) -> None:
    """`topk_softmax` takes none; `_topk_softmax`, which does, is not there: our kernel routes."""
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read("aiter/ops/moe_op.py"))
        names = [n for n in archive.namelist() if n.endswith("kernels/topk_softmax_kernels.cu")]
        source = archive.read(names[0]).decode()
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert "_topk_softmax" not in functions
    assert [name for name, _ in signature(functions["topk_softmax"])] == [
        *("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "need_renorm")
    ]
    assert "torch::empty({workspace_size}" in source.partition("void topk_softmax(")[2]


def test_parsing(tmp_path: Path) -> None:
    """Defaults are source text, absent functions and files are None, nothing is executed."""
    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "aiter/ops/moe_op.py",
            "raise SystemExit\n@decorated('x')\ndef ck_moe_stage1_fwd(a, b: int = 32, c=Q.No): ...\n",
        )
    found = signatures(path)
    assert found.pop("ck_moe_stage1_fwd") == [["a", None], ["b", "32"], ["c", "Q.No"]]
    assert set(found.values()) == {None}
    assert len(found) + 1 == sum(len(names) for names in OPERATORS.values())
