"""The convex problem behind `weights`: signals as a table, gradients of its losses, and the solver.

Several fits run side by side as columns ("fits"), each with its own weights of the queries, so that
all folds of a cross-validation share every product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.scoring import COMPARABLE, features, standardise
from routehead_plugins.signals import Judgments, QuerySignals

OBJECTIVES = ("listwise", "pairs")

_MOST_STEPS = 20_000  # reached only without a penalty, where weights may grow without limit
_NEVER = -1e30  # score in the padding


@dataclass(frozen=True)
class Listwise:
    """Cross-entropy between the softmax of scores and the judged gains divided by their sum.

    A query without gains above 0 has a loss of 0.
    """

    gains: Tensor  # judged relevance, shape (queries, documents)
    present: Tensor  # mask of the documents, false in the padding, shape (queries, documents)

    def losses(self, scores: Tensor) -> Tensor:
        """Compute the loss of each query, differentiable: (queries, documents) to (queries,)."""
        shown = scores.masked_fill(~self.present, _NEVER)
        return -(self._target * shown.log_softmax(dim=1)).sum(dim=1)

    def slopes(self, scores: Tensor) -> Tensor:
        """Differentiate the losses by the scores, shape (queries, documents, fits) both."""
        shown = scores.masked_fill(~self.present[..., None], _NEVER).softmax(dim=1)
        target = self._target[..., None]
        return shown * target.sum(dim=1, keepdim=True) - target

    @cached_property
    def _target(self) -> Tensor:
        """Gains as a distribution over documents, shape (queries, documents)."""
        gains = self.gains.clamp(min=0)  # judgments below 0 count as 0, as in nDCG
        return gains / gains.sum(dim=1, keepdim=True).clamp(min=1e-30)


@dataclass(frozen=True)
class Table:
    """Features of many queries, padded to the same number of documents."""

    features: Tensor  # shape (queries, documents, heads + 1), the retrieval score comes last
    scale: Tensor  # divisor of each column, shape (heads + 1,)
    judgments: Judgments
    objective: str

    @cached_property
    def rows(self) -> Tensor:
        """The features without the grouping by queries, shape (queries * documents, heads + 1)."""
        return self.features.flatten(0, 1)

    def by_query(self, rows: Tensor) -> Tensor:
        """Group rows by query: (queries * documents, fits) to (queries, documents, fits)."""
        return rows.view(*self.features.shape[:2], -1)

    def slopes(self, scores: Tensor, shares: Tensor) -> Tensor:
        """Differentiate the loss by the scores, shape (queries * documents, fits) both.

        ``shares`` holds the weight of each query in each fit, shape (queries, fits).
        """
        if self.objective == "listwise":
            slopes = self._listwise.slopes(self.by_query(scores))
        else:
            slopes = self._pairs(scores)
        return (slopes * shares[:, None]).flatten(0, 1)

    def gradient(self, weights: Tensor, shares: Tensor) -> Tensor:
        """Differentiate the loss by the weights, shape (heads + 1, fits) both."""
        return self.rows.T @ self.slopes(self.rows @ weights, shares)

    @cached_property
    def _listwise(self) -> Listwise:
        return Listwise(self.judgments.gains, self.judgments.present)

    def _pairs(self, scores: Tensor) -> Tensor:
        better, worse, share = self._adjacent
        pull = share * torch.sigmoid(scores[worse] - scores[better])  # (pairs, fits)
        slopes = torch.zeros_like(scores).index_add_(0, worse, pull).index_add_(0, better, -pull)
        return self.by_query(slopes)

    @cached_property
    def _adjacent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of adjacent grades: rows of the better and worse documents, weight of each pair."""
        pairs, share = [], []
        gains = self.judgments.gains
        for query, size in enumerate(self.judgments.sizes.tolist()):
            levels = gains[query, :size].unique(return_inverse=True)[1]
            rows = (levels[:, None] == levels + 1).nonzero() + query * gains.shape[1]
            pairs.append(rows)
            share.append(torch.full((len(rows), 1), 1 / max(len(rows), 1), dtype=torch.float64))
        better, worse = torch.cat(pairs).unbind(dim=1)
        return better, worse, torch.cat(share)


def tabulate(
    queries: Sequence[QuerySignals],
    aggregation: str,
    objective: str = "listwise",
    *,
    first_stage: bool,
) -> Table:
    """Tabulate finite signals for fitting; without first stage, the last column is zero.

    Raises:
        InputError: The aggregation or the objective does not exist.
    """
    if objective not in OBJECTIVES:
        raise InputError(
            f"objective={objective!r} does not exist; choose one of {', '.join(OBJECTIVES)}."
        )
    judgments = Judgments.stack(
        [query.gains for query in queries], [query.ideal_gains for query in queries]
    )
    heads = len(queries[0].mass)
    table = torch.zeros(*judgments.gains.shape, heads + 1, dtype=torch.float64)
    for row, query in enumerate(queries):
        size = len(query.gains)
        columns = features(aggregation, query.calibrated.double(), query.mass.double())
        # No loss depends on a query's mean, and without it the problem is better conditioned.
        table[row, :size, :-1] = (columns - columns.mean(dim=1, keepdim=True)).T
        if first_stage:  # zeros where a retrieval score is missing
            table[row, :size, -1] = standardise(query.first_stage.double())
    scale = torch.ones(heads + 1, dtype=torch.float64)
    if aggregation not in COMPARABLE:
        # Otherwise a penalty would prefer heads that happen to receive much attention.
        deviation = (table.square().sum(dim=(0, 1)) / judgments.sizes.sum()).sqrt()[:-1]
        scale[:-1] = torch.where(deviation > 0, deviation, 1.0)
        table /= scale
    return Table(table, scale, judgments, objective)


def solve(
    table: Table, shares: Tensor, l1: float, start: Tensor, tolerance: float = 1e-7
) -> Tensor:
    """Minimise loss + ``l1 * sum |w|`` over heads; the last weight is unpenalised but >= 0.

    Only heads that have, or should have, a weight in some fit take part in the steps.

    Args:
        table: The features and losses.
        shares: Weight of each query in each fit, shape (queries, fits).
        l1: Strength of the penalty; infinite for the retrieval score alone.
        start: Initial weights, shape (heads + 1, fits).
        tolerance: Largest violation of the conditions of an optimum, in units of ``l1``.

    Returns:
        Weights of shape (heads + 1, fits), exactly 0 where the penalty outweighs the loss.
    """
    weights = start.clone()
    active = (weights != 0).any(dim=1)
    active[-1] = True
    while True:
        indices = active.nonzero()[:, 0]
        rows = table.rows[:, indices].contiguous()
        weights[indices] = _descend(table, rows, shares, l1, weights[indices], tolerance)
        slopes = table.gradient(weights, shares).abs().amax(dim=1)
        wrong = (slopes > l1 + tolerance) & ~active
        if not bool(wrong.any()):
            return weights
        active |= wrong


def _descend(
    table: Table, rows: Tensor, shares: Tensor, l1: float, start: Tensor, tolerance: float
) -> Tensor:
    """Take accelerated proximal gradient steps to the optimum, on the heads of ``rows`` alone."""
    penalty = torch.full((len(start), 1), l1, dtype=start.dtype)
    penalty[-1] = 0.0
    lowest = torch.full_like(penalty, -torch.inf)
    lowest[-1] = 0.0

    def shrink(moved: Tensor, step: Tensor | float) -> Tensor:
        sizes = (moved.abs() - penalty * step).clamp(min=0)
        return torch.maximum(moved.sign() * sizes, lowest)

    curvature = torch.full((start.shape[1],), 0.1, dtype=start.dtype)
    momentum = torch.ones_like(curvature)
    last = point = start
    last_scores = scores = rows @ start
    for _ in range(_MOST_STEPS):
        slopes = table.slopes(scores, shares)
        gradient = rows.T @ slopes
        if bool(((point - shrink(point - gradient, 1.0)).abs() <= tolerance).all()):
            if point is last:
                return point
            # Check again at the last output of `shrink`: the extrapolated point has no exact zeros.
            momentum = torch.ones_like(momentum)
            point, scores = last, last_scores
            continue
        curvature = curvature * 0.95
        while True:
            new = shrink(point - gradient / curvature, 1 / curvature)
            new_scores = rows @ new
            moved = new - point
            # <difference of gradients, step> computed from scores is exact for tiny steps as well,
            # where differences of losses are rounding errors.
            bend = ((table.slopes(new_scores, shares) - slopes) * (new_scores - scores)).sum(dim=0)
            steep = bend > curvature * moved.square().sum(dim=0)
            if not bool(steep.any()):
                break
            curvature = torch.where(steep, 2 * curvature, curvature)
        # Restart the momentum of fits in which it points uphill.
        momentum = torch.where(((point - new) * (new - last)).sum(dim=0) > 0, 1.0, momentum)
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        swing = (momentum - 1) / grown
        point = new + swing * (new - last)
        scores = new_scores + swing * (new_scores - last_scores)
        last, last_scores, momentum = new, new_scores, grown
    return last
