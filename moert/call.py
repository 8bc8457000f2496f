"""What one `forward` was given, in the form that launches read.

A call is described by a key: address, shape, stride and dtype of every tensor it names, never
object identity. Equal keys mean equal launches, so whatever was checked and bound for a key needs
neither again. The values that kernels take are packed into one buffer whose address never changes:
the kernel nodes of instantiated graphs are rewritten straight from it.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch

from moert.topk import TopK

# position of each call argument in `Call.values`, and of its bytes in the packed buffer
_LAYOUT = struct.Struct("<6Q4q4i")
NAMES = (
    *("x_ptr", "ids_ptr", "weights_f32_ptr", "weights_ptr", "out_ptr", "num_valid_ptr"),
    *("x_stride", "ids_stride", "weights_stride", "out_stride"),
    *("ids_words", "weights_are_f32", "num_tokens", "pad_zero"),
)
POSITION = {name: position for position, name in enumerate(NAMES)}
_OFFSET = [8 * i for i in range(10)] + [80 + 4 * i for i in range(4)]

Key = tuple[Any, ...]


def call_key(
    x: torch.Tensor, topk: TopK, out: torch.Tensor, num_valid: torch.Tensor | None, pad: str
) -> Key:
    """The key of a call; raises AttributeError where an argument is no tensor."""
    weights, ids = topk
    return (
        x.data_ptr(),
        out.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        x.shape,
        out.shape,
        weights.shape,
        ids.shape,
        x.stride(),
        out.stride(),
        weights.stride(),
        ids.stride(),
        x.dtype,
        out.dtype,
        weights.dtype,
        ids.dtype,
        x.requires_grad or weights.requires_grad or out.requires_grad,
        pad,
        num_valid if num_valid is None else _scalar_key(num_valid),
    )


def _scalar_key(num_valid: torch.Tensor) -> Key:
    return (num_valid.data_ptr(), num_valid.dtype, num_valid.numel())


class Call:
    """The present call; one object serves all calls of a share group, one at a time.

    Args:
        no_limit: int32 scalar on the device, larger than any T, read where the caller gives no count.
        row_multiple: 16 if H is a multiple of 16, else 1: what an aligned row stride must divide by.
    """

    def __init__(self, no_limit: torch.Tensor, row_multiple: int) -> None:
        self.no_limit = no_limit
        self.row_multiple = row_multiple
        # kernels read no count through a null pointer; the interpreter reads tensors
        self._no_limit_ptr = 0 if no_limit.is_cuda else no_limit.data_ptr()
        self._no_topk = TopK(no_limit, no_limit)
        self._buffer = ctypes.create_string_buffer(_LAYOUT.size)
        self.values: tuple[int, ...] = (0,) * len(NAMES)
        self.tokens = 0
        self.aligned = True
        self.pad_zero = False
        self.release()

    def release(self) -> None:
        """Forget the caller's tensors, which only code that runs on the host reads; the values stay."""
        self.x = self.out = self.num_valid = self.no_limit
        self.topk = self._no_topk

    def address(self, name: str) -> int:
        """Where the packed value of a call argument lies."""
        return ctypes.addressof(self._buffer) + _OFFSET[POSITION[name]]

    def set(
        self,
        key: Key,
        x: torch.Tensor,
        topk: TopK,
        out: torch.Tensor,
        num_valid: torch.Tensor | None,
    ) -> None:
        """Take over a checked call; `key` is its `call_key`."""
        x_ptr, out_ptr, weights_ptr, ids_ptr, shape = key[:5]
        tokens = shape[0]
        # a single row has no stride that matters, and torch may report anything for it
        x_stride, out_stride = (key[8][0], key[9][0]) if tokens > 1 else (0, 0)
        words = 2 if key[15] is torch.int64 else 1
        self.pad_zero = key[17] == "zero"
        self.values = (
            x_ptr,
            ids_ptr,
            weights_ptr,
            weights_ptr,
            out_ptr,
            self._no_limit_ptr if num_valid is None else key[18][0],
            x_stride,
            key[11][0] * words,
            key[10][0],
            out_stride,
            words,
            int(key[14] is torch.float32),
            tokens,
            int(self.pad_zero),
        )
        _LAYOUT.pack_into(self._buffer, 0, *self.values)
        self.tokens = tokens
        self.aligned = not (
            (x_ptr | ids_ptr | weights_ptr | out_ptr) & 15
            or (x_stride | out_stride) & (self.row_multiple - 1)
        )
        self.x, self.topk, self.out = x, topk, out
        self.num_valid = self.no_limit if num_valid is None else num_valid

    def live_on_host(self) -> int:
        """T as a host integer; for the CPU only, where reading it does not wait for a device."""
        return max(0, min(self.tokens, int(self.num_valid)))

    def interpreter_values(self) -> dict[str, Any]:
        """The call by kernel parameter name, with CPU tensors where launches take addresses."""
        weights, ids = self.topk
        is_f32 = weights.dtype is torch.float32
        unused = self.x.new_zeros(1, dtype=self.x.dtype if is_f32 else torch.float32)
        tensors = {
            "x_ptr": self.x,
            "ids_ptr": ids.view(torch.int32),
            "weights_f32_ptr": weights if is_f32 else unused,
            "weights_ptr": unused if is_f32 else weights,
            "out_ptr": self.out,
            "num_valid_ptr": self.num_valid,
        }
        return {**dict(zip(NAMES, self.values, strict=True)), **tensors}
