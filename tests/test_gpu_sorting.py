"""The public sort on a GPU: up to its limits, element for element what the CPU gives; nothing allocated."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, assert_nothing_is_allocated

from moert.device import device_facts
from moert.steps.sorting import SortBuffers, sort
from moert.steps.sorting.launches import feasible

pytestmark = pytest.mark.gpu

POLICIES = {1: "one_shot", 2: "multi_phase"}
# T, E, K: each limit by itself and all together, and sizes with nothing in common
SIZES = [
    (65536, 1024, 32),
    (65536, 1024, 1),
    (65536, 1, 1),
    (65535, 7, 5),
    (2048, 1024, 32),
    (1, 1024, 32),
    (4097, 513, 10),
    (12345, 300, 3),
    (511, 1000, 31),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_feasible_is_right(policy: int, size: tuple[int, int, int]) -> None:
    """Against the CPU's sort, with ids of nobody, all rows live and then not."""
    tokens, experts, top_k = size
    if reason := feasible(POLICIES[policy], tokens, experts, top_k, device_facts(DEVICE)):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=generator)
    on_gpu = ids.to(DEVICE), weights.to(DEVICE)
    for live in (tokens, tokens // 2 + 1):
        count = torch.tensor([live], dtype=torch.int32)
        want = sort(ids, weights, experts, 32, num_valid=count)
        out = SortBuffers.empty(tokens, top_k, experts, 32, DEVICE)
        for tensor in (*out.rows, out.scratch):
            tensor.fill_(-5)
        got = sort(*on_gpu, experts, 32, policy=policy, num_valid=count.to(DEVICE), out=out)
        padded = int(want.num_valid_ids[0])
        for name, used in (
            ("num_valid_ids", 2),
            ("sorted_token_ids", padded),
            ("sorted_weights", padded),
            ("sorted_expert_ids", padded // 32),
        ):
            found = getattr(got, name).cpu()
            assert torch.equal(found[:used], getattr(want, name)[:used]), name
            assert (found[used:] == -5).all(), f"{name}: written past the rows in use"


@pytest.mark.parametrize("policy", [0, *POLICIES])
def test_nothing_is_allocated_with_buffers(policy: int) -> None:
    out = SortBuffers.empty(600, 8, 128, 16, DEVICE)
    ids = torch.randint(0, 128, (600, 8), device=DEVICE, dtype=torch.int32)
    weights = torch.rand(600, 8, device=DEVICE)
    live = torch.tensor([500], dtype=torch.int32, device=DEVICE)

    def calls() -> None:
        for tokens in (1, 16, 256, 600):
            sort(ids[:tokens], weights[:tokens], 128, 16, policy=policy, num_valid=live, out=out)
            sort(ids[:tokens], weights[:tokens], 128, 16, policy=policy, out=out)

    assert_nothing_is_allocated(calls, 1, 20)
