"""The environment variables: parsed once, checked, told apart from unset ones."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from runtime_cases import CFG, make_case, make_runtime

from moert.env import VARIABLES, Env, read_env
from moert.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        *[("MOERT_SORT_POLICY", str(n), "sort_policy", n) for n in range(4)],
        ("MOERT_SORT_POLICY", " 2 ", "sort_policy", 2),
        ("MOERT_TUNING_DIR", "/tmp/no/such/yet", "tuning_dir", Path("/tmp/no/such/yet")),
        ("MOERT_TUNE", "off", "tune", "off"),
        ("MOERT_TUNE", "Force", "tune", "force"),
        ("MOERT_BACKEND", "aiter", "backend", "aiter"),
        ("MOERT_LOG", "debug", "log_level", logging.DEBUG),
        ("MOERT_LOG", "WARNING", "log_level", logging.WARNING),
    ],
)
def test_value(name: str, text: str, field: str, value: object) -> None:
    env = read_env({name: text, "HOME": "/somewhere"})
    assert env == Env(**{field: value})  # and every other field is unset


@pytest.mark.parametrize("text", ["", "  "])
def test_unset_and_empty_are_the_same(text: str) -> None:
    assert read_env({}) == Env()
    assert read_env({variable.name: text for variable in VARIABLES}) == Env()


def test_tuning_dir_expands_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert read_env({"MOERT_TUNING_DIR": "~/t"}).tuning_dir == Path("/somewhere/t")


@pytest.mark.parametrize(
    ("name", "text", "need"),
    [
        ("MOERT_SORT_POLICY", "4", "0 (measured), 1 (one-shot), 2 (multi-phase), 3 (none)"),
        ("MOERT_SORT_POLICY", "-1", "0 (measured)"),
        ("MOERT_SORT_POLICY", "one-shot", "0 (measured)"),
        ("MOERT_SORT_POLICY", "1.0", "0 (measured)"),
        ("MOERT_TUNING_DIR", __file__, "a directory, this is a file"),
        ("MOERT_TUNE", "yes", "one of auto, off, force"),
        ("MOERT_BACKEND", "cuda", "one of auto, triton, aiter, torch"),
        ("MOERT_LOG", "loud", "one of debug, info, warning, error, critical"),
        ("MOERT_LOG", "10", "one of debug, info"),
    ],
)
def test_bad_value_names_the_variable_the_value_and_the_need(
    name: str, text: str, need: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read_env({name: text})
    assert f"{name}={text!r}: need {need}" in str(error.value)


def test_reads_the_real_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("MOERT_SORT_POLICY", "3")
    assert read_env() == Env(sort_policy=3)


def test_every_variable_fills_one_field_and_is_in_the_readme() -> None:
    assert [variable.field for variable in VARIABLES] == [field.name for field in fields(Env)]
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for variable in VARIABLES:
        assert f"`{variable.name}`" in readme, f"{variable.name} is not described"
        assert variable.help
        assert "\n" not in variable.help


def test_a_call_reads_no_environment_and_writes_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the files of all Python functions that run meanwhile."""
    rt = make_runtime("torch")
    case, logits = make_case(CFG, 3), torch.zeros(3, CFG.num_experts)
    live = torch.ones((), dtype=torch.int32)
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    monkeypatch.setenv("MOERT_SORT_POLICY", "not a policy")
    sys.setprofile(note)
    try:
        case.call(rt)
        case.call(rt, num_valid=live)
        rt.forward(case.x, case.topk)
        rt.route(logits)
    finally:
        sys.setprofile(None)
    here = {sys.modules["runtime_cases"].__file__, "<string>"}  # the latter: of named tuples
    assert {name for name in seen - here if not {"moert", "torch"} & set(Path(name).parts)} == set()
    assert not [name for name in seen if name.endswith("moert/env.py")]
