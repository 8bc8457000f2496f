"""Reads AITER's signatures off its sources, without importing it, into `tests/aiter_signatures.json`.

pip download --no-deps --pre amd-aiter
python scripts/aiter_signatures.py amd_aiter-*.whl
"""

from __future__ import annotations

import argparse
import ast
import json
import zipfile
from pathlib import Path
from typing import Any

OPERATORS = {
    "aiter/ops/moe_sorting.py": ["moe_sorting_fwd"],
    "aiter/ops/moe_sorting_opus.py": [
        "moe_sorting_opus_fwd",
        "moe_sorting_opus_get_workspace_size",
    ],
    "aiter/ops/moe_op.py": ["_topk_softmax", "ck_moe_stage1_fwd", "ck_moe_stage2_fwd"],
    "aiter/ops/shuffle.py": ["shuffle_weight"],
}
TARGET = Path(__file__).parent.parent / "tests" / "aiter_signatures.json"


def signature(function: ast.FunctionDef) -> list[list[str | None]]:
    """[name, default as source text or None] of every parameter, in order."""
    positional = function.args.posonlyargs + function.args.args
    without = len(positional) - len(function.args.defaults)
    defaults = [None] * without + [ast.unparse(default) for default in function.args.defaults]
    return [[argument.arg, default] for argument, default in zip(positional, defaults, strict=True)]


def signatures(wheel: Path) -> dict[str, Any]:
    """Operator -> signature, or None for one that the wheel does not have."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in OPERATORS.items():
            functions = {}
            if path in archive.namelist():
                tree = ast.parse(archive.read(path))
                functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
            found |= {n: signature(functions[n]) if n in functions else None for n in names}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel
    name, version = wheel.name.split("-")[:2]
    content = {"source": f"{name} {version}", "operators": signatures(wheel)}
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{TARGET.name}: {content['source']}")


if __name__ == "__main__":
    main()
