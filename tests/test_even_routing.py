"""What is expected of experts, against routings drawn at random."""

from __future__ import annotations

import pytest
import torch

from moert.backends.even_routing import distinct_experts, rows_of_nearly_all


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(16, 64, 4), (64, 128, 8), (512, 8, 2)])
def test_nearly_no_expert_has_more_rows(tokens: int, experts: int, top_k: int) -> None:
    """Of 200 routings; and not many fewer would do."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, tokens, experts, generator=generator)
    ids = scores.topk(top_k, -1).indices.flatten(1)
    rows = torch.zeros(200, experts).scatter_add_(1, ids, torch.ones(ids.shape))
    mean = tokens * top_k / experts
    assert (rows > rows_of_nearly_all(mean)).float().mean() < 0.05
    assert (rows > (mean + rows_of_nearly_all(mean)) / 2).float().mean() > 0.05


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 64, 4), (16, 64, 4), (8, 8, 2)])
def test_experts_that_are_hit(tokens: int, experts: int, top_k: int) -> None:
    """On the average of 2000 routings."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2000, tokens, experts, generator=generator)
    ids = scores.topk(top_k, -1).indices.flatten(1)
    hit = torch.zeros(2000, experts).scatter_(1, ids, 1.0).sum(1).mean().item()
    assert hit == pytest.approx(distinct_experts(experts, top_k, tokens), rel=0.01)


def test_distinct_experts() -> None:
    assert distinct_experts(128, 8, 1) == pytest.approx(8)
    assert distinct_experts(128, 8, 2) == pytest.approx(15.5)
    assert distinct_experts(8, 8, 5) == pytest.approx(8)
    assert (
        distinct_experts(3, 8, 1) == distinct_experts(3, 8, 2) == 3.0
    )  # a shard: never more than E
