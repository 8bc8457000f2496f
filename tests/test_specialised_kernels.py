"""The code of the warp-specialised kernels: what stands between warps that copy and warps that multiply.

None of these kernels runs without a Hopper GPU, where tests/test_gpu_choices.py checks results. Here is what
a result may never show: a missing fence or barrier is a race that is seldom lost.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from code_size import ROOT

triton = pytest.importorskip("triton")

from compile_samples import sampled_specialised  # noqa: E402

from moert.cli.compile_variants import Variant, compile_variant  # noqa: E402

pytestmark = pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="no compiler")


def is_tall(variant: Variant) -> bool:
    """Whether a block of rows is two products."""
    assert variant.gemm_tile is not None
    return variant.gemm_tile.bm.bit_count() > 1


def is_fixed(variant: Variant) -> bool:
    """Whether inputs are fixed-point numbers."""
    return "fixed" in variant.kernel


def kind(variant: Variant) -> tuple[object, ...]:
    """The kernel, and what its tile changes of its code: of 16-bit weights, what the partitions share."""
    tile = variant.gemm_tile
    assert tile is not None
    own = variant.layer.cfg.quant is None or is_fixed(variant)
    rows = tile.bm if own else is_tall(variant)
    return variant.kernel, tile.num_warps, tile.bk, rows


# the last of each kind
SAMPLES = list({kind(variant): variant for variant in sampled_specialised()}.values())


# operations of the compiler's last representation that still has structure, by what they are here
OPERATIONS = {
    "ttng.wait_barrier": "wait",
    "ttng.fence_async_shared": "fence",
    "ttng.warp_group_dot": "product",
    "ttng.warp_group_dot_wait": "done",
    "ttng.arrive_barrier": "arrive",
    "ttg.async_copy_global_to_local": "copy",
    "ttng.async_copy_mbarrier_arrive": "arrive",
    "tt.load": "load",
    "griddepcontrol.wait": "predecessor",
}


def write_code() -> None:
    """The samples on standard output."""
    json.dump([compile_variant(variant)[0].asm["ttgir"] for variant in SAMPLES], sys.stdout)


@pytest.fixture(scope="module")
def compiled() -> dict[Variant, str]:
    """Each sample, compiled in a process where kernels are not interpreted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, "-c", f"import {__name__} as tests; tests.write_code()"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(SAMPLES, json.loads(done.stdout), strict=True))


def events(code: str) -> list[str]:
    """What happens, in the order of the text, by the names of OPERATIONS."""
    names = "|".join(sorted(map(re.escape, OPERATIONS), key=len, reverse=True))
    return [OPERATIONS[name] for name in re.findall(rf"(?<![\w.])({names})(?![\w.])", code)]


def blocks_a_step(variant: Variant) -> int:
    """Parts of a stage of the ring."""
    assert variant.gemm_tile is not None
    return variant.gemm_tile.bk // 64


def products_a_step(variant: Variant) -> int:
    """Of a stage of the ring, at most."""
    return blocks_a_step(variant) * (2 if is_tall(variant) else 1)


def id_of(variant: Variant) -> str:
    return f"{variant.kernel}-{variant.tile}"


@pytest.mark.parametrize("variant", SAMPLES, ids=id_of)
def test_every_product_is_fenced(variant: Variant, compiled: dict[Variant, str]) -> None:
    """What was copied through the generic proxy is read by `wgmma` through the other one."""
    found = events(compiled[variant])
    assert found.count("product") >= 1
    fenced = 0
    for event in found:
        if event == "product":
            assert fenced, "no fence since the stage before"
            fenced -= 1
        if event in ("fence", "wait"):
            fenced = products_a_step(variant) if event == "fence" else 0


@pytest.mark.parametrize(
    "variant", [v for v in SAMPLES if v.layer.cfg.quant and not is_fixed(v)], ids=id_of
)
def test_a_stage_is_given_back_once_its_product_is_done(
    variant: Variant, compiled: dict[Variant, str]
) -> None:
    """And filled before it is said to be: copies, then the arrival."""
    found = [event for event in events(compiled[variant]) if event not in ("load", "predecessor")]
    followers = dict.fromkeys(("done", "copy"), 0)
    for event, following in itertools.pairwise(found):
        if event == "done":
            followers["done"] += 1
            # every product of a stage is done before the stage is given back
            last = followers["done"] % blocks_a_step(variant) == 0
            assert following == ("arrive" if last else "product")
        if event == "copy" and following != "copy":
            assert following == "arrive"
            followers["copy"] += 1
    assert followers["done"] == found.count("done") > 0 and followers["copy"] == 1


@pytest.mark.parametrize("variant", [v for v in SAMPLES if is_fixed(v)], ids=id_of)
def test_a_stage_of_fixed_point_rows_is_given_back_once_its_products_are_done(
    variant: Variant, compiled: dict[Variant, str]
) -> None:
    """Of both partitions, for each count of rows; then the copies."""
    found = [event for event in events(compiled[variant]) if event not in ("load", "predecessor")]
    tile, cfg = variant.gemm_tile, variant.layer.cfg
    assert tile is not None and cfg.quant is not None
    steps = -(-(cfg.hidden_size if "gate_up" in variant.kernel else cfg.intermediate_size) // 128)
    begin, one = ["wait", "fence", "product"], ["product", "done", "done", "arrive"]
    two = ["product", "done", *begin, "done", "arrive", *one]
    partition = []
    for rows in dict.fromkeys((tile.bm, max(8, tile.bm // 2), max(8, tile.bm // 4))):
        if rows <= 16:
            partition += begin + two
        if rows > 16 or steps % 2:
            partition += begin + one
    copies = ["copy"] * (5 if cfg.quant.symmetric else 7)
    assert found == [*partition, *partition, "wait", *copies, "arrive"]


def copying(variant: Variant) -> list[str]:
    """What the copying warps do: two steps together where there is room, and no odd one is left."""
    tile, cfg = variant.gemm_tile, variant.layer.cfg
    assert tile is not None
    steps = -(-(cfg.hidden_size if "gate_up" in variant.kernel else cfg.intermediate_size) // 64)
    together = 2 if tile.num_stages >= 5 and steps % 2 == 0 else 1
    copies = ["copy"] * (3 if is_tall(variant) else 2)
    return [*["wait"] * together, *copies * together, *["arrive"] * together]


@pytest.mark.parametrize("variant", [v for v in SAMPLES if not v.layer.cfg.quant], ids=id_of)
def test_a_stage_of_16_bits_is_given_back_while_the_next_is_multiplied(
    variant: Variant, compiled: dict[Variant, str]
) -> None:
    """Of both partitions: the first products of a tile, the loop, and what follows it."""
    code = compiled[variant]
    found = [event for event in events(code) if event not in ("load", "predecessor")]
    # a tile of tall blocks is there for both products, for the first, and for half its columns
    products = (2, 1, 1) if is_tall(variant) else (1,)
    partition = []
    for count in products:
        ask = ["wait", "fence", *["product"] * count, "done"]
        partition += [*ask, *ask, "arrive", "done", "arrive"]
    assert found == [*partition, *partition, *copying(variant)]
    # how many products may still be under way: those of the newest step, until there is no further one
    pending = [n for count in products for n in (str(count), str(count), "0")]
    assert re.findall(r"warp_group_dot_wait .*pendings = (\d)", code) == pending * 2


@pytest.mark.parametrize("variant", SAMPLES, ids=id_of)
def test_barriers_count_those_that_arrive(variant: Variant, compiled: dict[Variant, str]) -> None:
    """Every thread that copies, and every one that multiplies."""
    code, tile = compiled[variant], variant.gemm_tile
    assert tile is not None
    counts = [int(n) for n in re.findall(r"ttng\.init_barrier %\w+, (\d+)", code)]
    assert counts == [128, 2 * 32 * tile.num_warps] * tile.num_stages
    assert not re.findall(r"ttng\.arrive_barrier \S+, 1", code)
    assert len(re.findall(r"async_copy_mbarrier_arrive .*noIncrement", code)) > 1


@pytest.mark.parametrize("variant", SAMPLES, ids=id_of)
def test_nothing_of_the_predecessor_is_read_before_it_has_finished(
    variant: Variant, compiled: dict[Variant, str]
) -> None:
    """The gate/up GEMM follows the sort; the down GEMM may read the sort, which is older, and no more."""
    found = events(compiled[variant])
    assert found.count("predecessor") == 1
    before = found[: found.index("predecessor")]
    assert before == ([] if "gate_up" in variant.kernel else ["load"])
