"""`moert convert`: a checkpoint with int4 experts, of one with experts in any format that moert reads."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moert.checkpoint.files import INDEX, TensorFiles
from moert.checkpoint.hf_config import read_config, text_fields
from moert.checkpoint.names import Located, locate
from moert.checkpoint.pack_quantized import Tensors, expert_tensors, quantization_config
from moert.checkpoint.packing import QUANTIZED
from moert.cli.arguments import directory, print_json, size
from moert.cli.check import examine
from moert.config import MoEConfig, Quant
from moert.errors import ConfigError, WeightsError
from moert.quantization.int4_layout import Int4Matrix
from moert.tuning.progress import Progress
from moert.weights import ExpertWeights

EXAMPLES = """examples:
  moert convert path/to/model path/to/int4                     groups of 128 columns, symmetric
  moert convert path/to/model path/to/int4 --group-size 32 --zero-points
  moert convert path/to/gptq path/to/int4 --json

Floating experts are rounded to the nearest; those that are int4 already (GPTQ, AWQ, compressed-tensors) keep
their codes and scales. What is written is compressed-tensors' pack-quantized format, which
MoERuntime(OUT_DIR, layer=n) reads. All other tensors are copied as they are. OUT_DIR appears when all of it
is there, and not before.
"""
# beside the tensors: what else a directory needs to be used
KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass
class Converted:
    """What was written; bytes are those of the files' tensors with experts."""

    layers: int = 0
    before: int = 0
    after: int = 0
    act_order: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=directory, metavar="MODEL_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="made; must not exist yet")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="columns of a scale, -1: a row (128)"
    )
    parser.add_argument("--zero-points", action="store_true", help="not symmetric: groups have one")
    parser.add_argument("--device", help="where to round: cuda or cpu (the GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise ConfigError(f"{args.out}: exists already; name a directory that does not")
    cfg = MoEConfig.from_pretrained(str(args.path))
    quant = wanted(cfg, args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with new_directory(args.out) as folder:
        done = convert(args.path, folder, replace(cfg, quant=quant), device)
        problems = examine(folder).all_problems
        if problems:
            raise WeightsError(f"what was written cannot be read: {problems[0]}")
    if args.json:
        facts = {"layers": done.layers, "before": done.before, "after": done.after}
        print_json({"out": str(args.out), "quant": repr(quant), **facts})
    else:
        print(f"{args.out}: {done.layers} layers with experts, {quant}")
        print(f"experts: {size(done.before)} before, {size(done.after)} now")
    return 0


def wanted(cfg: MoEConfig, args: argparse.Namespace) -> Quant:
    """The quantisation asked for, or the one that the experts have already.

    Raises:
        ConfigError: they have another one: rounding twice is not offered.
    """
    asked = args.group_size is not None or args.zero_points
    size = 128 if args.group_size is None else args.group_size
    quant = Quant("int4", size, not args.zero_points)
    if cfg.quant is None:
        return quant
    if asked and quant != cfg.quant:
        raise ConfigError(
            f"{cfg.path}: the experts are {cfg.quant} already and keep their codes; need no --group-size and "
            "no --zero-points, or the same ones"
        )
    return cfg.quant


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes it at the end; after an error nothing is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def convert(source: Path, folder: Path, cfg: MoEConfig, device: str) -> Converted:
    """Write the checkpoint; `cfg.quant` says how."""
    fields = read_config(source)
    with closing(TensorFiles(source)) as files:
        model_type = str(text_fields(fields).get("model_type"))
        located, names = locate(files.names(), model_type), files.names()
    if not located.blocks:
        raise WeightsError(f"{source}: no layer with experts among the tensors' names")
    done, file_of = Converted(), dict[str, str]()
    experts = tuple(f"{block}experts." for block in located.blocks.values())
    others = [name for name in names if not name.startswith(experts)]
    steps = len(located.blocks) + 1
    progress = Progress(str(source), steps, verb="converting")
    try:
        for step, (layer, block) in enumerate(located.blocks.items()):
            progress.update(step, f"layer {layer}")
            # shared experts are among the other tensors, which stay as they are
            routed = replace(cfg, shared_experts=0, shared_gate=False)
            weights = ExpertWeights.from_checkpoint(source, layer, device, cfg=routed)
            tensors = expert_tensors(weights, block, located.names)
            assert isinstance(weights.w13, Int4Matrix)
            done.act_order |= weights.w13.permutation is not None
            done.after += save(folder, f"experts-{layer:05}.safetensors", tensors, file_of)
            done.layers += 1
            del weights, tensors
        progress.update(steps - 1, "other tensors")
        done.before = copy_others(source, folder, others, file_of)
    finally:
        progress.close()
    write_rest(source, folder, fields, located, cfg, done.act_order, file_of)
    return done


def save(folder: Path, file: str, tensors: Tensors, file_of: dict[str, str]) -> int:
    """Write tensors to a file, note them in `file_of`, and return their bytes."""
    save_file(tensors, folder / file, metadata={"format": "pt"})
    file_of.update(dict.fromkeys(tensors, file))
    return sum(tensor.nbytes for tensor in tensors.values())


def copy_others(source: Path, folder: Path, names: list[str], file_of: dict[str, str]) -> int:
    """Copy the named tensors file by file, and return the bytes of the files that are not copied."""
    wanted, left = set(names), 0
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            here = [name for name in file.keys() if name in wanted]  # noqa: SIM118, not a dictionary
            tensors: Tensors = {name: file.get_tensor(name) for name in here}
        left += path.stat().st_size
        if tensors:
            left -= save(folder, f"others-{number:05}.safetensors", tensors, file_of)
    return left


def write_rest(
    source: Path,
    folder: Path,
    fields: dict[str, Any],
    located: Located,
    cfg: MoEConfig,
    act_order: bool,
    file_of: dict[str, str],
) -> None:
    """config.json, the index, and the small files that a directory needs."""
    for pattern in KEPT:
        for path in source.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, folder / path.name)
    assert cfg.quant is not None
    kept = {key: value for key, value in fields.items() if key not in QUANTIZED}
    described = quantization_config(cfg.quant, located.names, act_order)
    write_json(folder / "config.json", {**kept, QUANTIZED[0]: described})
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    write_json(folder / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
