"""Checks of the fields of a description: each names the field, its value and what is needed."""

from __future__ import annotations

import math
from typing import Any

from moert.errors import ConfigError


def build(cls: type, fields: dict[str, Any], what: str) -> Any:
    known = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(
            f"{what}: unknown field(s) {', '.join(unknown)}; known: {', '.join(known)}"
        )
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from None


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def positive_int(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer >= {least}")


def truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False")


def number(name: str, value: object, above: float = -math.inf) -> float:
    """The value as a float, so that equal configs have one repr."""
    given = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if math.isfinite(given) and given > above:
        return float(given)
    bound = "finite" if above == -math.inf else f"finite and > {above:g}"
    raise ConfigError(f"{name}={value!r} must be a number, {bound}")
