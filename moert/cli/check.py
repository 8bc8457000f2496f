"""`moert check`: a checkpoint's experts by the headers of its files, before anything is loaded."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.hf_config import config_from_hf, read_config, text_fields
from moert.checkpoint.loader import layer_problems, ranges
from moert.checkpoint.names import Located, locate
from moert.checkpoint.packing import Packing, packing_of
from moert.cli.absent import absent_weights
from moert.cli.arguments import directory, print_json, size
from moert.config import MoEConfig
from moert.errors import MoertError
from moert.tuning.progress import Progress

EXAMPLES = """examples:
  moert check path/to/model
  moert check path/to/model --json

Nothing is loaded: names, shapes and dtypes are in the headers of the files.
"""
SHOWN = 20  # problems in the table; --json has all


@dataclass
class Layer:
    """One layer with experts: what its tensors take once loaded, and what keeps them from being loaded."""

    layer: int
    nbytes: int
    formats: dict[str, int]
    problems: list[str]


@dataclass
class Found:
    """Everything that was found out about a checkpoint."""

    path: str
    model_type: str | None = None
    config: str | None = None
    packing: str | None = None
    dense_layers: list[int] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        return [*self.problems, *(text for layer in self.layers for text in layer.problems)]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=directory, metavar="MODEL_DIR")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    found = examine(args.path)
    if args.json:
        print_json({**asdict(found), "nbytes": found.nbytes, "problems": found.all_problems})
    else:
        print_found(found)
    return bool(found.all_problems)


def examine(path: Path) -> Found:
    """As much as can be found out: a config that is not understood still leaves the files to look at."""
    found, cfg, packing = Found(str(path)), None, None
    try:
        fields = text_fields(read_config(path))
        found.model_type = fields.get("model_type")
        cfg, packing = config_from_hf(fields), packing_of(fields)
        found.config = repr(cfg)
        found.packing = None if packing is None else str(packing)
    except MoertError as error:
        found.problems.append(str(error))
    try:
        with closing(TensorFiles(path)) as files:
            located = locate(files.names(), str(found.model_type))
            found.dense_layers = [n for n in located.layers if n not in located.blocks]
            if not located.blocks:
                found.problems.append(f"{path}: no layer with experts among the tensors' names")
            found.layers = examine_layers(files, located, cfg, packing)
    except MoertError as error:
        found.problems.append(str(error))
    return found


def examine_layers(
    files: TensorFiles, located: Located, cfg: MoEConfig | None, packing: Packing | None
) -> list[Layer]:
    """Every layer; without a config, only the formats of its tensors."""
    names: dict[str, list[str]] = {block: [] for block in located.blocks.values()}
    depth = {block.count(".") for block in names}
    for name in files.names():
        for dots in depth:
            block = ".".join(name.split(".")[:dots]) + "."
            if block in names:
                names[block].append(name)
    nbytes = layer_bytes(cfg, packing) if cfg else 0
    progress = Progress(str(files.path), len(located.blocks), verb="checking")
    layers = []
    try:
        for done, (number, block) in enumerate(located.blocks.items()):
            progress.update(done, f"layer {number}")
            problems = layer_problems(files, block, located.names, cfg, packing) if cfg else []
            layers.append(Layer(number, nbytes, formats(files, names[block], problems), problems))
    finally:
        progress.close()
    return layers


def formats(files: TensorFiles, names: list[str], problems: list[str]) -> dict[str, int]:
    """How many tensors there are of each dtype; a file that cannot be opened is a problem."""
    counts: Counter[str] = Counter()
    try:
        for name in names:
            counts[files.dtype(name)] += 1
    except MoertError as error:
        problems += [] if str(error) in problems else [str(error)]
    return dict(counts)


def layer_bytes(cfg: MoEConfig, packing: Packing | None = None) -> int:
    """What one layer's experts, router and biases take in cfg.dtype, or packed as int4."""
    router = cfg.num_experts * cfg.hidden_size * cfg.torch_dtype.itemsize
    # the order in which each expert's columns are stored, int32
    order = 4 * cfg.num_experts * cfg.hidden_size if packing and packing.act_order else 0
    return absent_weights(cfg).nbytes + router + order


def print_found(found: Found) -> None:
    print(f"{found.path}: model_type {found.model_type}")
    if found.config:
        print(found.config)
    numbers = [layer.layer for layer in found.layers]
    print(f"layers with experts: {ranges(numbers) or 'none'} ({len(numbers)})")
    if found.dense_layers:
        print(f"layers without: {ranges(found.dense_layers)}")
    total: Counter[str] = Counter()
    for layer in found.layers:
        total.update(layer.formats)
    counts: Any = ", ".join(f"{count} {name}" for name, count in total.items())
    print(f"tensors of these layers: {counts or 'none'}")
    if found.packing:
        print(f"experts: {found.packing}")
    if found.nbytes:
        print(f"memory: {size(found.layers[0].nbytes)} a layer, {size(found.nbytes)} in total")
    problems = found.all_problems
    print("no problems" if not problems else f"{len(problems)} problem(s):")
    for text in problems[:SHOWN]:
        print(f"  {text}")
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN} more; --json shows all")
