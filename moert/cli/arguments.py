"""Arguments that more than one verb takes, and how results are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moert.config import ACTIVATIONS, DTYPES, QUANT_FORMATS, MoEConfig
from moert.env import BACKENDS, SORT_POLICIES
from moert.errors import ConfigError


def shape(text: str) -> MoEConfig:
    """E,K,H,I as a configuration.

    Raises:
        argparse.ArgumentTypeError: not four positive integers, or K above E.
    """
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(
            f"{text!r}: need four integers E,K,H,I (experts, experts per token, hidden and intermediate "
            "size), such as 128,8,2048,768"
        )
    try:
        cfg = MoEConfig(numbers[0], numbers[1], numbers[2], numbers[3])
        cfg.check_routing()
        return cfg
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def directory(text: str) -> Path:
    """The directory of a checkpoint.

    Raises:
        argparse.ArgumentTypeError: no such directory.
    """
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r}: no such directory; need a downloaded checkpoint"
        )
    return path


def model_or_shape(text: str) -> MoEConfig | Path:
    """A directory where one exists, else E,K,H,I.

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if "," in text:
        return shape(text)
    raise argparse.ArgumentTypeError(
        f"{text!r}: neither the directory of a checkpoint nor a shape E,K,H,I such as 128,8,2048,768"
    )


def tokens(text: str) -> int:
    """A number of tokens.

    Raises:
        argparse.ArgumentTypeError: not an integer in 1..2^24-1.
    """
    if text.isdecimal() and 1 <= int(text) < 2**24:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: need an integer in 1..{2**24 - 1}")


def add_layer(parser: argparse.ArgumentParser) -> None:
    """The layer that a verb is about."""
    parser.add_argument(
        "layer",
        type=model_or_shape,
        metavar="MODEL_DIR|E,K,H,I",
        help="a checkpoint's directory, or experts, experts per token, hidden and intermediate size",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Options of a runtime that its plans depend on."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--buckets", nargs="+", type=tokens, metavar="B", help="batch sizes")
    parser.add_argument("--max-tokens", type=tokens, metavar="T", help="the most of one call")
    parser.add_argument("--sort-policy", type=int, choices=tuple(SORT_POLICIES), default=None)


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """What a shape alone does not tell."""
    group = parser.add_argument_group("with a shape")
    group.add_argument("--dtype", choices=DTYPES, help="of weights and activations (bfloat16)")
    group.add_argument("--quant", choices=QUANT_FORMATS, help="of the weights (as --dtype)")
    group.add_argument("--activation", choices=ACTIVATIONS, help="of the experts (silu)")


def layer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `MoEConfig` that were asked for."""
    names = ("dtype", "quant", "activation")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they need: numbers right, the rest left."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *texts]) for i in range(len(head))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    for row in [list(head), *texts]:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())


def size(nbytes: int) -> str:
    """Bytes for people: "1.5 GiB"."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
