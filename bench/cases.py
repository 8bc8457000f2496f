"""What is measured beyond the table of shapes: prefill, skew, odd sizes, float16, shared experts.

A case is one to two layers that take turns, at several T; what is said of them is judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layer_chain import (
    MATMUL_FLOPS,
    READ_BYTES_PER_SECOND,
    Router,
    one_hot_expert_ids,
    same_ids,
    uniform_ids,
)
from shapes import SHAPES, in_format

from moert.config import MoEConfig, Routing

# at most, but for the share of the matmul rate; what is compared "as fast as" may be a noisy 2% slower
GOALS = {
    "prefill at 4096": 1.33,
    "prefill at 16384, share of the matmul rate": 0.75,
    "skew": 1.3,
    "odd": 1.15,
    "fp16": 1.02,
    "shared": 1.05,
}


@dataclass(frozen=True)
class Variant:
    """A layer and how it is called.

    Args:
        cfg: what it is, in its format.
        ids: what routes the tokens of `forward`; None for `forward_block`.
    """

    cfg: MoEConfig
    ids: Router | None = uniform_ids


Variants = dict[str, Variant]


@dataclass(frozen=True)
class Part:
    """Cases of one kind.

    Args:
        of: the variants of a shape by their names, by the shape's name, in a format.
        formats, tokens: what is measured where nobody says otherwise.
        any_format: others can be asked for.
        apart: each T has runtimes of its own.
    """

    of: Callable[[str], dict[str, Variants]]
    formats: tuple[str, ...]
    tokens: tuple[int, ...]
    any_format: bool = True
    apart: bool = False


@dataclass(frozen=True)
class Case:
    """The variants of one shape in one format, and the T they are measured at.

    Args:
        tokens: in groups that have runtimes in common.
    """

    part: str
    name: str
    format: str
    variants: Variants
    tokens: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.part} {self.name} {self.format}"


def prefill(form: str) -> dict[str, Variants]:
    return {name: {"uniform": Variant(in_format(cfg, form))} for name, cfg in SHAPES.items()}


def skew(form: str) -> dict[str, Variants]:
    """One expert that every token has; all tokens on the same K."""
    found = {}
    for name, cfg in SHAPES.items():
        changed = in_format(cfg, form)
        hot, same = Variant(changed, one_hot_expert_ids), Variant(changed, same_ids)
        found[name] = {"one hot expert": hot, "same K experts": same}
    return found


# sizes that no tile divides beside ones that it does; then layers of public models as they are, shared
# among 8 GPUs: DeepSeek-V2's, Kimi-K2's
ODD = {
    "E=60 I=1408": (MoEConfig(60, 4, 2048, 1408), MoEConfig(64, 4, 2048, 1536)),
    "H=I=2880": (MoEConfig(32, 4, 2880, 2880), MoEConfig(32, 4, 3072, 3072)),
    "I=200": (MoEConfig(64, 8, 2048, 200), MoEConfig(64, 8, 2048, 256)),
    "deepseek-v2-tp8": (MoEConfig(160, 6, 5120, 192),),
    "kimi-k2-tp8": (MoEConfig(384, 8, 7168, 256),),
}


def odd(form: str) -> dict[str, Variants]:
    return {
        name: {
            kind: Variant(in_format(cfg, form))
            for kind, cfg in zip(("odd", "even"), pair, strict=False)
        }
        for name, pair in ODD.items()
    }


def fp16(form: str) -> dict[str, Variants]:
    return {
        name: {kind: Variant(in_format(cfg, kind)) for kind in (form, "bfloat16")}
        for name, cfg in SHAPES.items()
    }


# as those models route: DeepSeek-V3 by sigmoid with a bias in groups, Qwen1.5-MoE-A2.7B without dividing by
# the sum, its shared expert as large as four
SHARED = {
    "deepseek-v3-tp8": MoEConfig(
        256,
        8,
        7168,
        256,
        routing=Routing(
            "sigmoid", correction_bias=True, num_groups=8, top_groups=4, scaling_factor=2.5
        ),
        shared_experts=1,
    ),
    "qwen1.5-moe": MoEConfig(
        60,
        4,
        2048,
        1408,
        routing=Routing(renormalize=False),
        shared_experts=4,
        shared_gate=True,
    ),
}


def shared(form: str) -> dict[str, Variants]:
    """Whole blocks with their shared experts, and without."""
    found = {}
    for name, cfg in SHARED.items():
        changed = in_format(cfg, form)
        bare = replace(changed, shared_experts=0, shared_gate=False)
        found[name] = {"with": Variant(changed, None), "without": Variant(bare, None)}
    return found


PARTS = {
    "prefill": Part(prefill, ("bfloat16", "int4"), (1024, 4096, 16384), apart=True),
    "skew": Part(skew, ("bfloat16",), (16, 64, 256)),
    "odd": Part(odd, ("bfloat16",), (1, 4, 16, 64, 256)),
    "fp16": Part(fp16, ("float16",), (1, 8, 64, 512), any_format=False),
    "shared": Part(shared, ("bfloat16",), (1, 8, 64)),
}


def all_names() -> list[str]:
    """Every name that a case can have."""
    return list(dict.fromkeys(name for part in PARTS.values() for name in part.of(part.formats[0])))


def cases(
    parts: Sequence[str],
    names: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
) -> list[Case]:
    """The cases of these parts; None stands for all, or for what a part measures by itself."""
    found = []
    for kind in parts:
        part = PARTS[kind]
        sizes = tuple(sorted(set(tokens or part.tokens)))
        groups = tuple((t,) for t in sizes) if part.apart else (sizes,)
        for form in (part.any_format and formats) or part.formats:
            for name, variants in part.of(form).items():
                if names is None or name in names:
                    found.append(Case(kind, name, form, variants, groups))
    return found


def judged(part: str, tokens: int, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the layers of a cell say together.

    Args:
        layers: by variant, what `Chain.cell` tells.

    Returns:
        The layers; "ratio" where two are compared: of the times in fp16, else of the times the floor;
        "matmul share" of prefill, and "share beside" of the rate of the matmul timed in turns with it, under
        load where clocks are lower; "met": whether the goal is, None where there is none.
    """
    cell: dict[str, Any] = {"layers": layers, "met": None}
    first, *others = layers.values()
    if part == "prefill":
        at_rate = first["flops"] / MATMUL_FLOPS
        share = cell["matmul share"] = round(at_rate * 1e6 / first["us"], 3)
        if "matmul flops" in first:
            rate = first["flops"] * 1e6 / first["us"]
            cell["share beside"] = round(rate / first["matmul flops"], 3)
        if tokens == 4096:
            cell["met"] = first["times the floor"] <= GOALS["prefill at 4096"]
        # where reading takes longer than computing, no rate can be asked for
        elif tokens == 16384 and at_rate >= first["bytes"] / READ_BYTES_PER_SECOND:
            cell["met"] = share >= GOALS["prefill at 16384, share of the matmul rate"]
    elif part == "skew":
        cell["met"] = max(one["times the floor"] for one in layers.values()) <= GOALS[part]
    elif others:
        what = "us" if part == "fp16" else "times the floor"
        cell["ratio"] = round(first[what] / others[0][what], 4)
        cell["met"] = cell["ratio"] <= GOALS[part]
    return cell
