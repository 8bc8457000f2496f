"""The kernels before AITER's operators: ids and weights of any call in the one form that those take."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton

from moert import MoEConfig, TopK
from moert.launch import run_interpreted
from moert.steps.checked_rows.launches import checked_rows_launch, clear_live_rows_launch
from moert.tuning.check import new_call, set_call

NAN = float("nan")
ODD = (-1, 7, 8, 2**30, -(2**31))
ODD_64 = (2**32, 2**32 + 1, -(2**63), -(2**32))  # the low words of the first two are experts

COMPILE = """
import itertools, json, sys, torch
from triton.backends.compiler import GPUTarget
from moert import MoEConfig
from moert.launch import compile_launch
from moert.steps.checked_rows.launches import checked_rows_launch, clear_live_rows_launch
cfg, spills = MoEConfig(128, 8, 2048, 768), []
ids = torch.empty(1, dtype=torch.int32, device="meta")
launches = checked_rows_launch(cfg, ids, ids.float()), clear_live_rows_launch(cfg)
for launch, aligned, arch in itertools.product(launches, (True, False), sys.argv[1:]):
    target = GPUTarget("hip", arch, 64)
    text = compile_launch(launch, torch.bfloat16, aligned=aligned, target=target).asm["amdgcn"]
    spills += [int(line.split()[-1]) for line in text.splitlines() if "_spill_count:" in line]
print(json.dumps(spills))
"""


def rows(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows, `gap` elements further apart."""
    wide = torch.zeros(values.shape[0], values.shape[1] + gap, dtype=values.dtype)
    return wide[:, : values.shape[1]].copy_(values)


@pytest.mark.parametrize(
    "tokens", [1, 3, 45, 130]
)  # less than a program's rows, more, several programs
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [0, 3])
def test_checked_rows(tokens: int, ids: torch.dtype, weights: torch.dtype, gap: int) -> None:
    cfg = MoEConfig(7, 3, 40, 24, dtype="float16")
    g = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(0, 7, (tokens, 3), generator=g)
    odd = torch.tensor(ODD + (ODD_64 if ids is torch.int64 else ()))
    strange = torch.rand(tokens, 3, generator=g) < 0.4
    chosen = torch.where(strange, odd[torch.randint(len(odd), (tokens, 3), generator=g)], chosen)
    given = torch.rand(tokens, 3, generator=g).to(weights)
    live = tokens - tokens // 3
    given[live:] = NAN
    topk = TopK(rows(given, gap), rows(chosen.to(ids), gap))
    x = torch.full((tokens, 40), NAN, dtype=torch.float16)
    # one row more than there are tokens: it must stay as it is
    got_ids = torch.full((tokens + 1, 3), -77, dtype=torch.int32)
    got_weights = torch.full((tokens + 1, 3), -77.0)
    call = new_call(cfg, torch.device("cpu"))
    set_call(call, x, topk, torch.empty_like(x), torch.tensor(live, dtype=torch.int32))
    launch = checked_rows_launch(cfg, got_ids, got_weights)
    run_interpreted([launch], call.interpreter_values(), tokens)
    expected = torch.where((chosen >= 0) & (chosen < 7), chosen, 7)
    expected[live:] = 7
    assert torch.equal(got_ids[:tokens], expected.int())
    assert torch.equal(got_weights[:live], given[:live].float())
    assert not got_weights[live:tokens].any()
    assert (got_ids[tokens:] == -77).all() and (got_weights[tokens:] == -77).all()


@pytest.mark.parametrize(
    "hidden", [1, 40, 2048, 2500]
)  # of one width, and more than is cleared at a time
@pytest.mark.parametrize("live", [-3, 0, 2, 5, 9])
def test_clear_live_rows(hidden: int, live: int) -> None:
    cfg = MoEConfig(7, 3, hidden, 24, dtype="float16")
    buffer = torch.full((6, hidden + 2), NAN, dtype=torch.float16)
    out = buffer[:5, :hidden]
    topk = TopK(torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int32))
    call = new_call(cfg, torch.device("cpu"))
    count = torch.tensor(live, dtype=torch.int32)
    set_call(call, torch.zeros(5, hidden, dtype=torch.float16), topk, out, count)
    run_interpreted([clear_live_rows_launch(cfg)], call.interpreter_values(), 5)
    end = max(0, min(live, 5))
    assert (out[:end] == 0).all()
    assert out[end:].isnan().all() and buffer[:, hidden:].isnan().all() and buffer[5].isnan().all()


def test_they_compile_without_spills() -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip("no compiler")
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, "gfx90a", "gfx942", "gfx950"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    spills = json.loads(run.stdout)
    assert len(spills) == 24 and not any(spills)
