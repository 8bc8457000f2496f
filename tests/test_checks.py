"""Bad calls are refused with the argument, what was given and what is needed; good ones are not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from moert.call import call_key
from moert.checks import check_forward, check_logits, check_num_valid, overlap, plainly_fine
from moert.config import MoEConfig
from moert.errors import InputError
from moert.topk import TopK

E, K, H, T = 6, 3, 20, 4
CFG = MoEConfig(E, K, H, 8, dtype="float16")
CPU = torch.device("cpu")
BUFFER = torch.zeros(4096, dtype=torch.float16)


def at(offset: int, rows: int, columns: int, stride: int = 0) -> torch.Tensor:
    """Rows inside one buffer."""
    return BUFFER.as_strided((rows, columns), (stride or columns, 1), offset)


def make_args(**changes: Any) -> dict[str, Any]:
    args = {
        "x": torch.zeros(T, H, dtype=torch.float16),
        "weights": torch.zeros(T, K),
        "ids": torch.zeros(T, K, dtype=torch.int32),
        "out": torch.zeros(T, H, dtype=torch.float16),
        "num_valid": None,
        "pad": "keep",
    }
    return args | changes


def check(args: dict[str, Any]) -> None:
    topk = TopK(args["weights"], args["ids"])
    check_forward(CFG, CPU, args["x"], topk, args["out"], args["num_valid"], args["pad"])


def fine(args: dict[str, Any], index: int = -1) -> bool:
    """As if the CPU, whose tensors say -1, were the GPU of that index."""
    x, topk, out = args["x"], TopK(args["weights"], args["ids"]), args["out"]
    key = call_key(x, topk, out, args["num_valid"], args["pad"])
    return plainly_fine(CFG, index, key, (x, out, *topk))


GOOD = {
    "plain": {},
    "no rows": {
        "x": torch.zeros(0, H, dtype=torch.float16),
        "out": torch.zeros(0, H, dtype=torch.float16),
        "weights": torch.zeros(0, K),
        "ids": torch.zeros(0, K, dtype=torch.int64),
    },
    "strided": {"x": at(0, T, H, 33), "out": at(2000, T, H, 50)},
    "columns of one buffer": {"x": at(0, T, H, 2 * H), "out": at(H, T, H, 2 * H)},
    "int64 ids": {"ids": torch.zeros(T, K, dtype=torch.int64)},
    "the model's weights": {"weights": torch.zeros(T, K, dtype=torch.float16)},
    "one row read often": {"x": torch.zeros(1, H, dtype=torch.float16).expand(T, H)},
    "num_valid": {"num_valid": torch.tensor(3, dtype=torch.int32)},
    "num_valid beside out": {
        "num_valid": at(T * H, 1, 2).view(torch.int32)[0],
        "out": at(0, T, H),
    },
    "num_valid [1, 1]": {"num_valid": torch.tensor([[3]], dtype=torch.int32)},
    "zero": {"pad": "zero"},
}
# plainly_fine takes no closer look at these
CLOSER = {
    *("columns of one buffer", "one row read often"),
    *("num_valid", "num_valid beside out", "num_valid [1, 1]"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_calls(name: str) -> None:
    args = make_args(**GOOD[name])
    check(args)
    assert fine(args) == (name not in CLOSER)
    assert not fine(args, index=0)  # tensors on another device


# (what changes, the whole message)
NEED_H = f"need [{T}, {H}]"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": [1.0]}, "x: got list, need a tensor [T, H=20]"),
    ({"x": torch.tensor(1.0)}, "x: got shape [], need a tensor [T, H=20]"),
    ({"x": torch.zeros(T)}, "x: got shape [4], need a tensor [T, H=20]"),
    ({"x": torch.zeros(T, H - 1)}, f"x: got shape [4, 19], {NEED_H}"),
    ({"x": torch.zeros(T, 1, H)}, "x: got shape [4, 1, 20], need a tensor [T, H=20]"),
    ({"x": torch.zeros(T, H)}, "x: got torch.float32, need torch.float16"),
    ({"x": make_args()["x"].to("meta")}, "x: got a tensor on meta, need cpu"),
    (
        {"x": make_args()["x"].requires_grad_()},
        "x: got requires_grad=True, need a tensor without (no backward here)",
    ),
    ({"x": make_args()["x"].to_sparse()}, "x: got layout torch.sparse_coo, need a strided tensor"),
    ({"x": at(0, H, T).t()}, "x: got strides [1, 4], need 1 between neighbours of a row"),
    ({"out": None}, f"out: got NoneType, need a tensor [{T}, {H}]"),
    ({"out": torch.zeros(T + 1, H)}, f"out: got shape [5, 20], {NEED_H}"),
    ({"out": torch.zeros(T, H).bfloat16()}, "out: got torch.bfloat16, need torch.float16"),
    ({"out": at(0, T, H, H - 1)}, "out: got row stride 19, need at least H=20"),
    ({"out": at(0, 1, H).expand(T, H)}, "out: got row stride 0, need at least H=20"),
    (
        {"out": at(0, T, 2 * H)[:, ::2]},
        "out: got strides [40, 2], need 1 between neighbours of a row",
    ),
    ({"ids": "ids"}, f"topk.ids: got str, need a tensor [{T}, {K}]"),
    ({"ids": torch.zeros(T, K + 1).int()}, "topk.ids: got shape [4, 4], need [4, 3]"),
    ({"ids": torch.zeros(T, K)}, "topk.ids: got torch.float32, need torch.int32 or torch.int64"),
    (
        {"ids": torch.zeros(K, T).int().t()},
        "topk.ids: got strides [1, 4], need 1 between neighbours of a row",
    ),
    ({"weights": torch.zeros(T - 1, K)}, "topk.weights: got shape [3, 3], need [4, 3]"),
    (
        {"weights": torch.zeros(T, K).double()},
        "topk.weights: got torch.float64, need torch.float32 or torch.float16",
    ),
    (
        {"weights": torch.zeros(T, K, requires_grad=True)},
        "topk.weights: got requires_grad=True, need a tensor without (no backward here)",
    ),
    ({"x": at(0, T, H), "out": at(0, T, H)}, "out: overlaps x in memory, need a buffer of its own"),
    (
        {"x": at(0, T, H), "out": at(T * H - 1, T, H)},
        "out: overlaps x in memory, need a buffer of its own",
    ),
    (
        {"ids": at(0, T, 2 * K).view(torch.int32), "out": at(5, T, H)},
        "out: overlaps topk.ids in memory, need a buffer of its own",
    ),
    (
        {"weights": at(90, T, K), "out": at(0, T, H, 30)},
        "out: overlaps topk.weights in memory, need a buffer of its own",
    ),
    ({"num_valid": 3}, "num_valid: got int, need one int32 tensor on cpu"),
    (
        {"num_valid": torch.tensor(3)},
        "num_valid: got torch.int64 [] on cpu, need one int32 value on cpu",
    ),
    (
        {"num_valid": torch.tensor([1, 2]).int()},
        "num_valid: got torch.int32 [2] on cpu, need one int32 value on cpu",
    ),
    (
        {"num_valid": torch.empty(1, dtype=torch.int32, device="meta")},
        "num_valid: got torch.int32 [1] on meta, need one int32 value on cpu",
    ),
    (
        {"num_valid": at(2 * H, 1, 2).view(torch.int32)[0], "out": at(0, T, H)},
        "out: overlaps num_valid in memory, need a buffer of its own",
    ),
    ({"pad": "mirror"}, "pad: got 'mirror', need one of keep, zero"),
    ({"pad": None}, "pad: got None, need one of keep, zero"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    args = make_args(**changes)
    with pytest.raises(InputError) as raised:
        check(args)
    assert str(raised.value) == message
    try:
        # tensors of the device "meta" say -1, too
        assert not fine(args, 0 if "meta" in message else -1)
    except (AttributeError, RuntimeError):  # these have no key: `forward` then asks check_forward
        assert any(not isinstance(v, torch.Tensor) or v.is_sparse for v in changes.values())


def any_rows(rng: random.Random, rows: int, columns: int, dtypes: Any) -> torch.Tensor:
    """Mostly what is needed, inside one buffer, so that overlaps are common."""
    dtype = rng.choice(dtypes)
    rows, columns = rows + (rng.random() < 0.03), columns - (rng.random() < 0.03)
    stride = rng.choice([columns] * 5 + [0, 1, columns - 1, columns + 1, 2 * columns, 3 * columns])
    inner = 1 if rng.random() < 0.96 else 2
    size = dtype.itemsize
    bytes_used = ((rows - 1) * stride + (columns - 1) * inner + 1) * size if rows else 0
    room = BUFFER.numel() * 2 - max(bytes_used, 0)
    start = rng.randrange(0, min(room, rng.choice([200, 8192])), size)
    tensor = BUFFER.view(dtype).as_strided((rows, columns), (stride, inner), start // size)
    if rng.random() < 0.03:
        tensor = tensor.unsqueeze(0) if rng.random() < 0.5 else tensor.reshape(-1)
    if rng.random() < 0.02 and dtype.is_floating_point:
        tensor = tensor.detach().requires_grad_()
    return tensor


def test_plainly_fine_is_never_more_generous_than_check_forward() -> None:
    rng = random.Random(0)
    seen = {(a, b): 0 for a in (True, False) for b in (True, False)}
    half, floats, ints = [torch.float16] * 30, [torch.float32] * 9, [torch.int32, torch.int64] * 9
    for _ in range(20_000):
        rows = rng.choice([0, 1, 1, 2, 3, 7])
        args = make_args(
            x=any_rows(rng, rows, H, [*half, torch.bfloat16]),
            out=any_rows(rng, rows, H, [*half, torch.float32]),
            weights=any_rows(rng, rows, K, [*half[:9], *floats, torch.bfloat16, torch.int32]),
            ids=any_rows(rng, rows, K, [*ints, torch.float32, torch.int16]),
            pad=rng.choice(["keep", "zero"] * 20 + ["wrap"]),
        )
        if rng.random() < 0.1:
            args["num_valid"] = torch.zeros(rng.choice([1, 1, 2]), dtype=rng.choice(ints[:2]))
        try:
            check(args)
            passes = True
        except InputError:
            passes = False
        plain = fine(args)
        seen[plain, passes] += 1
        assert passes or not plain, {k: getattr(v, "shape", v) for k, v in args.items()}
    assert min(seen[True, True], seen[False, True], seen[False, False]) > 100, seen


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0], "router_logits: got list, need a tensor [T, E=6]"),
        (torch.zeros(E), "router_logits: got shape [6], need a tensor [T, E=6]"),
        (torch.zeros(2, E + 1), "router_logits: got shape [2, 7], need [2, 6]"),
        (
            torch.zeros(2, E).double(),
            "router_logits: got torch.float64, need torch.float32 or torch.bfloat16 or torch.float16",
        ),
        (torch.zeros(2, E, device="meta"), "router_logits: got a tensor on meta, need cpu"),
        (
            torch.zeros(2, E, requires_grad=True),
            "router_logits: got requires_grad=True, need a tensor without (no backward here)",
        ),
        (
            torch.zeros(E, 2).t(),
            "router_logits: got strides [1, 2], need 1 between neighbours of a row",
        ),
    ],
)
def test_bad_logits(logits: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_logits(CFG, CPU, logits)
    assert str(raised.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_good_logits(dtype: torch.dtype) -> None:
    for logits in (torch.zeros(3, E), torch.zeros(0, E), torch.zeros(3, 50)[:, 7 : 7 + E]):
        check_logits(CFG, CPU, logits.to(dtype) if logits.is_contiguous() else logits)


def test_num_valid_of_any_shape_with_one_value() -> None:
    for shape in ((), (1,), (1, 1)):
        check_num_valid(CPU, torch.zeros(shape, dtype=torch.int32))


def bytes_of(tensor: torch.Tensor) -> set[int]:
    rows, columns = tensor.shape
    start, size = tensor.data_ptr(), tensor.element_size()
    return {
        start + (row * tensor.stride(0) + column) * size + byte
        for row in range(rows)
        for column in range(columns)
        for byte in range(size)
    }


@pytest.mark.parametrize("seed", range(4))
def test_overlap_against_sets_of_bytes(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = {True: 0, False: 0, "careful": 0}
    for _ in range(1500):
        pair = []
        common = rng.randint(0, 12)
        for dtype in rng.choices([torch.float16, torch.float32], k=2):
            rows, columns = rng.randint(1, 5), rng.randint(1, 6)
            stride = rng.choice([common, columns, rng.randint(0, 14)])
            tensor = BUFFER.view(dtype).as_strided((rows, columns), (stride, 1), rng.randint(0, 40))
            pair.append(tensor)
        shared = bool(bytes_of(pair[0]) & bytes_of(pair[1]))
        found = overlap(*pair)
        steps = {t.stride(0) * t.element_size() for t in pair}
        exact = len(steps) == 1 and steps != {0} and pair[0].shape[0] > 1
        rows_apart = all(t.stride(0) >= t.shape[1] for t in pair)
        if shared or (exact and rows_apart):
            assert found == shared, [
                (t.shape, t.stride(), t.storage_offset(), t.dtype) for t in pair
            ]
        outcomes["careful" if found and not shared else found] += 1
    assert min(outcomes.values()) > 10, outcomes
