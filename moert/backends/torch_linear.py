"""`rows @ weight.T + bias` with one expert's weights, into given rows, without allocating a tensor.

A bfloat16 product is oneDNN's, and torch lends it a scratchpad of 10 to 130 KiB a thread, taken from the
allocator and given back inside the call. No other way to multiply in bfloat16 is as fast.

Which call is fastest depends on dtype, storage and the number of rows. The choice is made from these
alone, never from values or addresses, so that the same rows give the same bits. The measured reasons
beside the constants are from torch 2.13 with MKL and oneDNN on an AVX-512 CPU, one and two threads,
weights larger than the caches.
"""

from __future__ import annotations

from typing import Final

import torch

from moert.arena import Field

# float32: a product of up to 4 rows is 1.1 to 3.5 times faster when the result is stored transposed, one
# row padded to two included; on one thread that turns into a loss (0.6 times at K=2048) when K is large
FLIP_ROWS: Final = 4
FLIP_MAX_K_ONE_THREAD: Final = 1536
# 16 bits without a oneDNN kernel: n rows cost n times one row, and weights whose K is not contiguous
# cost 20 times that; converting the weights to float32, a piece of 1 MiB at a time, costs two rows
STAGE_ROWS: Final = 3
STAGE_NUMEL: Final = 1 << 18
STAGE_MIN_COLUMNS: Final = 64


def linear_fields(
    shapes: list[tuple[int, int]], rows: int, dtype: torch.dtype
) -> tuple[Field, ...]:
    """The scratch that `ExpertLinear`s of these (N, K) share, for up to `rows` rows at a time."""
    widest = max(n for n, _ in shapes)
    fields = [Field("linear_bias", (widest,), dtype)]
    if dtype == torch.float32:
        fields.append(Field("linear_flip", (FLIP_ROWS * widest,), torch.float32))
    elif not _has_kernel(dtype):
        pieces = [(_stage_columns(n, k), k) for n, k in shapes]
        sizes = {
            "linear_stage_weights": max(c * k for c, k in pieces),
            "linear_stage_rows": rows * max(k for _, k in shapes),
            "linear_stage_out": rows * max(c for c, _ in pieces),
        }
        fields += [Field(name, (size,), torch.float32) for name, size in sizes.items()]
    return tuple(fields)


class ExpertLinear:
    """The linear maps of E experts.

    Args:
        weight: [E, N, K], N or K contiguous; only viewed, so that in-place updates are seen.
        bias: [E, N] of the same dtype or float32, or None.
        scratch: the tensors that `linear_fields` names.
        like: another one of the same tensors; its views serve both.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scratch: dict[str, torch.Tensor],
        like: ExpertLinear | None = None,
    ) -> None:
        _, self.n, self.k = weight.shape
        if like is None:
            self.weight = weight.detach().unbind(0)  # E x [N, K]
            self.weight_t = [w.t() for w in self.weight]  # E x [K, N]
            self.bias = None if bias is None else bias.detach().unbind(0)
        else:
            self.weight, self.weight_t, self.bias = like.weight, like.weight_t, like.bias
        self.bias_row = scratch["linear_bias"][: self.n]
        self.converts_bias = bias is not None and bias.dtype != weight.dtype
        self.scratch = scratch
        k_contiguous = weight.stride(2) == 1
        worth_it = self.k <= FLIP_MAX_K_ONE_THREAD or torch.get_num_threads() > 1
        flips = weight.dtype == torch.float32 and k_contiguous and worth_it
        self.flips = FLIP_ROWS if flips else 0
        self.flipped = [self._flip_view(n) for n in range(self.flips + 1)]
        self.stages_from = 1 << 62
        if not _has_kernel(weight.dtype):
            self.stages_from = STAGE_ROWS if k_contiguous else 1
            self.k_contiguous = k_contiguous
            self.columns = _stage_columns(self.n, self.k)

    def __call__(self, expert: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`out[i] = weight[expert] @ rows[i] + bias[expert]`.

        Args:
            rows: [n, K], n >= 1, contiguous, with room for one more row behind it in its storage.
            out: [n, N], contiguous, of the same dtype.
        """
        n = rows.shape[0]
        bias = None
        if self.bias is not None:
            bias = self.bias[expert]
            if self.converts_bias:
                bias = self.bias_row.copy_(bias)
        if n <= self.flips:
            self._flip(expert, rows, out, bias)
        elif n >= self.stages_from:
            self._stage(expert, rows, out, bias)
        elif bias is None:
            torch.mm(rows, self.weight_t[expert], out=out)
        else:
            torch.addmm(bias, rows, self.weight_t[expert], out=out)

    def _flip_view(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A product of n rows stored transposed, [N, max(n, 2)], and as rows [n, N]."""
        columns = max(n, 2)
        stored = self.scratch["linear_flip"][: self.n * columns] if self.flips else self.bias_row
        flipped = stored.view(self.n, -1)
        return flipped, flipped.t()[:n]

    def _flip(
        self, expert: int, rows: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        n = rows.shape[0]
        flipped, result = self.flipped[n]
        if n == 1:
            # the second row is whatever follows in the storage; its column of the result is dropped
            columns = rows.as_strided((self.k, 2), (1, self.k))
        else:
            columns = rows.t()
        torch.mm(self.weight[expert], columns, out=flipped)
        if bias is None:
            out.copy_(result)
        else:
            torch.add(result, bias, out=out)

    def _stage(
        self, expert: int, rows: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        n = rows.shape[0]
        rows32 = self.scratch["linear_stage_rows"][: n * self.k].view(n, self.k).copy_(rows)
        weight = self.weight[expert]
        for start in range(0, self.n, self.columns):
            piece = weight[start : start + self.columns]  # [c, K]
            c = piece.shape[0]
            stored = self.scratch["linear_stage_weights"][: c * self.k]
            if self.k_contiguous:
                right = stored.view(c, self.k).copy_(piece).t()
            else:
                right = stored.view(self.k, c).copy_(piece.t())
            result = self.scratch["linear_stage_out"][: n * c].view(n, c)
            torch.mm(rows32, right, out=result)
            out[:, start : start + c].copy_(result)
        if bias is not None:
            out.add_(bias)


def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` at full speed; oneDNN knows for 16 bits."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _stage_columns(n: int, k: int) -> int:
    return min(n, max(STAGE_MIN_COLUMNS, STAGE_NUMEL // k))
