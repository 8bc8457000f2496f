"""Read the experts, the router and the biases of one layer straight into their final tensors."""

from __future__ import annotations

import difflib
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moert.checkpoint.files import TensorFiles
from moert.checkpoint.hf_config import (
    check_not_quantized,
    config_from_hf,
    read_config,
    text_fields,
)
from moert.checkpoint.names import (
    FUSED_B2,
    FUSED_B13,
    FUSED_W2,
    FUSED_W13,
    HASH_TABLE,
    Located,
    Names,
    locate,
)
from moert.config import MoEConfig
from moert.errors import UnsupportedError, WeightsError

Shape = tuple[int, ...]


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
) -> dict[str, torch.Tensor]:
    """The tensors of one MoE layer, in canonical layout whatever the file's.

    Only this layer's bytes are read, one expert at a time, so the extra memory is one expert's.

    Args:
        path: directory with config.json and safetensors files.
        layer: number of the layer, counted as the checkpoint counts (dense layers included).
        device: where the tensors are made.
        cfg: shapes and dtype wanted; default: what config.json says.

    Returns:
        w13 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I], contiguous, of cfg.dtype;
        router_weight [E, H] of the file's dtype, because the choice of experts is sensitive to it; where
        the family has them: b13 [E, 2I], b2 [E, H] of cfg.dtype, router_bias [E] of the file's dtype,
        correction_bias [E] float32.

    Raises:
        ConfigError: config.json is missing or not understood.
        WeightsError: a missing file or tensor, a wrong shape, a dense layer, no such layer.
        UnsupportedError: quantised tensors, or a layer that is not routed by a score.
    """
    fields = text_fields(read_config(path))
    check_not_quantized(fields)
    cfg = cfg or config_from_hf(fields)
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
        return _Reader(files, block, located.names, cfg, torch.device(device)).all()


def layer_problems(files: TensorFiles, block: str, names: Names, cfg: MoEConfig) -> list[str]:
    """Everything that keeps one layer from being loaded, read from the files' headers alone.

    Args:
        block, names: as `locate` gives them.
    """
    if block + HASH_TABLE in files:
        return [f"{block}{HASH_TABLE}: experts are looked up by token id, not chosen by a score"]
    reader = _Reader(files, block, names, cfg, torch.device("meta"), problems=[])
    reader.check()
    return list(dict.fromkeys(reader.problems or ()))


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


class _Reader:
    """One layer's tensors: names checked, shapes checked, then copied.

    Args:
        problems: collects what is wrong; None raises the first.
    """

    def __init__(
        self,
        files: TensorFiles,
        block: str,
        names: Names,
        cfg: MoEConfig,
        device: torch.device,
        problems: list[str] | None = None,
    ) -> None:
        self.files, self.block, self.names, self.cfg, self.device = files, block, names, cfg, device
        self.problems = problems

    @property
    def is_fused(self) -> bool:
        return self.block + FUSED_W13 in self.files or self.block + FUSED_W2 in self.files

    def check(self) -> None:
        """All names, shapes and dtypes; reads no data."""
        self._small()
        if self.is_fused:
            self._check_fused()
        else:
            self._check_separate()
        if self.cfg.bias:
            self._check_biases()

    def all(self) -> dict[str, torch.Tensor]:
        cfg = self.cfg
        small = self._small()
        loaded = self._fused() if self.is_fused else self._separate()
        if cfg.bias:
            loaded |= self._biases()
        for key, name in small.items():
            dtype = torch.float32 if key == "correction_bias" else None
            loaded[key] = self.files.read(name).to(device=self.device, dtype=dtype, copy=True)
        return loaded

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.cfg.torch_dtype, device=self.device)

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
                self._check(self._expert(e, leaf), shape)
        if self._expert(experts, names.down) in self.files:
            self._fail(
                f"{self._expert(experts, names.down)}: exists, but num_experts={experts} was expected"
            )

    def _separate(self) -> dict[str, torch.Tensor]:
        """`experts.<e>.<gate|up|down>`: 3E tensors, all checked before the first is read."""
        self._check_separate()
        cfg, names = self.cfg, self.names
        experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        w13, w2 = self._empty(experts, 2 * inner, hidden), self._empty(experts, hidden, inner)
        for e in range(experts):
            w13[e, :inner].copy_(self.files.read(self._expert(e, names.gate)))
            w13[e, inner:].copy_(self.files.read(self._expert(e, names.up)))
            w2[e].copy_(self.files.read(self._expert(e, names.down)))
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
        checked = [self._check(name, shape, turned[name]) for name, shape in straight.items()]
        if not all(checked):
            return False
        given = {name: self._shape(name) for name in straight}
        # 2I = H and H = I cannot both hold, so the two shapes together always tell the orientation
        if given not in (straight, turned):
            self._fail(
                f"{w13_name} {list(given[w13_name])} and {w2_name} {list(given[w2_name])}: one is "
                "transposed and the other is not"
            )
        return given == turned

    def _fused(self) -> dict[str, torch.Tensor]:
        """`experts.gate_up_proj` and `experts.down_proj`: as linear layers keep them, or transposed."""
        transposed = self._check_fused()
        cfg, names = self.cfg, self.names
        experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
        w13_name, w2_name = self.block + FUSED_W13, self.block + FUSED_W2
        w13, w2 = self._empty(experts, 2 * inner, hidden), self._empty(experts, hidden, inner)
        for e in range(experts):
            for name, target in ((w13_name, w13), (w2_name, w2)):
                rows = self.files.read(name, e)
                rows = rows.t() if transposed else rows
                if name == w13_name and names.fused_interleaved:
                    target[e, :inner].copy_(rows[0::2])
                    target[e, inner:].copy_(rows[1::2])
                else:
                    target[e].copy_(rows)
        return {"w13": w13, "w2": w2}

    def _check_biases(self) -> None:
        cfg = self.cfg
        self._check(self.block + FUSED_B13, (cfg.num_experts, 2 * cfg.intermediate_size))
        self._check(self.block + FUSED_B2, (cfg.num_experts, cfg.hidden_size))

    def _biases(self) -> dict[str, torch.Tensor]:
        self._check_biases()
        cfg = self.cfg
        name13, name2 = self.block + FUSED_B13, self.block + FUSED_B2
        b13 = self.files.read(name13)
        if self.names.fused_interleaved:
            b13 = torch.cat((b13[:, 0::2], b13[:, 1::2]), dim=1)
        where: dict[str, Any] = {"device": self.device, "dtype": cfg.torch_dtype, "copy": True}
        return {"b13": b13.to(**where), "b2": self.files.read(name2).to(**where)}

    def _small(self) -> dict[str, str]:
        """The names of the router's tensors, checked; read last, but missed first."""
        cfg, names = self.cfg, self.names
        found = {"router_weight": self._first(names.router, (cfg.num_experts, cfg.hidden_size))}
        if names.router_bias:
            found["router_bias"] = self._first(names.router_bias, (cfg.num_experts,))
        if cfg.routing.correction_bias:
            found["correction_bias"] = self._first(names.correction_bias, (cfg.num_experts,))
        return found

    def _expert(self, e: int, leaf: str) -> str:
        return f"{self.block}experts.{e}.{leaf}"

    def _first(self, leaves: tuple[str, ...], shape: Shape) -> str:
        options = [self.block + leaf for leaf in leaves]
        name = next((option for option in options if option in self.files), options[0])
        self._check(name, shape)
        return name

    def _shape(self, name: str) -> Shape:
        if name not in self.files:
            raise WeightsError(f"{name}: missing from {self.files.path}{self._near(name)}")
        return self.files.shape(name)

    def _check(self, name: str, *shapes: Shape) -> bool:
        """Whether a tensor is there, of one of the shapes and, where problems are collected, readable."""
        try:
            given = self._shape(name)
            if given not in shapes:
                needed = " or ".join(str(list(shape)) for shape in shapes)
                raise WeightsError(f"{name}: shape {list(given)}, need {needed}")
            if self.problems is not None:
                self.files.check_dtype(name)
        except (WeightsError, UnsupportedError) as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))
            return False
        return True

    def _fail(self, text: str) -> None:
        if self.problems is None:
            raise WeightsError(text)
        self.problems.append(text)

    def _near(self, name: str) -> str:
        # comparing against one layer's names only: a large checkpoint has 100,000 of them
        local = [key for key in self.files.names() if key.startswith(self.block)]
        near = difflib.get_close_matches(name, local, n=3, cutoff=0.8)
        return f"; near names there: {', '.join(near)}" if near else ""
