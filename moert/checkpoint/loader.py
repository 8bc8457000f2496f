"""Read the experts, the router and the biases of one layer straight into their final tensors."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.hf_config import config_from_hf, read_config, text_fields
from moert.checkpoint.int4_experts import Int4Reader, same_quant
from moert.checkpoint.layer_files import LayerFiles, Shape
from moert.checkpoint.names import FUSED_W2, FUSED_W13, HASH_TABLE, Located, Names, locate
from moert.checkpoint.packing import Packing, packing_of
from moert.config import MoEConfig
from moert.errors import UnsupportedError, WeightsError
from moert.quantization.experts import quantize_layer


def expert_layers(path: str | Path) -> tuple[int, ...]:
    """The numbers of the layers that have experts; raises what `load_layer` raises for bad files."""
    model_type = str(text_fields(read_config(path)).get("model_type"))
    with closing(TensorFiles(path)) as files:
        return tuple(locate(files.names(), model_type).blocks)


def load_layer(
    path: str | Path,
    layer: int,
    device: str | torch.device = "cpu",
    cfg: MoEConfig | None = None,
) -> dict[str, Any]:
    """The tensors of one MoE layer, in canonical layout whatever the file's.

    Only this layer's bytes are read, one expert at a time, so the extra memory is one expert's.

    Args:
        path: directory with config.json and safetensors files.
        layer: number of the layer, counted as the checkpoint counts (dense layers included).
        device: where the tensors are made.
        cfg: shapes and dtype wanted; default: what config.json says.

    Returns:
        w13 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I], contiguous, of cfg.dtype, with
        cfg.shared_experts more behind them (the shared expert in parts of size I), or an
        `Int4Matrix` each, packed expert by expert as they are read (rounded from the whole layer where
        cfg.quant asks for int4 and the checkpoint is not quantised);
        router_weight [E, H] of the file's dtype, because the choice of experts is sensitive to it; where
        the family has them: b13 [E, 2I], b2 [E, H] of cfg.dtype, router_bias [E] of the file's dtype,
        correction_bias [E] float32, shared_gate [1, H] of the file's dtype.

    Raises:
        ConfigError: config.json is missing or not understood.
        WeightsError: a missing file or tensor, a wrong shape, a dense layer, no such layer.
        UnsupportedError: quantised tensors of another format than cfg.quant tells, or a layer that is not
            routed by a score.
    """
    fields = text_fields(read_config(path))
    packing = packing_of(fields)
    cfg = cfg or config_from_hf(fields)
    same_quant(cfg, packing)
    if cfg.shared_experts and packing is not None:
        raise UnsupportedError(
            f"shared_experts={cfg.shared_experts}: those of a checkpoint with int4 experts are not read, as "
            "most are dense; need shared_experts=0, and a caller who adds them"
        )
    if not cfg.gated:
        raise UnsupportedError(
            "gated=False: every known checkpoint layout has a gate and an up matrix"
        )
    with closing(TensorFiles(path)) as files:
        located = locate(files.names(), str(fields.get("model_type")))
        block = _block_of(files, located, layer)
        if block + HASH_TABLE in files:
            raise UnsupportedError(
                f"layer={layer}: its experts are looked up by token id ({block}{HASH_TABLE}), not chosen "
                "by a score; what can be loaded: layers with a score-based router"
            )
        loaded = _reader(packing, files, block, located.names, cfg, torch.device(device)).all()
    if cfg.quant is not None and packing is None:
        rounded = quantize_layer(loaded["w13"], loaded["w2"], loaded.get("b13"), False, cfg.quant)
        loaded |= {name: rounded[name] for name in ("w13", "w2")}
    return loaded


def layer_problems(
    files: TensorFiles,
    block: str,
    names: Names,
    cfg: MoEConfig,
    packing: Packing | None = None,
) -> list[str]:
    """Everything that keeps one layer from being loaded, read from the files' headers alone.

    Args:
        block, names: as `locate` gives them.
        packing: of the checkpoint's int4 matrices, if it has any.
    """
    if block + HASH_TABLE in files:
        return [f"{block}{HASH_TABLE}: experts are looked up by token id, not chosen by a score"]
    reader = _reader(packing, files, block, names, cfg, torch.device("meta"), [])
    reader.check()
    return list(dict.fromkeys(reader.problems or ()))


def _reader(packing: Packing | None, *args: Any) -> _Reader | Int4Reader:
    cfg: MoEConfig = args[3]
    if cfg.quant is None or packing is None:
        return _Reader(*args)
    return Int4Reader(packing, *args)


def _block_of(files: TensorFiles, located: Located, layer: int) -> str:
    if type(layer) is not int:
        raise WeightsError(f"layer={layer!r}: need the number of a layer of {files.path}")
    if layer in located.blocks:
        return located.blocks[layer]
    have = ranges(list(located.blocks)) or "none"
    if layer not in located.layers:
        held = ranges(list(located.layers)) or "none"
        raise WeightsError(
            f"layer={layer}: the checkpoint {files.path} holds layers {held}; with experts: {have}"
        )
    raise WeightsError(
        f"layer={layer}: a dense layer, without experts; layers with experts: {have}"
    )


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


class _Reader(LayerFiles):
    """One layer's floating tensors: checked, then copied."""

    @property
    def is_fused(self) -> bool:
        return self.block + FUSED_W13 in self.files or self.block + FUSED_W2 in self.files

    def check(self) -> None:
        """All names, shapes and dtypes; reads no data."""
        self.small()
        if self.is_fused:
            self._check_fused()
        else:
            self._check_separate()
        if self.cfg.bias:
            self.check_fused_biases()
        self.check_shared()

    def all(self) -> dict[str, torch.Tensor]:
        cfg = self.cfg
        small = self.small()
        self.check_shared()
        loaded = self._fused() if self.is_fused else self._separate()
        self.read_shared(loaded["w13"][cfg.num_experts :], loaded["w2"][cfg.num_experts :])
        if cfg.bias:
            loaded |= self.read_fused_biases()
        return loaded | self.read_small(small)

    def _empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 of the E experts and the n shared ones behind them."""
        cfg = self.cfg
        count = cfg.num_experts + cfg.shared_experts
        shapes = (
            (count, cfg.w13_rows, cfg.hidden_size),
            (count, cfg.hidden_size, cfg.intermediate_size),
        )
        w13, w2 = (torch.empty(s, dtype=cfg.torch_dtype, device=self.device) for s in shapes)
        return w13, w2

    def _check_separate(self) -> None:
        cfg, names = self.cfg, self.names
        experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        shapes = {
            names.gate: (inner, hidden),
            names.up: (inner, hidden),
            names.down: (hidden, inner),
        }
        for e in range(experts):
            for leaf, shape in shapes.items():
                self.check_tensor(self.expert(e, leaf), shape)
        self.check_no_more_experts(names.down)

    def _separate(self) -> dict[str, torch.Tensor]:
        """`experts.<e>.<gate|up|down>`: 3E tensors, all checked before the first is read."""
        self._check_separate()
        cfg, names = self.cfg, self.names
        inner = cfg.intermediate_size
        w13, w2 = self._empty()
        for e in range(cfg.num_experts):
            w13[e, :inner].copy_(self.files.read(self.expert(e, names.gate)))
            w13[e, inner:].copy_(self.files.read(self.expert(e, names.up)))
            w2[e].copy_(self.files.read(self.expert(e, names.down)))
        return {"w13": w13, "w2": w2}

    def _check_fused(self) -> bool:
        """Whether both tensors are transposed."""
        cfg = self.cfg
        experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        w13_name, w2_name = self.block + FUSED_W13, self.block + FUSED_W2
        straight: dict[str, Shape] = {
            w13_name: (experts, 2 * inner, hidden),
            w2_name: (experts, hidden, inner),
        }
        turned = {name: (shape[0], shape[2], shape[1]) for name, shape in straight.items()}
        checked = [self.check_tensor(name, shape, turned[name]) for name, shape in straight.items()]
        if not all(checked):
            return False
        given = {name: self.shape(name) for name in straight}
        # 2I = H and H = I cannot both hold, so the two shapes together always tell the orientation
        if given not in (straight, turned):
            self.fail(
                f"{w13_name} {list(given[w13_name])} and {w2_name} {list(given[w2_name])}: one is "
                "transposed and the other is not"
            )
        return given == turned

    def _fused(self) -> dict[str, torch.Tensor]:
        """`experts.gate_up_proj` and `experts.down_proj`: as linear layers keep them, or transposed."""
        transposed = self._check_fused()
        cfg, names = self.cfg, self.names
        inner = cfg.intermediate_size
        w13_name, w2_name = self.block + FUSED_W13, self.block + FUSED_W2
        w13, w2 = self._empty()
        for e in range(cfg.num_experts):
            for name, target in ((w13_name, w13), (w2_name, w2)):
                rows = self.files.read(name, e)
                rows = rows.t() if transposed else rows
                if name == w13_name and names.fused_interleaved:
                    target[e, :inner].copy_(rows[0::2])
                    target[e, inner:].copy_(rows[1::2])
                else:
                    target[e].copy_(rows)
        return {"w13": w13, "w2": w2}
