"""Compiles variants in processes of their own: a compiler that dies takes one kernel along, no more."""

from __future__ import annotations

import multiprocessing
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moert.cli.compile_report import Resources, problems, read_amdgcn, read_ptx
from moert.cli.compile_variants import Variant, compile_variant
from moert.device import KNOWN_DEVICES, DeviceFacts
from moert.env import without
from moert.graphs import parameter_count


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled variant: what it uses and what is wrong with it."""

    variant: Variant
    resources: Resources | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        variant = self.variant
        cfg = variant.layer.cfg
        return {
            "target": variant.arch,
            "kernel": variant.kernel,
            "tile": variant.tile,
            "shape": [cfg.num_experts, cfg.top_k, cfg.hidden_size, cfg.intermediate_size],
            "dtype": cfg.dtype,
            "bias": cfg.bias,
            "quant": None if cfg.quant is None else asdict(cfg.quant),
            "layout": variant.layer.layout,
            "tokens": variant.tokens,
            "aligned": variant.aligned,
            "strategy": None if variant.choice is None else variant.choice.strategy,
            "resources": None if self.resources is None else asdict(self.resources),
            "problems": list(self.problems),
        }


def examine(variant: Variant) -> Row:
    """Compile one variant in this process, which must not run Triton's interpreter."""
    facts = KNOWN_DEVICES[variant.arch]
    try:
        compiled, warps = compile_variant(variant)
        found = resources(compiled, facts, warps)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Row(variant, None, (f"does not compile: {type(error).__name__}: {first}",))
    wrong = problems(found, facts, needs_matrix=variant.needs_matrix, needs_wide=variant.needs_wide)
    return Row(variant, found, tuple(wrong))


def resources(compiled: Any, facts: DeviceFacts, num_warps: int) -> Resources:
    """What a compiled kernel uses, from what Triton and the compilers behind it say.

    Raises:
        ValueError: they say too little.
    """
    metadata = compiled.metadata
    visible = sum(kind != "constexpr" for kind in compiled.src.signature.values())
    sizes = {
        "num_warps": num_warps,
        "shared": metadata.shared,
        "global_scratch": getattr(metadata, "global_scratch_size", 0)
        + getattr(metadata, "profile_scratch_size", 0),
        "hidden": parameter_count(compiled) - visible,
    }
    if facts.kind == "hip":
        return read_amdgcn(compiled.asm["amdgcn"], facts, **sizes)
    return read_ptx(compiled.asm["ptx"], resource_usage(compiled.asm["cubin"]), facts, **sizes)


def resource_usage(cubin: bytes) -> str:
    """What the cuobjdump that comes with Triton says about a cubin.

    Raises:
        subprocess.CalledProcessError: no cubin.
    """
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def examine_all(variants: Sequence[Variant], workers: int) -> Iterator[Row]:
    """Rows in the order in which they are done.

    Args:
        workers: processes at a time.
    """
    left = dict.fromkeys(variants)
    # the workers are to compile, whatever this process does
    with without("TRITON_INTERPRET"):
        try:
            with _pool(min(workers, max(1, len(variants)))) as pool:
                futures = {pool.submit(examine, variant): variant for variant in variants}
                for future in as_completed(futures):
                    row = future.result()
                    del left[futures[future]]
                    yield row
        except BrokenProcessPool:
            for variant in left:
                yield _examine_alone(variant)


def _examine_alone(variant: Variant) -> Row:
    try:
        with _pool(1) as pool:
            return pool.submit(examine, variant).result()
    except BrokenProcessPool:
        return Row(variant, None, ("does not compile: the compiler ended its process",))


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
