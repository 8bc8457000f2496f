"""Tuning records: readable JSON, one file per device and layer geometry.

`<directory>/<device slug>/<geometry>.json` holds, for each bucket and sorting policy, the choice and its
times. All processes of a machine share the files: they are replaced as a whole, never rewritten in place, and
merged with what is on disk at that moment under a lock. A damaged file is never worse than none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import platformdirs

from moert import __version__
from moert.config import MoEConfig
from moert.device import DeviceFacts
from moert.plan import Choice
from moert.quantization.int4_layout import Int4Matrix
from moert.tuning.lock import exclusive
from moert.weights import ExpertWeights

log = logging.getLogger("moert")

FORMAT = 1
SHIPPED = Path(__file__).parent / "shipped"
Key = tuple[int, int]  # (tokens of the bucket, sorting policy)


@dataclass(frozen=True, slots=True)
class Record:
    """One measured choice.

    Args:
        choice: strategy and tiles.
        us: device time of one call in microseconds.
        default_us: the same for the heuristic choice, where it could be measured.
        cold: weights came from memory, not from a cache that held them all.
        made_with: versions of moert, triton, torch and driver.
        source: "cache" or "shipped", by where it was found; not stored.
    """

    choice: Choice
    us: float
    default_us: float | None
    cold: bool
    made_with: Mapping[str, str]
    source: str = "cache"

    def to_json(self) -> dict[str, Any]:
        times = {"us": self.us, "default_us": self.default_us, "cold": self.cold}
        return {"choice": self.choice.to_json(), **times, "made_with": dict(self.made_with)}

    @classmethod
    def from_json(cls, data: Any, made_with: Any, source: str) -> Record:
        """Inverse of `to_json`; `made_with` stands in where the entry names no versions of its own.

        Raises:
            ValueError, TypeError, KeyError: not a record.
        """
        us, default_us = float(data["us"]), data["default_us"]
        times = [us] if default_us is None else [us, float(default_us)]
        if not all(math.isfinite(time) and time > 0 for time in times):
            raise ValueError(f"times {times} are not all positive")
        versions = {str(k): str(v) for k, v in data.get("made_with", made_with).items()}
        cold = bool(data.get("cold", True))
        choice = Choice.from_json(data["choice"])
        return cls(choice, us, None if default_us is None else times[1], cold, versions, source)


def geometry(cfg: MoEConfig, weights: ExpertWeights, backend: str = "triton") -> str:
    """Everything about a layer that decides which kernels are fast, as a file name.

    Shapes and dtype, then whatever is not the usual: activation, clamp, biases, no gate, the layout of the
    weights, the backend.
    """
    parts = [
        f"E{cfg.num_experts}-K{cfg.top_k}-H{cfg.hidden_size}-I{cfg.intermediate_size}-{cfg.dtype}"
    ]
    if cfg.quant is not None:
        size = "channel" if cfg.quant.group_size == -1 else f"g{cfg.quant.group_size}"
        parts.append(f"{cfg.quant.format}_{size}" + ("" if cfg.quant.symmetric else "_zeros"))
    if cfg.activation != "silu":
        parts.append(cfg.activation)
    if cfg.activation_limit is not None and cfg.activation != "swiglu_oai":
        parts.append("limit")
    if not cfg.gated:
        parts.append("ungated")
    if cfg.bias:
        wide = weights.b13 is not None and weights.b13.dtype != cfg.torch_dtype
        parts.append("bias_float32" if wide else "bias")
    if weights.interleaved:
        parts.append("interleaved")
    for name, matrix in (("w13", weights.w13), ("w2", weights.w2)):
        if isinstance(matrix, Int4Matrix):
            if matrix.permutation is not None:
                parts.append(f"{name}_permuted")
        elif matrix.stride(2) != 1 and matrix.shape[2] > 1:
            parts.append(f"{name}_transposed")
    if backend != "triton":
        parts.append(backend)
    return "-".join(parts)


def directories(tuning_dir: Path | None = None) -> list[tuple[Path, str]]:
    """Where records are looked up, in order, with the source that their plans name; the first is written."""
    user = Path(platformdirs.user_cache_dir("moert", appauthor=False))
    named = [] if tuning_dir is None else [(tuning_dir, "cache")]
    return [*named, (user, "cache"), (SHIPPED, "shipped")]


class Store:
    """The records of one geometry on one device.

    Args:
        facts: the device.
        name: of the geometry, as `geometry` gives it.
        made_with: versions that new records are labelled with.
        places: as `directories` gives them.
    """

    def __init__(
        self,
        facts: DeviceFacts,
        name: str,
        made_with: Mapping[str, str],
        places: Sequence[tuple[Path, str]],
    ) -> None:
        self.name, self.made_with = name, dict(made_with)
        self._device = {key: asdict(facts)[key] for key in ("name", "arch", "compute_units")}
        self._files = [(place / facts.slug / f"{name}.json", source) for place, source in places]
        self._warned: set[tuple[Path, str]] = set()
        self._locked = False
        self._own: dict[Key, Record] = {}  # of this process, kept where nothing can be written
        self._found: list[dict[Key, Record]] = []
        self.reload()

    @property
    def path(self) -> Path:
        """The file that new records go to."""
        return self._files[0][0]

    def reload(self) -> None:
        """Read all files again."""
        self._found = [self._read(path, source)[0] for path, source in self._files]

    def find(self, tokens: int, policy: int) -> list[Record]:
        """Records of exactly this bucket and policy, in the order of look-up."""
        key = (tokens, policy)
        return [found[key] for found in (self._own, *self._found) if key in found]

    def made_by_this_code(self, record: Record) -> bool:
        """Same moert and same Triton, so that the very kernels that were checked will run."""
        names = ("moert", "triton")
        return all(record.made_with.get(name) == self.made_with.get(name) for name in names)

    def add(self, tokens: int, policy: int, record: Record) -> None:
        """Keep a record, on disk if the directory can be written."""
        self._own[tokens, policy] = record
        try:
            with self.lock():
                entries, replaceable = self._read(self.path, "cache")
                if replaceable:
                    self._write({**entries, (tokens, policy): record})
        except OSError as error:
            self._warn(self.path, "write", f"records cannot be kept: {error}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the file's lock, waiting for other processes; without it where none can be made."""
        if self._locked:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(self.path.with_suffix(".lock")))
            except OSError as error:
                self._warn(self.path, "write", f"records cannot be kept: {error}")
            self._locked = True
            stack.callback(setattr, self, "_locked", False)
            yield

    def _warn(self, path: Path, kind: str, text: str) -> None:
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            log.warning("tuning records %s: %s", path, text)

    def _read(self, path: Path, source: str) -> tuple[dict[Key, Record], bool]:
        """The records of a file, and whether it may be replaced (a newer format is left as it is)."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}, True
        except (OSError, ValueError) as error:
            self._warn(path, "read", f"ignored: {type(error).__name__}: {error}")
            return {}, True
        newer = False
        try:
            newer = isinstance(data["format"], int) and data["format"] > FORMAT
            for key, here in (
                ("format", FORMAT),
                ("device", self._device),
                ("geometry", self.name),
            ):
                if data[key] != here:
                    raise ValueError(f"{key} is {data[key]!r}, here it is {here!r}")
            versions = {**data["made_with"]}
            return self._entries(path, data["entries"], versions, source), True
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._warn(path, "read", f"ignored: {type(error).__name__}: {error}")
            return {}, not newer

    def _entries(self, path: Path, data: Any, made_with: Any, source: str) -> dict[Key, Record]:
        """All records that are whole; the others are named once."""
        found: dict[Key, Record] = {}
        for tokens, policies in data.items():
            for policy, entry in policies.items():
                with self._ignoring(path, f"entry {tokens}/{policy}"):
                    record = Record.from_json(entry, made_with, source)
                    found[int(tokens), int(policy)] = record
        return found

    @contextlib.contextmanager
    def _ignoring(self, path: Path, what: str) -> Iterator[None]:
        """Warn once a file about what is malformed in it, and go on."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._warn(path, "entry", f"{what} ignored: {type(error).__name__}: {error}")

    def _write(self, entries: Mapping[Key, Record]) -> None:
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.name}.", suffix=".tmp", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                self._dump(entries, file)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner reads; records are no secret
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _dump(self, entries: Mapping[Key, Record], file: IO[str]) -> None:
        """One line per record, buckets ascending: easy to read and to compare."""
        head = {
            "format": FORMAT,
            "device": self._device,
            "geometry": self.name,
            "made_with": self.made_with,
        }
        file.write("{\n")
        file.writelines(f' "{key}": {json.dumps(value)},\n' for key, value in head.items())
        buckets = []
        for tokens in sorted({tokens for tokens, _ in entries}):
            lines = []
            for policy in sorted(p for t, p in entries if t == tokens):
                entry = entries[tokens, policy].to_json()
                if entry["made_with"] == self.made_with:
                    del entry["made_with"]
                lines.append(f'   "{policy}": {json.dumps(entry)}')
            buckets.append(f'  "{tokens}": {{\n' + ",\n".join(lines) + "\n  }")
        file.write(' "entries": {\n' + ",\n".join(buckets) + "\n }\n}\n")


def open_store(
    facts: DeviceFacts,
    cfg: MoEConfig,
    weights: ExpertWeights,
    backend: str,
    made_with: Mapping[str, str],
    tuning_dir: Path | None,
) -> Store:
    """The store of a layer: its geometry, its device, and the places of `directories`."""
    name = geometry(cfg, weights, backend)
    return Store(facts, name, {"moert": __version__, **made_with}, directories(tuning_dir))
