"""What transformers is told about models with int4 experts: replace these modules, load nothing into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moert.config import MoEConfig
from moert.errors import UnsupportedError
from moert.integrations.experts_module import activation_of, is_experts_module
from moert.integrations.int4_module import Int4Tensors
from moert.integrations.transformers import experts_forward

METHOD = "moert"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Int4Experts(Int4Tensors):
    """Int4 experts that moert computes, whatever `experts_implementation` says."""

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


@register_quantization_config(METHOD)
class Int4ExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which layers' experts to replace.

    Args:
        layers: the description of the experts by the number of the layer.
    """

    def __init__(self, layers: Mapping[int, MoEConfig] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.layers = dict(layers or {})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "layers": sorted(self.layers)}


@register_quantizer(METHOD)
class Int4ExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Runs on the model's skeleton, before transformers loads the other tensors."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        left = dict(self.quantization_config.layers)
        for name, module in list(model.named_modules()):
            found = _LAYER.search(name)
            if not is_experts_module(module) or found is None or int(found[1]) not in left:
                continue
            cfg = left.pop(int(found[1]))
            # the module's own formula decides, as for every other model
            own = activation_of(module, cfg)
            facts = ("activation", "activation_limit", "activation_alpha")
            cfg = replace(cfg, **{fact: getattr(own, fact) for fact in facts})
            parent, _dot, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int4Experts(module.config, cfg))
        if left:
            raise UnsupportedError(
                f"{type(model).__name__}: layers {', '.join(map(str, sorted(left)))} have experts in the "
                "checkpoint, and no experts module whose forward transformers' experts interface chooses"
            )
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
