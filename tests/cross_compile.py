"""Compiles the GEMM kernels of one target, which need not be present, and prints what came out as JSON.

A process of its own for test_cross_compile: where tests run on a CPU, the interpreter replaces the compiler.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from moert.backends.triton import TritonBackend
from moert.backends.triton_tiles import candidates
from moert.cli.absent import absent_views, absent_weights
from moert.cli.compile_pool import resources
from moert.config import MoEConfig
from moert.device import KNOWN_DEVICES, DeviceFacts
from moert.graphs import parameter_count
from moert.launch import Launch, compile_launch
from moert.plan import Choice

CFG = MoEConfig(32, 4, 2048, 768)
GPT_OSS = MoEConfig(32, 4, 2880, 2880, activation="swiglu_oai", bias=True)


def cases(arch: str) -> Iterator[tuple[str, TritonBackend, Choice, int, bool]]:
    facts = KNOWN_DEVICES[arch]
    plain = TritonBackend(CFG, absent_weights(CFG), facts)
    for tokens in (1, 16, 4096):
        yield f"T={tokens}", plain, plain.default_choice(tokens), tokens, True
    yield "unaligned", plain, plain.default_choice(1), 1, False
    gpt_oss = TritonBackend(GPT_OSS, absent_weights(GPT_OSS, interleaved=True), facts)
    yield "gpt-oss", gpt_oss, gpt_oss.default_choice(64), 64, True
    # the largest tile that is said to fit
    grouped = [c for c in candidates(CFG, facts, 4096, ("one_shot",)) if c.strategy == "one_shot"]
    largest = max(grouped, key=lambda c: (c.gate_up.bm * c.gate_up.bn * c.gate_up.bk, str(c)))  # type: ignore[union-attr]
    yield "largest", plain, largest, 4096, True


def describe(launch: Launch, compiled: Any, facts: DeviceFacts) -> dict[str, Any]:
    return {
        "kernel": launch.name,
        **asdict(resources(compiled, facts, launch.num_warps)),
        "visible": sum(kind != "constexpr" for kind in compiled.src.signature.values()),
        "parameters": parameter_count(compiled),
    }


def main(arch: str) -> None:
    facts, found = KNOWN_DEVICES[arch], []
    name = arch if facts.kind == "hip" else int(arch.removeprefix("sm_"))
    target = GPUTarget(facts.kind, name, facts.warp_size)
    for case, backend, choice, tokens, aligned in cases(arch):
        launches = backend.launches(tokens, choice, absent_views(backend.fields(tokens, choice)))
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
            found.append({"case": case, **describe(launch, compiled, facts)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
