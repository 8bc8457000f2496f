"""AITER's operators, found by what they offer: a lazy import that survives whatever it meets.

Three packages answer to the name `aiter`: AMD's (amd-aiter on the index, or built from source), an unrelated
library of asynchronous iterators, and none. AMD's own compiles a module while it is imported and fails with
ImportError, RuntimeError or AttributeError where a compiler or a device is missing, so every failure is a
reason, never an error. Versions are not read: names and parameters say what can be called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# parameters that are passed, by the names that AITER gives them (github.com/ROCm/aiter, aiter/ops)
SORT = (
    *("topk_ids", "topk_weights", "sorted_token_ids", "sorted_weights", "sorted_expert_ids"),
    *("num_valid_ids", "moe_buf", "num_experts", "unit_size", "local_expert_mask"),
    "dispatch_policy",
)
SORT_OPUS = (*SORT, "workspace")
SORT_WORKSPACE = ("tokens", "num_experts", "topk", "dispatch_policy")
GEMM = (
    *("w1", "w2", "sorted_token_ids", "sorted_expert_ids", "num_valid_ids", "out", "topk"),
    *("block_m", "sorted_weights", "quant_type", "activation"),
)
SHUFFLE = ("x",)
ROUTE = (
    *("topk_weights", "topk_indices", "token_expert_indices", "gating_output"),
    *("softmax_workspace", "need_renorm"),
)


@dataclass(frozen=True)
class AiterOps:
    """What moert calls of AITER.

    Args:
        module: the package, for operators by name.
        sort: `moe_sorting_opus_fwd`, or `moe_sorting_fwd` where that is absent.
        sort_workspace: bytes of scratch for (tokens, experts, K, policy); None where the sort allocates its
            scratch itself.
        shuffle: a matrix [N, K] in the order that the GEMMs read, marked by an attribute `is_shuffled`.
        route: `_topk_softmax`, or the reason why it cannot be called.
    """

    module: Any
    sort: Callable[..., Any]
    sort_workspace: Callable[..., int] | None
    shuffle: Callable[..., torch.Tensor]
    route: Callable[..., Any] | str

    @property
    def sort_name(self) -> str:
        return "moe_sorting_fwd" if self.sort_workspace is None else "moe_sorting_opus_fwd"


def find_aiter(
    operators: Mapping[str, tuple[str, ...]], hip: str | bool | None = False
) -> AiterOps | str:
    """AITER with the operators asked for, or the reason why there is none.

    Args:
        operators: name to the parameters that will be passed.
        hip: torch's ROCm version; False to ask torch.
    """
    if (torch.version.hip if hip is False else hip) is None:
        return "this torch is built without ROCm"
    try:
        module = importlib.import_module("aiter")
    except ModuleNotFoundError as error:
        if error.name == "aiter":
            return "aiter is not installed (the package is named amd-aiter)"
        return f"aiter is installed, but does not import: {_said(error)}"
    except Exception as error:
        return f"aiter is installed, but does not import: {_said(error)}"
    try:
        # a package may look its names up only when they are asked for
        return _found(module, operators)
    except Exception as error:
        return f"aiter is installed, but cannot be used: {_said(error)}"


def _found(module: Any, operators: Mapping[str, tuple[str, ...]]) -> AiterOps | str:
    if not hasattr(module, "fused_moe") and not hasattr(module, "moe_sorting_fwd"):
        where = getattr(module, "__file__", None) or "unknown place"
        return f"the package named aiter ({where}) is not AMD's: it has no operators of experts"
    for name, wanted in operators.items():
        if lack := _lacks(module, name, wanted):
            return lack
    shuffle = importlib.import_module("aiter.ops.shuffle")
    if lack := _lacks(shuffle, "shuffle_weight", SHUFFLE):
        return lack
    opus = _lacks(module, "moe_sorting_opus_fwd", SORT_OPUS) or _lacks(
        module, "moe_sorting_opus_get_workspace_size", SORT_WORKSPACE
    )
    if opus is None:
        sort, workspace = module.moe_sorting_opus_fwd, module.moe_sorting_opus_get_workspace_size
        return AiterOps(module, sort, workspace, shuffle.shuffle_weight, _route())
    if lack := _lacks(module, "moe_sorting_fwd", SORT):
        return lack
    return AiterOps(module, module.moe_sorting_fwd, None, shuffle.shuffle_weight, _route())


def _route() -> Callable[..., Any] | str:
    """The routing operator that allocates nothing, or why there is none: the layer does without."""
    try:
        # the package itself exports no names with an underscore
        operators = importlib.import_module("aiter.ops.moe_op")
        if lack := _lacks(operators, "_topk_softmax", ROUTE):
            return lack
        operator: Callable[..., Any] = operators._topk_softmax
        return operator
    except Exception as error:
        return f"aiter.ops.moe_op does not import: {_said(error)}"


def _lacks(module: Any, name: str, wanted: tuple[str, ...]) -> str | None:
    """What a module has not: an operator, or parameters of it."""
    operator = getattr(module, name, None)
    if operator is None:
        return f"this aiter has no {name}"
    parameters = _parameters(name, operator)
    missing = [] if parameters is None else [p for p in wanted if p not in parameters]
    return f"{name} of this aiter takes no {', '.join(missing)}" if missing else None


def _parameters(name: str, operator: Any) -> set[str] | None:
    """What an operator takes, by name; None where nothing tells."""
    found = inspect.signature(operator).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()):
        return set(found)
    # compiled operators are registered with torch: what is called takes anything, the schema tells what
    registered = getattr(torch.ops.aiter, name, None)
    if registered is None:
        return None
    return {argument.name for argument in registered.default._schema.arguments}


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
