"""Which choices are timed for a bucket: what a policy allows, and pairs of tiles that were best apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from moert.backends.base import Backend
from moert.env import SORT_POLICIES
from moert.errors import ConfigError
from moert.plan import STRATEGIES, Choice, Tile

_POLICY_STRATEGIES: Final = {
    0: STRATEGIES,
    1: ("one_shot",),
    2: ("multi_phase",),
    3: ("none",),
}


def strategies_for(policy: int) -> tuple[str, ...]:
    """The sorting strategies that a policy of `moert.env.SORT_POLICIES` allows."""
    return _POLICY_STRATEGIES[policy]


def allowed_candidates(backend: Backend, tokens: int, policy: int) -> list[Choice]:
    """Choices that a policy allows for a bucket, the default first.

    Raises:
        ConfigError: the policy names one strategy and that cannot serve the bucket.
    """
    strategies, default = strategies_for(policy), backend.default_choice(tokens)
    if policy and (reason := backend.infeasible(strategies[0], tokens)) is not None:
        raise ConfigError(
            f"sort_policy={policy} ({SORT_POLICIES[policy]}) cannot serve {tokens} tokens: {reason}; use "
            "sort_policy=0, or a smaller max_tokens"
        )
    found = [c for c in backend.candidates(tokens, strategies) if c.strategy in strategies]
    if found and default.strategy not in strategies:
        others = {choice.gate_up for choice in found}
        if "none" not in (default.strategy, strategies[0]) and default.gate_up in others:
            # the default's tiles behind the other sort
            found.insert(0, replace(default, strategy=strategies[0]))
        return list(dict.fromkeys(found))
    # a backend that has nothing to choose says so by offering its default alone
    return list(dict.fromkeys((default, *found)))


def usable(backend: Backend, choice: Choice, tokens: int, candidates: Sequence[Choice]) -> bool:
    """Whether a bucket can take over a choice from elsewhere: sorted as its candidates are, by kernels that
    can serve it."""
    allowed = {candidate.strategy for candidate in candidates}
    return choice.strategy in allowed and backend.can_run(choice, tokens)


def crossed(medians: Mapping[Choice, float], most: int = 3) -> list[Choice]:
    """Untimed pairs of the best gate/up and down tiles of choices that differ in tiles alone.

    Args:
        medians: what choices took.
        most: tiles of each GEMM. Those that are the first of their kind of kernel come on top; where nothing
            is sorted, kernels are short, and how two of them overlap counts: twice as many.
    """
    ranking = sorted(medians, key=medians.__getitem__)
    if not ranking or ranking[0].gate_up is None or ranking[0].down is None:
        return []
    best = ranking[0]

    def frame(choice: Choice) -> tuple[object, ...]:
        tile = choice.gate_up
        # unsorted, the two GEMMs have nothing in common but h
        blocks = None if tile is None or choice.strategy == "none" else (tile.bm, tile.kernel)
        return (choice.strategy, choice.dependent, blocks)

    kin = [choice for choice in ranking if frame(choice) == frame(best)]
    most *= 2 if best.strategy == "none" else 1
    ups = _foremost((choice.gate_up for choice in kin), most)
    downs = _foremost((choice.down for choice in kin), most)
    pairs = (replace(best, gate_up=up, down=down) for up in ups for down in downs)
    return [pair for pair in pairs if pair not in medians]


def _foremost(tiles: Iterable[Tile | None], most: int) -> list[Tile]:
    """The first few, and the first of each kind of kernel."""
    found = [tile for tile in dict.fromkeys(tiles) if tile is not None]
    kinds: dict[str, Tile] = {}
    for tile in found:
        kinds.setdefault(tile.kernel, tile)
    return list(dict.fromkeys((*found[:most], *kinds.values())))
