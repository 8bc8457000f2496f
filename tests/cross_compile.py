"""Compiles the GEMM kernels of one target, which need not be present, and prints what came out as JSON.

A process of its own for test_cross_compile: where tests run on a CPU, the interpreter replaces the compiler.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from moert.arena import Field
from moert.backends.triton import TritonBackend
from moert.backends.triton_tiles import candidates
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES
from moert.graphs import parameter_count
from moert.launch import Launch, compile_launch
from moert.plan import Choice
from moert.weights import ExpertWeights

CFG = MoEConfig(32, 4, 2048, 768)
GPT_OSS = MoEConfig(32, 4, 2880, 2880, activation="swiglu_oai", bias=True)
WIDE_LOADS = {
    "hip": r"(?:global|buffer)_load_(?:dwordx4|b128)",
    "cuda": r"ld\.global\S*\.v4\.b32|cp\.async\.\S+ \[[^\]]*\], \[[^\]]*\], (?:0x10|16)\b",
}
MATRIX = {"hip": "v_mfma|v_wmma", "cuda": r"wgmma\.mma|mma\.sync|tcgen05\.mma"}


def views_of(fields: tuple[Field, ...]) -> dict[str, torch.Tensor]:
    return {f.name: torch.empty(f.shape, dtype=f.dtype, device="meta") for f in fields}


def weights_of(cfg: MoEConfig, interleaved: bool) -> ExpertWeights:
    experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=cfg.torch_dtype, device="meta")

    w13, w2 = empty(experts, cfg.w13_rows, hidden), empty(experts, hidden, inner)
    biases = (empty(experts, cfg.w13_rows), empty(experts, hidden)) if cfg.bias else (None, None)
    return ExpertWeights(w13, w2, *biases, interleaved=interleaved)


def cases(arch: str) -> Iterator[tuple[str, TritonBackend, Choice, int, bool]]:
    facts = KNOWN_DEVICES[arch]
    plain = TritonBackend(CFG, weights_of(CFG, False), facts)
    for tokens in (1, 16, 4096):
        yield f"T={tokens}", plain, plain.default_choice(tokens), tokens, True
    yield "unaligned", plain, plain.default_choice(1), 1, False
    gpt_oss = TritonBackend(GPT_OSS, weights_of(GPT_OSS, True), facts)
    yield "gpt-oss", gpt_oss, gpt_oss.default_choice(64), 64, True
    # the largest tile that is said to fit
    grouped = [c for c in candidates(CFG, facts, 4096, ("one_shot",)) if c.strategy == "one_shot"]
    largest = max(grouped, key=lambda c: (c.gate_up.bm * c.gate_up.bn * c.gate_up.bk, str(c)))  # type: ignore[union-attr]
    yield "largest", plain, largest, 4096, True


def describe(launch: Launch, compiled: Any, kind: str) -> dict[str, Any]:
    text = compiled.asm["amdgcn" if kind == "hip" else "ptx"]

    def numbers(name: str) -> list[int]:
        return [int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)]

    metadata = compiled.metadata
    return {
        "kernel": launch.name,
        "shared": metadata.shared,
        "scratch": getattr(metadata, "global_scratch_size", 0) + metadata.profile_scratch_size,
        "spills": numbers("vgpr_spill_count"),
        "private": numbers("private_segment_fixed_size"),
        "wide": len(re.findall(WIDE_LOADS[kind], text)),
        "matrix": len(re.findall(MATRIX[kind], text)),
        "visible": sum(kind != "constexpr" for kind in compiled.src.signature.values()),
        "parameters": parameter_count(compiled),
    }


def main(arch: str) -> None:
    facts, found = KNOWN_DEVICES[arch], []
    name = arch if facts.kind == "hip" else int(arch.removeprefix("sm_"))
    target = GPUTarget(facts.kind, name, facts.warp_size)
    for case, backend, choice, tokens, aligned in cases(arch):
        launches = backend.launches(tokens, choice, views_of(backend.fields(tokens, choice)))
        for launch in launches:
            if "sort" in launch.name:
                continue
            compiled = compile_launch(
                launch,
                torch.bfloat16,
                aligned=aligned,
                row_multiple=backend.row_multiple,
                target=target,
            )
            found.append({"case": case, **describe(launch, compiled, facts.kind)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
