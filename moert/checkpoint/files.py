"""The safetensors files of a checkpoint as one dictionary of names, opened lazily, read tensor by tensor."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from moert.checkpoint.packing import LOADABLE
from moert.errors import UnsupportedError, WeightsError

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
FLOATS: Final = ("BF16", "F16", "F32")


class TensorFiles:
    """Names, shapes and contents of every tensor under a directory; `close()` it after use.

    Reads `model.safetensors.index.json`, else `model.safetensors`, else every `*.safetensors` there.

    Args:
        path: the checkpoint's directory.

    Raises:
        WeightsError: no such directory, no safetensors file, a damaged one, or a shard that is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}
        self._file_of = self._index()

    def close(self) -> None:
        """Release every file; tensors already read stay."""
        self._slices.clear()
        self._open.clear()
        self._stack.close()

    def names(self) -> list[str]:
        """The name of every tensor in the checkpoint."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file's header; reads no data."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype in the file's header, as "BF16"."""
        return str(self._slice(name).get_dtype())

    def check_dtype(self, name: str, dtypes: tuple[str, ...] = FLOATS) -> None:
        """Refuse a tensor of another dtype; reads no data.

        Raises:
            UnsupportedError: floats are wanted, and the tensor is of a quantised or integer dtype.
            WeightsError: it is not of one of the `dtypes`.
        """
        if self.dtype(name) in dtypes:
            return
        if dtypes != FLOATS:
            raise WeightsError(f"{name}: stored as {self.dtype(name)}, need {' or '.join(dtypes)}")
        raise UnsupportedError(
            f"{name}: stored as {self.dtype(name)}, a quantised or integer format; "
            f"what can be loaded: {LOADABLE}"
        )

    def read(
        self, name: str, index: int | None = None, dtypes: tuple[str, ...] = FLOATS
    ) -> torch.Tensor:
        """A tensor on the CPU, or `tensor[index]` read alone.

        Raises:
            UnsupportedError, WeightsError: see `check_dtype`.
        """
        self.check_dtype(name, dtypes)
        part = self._slice(name)
        # safetensors makes tensors on the caller's default device
        with torch.device("cpu"):
            tensor = part[:] if index is None else part[index : index + 1][0]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            try:
                self._slices[name] = self._handle(self._file_of[name]).get_slice(name)
            except SafetensorError as error:
                raise WeightsError(f"{name}: not in {self._file_of[name]}: {error}") from None
        return self._slices[name]

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            full = self.path / file
            if not full.is_file():
                raise WeightsError(f"{full}: no such file, but {INDEX} names it")
            try:
                handle = safe_open(str(full), framework="pt", device="cpu")
            except SafetensorError as error:
                raise WeightsError(f"{full}: not a readable safetensors file: {error}") from None
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file]

    def _index(self) -> dict[str, str]:
        if not self.path.is_dir():
            raise WeightsError(
                f"path={str(self.path)!r}: no such directory; need a downloaded checkpoint"
            )
        index = self.path / INDEX
        if index.is_file():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise WeightsError(f"{index}: no JSON object with a weight_map") from None
        single = self.path / SINGLE
        files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise WeightsError(
                f"path={str(self.path)!r}: no {INDEX}, no {SINGLE} and no other *.safetensors"
            )
        file_of: dict[str, str] = {}
        for file in files:
            file_of |= dict.fromkeys(self._handle(file.name).keys(), file.name)
        return file_of
