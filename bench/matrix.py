"""Which cases are measured: formats, shapes, T; and a tiny matrix that only shows that everything runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from device_timing import GPU
from layer_chain import layer_count
from shapes import SHAPES, in_format

from moert.config import MoEConfig

TINY = MoEConfig(8, 2, 64, 48)
# one layer for whatever is not about its shape
USUAL = "qwen3-30b-a3b"


@dataclass(frozen=True)
class LayerCase:
    """A chain of layers to build.

    Args:
        format: of weights and activations.
        name: of the shape.
        cfg: what it is.
        count: layers in the chain.
    """

    format: str
    name: str
    cfg: MoEConfig
    count: int

    def __str__(self) -> str:
        return f"{self.format}-{self.name}"


@dataclass(frozen=True)
class Matrix:
    """All cases of one kind of run.

    Args:
        formats: by name of the format, the shapes that are measured in it.
        shapes: by name.
        tokens: T of decode and of the comparison with others.
        sort_experts, sort_tokens: E and T of sorting.
        rounds: samples of each time.
        group_ms: device time of one sample.
    """

    formats: dict[str, tuple[str, ...]]
    shapes: dict[str, MoEConfig]
    tokens: tuple[int, ...]
    versus_tokens: tuple[int, ...]
    sort_experts: tuple[int, ...]
    sort_tokens: tuple[int, ...]
    rounds: int
    group_ms: float
    smoke: bool

    @staticmethod
    @cache
    def here(smoke: bool) -> Matrix:
        """The full matrix on a GPU unless a smoke run is asked for."""
        return SMOKE if smoke or not GPU else FULL

    @property
    def layers(self) -> list[LayerCase]:
        cases = []
        for form, names in self.formats.items():
            for name in names:
                cfg = in_format(self.shapes[name], form)
                cases.append(LayerCase(form, name, cfg, 2 if self.smoke else layer_count(cfg)))
        return cases

    @property
    def usual(self) -> MoEConfig:
        return TINY if self.smoke else SHAPES[USUAL]

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Arguments of the tests that take one of several values."""
        return {
            "tokens": self.tokens,
            "versus_tokens": self.versus_tokens,
            "sort_experts": self.sort_experts,
            "sort_tokens": self.sort_tokens,
        }

    @staticmethod
    def label(axis: str, value: Any) -> str:
        return f"E{value}" if axis == "sort_experts" else f"T{value}"


FULL = Matrix(
    formats={
        "bfloat16": tuple(SHAPES),
        "int4": tuple(SHAPES),
        "float16": (USUAL,),
    },
    shapes=SHAPES,
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    versus_tokens=(1, 8, 64, 512),
    sort_experts=(8, 128, 512),
    sort_tokens=(1, 16, 128, 512),
    rounds=11,
    group_ms=6.0,
    smoke=False,
)
SMOKE = Matrix(
    formats={"float32": ("tiny",), "int4": ("tiny",)},
    shapes={"tiny": TINY},
    tokens=(1, 3),
    versus_tokens=(3,),
    sort_experts=(8,),
    sort_tokens=(5,),
    rounds=3,
    group_ms=0.2,
    smoke=True,
)
