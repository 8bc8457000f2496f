"""Routing in plain torch, fp32: what every other implementation of the step is measured against.

The rules are those of the published models as transformers 5.23 runs them: Mixtral, Qwen-MoE, OLMoE
(softmax), gpt-oss (softmax_topk), DeepSeek-V2 (softmax, best groups by their best expert), DeepSeek-V3,
GLM-4, MiniMax-M2 (sigmoid, correction bias, groups by their best two), DeepSeek-V4 (sqrtsoftplus).

What those leave open is settled here, and every implementation follows (but for logits that are not finite
where AITER's operator routes, as `plan()` says):

- A NaN logit counts as -inf, +inf as the largest finite number. An expert of logit -inf has score 0 under
  every scoring, and a token whose K chosen scores are all 0 gets weights of 0: it asked for nobody.
- Without a correction bias experts are ranked by logit, not by score: every scoring is monotone, and the
  logit still tells apart what a saturated or underflowed score does not.
- Equal ranks: the lowest id first. The K ids are distinct and in descending rank, and come from the
  chosen groups, also when every logit there is -inf.
- softmax with `renormalize` is the softmax over the chosen K: the same number, without its underflow.
  The other scorings add 1e-20 to the sum they divide by, as DeepSeek-V3 does.
"""

from __future__ import annotations

import torch

from moert.config import MoEConfig, Routing
from moert.topk import TopK

FLOAT_MAX = torch.finfo(torch.float32).max
SUM_EPSILON = 1e-20


def route_reference(
    logits: torch.Tensor, cfg: MoEConfig, correction_bias: torch.Tensor | None = None
) -> TopK:
    """Choose K experts a token and weigh them.

    Args:
        logits: [T, E], any floating dtype; raised to fp32 first.
        cfg: gives E, K and the routing rule.
        correction_bias: [E], added to the scores for the choice only (to the logits under softmax_topk);
            used where `cfg.routing.correction_bias` says so.

    Returns:
        TopK(weights [T, K] fp32, ids [T, K] int32).
    """
    rule = cfg.routing
    inf = float("inf")
    x = logits.float().nan_to_num(nan=-inf, posinf=FLOAT_MAX, neginf=-inf)
    scores = _scores(x, rule.scoring)
    choice = x
    if rule.correction_bias:
        assert correction_bias is not None
        choice = (scores + correction_bias.float()).nan_to_num(nan=-inf, posinf=inf, neginf=-inf)
    order = choice.sort(dim=1, descending=True, stable=True).indices
    if rule.num_groups > 1:
        allowed = _allowed(choice if rule.correction_bias else scores, x, rule)
        order = order.gather(
            1, allowed.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        )
    ids = order[:, : cfg.top_k]
    return TopK(_weights(x.gather(1, ids), scores.gather(1, ids), rule), ids.to(torch.int32))


def _scores(x: torch.Tensor, scoring: str) -> torch.Tensor:
    """Scores of sanitised logits [T, E] fp32; under softmax_topk the logits themselves."""
    if scoring == "softmax":
        return _softmax(x)
    if scoring == "sigmoid":
        return x.sigmoid()
    if scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(x).sqrt()
    return x


def _softmax(x: torch.Tensor) -> torch.Tensor:
    peak = x.amax(dim=1, keepdim=True)
    powers = (x - peak.clamp(min=-FLOAT_MAX)).exp()
    # the peak's own term is 1, so only a row of -inf has a smaller sum: 0
    return powers / powers.sum(dim=1, keepdim=True).clamp(min=1.0)


def _allowed(scores: torch.Tensor, x: torch.Tensor, rule: Routing) -> torch.Tensor:
    """[T, E] bool: the expert's group is among the token's best groups."""
    tokens, experts = x.shape
    shape = (tokens, rule.num_groups, experts // rule.num_groups)
    if rule.group_score == "top2_sum":
        group = scores.view(shape).topk(2, dim=2).values.sum(dim=2)
    else:
        group = (scores if rule.correction_bias else x).view(shape).amax(dim=2)
    # +inf and -inf in one group: no number, last
    group = torch.where(group.isnan(), -float("inf"), group)
    best = group.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_groups]
    mask = torch.zeros_like(group, dtype=torch.bool).scatter_(1, best, True)
    return mask.repeat_interleave(shape[2], dim=1)


def _weights(chosen: torch.Tensor, chosen_scores: torch.Tensor, rule: Routing) -> torch.Tensor:
    if rule.scoring == "softmax_topk" or (rule.scoring == "softmax" and rule.renormalize):
        weights = _softmax(chosen)
    elif rule.renormalize:
        weights = chosen_scores / (chosen_scores.sum(dim=1, keepdim=True) + SUM_EPSILON)
    else:
        weights = chosen_scores
    return weights * rule.scaling_factor
