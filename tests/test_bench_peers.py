"""Adapters to other projects' layers: right where they are installed, a reason where not.

vLLM and triton_kernels cannot run here: stand-ins with their documented interfaces take their place, which
shows that arguments have the shapes, dtypes and meanings that those interfaces ask for.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from code_size import ROOT

from moert import ExpertWeights, MoEConfig, TopK
from moert.steps.experts_reference import experts_reference

sys.path.append(str(ROOT / "bench"))

import peers
from layer_chain import uniform_ids

CFG = MoEConfig(8, 3, 40, 24, dtype="float32")
TOKENS = 5


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    inplace: bool = False,
) -> torch.Tensor:
    assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
    weights = ExpertWeights.from_tensors(w1, w2)
    return experts_reference(hidden_states, TopK(topk_weights, topk_ids), weights, CFG)


def make_ragged_tensor_metadata(slice_sizes: torch.Tensor, n_total_rows: int) -> SimpleNamespace:
    assert slice_sizes.dtype == torch.int32 and int(slice_sizes.sum()) == n_total_rows
    return SimpleNamespace(sizes=slice_sizes)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: None,
    a_ragged_metadata: Any = None,
    gather_indx: torch.Tensor | None = None,
    scatter_indx: torch.Tensor | None = None,
    gammas: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row i of the product reads row gather_indx[i], is times gammas[i], is written to scatter_indx[i]."""
    rows = a if gather_indx is None else a[gather_indx]
    expert = torch.repeat_interleave(torch.arange(len(b)), a_ragged_metadata.sizes)
    out = torch.einsum("sk,skn->sn", rows, b[expert])
    out = out if gammas is None else out * gammas[:, None]
    if scatter_indx is None:
        return out
    return torch.empty_like(out).index_copy_(0, scatter_indx.long(), out)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, **names: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(names)
        made.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, made)

    for parent in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "triton_kernels"):
        module(parent, __path__=[])
    module("vllm.model_executor.layers.fused_moe", fused_experts=fused_experts)
    module("triton_kernels.matmul", matmul=matmul)
    module("triton_kernels.tensor", make_ragged_tensor_metadata=make_ragged_tensor_metadata)
    monkeypatch.setattr(peers, "need", lambda name: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins compute on the CPU")
@pytest.mark.parametrize("name", peers.PEERS)
def test_adapter(name: str, stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    weights = ExpertWeights.random(CFG)
    x = torch.randn(TOKENS, CFG.hidden_size)
    topk = TopK(torch.rand(TOKENS, CFG.top_k), uniform_ids(TOKENS, CFG.num_experts, CFG.top_k))
    before = x.clone()
    with monkeypatch.context() as patch:
        if not name.startswith(("torch", "transformers")):
            patch.setattr(peers, "GPU", True)
        call = peers.PEERS[name](CFG, weights, TOKENS)
    got = call(x, topk)
    expected = experts_reference(before, topk, weights, CFG)
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("no_such_project.layer", "no_such_project is not installed"),
        ("json.no_such_part", "the installed json has no json.no_such_part"),
    ],
)
def test_reason(module: str, reason: str) -> None:
    with pytest.raises(peers.AbsentError, match=reason):
        peers.need(module)


def test_batched_mm_of_many_slots_is_left_out() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(peers.AbsentError, match="copies the weights of all 600 slots"):
        peers.PEERS["transformers-batched_mm"](CFG, ExpertWeights.random(CFG), 200)
