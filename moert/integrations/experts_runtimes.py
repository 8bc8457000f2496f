"""The runtimes of experts modules and of whole blocks: made on demand, found by the addresses of the
parameters they read."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from moert.config import MoEConfig
from moert.errors import StateError
from moert.integrations import block_module, experts_module
from moert.plan import PlanReport
from moert.runtime import MoERuntime
from moert.weights import ExpertWeights

log = logging.getLogger("moert")

# rebuilding this often means that something moves the weights back and forth
_MANY_BUILDS = 4

Key = tuple[Any, ...]


@dataclass(eq=False)
class Entry:
    """The runtime of one experts module.

    Args:
        key: of the parameters that the runtime reads, see `key_of`. While the entry lives it keeps them in
            memory, so that no other tensor gets their addresses.
        owner: the config object, which all layers of one model hold.
        group: one object for all entries that share an arena.
    """

    runtime: MoERuntime
    key: Key
    owner: object
    options: dict[str, Any]
    group: object


@dataclass
class _Wishes:
    """What outlives an entry: the options of `prepare`, and how often the module got a runtime."""

    options: dict[str, Any] = field(default_factory=dict)
    builds: int = 0


_LOCK = threading.RLock()
# nothing here keeps a module alive, and nothing is put on a module: models are copied and pickled
_KNOWN: weakref.WeakKeyDictionary[torch.nn.Module, _Wishes] = weakref.WeakKeyDictionary()
_ENTRIES: weakref.WeakKeyDictionary[torch.nn.Module, Entry] = weakref.WeakKeyDictionary()
_BY_KEY: weakref.WeakValueDictionary[Key, Entry] = weakref.WeakValueDictionary()


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that an experts module or a block computes with."""
    if experts_module.is_experts_module(module):
        return experts_module.parameters(module)
    return block_module.block_parameters(module)


def describe(module: torch.nn.Module, top_k: int) -> tuple[MoEConfig, ExpertWeights]:
    """An experts module or a block as a config and weights; raises what their own `describe` raise."""
    if experts_module.is_experts_module(module):
        return experts_module.describe(module, top_k)
    return block_module.describe_block(module, top_k)


def key_of(params: list[torch.Tensor], top_k: int) -> Key:
    """What a runtime depends on: K, then dtype, device, shape of w13 and the address of every parameter."""
    first = params[0]
    return (top_k, first.dtype, first.device, first.shape, *[p.data_ptr() for p in params])


def find(key: Key) -> Entry | None:
    """The entry for these parameters; one look-up."""
    return _BY_KEY.get(key)


def know(module: torch.nn.Module) -> bool:
    """Note a module, so that `module_of` finds it."""
    with _LOCK:
        _KNOWN.setdefault(module, _Wishes())
    return True


def module_of(key: Key) -> torch.nn.Module | None:
    """The noted module that holds these parameters now."""
    with _LOCK:
        known = list(_KNOWN)
    return next((module for module in known if key_of(parameters(module), key[0]) == key), None)


def wish(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Set the options of a module's future runtimes; one with other options is dropped."""
    with _LOCK:
        _KNOWN[module] = _Wishes(options)
        entry = _ENTRIES.get(module)
        if entry is not None and entry.options != options:
            _drop(module)


def drop(module: torch.nn.Module) -> None:
    """Close a module's runtime, if it has one."""
    _drop(module)


def make(module: torch.nn.Module, top_k: int) -> Entry:
    """The entry of a module for its present parameters, built unless it is there.

    Raises:
        StateError: a stream is capturing. UnsupportedError: see `experts_module.describe`.
    """
    with _LOCK:
        wishes = _KNOWN.setdefault(module, _Wishes())
        if not experts_module.is_experts_module(module):
            _settle(module)
        key = key_of(parameters(module), top_k)
        entry = _ENTRIES.get(module)
        if entry is None or entry.key != key:
            _refuse_capture(module)
            _count_build(module, wishes)
            owner = _owner(module)
            _drop_stale(owner)
            _drop(module)
            # what surrounds a first forward must not show in buffers that outlive it: those made in inference
            # mode could not be written outside of it
            with torch.inference_mode(False), torch.no_grad(), torch.device(key[2]):
                entry = _build(module, key, owner, wishes.options)
            _ENTRIES[module] = entry
        _BY_KEY[key] = entry
        return entry


def _build(module: torch.nn.Module, key: Key, owner: object, options: dict[str, Any]) -> Entry:
    """A runtime that shares with one of the same model whose arena and plans fit, if there is any.

    Models keep apart: graphs captured around two of them may run at the same time.
    """
    cfg, weights = describe(module, key[0])
    for other in list(_ENTRIES.values()):
        same = other.owner is owner and other.options == options
        if same and other.runtime.cfg == cfg and other.runtime.device == weights.device:
            runtime = MoERuntime(cfg, weights, share=other.runtime)
            return Entry(runtime, key, owner, options, other.group)
    return Entry(MoERuntime(cfg, weights, **options), key, owner, options, object())


def _owner(module: Any) -> object:
    """The config object that all layers of a model hold; a block's is that of its experts."""
    experts = module if experts_module.is_experts_module(module) else module.experts
    return getattr(experts, "config", module)


def _settle(module: torch.nn.Module) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # a runtime that would have to be built is refused anyway
    with torch.inference_mode(False), torch.no_grad():
        block_module.settle(module)


def _count_build(module: torch.nn.Module, wishes: _Wishes) -> None:
    wishes.builds += 1
    if wishes.builds == _MANY_BUILDS:
        log.warning(
            "%s: its parameters moved again, runtime built %d times; with weights that are offloaded "
            "between calls use another experts_implementation",
            type(module).__name__,
            wishes.builds,
        )


def _drop_stale(owner: object) -> None:
    """Drop what reads former parameters of a model: each would keep them in memory until its layer's turn."""
    for module, entry in list(_ENTRIES.items()):
        if entry.owner is owner and key_of(parameters(module), entry.key[0]) != entry.key:
            _drop(module)


def _drop(module: torch.nn.Module) -> None:
    with _LOCK:
        entry = _ENTRIES.pop(module, None)
        if entry is None:
            return
        # two modules may hold the same parameters
        if _BY_KEY.get(entry.key) is entry:
            del _BY_KEY[entry.key]
        entry.runtime.close()


def _refuse_capture(module: torch.nn.Module) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise StateError(
            f"{type(module).__name__}: has no runtime for its parameters yet, and none can be built while a "
            "stream is capturing; call moert.integrations.transformers.prepare(model) before"
        )


class Prepared:
    """The runtimes of a model's experts modules in the model's order: `len`, index, iterate.

    Keeps no model alive. Shows what is there now: a layer whose parameters moved has no runtime until its
    next forward.
    """

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self._modules = [weakref.ref(module) for module in modules]

    def __len__(self) -> int:
        return len(self._entries())

    def __getitem__(self, index: int) -> MoERuntime:
        return self._entries()[index].runtime

    def __iter__(self) -> Iterator[MoERuntime]:
        return iter([entry.runtime for entry in self._entries()])

    def plan(self) -> tuple[PlanReport, ...]:
        """One report for each geometry; all its layers run these plans."""
        return tuple(entry.runtime.plan() for entry in self._groups())

    def memory(self) -> dict[str, int]:
        """Bytes by purpose, and their total.

        The weights are the model's own, of all layers; what layers share is counted once.
        """
        sizes = Counter(weights=sum(runtime.weights.nbytes for runtime in self))
        for entry in self._groups():
            shared = entry.runtime.memory()
            sizes.update({k: v for k, v in shared.items() if k not in ("weights", "total")})
        return {**sizes, "total": sizes.total()}

    def stats(self) -> dict[str, int]:
        """The layers' counts, added up."""
        counts: Counter[str] = Counter()
        for runtime in self:
            counts.update(runtime.stats())
        return dict(counts)

    def close(self) -> None:
        """Free all runtimes; idempotent. A later forward of the model makes new ones."""
        for ref in self._modules:
            module = ref()
            if module is not None:
                _drop(module)

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entries(self) -> list[Entry]:
        modules = (ref() for ref in self._modules)
        found = (_ENTRIES.get(module) for module in modules if module is not None)
        return [entry for entry in found if entry is not None]

    def _groups(self) -> list[Entry]:
        """The first entry of each set that shares an arena."""
        first: dict[int, Entry] = {}
        for entry in self._entries():
            first.setdefault(id(entry.group), entry)
        return list(first.values())
