"""Jobs for the compiler: whole without the launch they come from, the same from whichever tensors."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from moert.arena import Arena, layout
from moert.backends.triton import TritonBackend
from moert.cli.absent import absent_weights
from moert.config import MoEConfig, Quant
from moert.device import KNOWN_DEVICES, device_facts
from moert.launch import compile_job
from moert.plan import STRATEGIES
from moert.weights import ExpertWeights

CONFIGS = {
    "bfloat16": MoEConfig(128, 8, 2048, 768),
    "odd": MoEConfig(60, 4, 1000, 500, dtype="float16", bias=True),
    "int4": MoEConfig(128, 8, 2048, 768, quant=Quant("int4", 128)),
}


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_candidates_jobs_can_be_sent(name: str, arch: str) -> None:
    cfg = CONFIGS[name]
    backend = TritonBackend(cfg, absent_weights(cfg), KNOWN_DEVICES[arch])
    jobs = {
        job: None
        for tokens in (1, 16, 512)
        for choice in backend.candidates(tokens, STRATEGIES)
        for job in backend.compile_jobs(tokens, choice)
    }
    sent = pickle.loads(pickle.dumps(list(jobs)))
    assert sent == list(jobs) and len(jobs) > 20
    # Triton's cache knows constants by their text
    assert [str(job) for job in sent] == [str(job) for job in jobs]


@pytest.mark.parametrize("misaligned", [False, True])
def test_jobs_are_those_of_the_programs(misaligned: bool) -> None:
    """Stand-ins for the arena's views and its views are specialised alike; weights as they lie."""
    cfg = MoEConfig(4, 2, 64, 32, bias=True)
    weights = ExpertWeights.random(cfg)
    if misaligned:
        b2 = torch.empty(4 * 64 + 1, dtype=cfg.torch_dtype)[1:].view(4, 64)
        weights = replace(weights, b2=b2)
    backend = TritonBackend(cfg, weights, KNOWN_DEVICES["sm_90"])
    found = set()
    for choice in backend.candidates(16, STRATEGIES):
        fields = backend.fields(16, choice)
        views = Arena(torch.device("cpu"), layout(fields)[1]).views(fields)
        launches = backend.launches(16, choice, views)
        made = [compile_job(launch, cfg.torch_dtype, True, 16) for launch in launches]
        assert list(backend.compile_jobs(16, choice)) == made
        assert [job.kernel() for job in made] == [launch.kernel for launch in launches]
        found.update(made)
    aligned = TritonBackend(cfg, ExpertWeights.random(cfg), KNOWN_DEVICES["sm_90"])
    others = {j for c in aligned.candidates(16, STRATEGIES) for j in aligned.compile_jobs(16, c)}
    assert (found == others) != misaligned


def test_an_interpreter_compiles_nothing() -> None:
    cfg = MoEConfig(4, 2, 64, 32)
    cpu = device_facts(torch.device("cpu"))
    backend = TritonBackend(cfg, ExpertWeights.random(cfg), cpu)
    assert backend.compile_jobs(1, backend.default_choice(1)) == ()
