"""Rules about the source tree itself: what may import what, what importing costs, how long files get."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from code_size import ROOT, lines, parsed, source_files

import moert

# from the bottom up: a module imports from its own layer and from those above it in this table. A name
# stands for a module and all below it, unless a longer name says otherwise.
LAYERS = {
    "vocabulary": ("errors", "env", "field_checks", "config", "topk"),
    "device": ("device",),
    "weights": (
        *("checkpoint", "quantization", "random_weights", "shared_experts"),
        *("weights", "weights_check"),
    ),
    "plan": ("arena", "call", "tensor_check", "checks", "labels", "plan"),
    "launch": (
        "steps.call_args",
        "compile_job",
        "compile_ahead",
        "compile_helper",
        "launch",
        "graph_nodes",
    ),
    "steps": ("steps",),
    "backends": ("backends",),
    "tuning": ("timing", "tuning"),
    "share": ("streams", "block_rows", "share"),
    "executors": ("graphs", "capture", "device_executor", "host_executor"),
    "runtime": ("build", "lifetime", "call_flow", "runtime"),
    "surface": ("", "__main__", "cli", "integrations"),
}

# lazy imports against the direction: (importer, imported): why
EXCEPTIONS = {
    ("config", "checkpoint.hf_config"): "MoEConfig.from_hf and from_pretrained read checkpoints",
}

MAX_LINES = 400
MODULES = {
    ".".join(path.relative_to(ROOT / "moert").with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): path
    for path in source_files("moert")
    if path.suffix == ".py"
}


def entry_of(module: str) -> str | None:
    """The longest entry of LAYERS that covers a module."""
    entries = [name for names in LAYERS.values() for name in names]
    covering = [n for n in entries if module == n or (n and module.startswith(n + "."))]
    return max(covering, key=len, default=None)


def layer_of(module: str) -> int:
    entry = entry_of(module)
    return next((level for level, names in enumerate(LAYERS.values()) if entry in names), 0)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree that run: the bodies of `if TYPE_CHECKING` are left out."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        yield child
        yield from runtime_nodes(child)


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module inside moert) of every import that runs, those inside functions too."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"moert.{module}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "moert.__version__" or name.split(".")[0] != "moert":
                continue
            inner = name.removeprefix("moert").lstrip(".")
            yield node.lineno, inner if inner in MODULES else inner.rpartition(".")[0]


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    return [
        f"moert.{module}:{line} imports moert.{target} from a layer above its own"
        for line, target in imports(module, tree)
        if layer_of(target) > layer_of(module) and (module, target) not in EXCEPTIONS
    ]


def test_every_module_is_in_exactly_one_layer() -> None:
    entries = [name for names in LAYERS.values() for name in names]
    assert len(entries) == len(set(entries))
    assert [module for module in MODULES if entry_of(module) is None] == []


def test_imports_go_downwards() -> None:
    wrong = [
        text for module, path in MODULES.items() for text in wrong_imports(module, parsed(path))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from moert.backends import registry", 1),
        ("import moert.runtime", 1),
        ("from moert import MoERuntime", 1),  # the package itself is the top layer
        ("def f():\n    from moert.graphs import X", 1),  # lazy is no excuse
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moert.runtime", 0),
        ("from moert.config import MoEConfig\nfrom moert import __version__", 0),
        ("from moert.steps.call_args import CALL_ARGS", 0),
    ],
)
def test_the_import_rule_itself(source: str, count: int) -> None:
    assert len(wrong_imports("steps.sorting", ast.parse(source))) == count


def test_no_import_cycles() -> None:
    """Modules of one layer may import each other, but not in a circle when they are loaded."""

    def at_load(module: str) -> set[str]:
        tree = ast.Module(body=[], type_ignores=[])
        tree.body = [
            n for n in parsed(MODULES[module]).body if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        return {target for _, target in imports(module, tree) if target != module}

    graph = {module: at_load(module) for module in MODULES}
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"these modules import each other: {sorted(graph)}"


def fresh_python(code: str) -> Any:
    """Run code in a new interpreter; it prints one JSON value."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_import_is_light_and_quick() -> None:
    code = (
        "import json, sys, time; start = time.perf_counter(); import moert; "
        "print(json.dumps([time.perf_counter() - start, "
        "[m for m in ('torch', 'triton', 'numpy') if m in sys.modules]]))"
    )
    seconds, heavy = min(fresh_python(code) for _ in range(3))
    assert heavy == []
    assert seconds < 0.25  # milliseconds in truth; torch alone would take more


def test_a_config_touches_no_gpu_and_no_triton() -> None:
    code = (
        "import json, sys, torch; from moert import MoEConfig, Routing, TopK; "
        "MoEConfig(8, 2, 64, 32).torch_dtype; "
        "print(json.dumps([torch.cuda.is_initialized(), 'triton' in sys.modules]))"
    )
    assert fresh_python(code) == [False, False]


@pytest.mark.parametrize("name", moert.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(moert, name) is not None
    assert name in dir(moert)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moert' has no attribute 'MoeRuntime'"):
        _ = moert.MoeRuntime  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short(path: Path) -> None:
    assert lines(path) <= MAX_LINES


def tracked_files() -> list[Path]:
    """Text files under version control; in an unpacked archive, the source files."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        return source_files()
    paths = [ROOT / name for name in git.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix != ".png"]


def test_nothing_is_left_for_later() -> None:
    """No markers of unfinished work, no conflict markers, no paths of one machine."""
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK", "W" + "IP")
    marker = re.compile(rf"\b({'|'.join(words)})\b|^(<<<<<<<|>>>>>>>) |/(home|ro{''}ot)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in tracked_files()
        if path.name != "test_architecture.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marker.search(line)
    ]
    assert found == []


def test_only_env_reads_the_environment() -> None:
    reads = {"environ", "environb", "getenv"}
    found = [
        f"moert.{module}:{getattr(node, 'lineno', '?')}"
        for module, path in MODULES.items()
        if module != "env"
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and node.attr in reads)
        or (isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & reads)
    ]
    assert found == []


def test_no_kernel_waits_for_another_or_adds_in_any_order() -> None:
    """Both take atomics: without them no launch can deadlock, and every sum has a fixed order."""
    found = [
        f"moert.{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr.startswith("atomic_")
    ]
    assert found == []


def test_every_module_has_a_docstring() -> None:
    files = [path for path in source_files() if path.suffix == ".py"]
    bare = [path for path in files if parsed(path).body and not ast.get_docstring(parsed(path))]
    assert [str(path.relative_to(ROOT)) for path in bare] == []
