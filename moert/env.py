"""Every environment variable that moert reads: name, default, meaning.

They are read once, when a runtime is made, never during a call; a keyword argument of `MoERuntime` wins over
the variable of the same name.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moert.errors import ConfigError

SORT_POLICIES: Final = {0: "measured", 1: "one-shot", 2: "multi-phase", 3: "none"}
TUNE_MODES: Final = ("auto", "off", "force")
BACKENDS: Final = ("auto", "triton", "aiter", "torch")
LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True)
class Env:
    """What the environment asks for; None where a variable is unset or empty.

    Args:
        sort_policy: a key of `SORT_POLICIES`.
        tuning_dir: the first directory in which tuning records are looked up.
        tune: one of `TUNE_MODES`.
        backend: one of `BACKENDS`.
        log_level: a level of the standard `logging` module for the logger "moert".
    """

    sort_policy: int | None = None
    tuning_dir: Path | None = None
    tune: str | None = None
    backend: str | None = None
    log_level: int | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable: the `Env` field it fills, what an unset one means, one line of help."""

    name: str
    field: str
    default: str
    help: str
    parse: Callable[[str], object]


def _sort_policy(text: str) -> int:
    if text in map(str, SORT_POLICIES):
        return int(text)
    meanings = ", ".join(f"{number} ({meaning})" for number, meaning in SORT_POLICIES.items())
    raise ValueError(meanings)


def _directory(text: str) -> Path:
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError("a directory, this is a file")
    return path


def _one_of(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text.lower()

    return parse


def _log_level(text: str) -> int:
    return int(logging.getLevelName(_one_of(LOG_LEVELS)(text).upper()))


VARIABLES: Final = (
    Variable(
        "MOERT_SORT_POLICY",
        "sort_policy",
        "0",
        "how rows are sorted by expert: 0 measured, 1 one-shot, 2 multi-phase, 3 none",
        _sort_policy,
    ),
    Variable(
        "MOERT_TUNING_DIR",
        "tuning_dir",
        "the user's cache directory",
        "directory of tuning records, looked up before all others",
        _directory,
    ),
    Variable(
        "MOERT_TUNE",
        "tune",
        "auto",
        "auto: measure what no record holds; off: never measure; force: measure again",
        _one_of(TUNE_MODES),
    ),
    Variable(
        "MOERT_BACKEND",
        "backend",
        "auto",
        "auto, triton, aiter or torch",
        _one_of(BACKENDS),
    ),
    Variable(
        "MOERT_LOG",
        "log_level",
        "warning",
        "level of the logger 'moert': debug, info, warning, error or critical",
        _log_level,
    ),
)


def given_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The texts of the variables that are set, by name; `environ` as for `read_env`."""
    source = os.environ if environ is None else environ
    texts = {variable.name: source.get(variable.name, "").strip() for variable in VARIABLES}
    return {name: text for name, text in texts.items() if text}


def read_env(environ: Mapping[str, str] | None = None) -> Env:
    """The environment's wishes, checked.

    Args:
        environ: stands in for `os.environ`.

    Raises:
        ConfigError: the variable, its value and the values it may have.
    """
    given = given_variables(environ)
    found: dict[str, object] = {}
    for variable in VARIABLES:
        text = given.get(variable.name)
        if text is None:
            continue
        try:
            found[variable.field] = variable.parse(text)
        except ValueError as error:
            raise ConfigError(f"{variable.name}={text!r}: need {error}") from None
    return Env(**found)  # type: ignore[arg-type]


def local_processes() -> int:
    """Processes of a job on this machine, as torch's launcher says; 1 where nothing is said."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def environment_with(**changes: str) -> dict[str, str]:
    """This process's environment with other variables, for a process to be started."""
    return {**os.environ, **changes}


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """For processes started meanwhile: the environment without these variables."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
