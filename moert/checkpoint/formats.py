"""The packed int4 formats by name."""

from __future__ import annotations

from typing import Final

from moert.checkpoint.awq import Awq
from moert.checkpoint.compressed_tensors import CompressedTensors
from moert.checkpoint.gptq import Gptq
from moert.checkpoint.packed import PackedFormat
from moert.checkpoint.packing import Packing

FORMATS: Final[dict[str, type[PackedFormat]]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
}


def format_of(packing: Packing) -> PackedFormat:
    """The reader of a packing."""
    return FORMATS[packing.method](packing)
