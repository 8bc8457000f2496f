"""What one `forward` was given, checked and in the form that launches read.

The values live in C cells whose addresses never change: launches read them, and the kernel nodes of an
instantiated graph are rewritten straight from them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moert.topk import TopK

_POINTERS = ("x_ptr", "ids_ptr", "weights_f32_ptr", "weights_ptr", "out_ptr", "num_valid_ptr")
_STRIDES = ("x_stride", "ids_stride", "weights_stride", "out_stride")
_COUNTS = ("ids_words", "weights_are_f32", "num_tokens", "pad_zero")


class Call:
    """The arguments of one call; one object serves all calls of a share group, one at a time.

    Args:
        no_limit: int32 scalar on the device, larger than any T, read where the caller gives no count.
        row_multiple: 16 if H is a multiple of 16, else 1: what an aligned row stride must divide by.
    """

    def __init__(self, no_limit: torch.Tensor, row_multiple: int) -> None:
        self.no_limit = no_limit
        self.row_multiple = row_multiple
        self.cells: dict[str, Any] = {name: ctypes.c_uint64(0) for name in _POINTERS}
        self.cells |= {name: ctypes.c_int64(0) for name in _STRIDES}
        self.cells |= {name: ctypes.c_int32(0) for name in _COUNTS}
        self.tokens = 0
        self.aligned = True
        self.pad_zero = False
        # the tensors themselves, for code that runs on the host
        self.x = self.out = self.num_valid = no_limit
        self.topk = TopK(no_limit, no_limit)

    def set(
        self,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
        pad_zero: bool,
    ) -> None:
        """Take over the checked tensors of a call: x, out [T, H]; topk [T, K]; unit inner strides."""
        cells = self.cells
        weights, ids = topk
        x_ptr, ids_ptr, weights_ptr, out_ptr = (
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
        )
        words = 2 if ids.dtype is torch.int64 else 1
        # a single row has no stride that matters, and torch may report anything for it
        tokens = x.shape[0]
        x_stride, out_stride = (x.stride(0), out.stride(0)) if tokens > 1 else (0, 0)
        cells["x_ptr"].value = x_ptr
        cells["x_stride"].value = x_stride
        cells["ids_ptr"].value = ids_ptr
        cells["ids_stride"].value = ids.stride(0) * words
        cells["ids_words"].value = words
        cells["weights_f32_ptr"].value = weights_ptr
        cells["weights_ptr"].value = weights_ptr
        cells["weights_stride"].value = weights.stride(0)
        cells["weights_are_f32"].value = weights.dtype is torch.float32
        cells["out_ptr"].value = out_ptr
        cells["out_stride"].value = out_stride
        limit = self.no_limit if num_valid is None else num_valid
        cells["num_valid_ptr"].value = limit.data_ptr()
        cells["num_tokens"].value = tokens
        cells["pad_zero"].value = pad_zero
        self.tokens = tokens
        self.aligned = (
            not (x_ptr | ids_ptr | weights_ptr | out_ptr) & 15
            and not x_stride % self.row_multiple
            and not out_stride % self.row_multiple
        )
        self.x, self.topk, self.out, self.num_valid, self.pad_zero = x, topk, out, limit, pad_zero

    def live_on_host(self) -> int:
        """T as a host integer; for the CPU only, where reading it does not wait for a device."""
        return max(0, min(self.tokens, int(self.num_valid)))

    def interpreter_values(self) -> dict[str, Any]:
        """The call by kernel parameter name, with CPU tensors where launches take addresses."""
        values = {name: cell.value for name, cell in self.cells.items()}
        weights, ids = self.topk
        dummy32 = torch.zeros(1, dtype=torch.float32)
        dummy = torch.zeros(1, dtype=self.x.dtype)
        is_f32 = weights.dtype is torch.float32
        values |= {
            "x_ptr": self.x,
            "ids_ptr": ids.view(torch.int32),
            "weights_f32_ptr": weights if is_f32 else dummy32,
            "weights_ptr": dummy if is_f32 and self.x.dtype is not torch.float32 else weights,
            "out_ptr": self.out,
            "num_valid_ptr": self.num_valid,
        }
        return values
