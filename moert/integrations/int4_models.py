"""Opens transformers models whose experts are int4 on disk, without the packages that quantised them.

The experts stay int4 and are computed by moert. Every other quantised matrix (attention, shared experts) is
dequantised as it is read: for those transformers computes with plain linear layers.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.formats import format_of
from moert.checkpoint.hf_config import config_from_pretrained, read_config, text_fields
from moert.checkpoint.names import locate
from moert.checkpoint.packed import PackedFormat
from moert.checkpoint.packing import QUANTIZED, packing_of
from moert.config import MoEConfig
from moert.errors import UnsupportedError
from moert.integrations.int4_module import Int4Tensors
from moert.quantization.int4_layout import columns_per_group, dequantize_rows
from moert.weights import ExpertWeights


def load_model(
    path: str | Path, device: str | torch.device, dtype: Any, options: dict[str, Any]
) -> Any:
    """See `moert.integrations.transformers.load`."""
    from transformers import AutoConfig, GenerationConfig

    from moert.integrations.int4_quantizer import Int4ExpertsConfig

    fields = text_fields(read_config(path))
    packing = packing_of(fields)
    if packing is None:
        raise UnsupportedError(
            f"{path}: not quantised; AutoModelForCausalLM.from_pretrained(path, "
            "experts_implementation='moert') opens it"
        )
    cfg = config_from_pretrained(path)
    if dtype is not None:
        cfg = replace(cfg, dtype=dtype)
    packed = format_of(packing)
    with closing(TensorFiles(path)) as files:
        blocks = _packed_blocks(files, packed, str(fields.get("model_type")))
        tensors = dense_tensors(files, packed, tuple(blocks.values()), cfg.torch_dtype)
    config = AutoConfig.from_pretrained(str(path))
    for part in (config, config.get_text_config()):
        for key in QUANTIZED:
            if getattr(part, key, None) is not None:
                delattr(part, key)
    # of a class of its own: the automatic one takes no tensors
    model = _model_class(config).from_pretrained(
        None,
        config=config,
        quantization_config=Int4ExpertsConfig(dict.fromkeys(blocks, cfg)),
        state_dict=tensors,
        dtype=cfg.torch_dtype,
        experts_implementation="moert",
        **options,
    )
    model.config.name_or_path = str(path)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    model.to(device)
    fill_experts(model, path)
    return model


def _model_class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedError(
            f"{type(config).__name__}: transformers has no causal language model for it"
        ) from None
    return found[0] if isinstance(found, (tuple, list)) else found


def _packed_blocks(files: TensorFiles, packed: PackedFormat, model_type: str) -> dict[int, str]:
    """The layers whose experts are packed, and what their tensors' names start with."""
    located = locate(files.names(), model_type)
    down = located.names.down.removesuffix(".weight")
    first = f"experts.0.{down}.{packed.main}"
    return {layer: block for layer, block in located.blocks.items() if block + first in files}


def fill_experts(model: Any, path: str | Path) -> None:
    """Read the int4 experts of every replaced module onto the device of the model."""
    device = next(model.parameters()).device
    for name, module in model.named_modules():
        if isinstance(module, Int4Tensors):
            layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
            assert layer is not None
            cfg: MoEConfig = module.cfg
            module.fill(ExpertWeights.from_checkpoint(path, int(layer[1]), device, cfg=cfg))


def dense_tensors(
    files: TensorFiles, packed: PackedFormat, blocks: tuple[str, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but the experts of some blocks; packed matrices as `<base>.weight`."""
    experts = tuple(f"{block}experts." for block in blocks)
    names = [name for name in files.names() if not name.startswith(experts)]
    bases = {n.removesuffix(f".{packed.main}") for n in names if n.endswith(f".{packed.main}")}
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        base, _, leaf = name.rpartition(".")
        if base not in bases or leaf in ("weight", "bias"):
            tensors[name] = files.read(name, dtypes=(files.dtype(name),))
    for base in sorted(bases):
        tensors[f"{base}.weight"] = dense_matrix(files, packed, base).to(dtype)
    return tensors


def dense_matrix(files: TensorFiles, packed: PackedFormat, base: str) -> torch.Tensor:
    """One packed matrix dequantised, [N, K] float32, columns in their own order.

    Raises:
        WeightsError, UnsupportedError: a part is missing or does not fit.
    """
    n, k = packed.shape(files, base)
    codes, scales, zeros, order = packed.read(files, base, n, k)
    group = columns_per_group(packed.packing.quant.group_size, k)
    weight = dequantize_rows(codes, scales, zeros, group)
    if order is None:
        return weight
    ordered = torch.empty_like(weight)
    ordered[:, order] = weight
    return ordered
