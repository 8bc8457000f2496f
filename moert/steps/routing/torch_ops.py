"""Routing on the CPU without a new tensor: scratch made once, every operator writes through `out=`.

Constants are tensors, because torch wraps a Python number operand in a newly allocated one, and no
operator mixes dtypes, because torch converts such an operand into a temporary.
"""

from __future__ import annotations

import torch

from moert.config import MoEConfig
from moert.errors import InputError
from moert.steps.routing.reference import FLOAT_MAX, SUM_EPSILON
from moert.topk import TopK

INF = float("inf")


class TorchRouter:
    """`route_reference` for up to max_tokens rows, into the caller's tensors, allocating nothing.

    Args:
        cfg: gives E, K and the routing rule.
        max_tokens: rows of the scratch, about 40 bytes a logit.
    """

    def __init__(self, cfg: MoEConfig, max_tokens: int) -> None:
        rule, experts, k = cfg.routing, cfg.num_experts, cfg.top_k
        self.cfg, self.rule, self.max_tokens = cfg, rule, max_tokens
        self.scores_needed = rule.correction_bias or rule.num_groups > 1
        self.softmax_of_chosen = rule.scoring == "softmax_topk" or (
            rule.scoring == "softmax" and rule.renormalize
        )
        # whatever the caller's default device is; dtypes are named for the same reason
        with torch.device("cpu"):
            self._allocate(max_tokens, experts, k)
        self.nbytes = _nbytes(self)

    def _allocate(self, max_tokens: int, experts: int, k: int) -> None:
        rule, f32 = self.rule, torch.float32
        self.logits, self.scores, self.choice = torch.empty(
            3, max_tokens, experts, dtype=f32
        ).unbind()
        self.chosen = torch.empty(max_tokens, k, dtype=f32)
        self.peak, self.total = torch.empty(2, max_tokens, 1, dtype=f32).unbind()
        self.bias = torch.empty(experts, dtype=f32)
        self.rank_experts = _Ranker(max_tokens, experts, k)
        if rule.num_groups > 1:
            self.rank_groups = _Ranker(max_tokens, rule.num_groups, rule.top_groups)
            self.group_best = torch.empty(max_tokens, rule.num_groups, 2, dtype=f32)
            self.group_best_at = torch.empty(max_tokens, rule.num_groups, 2, dtype=torch.int64)
            self.group = torch.empty(max_tokens, rule.num_groups, dtype=f32)
            self.allowed = torch.empty(max_tokens, rule.num_groups, dtype=torch.bool)
            self.true = torch.ones(max_tokens, rule.top_groups, dtype=torch.bool)
        self.zero, self.one, self.lowest = torch.tensor([0.0, 1.0, -FLOAT_MAX], dtype=f32).unbind()
        constants = [SUM_EPSILON, rule.scaling_factor]
        self.epsilon, self.scale = torch.tensor(constants, dtype=f32).unbind()

    def __call__(
        self, logits: torch.Tensor, out: TopK, correction_bias: torch.Tensor | None = None
    ) -> None:
        """Route; see `route_reference`.

        Args:
            logits: [T, E], any floating dtype, on the CPU.
            out: TopK(weights [T, K] fp32, ids [T, K] int32); written.
            correction_bias: [E], required where the rule has one.

        Raises:
            InputError: T exceeds max_tokens.
        """
        tokens = logits.shape[0]
        if tokens > self.max_tokens:
            raise InputError(
                f"logits: got {tokens} rows, this router was made for {self.max_tokens}"
            )
        x = self.logits[:tokens].copy_(logits)
        torch.nan_to_num_(x, nan=-INF, posinf=FLOAT_MAX, neginf=-INF)
        choice = scores = x
        if self.scores_needed:
            scores = self._score(x, self.scores[:tokens])
        if self.rule.correction_bias:
            assert correction_bias is not None
            choice = self.choice[:tokens]
            torch.add(scores, self.bias.copy_(correction_bias), out=choice)
            scores = torch.nan_to_num_(choice, nan=-INF, posinf=INF, neginf=-INF)
        allowed = self._allowed(choice, scores) if self.rule.num_groups > 1 else None
        columns = self.rank_experts(choice, allowed)
        out.ids.copy_(columns)
        self._weigh(torch.gather(x, 1, columns, out=self.chosen[:tokens]), x, columns, out.weights)

    def _score(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.rule.scoring == "softmax":
            return self._softmax(x, x, out)
        if self.rule.scoring == "sigmoid":
            return torch.sigmoid(x, out=out)
        if self.rule.scoring == "sqrtsoftplus":
            torch.ops.aten.softplus.out(x, out=out)
            return torch.sqrt(out, out=out)
        return out.copy_(x)

    def _softmax(self, x: torch.Tensor, over: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """exp(x) / sum(exp(over)) by rows; zeros for rows of -inf. `out` is written twice."""
        tokens = x.shape[0]
        peak, total = self.peak[:tokens], self.total[:tokens]
        torch.amax(over, dim=1, keepdim=True, out=peak)
        torch.maximum(peak, self.lowest, out=peak)
        powers = out if over is x else self.scores[:tokens]
        torch.exp(torch.sub(over, peak, out=powers), out=powers)
        torch.sum(powers, dim=1, keepdim=True, out=total)
        if over is not x:
            torch.exp(torch.sub(x, peak, out=out), out=out)
        # the peak's own term is 1, so only a row of -inf has a smaller sum: 0
        return torch.div(out, torch.maximum(total, self.one, out=total), out=out)

    def _allowed(self, choice: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[T, G] bool: the token's best groups."""
        tokens = choice.shape[0]
        group, allowed = self.group[:tokens], self.allowed[:tokens]
        shape = (tokens, self.rule.num_groups, self.cfg.num_experts // self.rule.num_groups)
        if self.rule.group_score == "top2_sum":
            best = self.group_best[:tokens]
            torch.topk(scores.view(shape), 2, dim=2, out=(best, self.group_best_at[:tokens]))
            torch.add(best[..., 0], best[..., 1], out=group)
            torch.nan_to_num_(group, nan=-INF, posinf=INF, neginf=-INF)
        else:
            torch.amax(choice.view(shape), dim=2, out=group)
        return allowed.zero_().scatter_(1, self.rank_groups(group), self.true[:tokens])

    def _weigh(
        self, chosen: torch.Tensor, x: torch.Tensor, columns: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if self.softmax_of_chosen:
            self._softmax(chosen, chosen, weights)
        elif self.rule.scoring == "softmax":
            self._softmax(chosen, x, weights)
        else:
            self._score(chosen, weights)
            if self.rule.renormalize:
                total = self.total[: chosen.shape[0]]
                torch.sum(weights, dim=1, keepdim=True, out=total)
                torch.div(weights, torch.add(total, self.epsilon, out=total), out=weights)
        torch.mul(weights, self.scale, out=weights)


def _nbytes(owner: object) -> int:
    """Of the storages behind all tensors of an object and of its rankers."""
    found: dict[int, int] = {}
    owners = [owner, *(v for v in vars(owner).values() if isinstance(v, _Ranker))]
    for tensor in (t for o in owners for t in vars(o).values() if isinstance(t, torch.Tensor)):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


class _Ranker:
    """The best k of every row of fp32 values [T, n] without NaN; of equal ones the lowest column.

    An int64 key holds the order of the value above the reversed column, so a plain top-k of distinct
    keys is deterministic and never gives a column twice.
    """

    def __init__(self, rows: int, columns: int, k: int) -> None:
        self.k = k
        self.bits, self.flips = torch.empty(2, rows, columns, dtype=torch.int32).unbind()
        self.keys = torch.empty(rows, columns, dtype=torch.int64)
        self.best, self.best_at = torch.empty(2, rows, k, dtype=torch.int64).unbind()
        self.reversed = torch.arange(columns - 1, -1, -1)
        self.zero = torch.tensor(0.0, dtype=torch.float32)
        self.sign_shift, self.magnitude = torch.tensor([31, 2**31 - 1], dtype=torch.int32).unbind()
        self.high_word, self.lowest = torch.tensor([2**32, -(2**63)]).unbind()

    def __call__(self, values: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Columns [T, k] int64, best first; where given, `allowed` [T, G] masks G spans of columns."""
        rows = values.shape[0]
        bits, flips, keys = self.bits[:rows], self.flips[:rows], self.keys[:rows]
        # adding zero turns -0.0 into 0.0, so that the two tie
        torch.add(values, self.zero, out=bits.view(torch.float32))
        torch.bitwise_right_shift(bits, self.sign_shift, out=flips)
        torch.bitwise_and(flips, self.magnitude, out=flips)
        keys.copy_(torch.bitwise_xor(bits, flips, out=bits))
        torch.mul(keys, self.high_word, out=keys)
        torch.add(keys, self.reversed, out=keys)
        if allowed is not None:
            groups = allowed.shape[1]
            spans = keys.view(rows, groups, keys.shape[1] // groups)
            torch.where(allowed.unsqueeze(2), spans, self.lowest, out=spans)
        columns = self.best_at[:rows]
        torch.topk(keys, self.k, dim=1, out=(self.best[:rows], columns))
        return columns
