"""Record files: read, merged and replaced whole; nothing that lies in them can do harm."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fakes import (
    CFG,
    DEFAULT,
    FACTS,
    FAST,
    MADE_WITH,
    fake_record,
    fake_store,
    fresh_processes,
)

from moert.config import MoEConfig
from moert.tuning import store as store_module
from moert.tuning.store import FORMAT, SHIPPED, Store, directories, geometry
from moert.weights import ExpertWeights


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_round_trip_and_layout(tmp_path: Path) -> None:
    store = fake_store(tmp_path)
    store.add(16, 0, fake_record())
    store.add(2, 3, fake_record(DEFAULT, 5.0))
    assert store.path == tmp_path / "fake-gpu" / "E8-K2-H32-I16-float32.json"
    fresh = fake_store(tmp_path)
    assert fresh.find(16, 0) == [fake_record()]
    assert fresh.find(2, 3) == [fake_record(DEFAULT, 5.0)]
    # exact buckets and policies only
    assert fresh.find(8, 0) == fresh.find(16, 3) == []
    data = json.loads(store.path.read_text())
    assert data["format"] == FORMAT and data["made_with"] == MADE_WITH
    assert list(data["entries"]) == ["2", "16"]  # by number, not by letter
    entry = data["entries"]["16"]["0"]
    assert entry["choice"] == FAST.to_json() and "made_with" not in entry
    assert [p.name for p in store.path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_older_entries_keep_their_versions(tmp_path: Path) -> None:
    fake_store(tmp_path, made_with={**MADE_WITH, "triton": "1"}).add(1, 0, fake_record(triton="1"))
    store = fake_store(tmp_path)
    store.add(2, 0, fake_record())
    found = {tokens: fake_store(tmp_path).find(tokens, 0)[0] for tokens in (1, 2)}
    assert [found[t].made_with["triton"] for t in (1, 2)] == ["1", "2"]
    assert [store.made_by_this_code(found[t]) for t in (1, 2)] == [False, True]


@pytest.mark.parametrize(
    ("other", "same"), [({"driver": "9"}, True), ({"torch": "9"}, True), ({"moert": "9"}, False)]
)
def test_which_versions_matter(tmp_path: Path, other: dict[str, str], same: bool) -> None:
    assert fake_store(tmp_path).made_by_this_code(fake_record(**other)) is same


def test_order_of_look_up(tmp_path: Path) -> None:
    places = [(tmp_path / name, name) for name in ("cache", "shipped")]
    for place, source in places:
        Store(FACTS, "g", MADE_WITH, [(place, source)]).add(
            1, 0, replace(fake_record(), source=source)
        )
    Store(FACTS, "g", MADE_WITH, places[1:]).add(2, 0, fake_record())
    store = Store(FACTS, "g", MADE_WITH, places)
    assert [record.source for record in store.find(1, 0)] == ["cache", "shipped"]
    assert [record.source for record in store.find(2, 0)] == ["shipped"]


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        store_module.platformdirs, "user_cache_dir", lambda *a, **k: str(tmp_path / "user")
    )
    user = (tmp_path / "user", "cache")
    assert directories() == [user, (SHIPPED, "shipped")]
    assert directories(tmp_path) == [(tmp_path, "cache"), user, (SHIPPED, "shipped")]


def good() -> dict[str, Any]:
    entry = {"choice": FAST.to_json(), "us": 10.0, "default_us": 20.0, "cold": True}
    device = {"name": FACTS.name, "arch": FACTS.arch, "compute_units": FACTS.compute_units}
    head = {
        "format": FORMAT,
        "device": device,
        "geometry": geometry(CFG, ExpertWeights.random(CFG)),
    }
    return {**head, "made_with": MADE_WITH, "entries": {"16": {"0": entry}}}


def spoiled(change: Callable[[dict[str, Any]], None]) -> str:
    data = good()
    change(data)
    return json.dumps(data)


FOREIGN_CHOICE = {**FAST.to_json(), "strategy": "guess"}
NEGATIVE_TILE = {**FAST.to_json(), "down": {"bm": -1, "bn": 1, "bk": 1}}
DAMAGED = {
    "empty": "",
    "not json": "entries: none",
    "truncated": json.dumps(good())[:-30],
    "not utf-8": b"\xff\xfe{",
    "a list": "[]",
    "null": "null",
    "other format": spoiled(lambda d: d.update(format=0)),
    "no format": spoiled(lambda d: d.pop("format")),
    "other device": spoiled(lambda d: d["device"].update(name="Other GPU")),
    # a partition of the same device: the name alone does not tell
    "fewer compute units": spoiled(lambda d: d["device"].update(compute_units=1)),
    "other geometry": spoiled(lambda d: d.update(geometry="E1")),
    "entries missing": spoiled(lambda d: d.pop("entries")),
    "entries a list": spoiled(lambda d: d.update(entries=[1])),
    "bucket a list": spoiled(lambda d: d["entries"].update({"16": [1]})),
    "bucket no number": spoiled(lambda d: d.update(entries={"many": d["entries"]["16"]})),
    "entry null": spoiled(lambda d: d["entries"]["16"].update({"0": None})),
    "unknown strategy": spoiled(lambda d: d["entries"]["16"]["0"].update(choice=FOREIGN_CHOICE)),
    "negative tile": spoiled(lambda d: d["entries"]["16"]["0"].update(choice=NEGATIVE_TILE)),
    "time not a number": spoiled(lambda d: d["entries"]["16"]["0"].update(us="fast")),
    "time zero": spoiled(lambda d: d["entries"]["16"]["0"].update(us=0)),
    "time infinite": spoiled(lambda d: d["entries"]["16"]["0"].update(us=float("inf"))),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file(text: str | bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fake_store(tmp_path).path
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    store = fake_store(tmp_path)
    assert store.find(16, 0) == []
    store.reload()
    assert len(warnings(caplog)) == 1 and "ignored" in warnings(caplog)[0]
    assert str(path) in warnings(caplog)[0]
    # and it is replaced by a good one
    store.add(4, 0, fake_record())
    assert len(warnings(caplog)) == 1
    assert fake_store(tmp_path).find(4, 0) == [fake_record()]


def test_the_good_file_is_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fake_store(tmp_path).path
    path.parent.mkdir()
    path.write_text(json.dumps(good()))
    assert fake_store(tmp_path).find(16, 0) == [fake_record()]
    assert warnings(caplog) == []


def test_one_bad_entry_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fake_store(tmp_path).path
    path.parent.mkdir()
    path.write_text(spoiled(lambda d: d["entries"].update({"8": {"0": {}}, "4": {"0": {}}})))
    assert fake_store(tmp_path).find(16, 0) == [fake_record()]
    assert len(warnings(caplog)) == 1


def test_a_newer_format_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fake_store(tmp_path).path
    path.parent.mkdir()
    text = spoiled(lambda d: d.update(format=FORMAT + 1))
    path.write_text(text)
    store = fake_store(tmp_path)
    store.add(4, 0, fake_record())
    assert path.read_text() == text
    # this process still knows
    assert store.find(4, 0) == [fake_record()]
    assert len(warnings(caplog)) == 1


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("what", ["read-only", "refused", "a file in the way"])
def test_nothing_can_be_written(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "records"
    if what == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.mkdir(mode=0o500)
    elif what == "refused":  # what a read-only file system does to root too
        monkeypatch.setattr(store_module, "exclusive", refuse)
        monkeypatch.setattr(store_module.tempfile, "mkstemp", refuse)
    else:
        folder.write_text("")
    store = fake_store(folder)
    with store.lock():
        store.add(1, 0, fake_record())
        store.add(2, 0, fake_record())
    assert store.find(1, 0) == [fake_record()]
    assert len(warnings(caplog)) == 1 and "cannot be kept" in warnings(caplog)[0]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fake_store(tmp_path)
    store.add(1, 0, fake_record())
    before = store.path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    store.add(2, 0, fake_record())
    assert store.path.read_text() == before
    assert sorted(p.suffix for p in store.path.parent.iterdir()) == [".json", ".lock"]


def test_who_reads_while_another_writes_sees_one_whole_file(tmp_path: Path) -> None:
    """The file is replaced, never rewritten: what a reader has open stays what it was."""
    store = fake_store(tmp_path)
    store.add(1, 0, fake_record())
    before = store.path.read_text()
    with store.path.open() as reader:
        store.add(2, 0, fake_record())
        assert reader.read() == before != store.path.read_text()


def write_many(folder: Path, first: int) -> None:
    store = fake_store(folder)
    for tokens in range(first, first + 25):
        store.add(tokens, 0, fake_record(us=float(tokens)))


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    context = fresh_processes()
    writers = [context.Process(target=write_many, args=(tmp_path, first)) for first in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = fake_store(tmp_path)
    for tokens in (*range(1, 26), *range(101, 126)):
        assert [record.us for record in store.find(tokens, 0)] == [float(tokens)]


def test_lock_excludes_another_store(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    store = fake_store(tmp_path)
    lock_file = store.path.with_suffix(".lock")
    with store.lock(), store.lock(), lock_file.open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock_file.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


BASE = MoEConfig(8, 2, 32, 16)
GEOMETRIES = [
    (BASE, {}, "triton", "E8-K2-H32-I16-bfloat16"),
    (replace(BASE, dtype="float16"), {}, "triton", "E8-K2-H32-I16-float16"),
    (BASE, {}, "aiter", "E8-K2-H32-I16-bfloat16-aiter"),
    (BASE, {"interleaved": True}, "triton", "E8-K2-H32-I16-bfloat16-interleaved"),
    (replace(BASE, activation_limit=7.0), {}, "triton", "E8-K2-H32-I16-bfloat16-limit"),
    (
        replace(BASE, activation="swiglu_oai", bias=True),
        {},
        "triton",
        "E8-K2-H32-I16-bfloat16-swiglu_oai-bias",
    ),
    (
        replace(BASE, activation="relu2", gated=False),
        {},
        "triton",
        "E8-K2-H32-I16-bfloat16-relu2-ungated",
    ),
]


@pytest.mark.parametrize(("cfg", "options", "backend", "name"), GEOMETRIES)
def test_geometry(cfg: MoEConfig, options: dict[str, Any], backend: str, name: str) -> None:
    assert geometry(cfg, replace(ExpertWeights.random(cfg), **options), backend) == name


def test_geometry_of_layouts() -> None:
    weights = ExpertWeights.random(BASE)
    stored = {"w13": weights.w13.transpose(1, 2), "w2": weights.w2.transpose(1, 2)}
    contiguous = {name: tensor.contiguous() for name, tensor in stored.items()}
    transposed = ExpertWeights.from_tensors(**contiguous, transposed=True)
    assert geometry(BASE, transposed).endswith("-bfloat16-w13_transposed-w2_transposed")
    biased = replace(BASE, bias=True)
    wide = ExpertWeights.random(biased)
    assert wide.b13 is not None
    wide = replace(wide, b13=wide.b13.to(torch.float32))
    assert geometry(biased, wide).endswith("-bias_float32")
