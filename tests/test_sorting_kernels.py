"""The sort kernels: interpreted, compiled for absent devices, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sorting_cases import CASES, LARGE, POISON, Case, Inputs, assert_sorted, make_inputs, poisoned

from moert.device import KNOWN_DEVICES
from moert.errors import StateError
from moert.steps.sorting import SortBuffers, SortedRows, max_blocks, padded_rows, sort

triton = pytest.importorskip("triton")

from moert.launch import run_interpreted  # noqa: E402
from moert.steps.sorting import launches as plans  # noqa: E402
from moert.steps.sorting import layout  # noqa: E402

H200 = KNOWN_DEVICES["sm_90"]
STRATEGIES = ("one_shot", "multi_phase")
ON_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(ON_GPU, reason="the interpreter is on where there is no GPU")


def launch_values(inputs: Inputs) -> dict[str, Any]:
    words = 2 if inputs.ids.dtype is torch.int64 else 1
    is_f32 = inputs.weights.dtype is torch.float32
    return {
        "ids_ptr": inputs.ids.view(torch.int32),
        "ids_stride": inputs.ids.stride(0) * words,
        "ids_words": words,
        "weights_f32_ptr": inputs.weights if is_f32 else torch.full((1,), torch.nan),
        "weights_ptr": torch.full((1,), torch.nan, dtype=torch.float16)
        if is_f32
        else inputs.weights,
        "weights_stride": inputs.weights.stride(0),
        "weights_are_f32": int(is_f32),
        "num_valid_ptr": torch.tensor([inputs.live], dtype=torch.int32),
        "num_tokens": inputs.ids.shape[0],
    }


def kernel_launches(
    strategy: str,
    case: Case,
    buffers: SortBuffers,
    mask: torch.Tensor | None,
    tokens: int | None = None,
) -> list[Any]:
    views = {**buffers.rows._asdict(), "sort_scratch": buffers.scratch}
    tokens = case.tokens if tokens is None else tokens
    sizes = (tokens, case.experts, case.top_k, case.block)
    return plans.sort_launches(strategy, H200, *sizes, views, mask)


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@interpreted
def test_kernels(strategy: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "ONE_SHOT_TILE", 64)  # so that LARGE needs several
    inputs, buffers = make_inputs(case), poisoned(case)
    launches = kernel_launches(strategy, case, buffers, inputs.mask)
    run_interpreted(launches, launch_values(inputs), case.tokens)
    assert_sorted(buffers.rows, case, inputs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@interpreted
def test_launches_of_a_bucket_take_fewer_tokens(strategy: str) -> None:
    """As replayed (the bucket's grid) and as launched (the call's grid); scratch is stale, not fresh."""
    bucket = Case(45, 20, 4, 16, "bucket")
    buffers = poisoned(bucket)
    launches = kernel_launches(strategy, bucket, buffers, None)
    for tokens, grid_tokens in ((45, 45), (11, 45), (11, 11), (0, 45), (33, 33)):
        case = bucket._replace(tokens=tokens)
        inputs = make_inputs(case, seed=tokens)
        for tensor in buffers.rows:
            tensor.fill_(POISON)
        run_interpreted(launches, launch_values(inputs), grid_tokens)
        assert_sorted(buffers.rows, case, inputs)


@interpreted
def test_more_tiles_than_workgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 workgroups at most, each has several tiles, the last one fewer."""
    for module in (layout, plans):
        monkeypatch.setattr(module, "MAX_SHARES", 3)
        monkeypatch.setattr(module, "PHASE_TILE", 32)
    case = Case(61, 20, 4, 16, "8 tiles for 3 workgroups", live=60)
    inputs, buffers = make_inputs(case), poisoned(case)
    launches = kernel_launches("multi_phase", case, buffers, None)
    assert launches[0].grid(case.tokens) == (3, 1, 1)
    run_interpreted(launches, launch_values(inputs), case.tokens)
    assert_sorted(buffers.rows, case, inputs)


@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@interpreted
def test_one_shot_without_few_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What more rows than a few run, on these cases too."""
    monkeypatch.setattr(plans, "FEW_ROWS", -1)
    inputs, buffers = make_inputs(case), poisoned(case)
    launches = kernel_launches("one_shot", case, buffers, inputs.mask)
    assert [launch.name for launch in launches] == ["sort_one_shot_kernel"]
    run_interpreted(launches, launch_values(inputs), case.tokens)
    assert_sorted(buffers.rows, case, inputs)


@pytest.mark.parametrize("case", LARGE, ids=str)
@interpreted
def test_few_rows_take_all_that_fit(case: Case) -> None:
    inputs, buffers = make_inputs(case), poisoned(case)
    launches = kernel_launches("one_shot", case, buffers, inputs.mask)
    assert [launch.name for launch in launches] == ["sort_one_shot_few_kernel"]
    run_interpreted(launches, launch_values(inputs), case.tokens)
    assert_sorted(buffers.rows, case, inputs)


CROWDS = [
    Case(40, 32, 4, 8, "one expert takes all", ids="same"),
    Case(40, 32, 4, 8, "one hot expert", ids="hot"),
    Case(40, 32, 4, 8, "few rows an expert"),
    Case(64, 4, 2, 8, "every expert crowded"),
    Case(64, 4, 2, 8, "every expert crowded, dead rows", live=37),
    Case(64, 4, 2, 8, "no live token", live=0),
    Case(48, 20, 4, 16, "masked", ids="hot", masked=True),
    Case(50, 3, 2, 5, "blocks no powers of two"),
]


@pytest.mark.parametrize("reach", [1, 4])
@pytest.mark.parametrize("case", CROWDS, ids=str)
@pytest.mark.parametrize("kernel", ["few", "one_shot", "multi_phase"])
@interpreted
def test_blocks_for_crowds(
    kernel: str, case: Case, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one size or the other, as the rule says; what follows the other size finds no rows."""
    if kernel == "one_shot":
        monkeypatch.setattr(plans, "FEW_ROWS", -1)
        monkeypatch.setattr(plans, "ONE_SHOT_TILE", 64)
    strategy = "multi_phase" if kernel == "multi_phase" else "one_shot"
    tall = case._replace(block=case.block * 2 * reach)
    inputs = make_inputs(case)
    both = zip(poisoned(case).rows, poisoned(tall).rows, strict=True)
    longest = SortedRows(*(max(pair, key=torch.numel) for pair in both))
    buffers = SortBuffers(longest, poisoned(tall).scratch)
    crowded_valid = torch.full((3,), POISON, dtype=torch.int32)
    views = {
        **buffers.rows._asdict(),
        "sort_scratch": buffers.scratch,
        "crowded_valid_ids": crowded_valid,
    }
    launches = plans.sort_launches(
        strategy,
        H200,
        *(case.tokens, case.experts, case.top_k, case.block),
        views,
        inputs.mask,
        crowded_block_m=tall.block,
        reach=reach * case.block,
    )
    run_interpreted(launches, launch_values(inputs), case.tokens)
    crowded = layout.takes_crowded(rows_of_experts(case, inputs), reach * case.block, tall.block)
    chosen = num_valid = buffers.rows.num_valid_ids
    if crowded:
        num_valid, chosen = chosen[:2].clone(), crowded_valid
        buffers.rows.num_valid_ids[:2] = chosen[:2]
        assert num_valid.tolist() == [0, chosen[1]]
    else:
        assert crowded_valid[:2].tolist() == [0, num_valid[1]]
    assert crowded_valid[2] == POISON
    assert_sorted(buffers.rows, tall if crowded else case, inputs)


def rows_of_experts(case: Case, inputs: Inputs) -> list[int]:
    ids = inputs.ids[: max(0, min(case.tokens, inputs.live))].flatten().tolist()
    kept = [True] * case.experts if inputs.mask is None else [bool(m) for m in inputs.mask]
    return [ids.count(expert) if kept[expert] else 0 for expert in range(case.experts)]


def test_the_rule_of_crowds() -> None:
    assert not layout.takes_crowded([0, 0], 8, 16)
    assert not layout.takes_crowded([8, 8, 8, 0], 8, 16)
    assert layout.takes_crowded([16, 0, 16], 8, 16)
    # one hot expert among many is read again, the others are not
    assert not layout.takes_crowded([64, *[4] * 127], 8, 64)
    assert layout.takes_crowded([64] * 8, 32, 64)
    assert not layout.takes_crowded([64] * 8, 64, 64)
    # 9 readings for 5: not halved
    assert not layout.takes_crowded([9 * 8], 8, 16)
    assert layout.takes_crowded([2 * 8, 2 * 8, 3 * 8, 5], 8, 24)


def test_crowds_are_among_the_tried() -> None:
    """Of the cases above both sizes are taken, with either reach."""
    for reach in (1, 4):
        taken = {
            layout.takes_crowded(
                rows_of_experts(case, make_inputs(case)), reach * case.block, 2 * reach * case.block
            )
            for case in CROWDS
        }
        assert taken == {True, False}


def test_padded_rows_within_int32() -> None:
    """The largest sort that is feasible keeps its positions below 2^31, padding and grid counted."""
    assert padded_rows(2**24 - 1, 64, 1024, 512) + 512 * 128 < 2**31


def test_feasible() -> None:
    for facts in KNOWN_DEVICES.values():
        for tokens in (0, 1, 64, 256, 65536):
            assert plans.feasible("multi_phase", tokens, 1024, 32, facts) is None
        assert plans.feasible("one_shot", 256, 1024, 32, facts) is None
        assert plans.feasible("none", 1, 1, 1, facts) is None
    tiny = dataclasses.replace(H200, name="tiny", shared_memory=4096)
    refused = [
        (("one_shot", 64, 128, 8, tiny), "shared memory, tiny has 4096"),
        (("multi_phase", 64, 1024, 8, tiny), "shared memory, tiny has 4096"),
        (("one_shot", 65536, 128, 8, H200), "S=524288 exceeds"),
        (("one_shot", 1, 1025, 8, H200), "E=1025 exceeds 1024"),
        (("multi_phase", 1, 128, 128, H200), "K=128 exceeds 127"),
        (("multi_phase", 2**24, 128, 1, H200), "T=16777216 is not below"),
        (("multi_phase", 2**24 - 1, 128, 100, H200), "exceeds 2^30"),
        (("two_shot", 1, 8, 2, H200), "unknown strategy"),
    ]
    for args, reason in refused:
        assert reason in (plans.feasible(*args) or ""), args


def test_fields_hold_what_the_kernels_write() -> None:
    fields = {name: shape for name, shape, _ in plans.sort_fields("multi_phase", 100, 60, 4, 16)}
    assert fields["sorted_token_ids"] == (padded_rows(100, 4, 60, 16),)
    assert fields["sorted_expert_ids"] == (max_blocks(100, 4, 60, 16),)
    assert fields["sort_scratch"] == (5, 64)  # 400 rows in 4 tiles of 128, and the totals
    assert "sort_scratch" not in {
        name for name, *_ in plans.sort_fields("one_shot", 100, 60, 4, 16)
    }
    assert plans.sort_fields("none", 100, 60, 4, 16) == ()
    assert plans.sort_launches("none", H200, 100, 60, 4, 16, {}) == []


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from moert.device import KNOWN_DEVICES
from moert.launch import compile_launch
from moert.steps.sorting.launches import shared_bytes, sort_fields, sort_launches
arch = sys.argv[1]
facts = KNOWN_DEVICES[arch]
hip = facts.kind == "hip"
target = GPUTarget("hip" if hip else "cuda", arch if hip else int(arch[3:]), facts.warp_size)
for strategy, tokens in (("one_shot", 1), ("one_shot", 64), ("one_shot", 1024), ("multi_phase", 4096)):
    crowded = {"crowded_block_m": 128} if tokens > 1 else {}
    fields = sort_fields(strategy, tokens, 128, 8, 16, **crowded)
    views = {n: torch.empty(s, dtype=d) for n, s, d in fields}
    for launch in sort_launches(strategy, facts, tokens, 128, 8, 16, views, **crowded):
        kernel = compile_launch(launch, torch.bfloat16, target=target)
        text = kernel.asm.get("amdgcn", "")
        print(launch.name, kernel.metadata.shared <= shared_bytes(launch.constants["C"], 128))
        if text:
            print(*[line.strip() for line in text.splitlines()
                    if ".vgpr_spill_count" in line or ".private_segment_fixed_size:" in line])
        else:
            path = f"{sys.argv[2]}/{launch.name}-{tokens}.cubin"
            open(path, "wb").write(kernel.asm["cubin"])
"""


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx1151"])
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    """In a process of its own: this one may have replaced the compiler by the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, arch, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    names = re.findall(r"^(sort_\w+) (\w+)$", run.stdout, re.MULTILINE)
    assert [name for name, _ in names] == [
        *["sort_one_shot_few_kernel"] * 2,
        "sort_one_shot_kernel",
        *("sort_count_kernel", "sort_scan_kernel", "sort_place_kernel"),
    ]
    assert {fits for _, fits in names} == {"True"}
    if arch.startswith("gfx"):
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", run.stdout)
        private = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", run.stdout)
        assert len(spills) == len(private) == 6
        assert {*spills, *private} == {"0"}
        return
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for cubin in tmp_path.glob("*.cubin"):
        tool = [tools / "cuobjdump", "-res-usage", cubin]
        usage = subprocess.run(tool, capture_output=True, text=True).stdout
        assert "REG:" in usage
        assert "STACK:0" in usage and "LOCAL:0" in usage, f"{cubin.name}: {usage}"
        if cubin.name.startswith("sort_one_shot_few"):
            tool = [tools / "nvdisasm", "-c", cubin]
            code = subprocess.run(tool, capture_output=True, text=True).stdout
            # more would mean that the compiler has laid rows out otherwise than a warp to each
            assert 2 <= code.count("BAR.SYNC") <= 4, cubin.name


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("case", CASES + LARGE + [Case(3000, 128, 8, 64, "large")], ids=str)
@pytest.mark.parametrize("policy", [0, 1, 2])
def test_public_function_on_a_gpu(policy: int, case: Case) -> None:
    inputs, buffers = make_inputs(case), poisoned(case)
    if policy == 1 and plans.feasible("one_shot", case.tokens, case.experts, case.top_k, H200):
        pytest.skip("more rows than one launch takes")
    out = SortBuffers(SortedRows(*(t.cuda() for t in buffers.rows)), buffers.scratch.cuda())
    mask = None if inputs.mask is None else inputs.mask.cuda()
    live = torch.tensor([inputs.live], dtype=torch.int32, device="cuda")
    ids, weights = inputs.ids.cuda(), inputs.weights.cuda()
    args = (ids, weights, case.experts, case.block)
    rows = sort(*args, policy=policy, num_valid=live, expert_mask=mask, out=out)
    assert_sorted(rows, case, inputs)
    rows = sort(*args, policy=policy, num_valid=live, expert_mask=mask)
    assert_sorted(rows, case, inputs, poison=False)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_capture() -> None:
    """A captured sort allocates nothing and follows the live count; an unknown size is refused."""
    case = Case(50, 16, 4, 16, "captured")
    inputs = make_inputs(case)
    ids, weights = inputs.ids.cuda(), inputs.weights.cuda()
    live = torch.tensor([50], dtype=torch.int32, device="cuda")
    out = SortBuffers.empty(50, 4, 16, 16, "cuda")
    for policy in (1, 2):
        sort(ids, weights, 16, 16, policy=policy, num_valid=live, out=out)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_allocated()
        with torch.cuda.graph(graph):
            sort(ids, weights, 16, 16, policy=policy, num_valid=live, out=out)
            with pytest.raises(StateError, match="before capturing"):
                sort(ids, weights, 17, 96 + policy, policy=policy, num_valid=live)
        for count in (50, 7, 0):
            live.fill_(count)
            graph.replay()
            assert_sorted(out.rows, case, inputs._replace(live=count), poison=False)
        del graph
        assert torch.cuda.memory_allocated() == before
