"""The mixture-of-experts layer of a language model at decode time. The public names, loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moert.errors import (
    ConfigError,
    InputError,
    MoertError,
    StateError,
    UnsupportedError,
    WeightsError,
)

if TYPE_CHECKING:
    from moert.config import MoEConfig, Quant, Routing
    from moert.quantization.int4_skinny import SkinnyInt4
    from moert.runtime import MoERuntime
    from moert.steps.routing import route
    from moert.steps.sorting import SortedRows, sort
    from moert.topk import TopK
    from moert.weights import ExpertWeights

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ExpertWeights",
    "InputError",
    "MoEConfig",
    "MoERuntime",
    "MoertError",
    "Quant",
    "Routing",
    "SkinnyInt4",
    "SortedRows",
    "StateError",
    "TopK",
    "UnsupportedError",
    "WeightsError",
    "__version__",
    "route",
    "sort",
]

# torch and triton take seconds to import, so only the module of a name that is asked for is loaded
_MODULE_OF = {
    "ExpertWeights": "moert.weights",
    "MoEConfig": "moert.config",
    "MoERuntime": "moert.runtime",
    "Quant": "moert.config",
    "Routing": "moert.config",
    "SkinnyInt4": "moert.quantization.int4_skinny",
    "SortedRows": "moert.steps.sorting",
    "TopK": "moert.topk",
    "route": "moert.steps.routing",
    "sort": "moert.steps.sorting",
}


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'moert' has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
