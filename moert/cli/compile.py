"""`moert compile`: every kernel that plans can launch, as machine code for devices that need not be there.

Exit code 1 tells of a kernel that does not compile, spills registers, needs scratch or more shared memory
than the device has, or lacks the matrix instructions or 16-byte loads it should have.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moert.build import DEFAULT_BUCKETS, DEFAULT_MAX_TOKENS
from moert.cli.arguments import (
    add_layer_options,
    directory,
    layer_options,
    print_json,
    print_table,
    shape,
    tokens,
)
from moert.cli.compile_pool import Row, examine_all
from moert.cli.compile_variants import (
    FAMILIES,
    LAYOUTS,
    Layer,
    Variant,
    layouts_of,
    specialisation,
)
from moert.config import MoEConfig, Quant, Routing
from moert.device import KNOWN_DEVICES
from moert.tuning.progress import Progress

EXAMPLES = """examples:
  moert compile --target gfx942                          the usual layers, whatever plans may choose
  moert compile --target gfx942 --target sm_90 --shape 128,8,2048,768 --layout plain
  moert compile --target gfx1151 --model DIR --defaults-only --json
  moert compile --quick                                  every device, few layers and sizes
"""
TARGETS = tuple(KNOWN_DEVICES)
# buckets, then what is launched eagerly up to the default max_tokens
BUCKETS = (*DEFAULT_BUCKETS, 1024, 2048, DEFAULT_MAX_TOKENS)
# a small expert in every layout and dtype, one with biases and an interleaved gate, one routed by groups, one
# whose rows begin at no multiple of 16 bytes; int4 in groups of whole steps and of parts of a block
_GROUPS = Routing("sigmoid", correction_bias=True, num_groups=8, top_groups=4, scaling_factor=2.5)
_SMALL = MoEConfig(128, 8, 2048, 768)
_BIASED = MoEConfig(128, 4, 2880, 2880, activation="swiglu_oai", bias=True)
_NARROW = MoEConfig(128, 8, 1000, 500)
_INT4 = replace(_SMALL, quant=Quant("int4", 128))
USUAL = (
    (_SMALL, LAYOUTS),
    (replace(_SMALL, dtype="float16"), ("plain",)),
    (replace(_SMALL, dtype="float32"), ("plain",)),
    (_BIASED, ("plain", "interleaved")),
    (MoEConfig(256, 8, 7168, 256, routing=_GROUPS), ("plain",)),
    (_NARROW, ("plain",)),
    (_INT4, ("plain",)),
    (replace(_BIASED, dtype="float16", quant=Quant("int4", 32, symmetric=False)), ("plain",)),
    (replace(_NARROW, dtype="float32", quant=Quant("int4", 96, symmetric=False)), ("plain",)),
)
# of all that, what a minute or two suffice for
QUICK = (
    (_SMALL, ("plain",)),
    (replace(_BIASED, top_k=8, dtype="float16"), ("interleaved",)),
    (replace(_NARROW, dtype="float32"), ("plain",)),
    (_INT4, ("plain",)),
)
QUICK_BUCKETS = (1, 64, DEFAULT_MAX_TOKENS)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        action="append",
        choices=TARGETS,
        metavar="ARCH",
        help=f"one of {', '.join(TARGETS)}; may be repeated (all of them)",
    )
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument(
        "--shape", action="append", type=shape, metavar="E,K,H,I", help="a layer; may be repeated"
    )
    layer.add_argument(
        "--quick", action="store_true", help="few layers and sizes, for checks of a change"
    )
    layer.add_argument("--model", type=directory, metavar="DIR", help="the layers of a checkpoint")
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, help="how weights lie in memory (every way)"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=tokens, metavar="T", help="bucket sizes (the default ones)"
    )
    parser.add_argument(
        "--defaults-only",
        action="store_true",
        help="only what runs where nothing is tuned, and shipped records",
    )
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time (one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_layer_options(parser)


def run(args: argparse.Namespace) -> int:
    jobs = args.jobs if args.jobs > 0 else os.cpu_count() or 1
    buckets = args.tokens or (QUICK_BUCKETS if args.quick else BUCKETS)
    everything = not (args.quick or args.defaults_only)
    chosen = collect(layers(args), args.target or TARGETS, sorted(buckets), everything)
    start = time.monotonic()
    rows = compile_rows(chosen, jobs)
    bad = [row for row in rows if row.problems]
    if args.json:
        print_json({"kernels": [row.to_json() for row in rows], "problems": len(bad)})
        return bool(bad)
    print_rows(rows)
    seconds = time.monotonic() - start
    print(f"\n{len(rows)} kernels compiled in {seconds:.0f} s, {len(bad)} with problems")
    for row in bad:
        said = row.to_json()
        where = f"{said['target']} {said['kernel']} {said['tile']} shape {said['shape']}"
        aligned = "aligned" if said["aligned"] else "unaligned"
        print(f"  {where} {said['layout']} {aligned}: {'; '.join(row.problems)}")
    return bool(bad)


def layers(args: argparse.Namespace) -> list[Layer]:
    """The layers asked for in every layout asked for; the usual ones if none was."""
    wanted = args.layout or LAYOUTS
    if args.model is not None:
        return layouts_of(MoEConfig.from_pretrained(args.model), wanted)
    if args.shape:
        cfgs = [replace(cfg, **layer_options(args)) for cfg in args.shape]
        return [layer for cfg in cfgs for layer in layouts_of(cfg, wanted)]
    return [
        layer
        for cfg, layouts in (QUICK if args.quick else USUAL)
        for layer in layouts_of(
            replace(cfg, **layer_options(args)), [name for name in layouts if name in wanted]
        )
    ]


def collect(
    layers: Sequence[Layer], targets: Sequence[str], buckets: Sequence[int], all_candidates: bool
) -> list[Variant]:
    """Every kernel to compile, each specialisation once."""
    found: dict[tuple[Any, ...], Variant] = {}
    for arch in dict.fromkeys(targets):
        for layer in layers:
            for family in FAMILIES:
                for variant in family(layer, arch, buckets, all_candidates):
                    found.setdefault(specialisation(variant), variant)
    return list(found.values())


def compile_rows(chosen: Sequence[Variant], jobs: int) -> list[Row]:
    """All rows, in the order of the variants."""
    progress = Progress(f"{len(chosen)} kernels", len(chosen), verb="compiling")
    rows = {}
    try:
        for number, row in enumerate(examine_all(chosen, jobs), 1):
            rows[row.variant] = row
            progress.update(number, f"{row.variant.arch} {row.variant.kernel}")
    finally:
        progress.close()
    return [rows[variant] for variant in chosen]


HEAD = (
    *("target", "kernel", "tile", "layout", "aligned", "regs", "agpr", "sgpr", "spills"),
    *("scratch", "shared", "waves/SIMD", "matrix", "load", "problems"),
)


def print_rows(rows: Sequence[Row]) -> None:
    table = []
    for row in rows:
        variant, found = row.variant, row.resources
        layout = "bias" if variant.layer.cfg.bias else variant.layer.layout
        if variant.layer.cfg.bias and variant.layer.layout != "plain":
            layout = f"bias, {variant.layer.layout}"
        if variant.layer.cfg.quant is not None:
            layout = f"{variant.layer.cfg.quant.format}, {layout}"
        numbers: list[object] = ["-"] * 9
        if found is not None:
            numbers = [
                *(found.vgprs, found.agprs, found.sgprs, found.spills),
                *(found.scratch, found.shared, found.occupancy, found.matrix, found.widest_load),
            ]
        table.append(
            [
                *(variant.arch, variant.kernel, variant.tile, layout),
                "yes" if variant.aligned else "no",
                *numbers,
                "; ".join(row.problems) or "none",
            ]
        )
    print_table(HEAD, table)
