"""The one check of tensors: what is refused, in which words, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moert.errors import InputError
from moert.tensor_check import check_tensor

CPU = torch.device("cpu")
GOOD: dict[str, Any] = {
    "name": "rows",
    "tensor": torch.zeros(3, 4),
    "dtypes": (torch.float32, torch.float16),
    "device": CPU,
    "shape": (3, 4),
}
LONG = torch.zeros(3, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tensor": torch.zeros(3, 4).half()},
        {"tensor": LONG[:, 2:6]},  # rows may be far apart
        {"tensor": torch.zeros(1, 4).expand(3, 4)},
        {"tensor": torch.zeros(3, 2)[:, ::2], "shape": (3, 1)},  # one column has no neighbours
        {"tensor": torch.zeros(()), "shape": None},
        {"tensor": torch.zeros(8)[::2], "shape": (4,)},
        {"tensor": torch.zeros(0, 4), "shape": (0, 4), "contiguous": True},
        {"tensor": torch.zeros(3, 4, requires_grad=True)},
        {"contiguous": True, "gradients": False},
    ],
)
def test_what_fits(changes: dict[str, Any]) -> None:
    check_tensor(**(GOOD | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": [1.0]}, "rows: got list, need a tensor [3, 4]"),
        ({"tensor": None, "shape": None}, "rows: got NoneType, need a tensor"),
        ({"tensor": torch.zeros(4, 3)}, "rows: got shape [4, 3], need [3, 4]"),
        (
            {"tensor": torch.zeros(3, 4).long()},
            "rows: got torch.int64, need torch.float32 or torch.float16",
        ),
        (
            {"tensor": torch.zeros(3, 4).long(), "dtypes": (torch.int32, torch.int32)},
            "rows: got torch.int64, need torch.int32",
        ),
        ({"tensor": torch.zeros(3, 4, device="meta")}, "rows: got a tensor on meta, need cpu"),
        (
            {"tensor": torch.zeros(3, 4, requires_grad=True), "gradients": False},
            "rows: got requires_grad=True, need a tensor without (no backward here)",
        ),
        (
            {"tensor": torch.zeros(3, 4).to_sparse()},
            "rows: got layout torch.sparse_coo, need a strided tensor",
        ),
        (
            {"tensor": torch.zeros(4, 3).t()},
            "rows: got strides [1, 3], need 1 between neighbours of a row",
        ),
        (
            {"tensor": LONG[:, 2:6], "contiguous": True},
            "rows: got strides [8, 1], need a contiguous tensor",
        ),
        (
            {"tensor": torch.zeros(8)[::2], "shape": (4,), "contiguous": True},
            "rows: got strides [2], need a contiguous tensor",
        ),
    ],
)
def test_what_does_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        check_tensor(**(GOOD | changes))
    assert str(error.value) == message
