"""The model description that everything else is derived from.

Vocabulary, the same letters in every docstring, kernel, test and table:
T live tokens of a call, K experts per token, E experts, H hidden size, I intermediate size of one
expert, S = T*K routed rows, BM/BN/BK tile sizes, bucket B >= T the batch size a graph was captured for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moert.errors import ConfigError
from moert.field_checks import build, number, one_of, positive_int, truth

if TYPE_CHECKING:
    import torch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")
DTYPES = ("bfloat16", "float16", "float32")
SCORINGS = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")
QUANT_FORMATS = ("int4",)
GROUP_MULTIPLE = 32  # columns: half a block of the packed layout, so that no half has two scales


@dataclass(frozen=True, slots=True)
class Routing:
    """How router logits [T, E] become K expert ids and K weights for every token.

    Args:
        scoring: "softmax" over all E; "softmax_topk" picks by logit, then softmax over the chosen K
            (gpt-oss); "sigmoid" (DeepSeek-V3, MiniMax-M2); "sqrtsoftplus" (DeepSeek-V4).
        renormalize: divide the K chosen scores by their sum.
        correction_bias: a per-expert bias [E] is added to the scores for the choice only, never to
            the weights (`e_score_correction_bias`, `topk_method="noaux_tc"`).
        num_groups: experts form this many equal, contiguous groups; 1 means no groups.
        top_groups: how many groups a token may choose from.
        group_score: a group's score: its best expert ("max", DeepSeek-V2) or the sum of its best two
            ("top2_sum", DeepSeek-V3).
        scaling_factor: multiplies the weights last (`routed_scaling_factor`).
    """

    scoring: str = "softmax"
    renormalize: bool = True
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2_sum"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        one_of("routing.scoring", self.scoring, SCORINGS)
        one_of("routing.group_score", self.group_score, GROUP_SCORES)
        positive_int("routing.num_groups", self.num_groups)
        positive_int("routing.top_groups", self.top_groups)
        if self.top_groups > self.num_groups:
            raise ConfigError(
                f"routing.top_groups={self.top_groups} exceeds routing.num_groups={self.num_groups}"
            )
        truth("routing.renormalize", self.renormalize)
        truth("routing.correction_bias", self.correction_bias)
        scale = number("routing.scaling_factor", self.scaling_factor, above=0.0)
        object.__setattr__(self, "scaling_factor", scale)


@dataclass(frozen=True, slots=True)
class Quant:
    """How the experts' matrices are stored; activations keep `MoEConfig.dtype`.

    Args:
        format: "int4": codes 0..15 with a scale, and maybe a zero point, for every group of columns of a row.
        group_size: columns that share a scale: a positive multiple of 32, or -1 for a whole row. It need not
            divide a matrix's columns: the last group of a row is shorter then.
        symmetric: the zero point of every group is 8.
    """

    format: str = "int4"
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        one_of("quant.format", self.format, QUANT_FORMATS)
        size = self.group_size
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not (whole and (size == -1 or (size > 0 and size % GROUP_MULTIPLE == 0))):
            raise ConfigError(
                f"quant.group_size={size!r} must be a positive multiple of {GROUP_MULTIPLE}, or -1 for one "
                "group a row"
            )
        truth("quant.symmetric", self.symmetric)


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """One mixture-of-experts layer: shapes, activation, routing rule, dtype. Holds no tensors.

    `eval(repr(cfg)) == cfg`. See the module docstring for the letters.

    Args:
        num_experts: E.
        top_k: K, at most 127 (the packed sort keeps the slot in 7 bits). More than E where these experts are
            a shard of a layer's: ids of the others are out of range, and nothing can be routed here.
        hidden_size: H.
        intermediate_size: I of one expert.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu2" (squared relu), or "swiglu_oai":
            `g = min(g, limit); u = clamp(u, -limit, limit); (u + 1) * g * sigmoid(alpha * g)`.
        gated: `act(gate) * up` if True, else `act(up)` with w13 of I rows.
        activation_limit: clamp of gate (from above) and up (both sides) before the activation;
            None for no clamp. swiglu_oai defaults to 7.0.
        activation_alpha: the slope inside swiglu_oai's sigmoid.
        bias: the experts have biases b13 [E, 2I] and b2 [E, H].
        dtype: of weights and activations: "bfloat16", "float16" or "float32" (torch dtypes accepted).
        routing: a `Routing`, or a dict of its fields.
        quant: None, or the `Quant` of the experts' weights, a dict of its fields, or the format alone.
        path: the checkpoint this description was read from; not part of equality.
        shared_experts: n, experts of size I that every token has besides its K (DeepSeek, GLM-4, Qwen2-MoE),
            no part of E. One shared expert of size n*I is n of them: the parts of its columns add up.
        shared_gate: their outputs are weighted by sigmoid(x @ gate) instead of 1 (Qwen2-MoE, Qwen3-Next).

    Raises:
        ConfigError: the field, its value and the bound.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    activation_limit: float | None = None
    activation_alpha: float = 1.702
    bias: bool = False
    dtype: str = "bfloat16"
    routing: Routing = field(default_factory=Routing)
    quant: Quant | None = None
    path: str | None = field(default=None, compare=False)
    shared_experts: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            positive_int(name, getattr(self, name))
        if self.top_k > 127:
            raise ConfigError(
                f"top_k={self.top_k} exceeds 127, the most a packed sort entry can hold"
            )
        one_of("activation", self.activation, ACTIVATIONS)
        truth("gated", self.gated)
        truth("bias", self.bias)
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        one_of("dtype", self.dtype, DTYPES)
        if isinstance(self.routing, dict):
            object.__setattr__(self, "routing", build(Routing, self.routing, "routing"))
        if not isinstance(self.routing, Routing):
            raise ConfigError(
                f"routing={self.routing!r} must be a moert.Routing or a dict of its fields"
            )
        if isinstance(self.quant, str):
            object.__setattr__(self, "quant", Quant(self.quant))
        if isinstance(self.quant, dict):
            object.__setattr__(self, "quant", build(Quant, self.quant, "quant"))
        if not (self.quant is None or isinstance(self.quant, Quant)):
            raise ConfigError(
                f"quant={self.quant!r} must be None, a moert.Quant or a dict of its fields"
            )
        if self.activation == "swiglu_oai":
            if not self.gated:
                raise ConfigError(
                    "activation='swiglu_oai' needs gated=True: it combines gate and up"
                )
            if self.activation_limit is None:
                object.__setattr__(self, "activation_limit", 7.0)
        if self.activation_limit is not None and not self.gated:
            raise ConfigError(
                f"activation_limit={self.activation_limit} clamps gate and up, but gated=False"
            )
        if self.activation_limit is not None:
            limit = number("activation_limit", self.activation_limit, above=0.0)
            object.__setattr__(self, "activation_limit", limit)
        alpha = number("activation_alpha", self.activation_alpha)
        object.__setattr__(self, "activation_alpha", alpha)
        if isinstance(self.path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))
        if not (self.path is None or isinstance(self.path, str)):
            raise ConfigError(f"path={self.path!r} must be the directory of a checkpoint, or None")
        self._check_groups()
        self._check_shared()

    def _check_shared(self) -> None:
        positive_int("shared_experts", self.shared_experts, least=0)
        truth("shared_gate", self.shared_gate)
        if self.shared_gate and not self.shared_experts:
            raise ConfigError("shared_gate=True weighs shared experts, but shared_experts=0")
        if self.top_k + self.shared_experts > 127:
            raise ConfigError(
                f"top_k={self.top_k} and shared_experts={self.shared_experts} exceed 127 together, the most "
                "a packed sort entry can hold"
            )

    def _check_groups(self) -> None:
        r = self.routing
        if self.num_experts % r.num_groups:
            raise ConfigError(
                f"routing.num_groups={r.num_groups} does not divide num_experts={self.num_experts}"
            )
        per_group = self.num_experts // r.num_groups
        if r.num_groups > 1 and self.top_k > per_group * r.top_groups:
            raise ConfigError(
                f"top_k={self.top_k} exceeds the {per_group * r.top_groups} experts of "
                f"routing.top_groups={r.top_groups} groups of {per_group}"
            )
        if r.num_groups > 1 and r.group_score == "top2_sum" and per_group < 2:
            raise ConfigError("routing.group_score='top2_sum' needs at least 2 experts a group")

    @property
    def can_route(self) -> bool:
        """There are K experts to choose."""
        return self.top_k <= self.num_experts

    def check_routing(self) -> None:
        """Of a whole layer, as a checkpoint has it, K experts can be chosen.

        Raises:
            ConfigError: there are fewer.
        """
        if not self.can_route:
            raise ConfigError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")

    @property
    def as_launched(self) -> MoEConfig:
        """The layer as its launches see it: E + n experts of which a token has K + n, the last n always.

        Without shared experts it is the config itself.
        """
        if not self.shared_experts:
            return self
        return replace(
            self,
            num_experts=self.num_experts + self.shared_experts,
            top_k=self.top_k + self.shared_experts,
            routing=Routing(),
            shared_experts=0,
            shared_gate=False,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's first matrix: gate rows then up rows (2I), or up rows alone (I)."""
        return self.intermediate_size * (2 if self.gated else 1)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MoEConfig:
        """Build from moert's own field names; a Hugging Face dict goes through `from_hf`."""
        cfg: MoEConfig = build(cls, fields, "config")
        return cfg

    @classmethod
    def from_hf(cls, hf_config: Any) -> MoEConfig:
        """Build from a Hugging Face config object or its dict, any family of `moert.checkpoint.families`."""
        from moert.checkpoint.hf_config import config_from_hf

        return config_from_hf(hf_config)

    @classmethod
    def from_pretrained(cls, path: str) -> MoEConfig:
        """Read `config.json` of a checkpoint directory; the config remembers the path.

        Raises:
            ConfigError: no such file, an unknown family, or contradictory fields.
        """
        from moert.checkpoint.hf_config import config_from_pretrained

        return config_from_pretrained(path)
