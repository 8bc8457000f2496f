"""The command line: verbs, exit codes, what they print as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moert import __version__
from moert.cli.main import VERBS, main
from moert.device import KNOWN_DEVICES
from moert.env import VARIABLES

Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, *words: str, code: int = 0) -> Any:
    """What a verb prints as JSON."""
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "moert", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"moert {__version__}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as error:
        main([verb, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"  moert {verb}")]
    assert examples
    assert "--json" in text


def test_general_help_names_every_verb_and_the_exit_codes(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert "exit codes: 0" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "VERB"),
        (["nonsense"], "nonsense"),
        (["plan"], "MODEL_DIR|E,K,H,I"),
        (["plan", "1,2,3"], "four integers E,K,H,I"),
        (["plan", "8,9,64,64"], "top_k=9 exceeds num_experts=8"),
        (["plan", "no/such/directory"], "neither the directory of a checkpoint nor a shape"),
        (["plan", "8,2,64,64", "--device", "gfx1"], "gfx942"),
        (["plan", "8,2,64,64", "--buckets", "0"], "1.."),
        (["check", "no/such/directory"], "no such directory"),
        (["compile", "--target", "sm_20"], "sm_20"),
        (["compile", "--shape", "8,2,64,64", "--model", "."], "not allowed with"),
    ],
)
def test_wrong_usage_is_2(words: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_info(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "some-device" / "E8.json"
    record.parent.mkdir()
    record.write_text("{}")
    monkeypatch.setenv("MOERT_TUNING_DIR", str(tmp_path))
    monkeypatch.setenv("MOERT_TUNE", "off")
    found = answer(capsys, "info")
    assert found["devices"][-1]["kind"] == "cpu"
    assert {row["backend"] for row in found["backends"]} == {"triton", "aiter", "torch"}
    on_cpu = {r["backend"]: r["why_not"] for r in found["backends"] if r["device"] == "cpu"}
    assert on_cpu["torch"] is None
    assert on_cpu["aiter"]
    first = found["tuning"][0]
    assert first == {
        "directory": str(tmp_path),
        "source": "cache",
        "files": ["some-device/E8.json"],
    }
    assert found["tuning"][-1]["source"] == "shipped"
    values = {row["name"]: row["value"] for row in found["environment"]}
    assert values["MOERT_TUNE"] == "off"
    assert set(values) == {variable.name for variable in VARIABLES}
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("devices", "some-device/E8.json", *values, *(v.help for v in VARIABLES)):
        assert part in text


def test_info_finds_a_wrong_variable(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOERT_SORT_POLICY", "9")
    found = answer(capsys, "info", code=1)
    assert found["problems"] == [
        "MOERT_SORT_POLICY='9': need 0 (measured), 1 (one-shot), 2 (multi-phase), 3 (none)"
    ]
    assert main(["info"]) == 1
    assert "MOERT_SORT_POLICY='9'" in capsys.readouterr().out


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_plan_for_an_absent_device(arch: str, capsys: Capture) -> None:
    pytest.importorskip("triton")
    words = ("plan", "128,8,2048,768", "--device", arch, "--buckets", "1", "64")
    found = answer(capsys, *words, "--max-tokens", "200")
    assert found["arch"] == arch
    assert found["backend"] == "triton"
    assert [plan["tokens"] for plan in found["plans"]] == [1, 64, 128, 200]
    assert [plan["captured"] for plan in found["plans"]] == [True, True, False, False]
    assert [plan["choice"]["strategy"] for plan in found["plans"]][:2] == ["none", "one_shot"]
    shipped = "shipped" if arch == "sm_90" else "heuristic"
    assert found["plans"][0]["source"] == shipped
    memory = found["memory"]
    assert memory["weights"] == 128 * 3 * 2048 * 768 * 2
    assert memory["arena"] == max(plan["scratch_bytes"] for plan in found["plans"])
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert main(list(words)) == 0
    assert f"({arch})" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of this machine are those of its GPU")
def test_plan_here_counts_what_a_runtime_holds(capsys: Capture) -> None:
    from moert import ExpertWeights, MoEConfig, MoERuntime

    found = answer(capsys, "plan", "8,2,64,48", "--dtype", "float32", "--max-tokens", "24")
    cfg = MoEConfig(8, 2, 64, 48, dtype="float32")
    with MoERuntime(cfg, ExpertWeights.random(cfg), max_tokens=24) as rt:
        report, held = rt.plan(), rt.memory()
    assert found["config"] == repr(cfg)
    assert found["graphs"] == report.graphs
    plans = [(p["tokens"], p["captured"], p["kernels"]) for p in found["plans"]]
    assert plans == [(p.tokens, p.captured, list(p.kernels)) for p in report]
    router = cfg.num_experts * cfg.hidden_size * 4  # random weights bring a router along
    assert found["memory"]["weights"] == held["weights"] - router
    for name in ("arena", "capture_arena", "results", "block"):
        assert found["memory"][name] == held[name], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of this machine are those of its GPU")
def test_plan_of_a_layer_with_shared_experts(
    capsys: Capture, tiny_checkpoint: Callable[..., Path]
) -> None:
    """E + n experts in the launches, K columns in what routing returns."""
    from moert import MoERuntime

    path = str(tiny_checkpoint("deepseek_v3"))
    found = answer(capsys, "plan", path, "--max-tokens", "24")
    with MoERuntime(path, layer=1, max_tokens=24) as rt:
        held = rt.memory()
        scratch = [plan.scratch_bytes for plan in rt.plan()]
    assert [plan["scratch_bytes"] for plan in found["plans"]] == scratch
    for name in ("arena", "capture_arena", "results", "block"):
        assert found["memory"][name] == held[name], name


def test_plan_that_no_backend_serves_is_a_problem(capsys: Capture) -> None:
    pytest.importorskip("triton")
    words = ["plan", "2000,8,64,64", "--device", "gfx942", "--backend", "triton"]
    assert main(words) == 1
    assert "num_experts=2000 exceeds" in capsys.readouterr().err


def test_plan_of_a_checkpoint(capsys: Capture, tiny_checkpoint: Callable[..., Path]) -> None:
    found = answer(capsys, "plan", str(tiny_checkpoint("qwen3_moe")))
    assert "num_experts=8" in found["config"]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_check_of_a_good_checkpoint(
    family: str, capsys: Capture, tiny_checkpoint: Callable[..., Path]
) -> None:
    from moert import ExpertWeights

    path = tiny_checkpoint(family)
    found = answer(capsys, "check", str(path))
    assert found["problems"] == []
    assert found["model_type"] == family
    assert found["layers"]
    for layer in found["layers"]:
        assert set(layer["formats"]) == {"F32"}
        loaded = ExpertWeights.from_checkpoint(path, layer["layer"])
        small = 0 if loaded.router_bias is None else loaded.router_bias.nbytes
        assert layer["nbytes"] == loaded.nbytes - small
    assert found["nbytes"] == sum(layer["nbytes"] for layer in found["layers"])
    assert main(["check", str(path)]) == 0
    assert "no problems" in capsys.readouterr().out


def damaged(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_check_names_everything_that_is_wrong(
    capsys: Capture, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A missing tensor, a misshapen one and one of another format, in two layers, all in one run."""
    experts = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    missing, bent, integer = (
        experts.format(0, 3, "up"),
        experts.format(2, 1, "down"),
        experts.format(2, 5, "gate"),
    )

    def change(tensors: dict[str, Any]) -> None:
        del tensors[missing]
        tensors[bent] = tensors[bent].t().contiguous()
        tensors[integer] = tensors[integer].to(torch.int8)

    path = damaged(tiny_checkpoint("qwen3_moe"), tmp_path, change)
    found = answer(capsys, "check", str(path), code=1)
    problems = found["problems"]
    assert [text.split(":")[0] for text in problems] == [missing, bent, integer]
    assert "missing from" in problems[0]
    assert "shape [96, 64], need [64, 96]" in problems[1]
    assert "stored as I8" in problems[2]
    assert [len(layer["problems"]) for layer in found["layers"]] == [1, 2]
    assert found["layers"][1]["formats"]["I8"] == 1
    assert main(["check", str(path)]) == 1
    text = capsys.readouterr().out
    assert "3 problem(s):" in text
    assert missing in text


def test_check_of_a_quantised_checkpoint_tells_its_formats(
    capsys: Capture, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = damaged(tiny_checkpoint("qwen3_moe"), tmp_path, lambda tensors: None)
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(fields))
    found = answer(capsys, "check", str(path), code=1)
    assert len(found["problems"]) == 1
    assert "quantised as 'fp8'" in found["problems"][0]
    assert [layer["formats"] for layer in found["layers"]] == [{"F32": 25}] * 2


def test_check_of_an_empty_directory(capsys: Capture, tmp_path: Path) -> None:
    found = answer(capsys, "check", str(tmp_path), code=1)
    assert ["no config.json" in found["problems"][0], len(found["problems"])] == [True, 2]
