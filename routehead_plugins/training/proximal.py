"""The convex problem behind `weights`: its table, the slopes of its losses, and the solver.

Everything is in float64 and without chance. Several fits run side by side as columns ("fits"),
each with its own say of the queries, so that all parts of a cross-validation share every product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.scoring import features, get_aggregation, standardise
from routehead_plugins.signals import QuerySignals

_MOST_STEPS = 20_000  # met only without a penalty, where weights may grow for ever
_NEVER = -1e30  # score of a place without a document


@dataclass(frozen=True)
class Table:
    """Signals of many queries, padded to the same number of documents.

    Attributes:
        features: Shape (queries, documents, heads + 1), the retrieval score in the last column.
        scale: What each column was divided by, shape (heads + 1,).
        gains: Judged relevance, shape (queries, documents).
        sizes: Number of documents, shape (queries,).
        objective: ``"listwise"`` or ``"pairs"``.
        spread: Strength of the term for the middle of the list.
    """

    features: Tensor
    scale: Tensor
    gains: Tensor
    sizes: Tensor
    objective: str
    spread: float

    @cached_property
    def rows(self) -> Tensor:
        """The features of all places, shape (queries * documents, heads + 1)."""
        return self.features.flatten(0, 1)

    @cached_property
    def present(self) -> Tensor:
        """Which places hold a document, shape (queries, documents, 1)."""
        return (torch.arange(self.gains.shape[1]) < self.sizes[:, None])[:, :, None]

    def slopes(self, scores: Tensor, shares: Tensor) -> Tensor:
        """Differentiate the loss by the scores.

        Args:
            scores: Shape (queries * documents, fits).
            shares: What each query counts in each fit, shape (queries, fits).

        Returns:
            Shape (queries * documents, fits).
        """
        table = scores.view(*self.gains.shape, -1)
        slopes = self._listwise(table) if self.objective == "listwise" else self._pairs(scores)
        if self.spread:
            slopes = slopes + self.spread * self._middle(table)
        return (slopes * shares[:, None]).flatten(0, 1)

    def gradient(self, weights: Tensor, shares: Tensor) -> Tensor:
        """Differentiate the loss by the weights, shape (heads + 1, fits) both."""
        return self.rows.T @ self.slopes(self.rows @ weights, shares)

    def _listwise(self, scores: Tensor) -> Tensor:
        shown = scores.masked_fill(~self.present, _NEVER).softmax(dim=1)
        return shown * self._target.sum(dim=1, keepdim=True) - self._target

    def _pairs(self, scores: Tensor) -> Tensor:
        better, worse, share = self._adjacent
        pull = share * torch.sigmoid(scores[worse] - scores[better])  # (pairs, fits)
        slopes = torch.zeros_like(scores).index_add_(0, worse, pull).index_add_(0, better, -pull)
        return slopes.view(*self.gains.shape, -1)

    def _middle(self, scores: Tensor) -> Tensor:
        share = self._middle_share
        centred = scores - (scores * share).sum(dim=1, keepdim=True)
        variance = (centred.square() * share).sum(dim=1, keepdim=True)
        return -2 * share * centred / (1 + variance).square()

    @cached_property
    def _target(self) -> Tensor:
        """Gains as a distribution over documents, shape (queries, documents, 1)."""
        gains = self.gains.clamp(min=0)  # what is worse than useless is useless, as for nDCG
        return (gains / gains.sum(dim=1, keepdim=True).clamp(min=1e-30))[:, :, None]

    @cached_property
    def _adjacent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of adjacent grades: rows of the better, of the worse, and their share."""
        better, worse, share = [], [], []
        for query, size in enumerate(self.sizes.tolist()):
            levels = self.gains[query, :size].unique(return_inverse=True)[1]
            pairs = (levels[:, None] == levels + 1).nonzero() + query * self.gains.shape[1]
            better.append(pairs[:, 0])
            worse.append(pairs[:, 1])
            share.append(torch.full((len(pairs), 1), 1 / max(len(pairs), 1), dtype=torch.float64))
        return torch.cat(better), torch.cat(worse), torch.cat(share)

    @cached_property
    def _middle_share(self) -> Tensor:
        """1 / n where one of the n documents of the middle third stands, else 0."""
        place = torch.arange(self.gains.shape[1])
        third = (self.sizes // 3)[:, None]
        middle = ((place >= third) & (place < self.sizes[:, None] - third)).double()
        return (middle / middle.sum(dim=1, keepdim=True).clamp(min=1))[:, :, None]


def tabulate(
    queries: Sequence[QuerySignals],
    aggregation: str,
    objective: str,
    *,
    first_stage: bool,
    spread: float,
) -> Table:
    """Lay signals out for learning.

    Args:
        queries: The signals.
        aggregation: What is weighted.
        objective: The loss.
        first_stage: Whether the retrieval score has a column; it is zero otherwise.
        spread: Strength of the term for the middle of the list.

    Raises:
        InputError: Signals are not finite.
    """
    sizes = torch.tensor([len(query.gains) for query in queries])
    longest, heads = int(sizes.max()), len(queries[0].mass)
    table = torch.zeros(len(queries), longest, heads + 1, dtype=torch.float64)
    gains = torch.zeros(len(queries), longest, dtype=torch.float64)
    for place, (query, size) in enumerate(zip(queries, sizes.tolist(), strict=True)):
        found = features(aggregation, query.calibrated.double(), query.mass.double())
        # No loss depends on a query's mean, and without it the problem is better conditioned.
        table[place, :size, :-1] = (found - found.mean(dim=1, keepdim=True)).T
        if first_stage:
            # Zeros where a retrieval score is missing: it then says nothing of the query.
            table[place, :size, -1] = standardise(query.first_stage.double())
        gains[place, :size] = query.gains
        if not bool(table[place].isfinite().all()):
            raise InputError(
                f"signals of query {query.query_id!r} are not finite numbers; compute them again."
            )
    scale = torch.ones(heads + 1, dtype=torch.float64)
    if not get_aggregation(aggregation).comparable:
        # Otherwise a penalty would prefer heads that happen to receive much attention.
        deviation = (table.square().sum(dim=(0, 1)) / sizes.sum()).sqrt()[:-1]
        scale[:-1] = torch.where(deviation > 0, deviation, 1.0)
        table /= scale
    return Table(table, scale, gains, sizes, objective, spread)


def solve(
    table: Table, shares: Tensor, l1: float, start: Tensor, tolerance: float = 1e-7
) -> Tensor:
    """Minimise the loss plus ``l1 * sum |w|`` over the heads, the last weight free but >= 0.

    Only heads that have, or should have, a weight in some fit take part in the steps.

    Args:
        table: The signals.
        shares: What each query counts in each fit, shape (queries, fits).
        l1: Strength of the penalty; infinite for the retrieval score alone.
        start: Weights to start from, best those of a similar strength, shape (heads + 1, fits).
        tolerance: By how much the conditions of an optimum may be missed, in units of ``l1``.

    Returns:
        Weights of the same shape, exactly 0 where the penalty wants it.
    """
    weights = start.clone()
    active = (weights != 0).any(dim=1)
    active[-1] = True
    while True:
        places = active.nonzero()[:, 0]
        rows = table.rows[:, places].contiguous()
        weights[places] = _descend(table, rows, shares, l1, weights[places], tolerance)
        slopes = table.gradient(weights, shares).abs().amax(dim=1)
        wrong = (slopes > l1 + tolerance) & ~active
        if not bool(wrong.any()):
            return weights
        active |= wrong


def _descend(
    table: Table, rows: Tensor, shares: Tensor, l1: float, start: Tensor, tolerance: float
) -> Tensor:
    """Take accelerated proximal gradient steps on some heads until the optimum is met.

    Args:
        table: The losses.
        rows: Features of these heads, shape (queries * documents, heads + 1).
        shares: What each query counts in each fit, shape (queries, fits).
        l1: Strength of the penalty.
        start: Shape (heads + 1, fits).
        tolerance: By how much the conditions of an optimum may be missed.
    """
    penalty = torch.full((len(start), 1), l1, dtype=start.dtype)
    penalty[-1] = 0.0
    lowest = torch.full_like(penalty, -torch.inf)
    lowest[-1] = 0.0

    def shrink(moved: Tensor, step: Tensor | float) -> Tensor:
        kept = (moved.abs() - penalty * step).clamp(min=0)
        return torch.maximum(moved.sign() * kept, lowest)

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
            momentum = torch.ones_like(momentum)  # look again without the swing, which is no
            point, scores = last, last_scores  # output of `shrink` and has no exact zeros
            continue
        curvature = curvature * 0.95
        while True:
            new = shrink(point - gradient / curvature, 1 / curvature)
            new_scores = rows @ new
            moved = new - point
            # <difference of gradients, step> by way of scores: exact also for tiny steps, where
            # differences of losses are all rounding.
            bend = ((table.slopes(new_scores, shares) - slopes) * (new_scores - scores)).sum(dim=0)
            steep = bend > curvature * moved.square().sum(dim=0)
            if not bool(steep.any()):
                break
            curvature = torch.where(steep, 2 * curvature, curvature)
        # Where the swing points uphill, start it anew.
        momentum = torch.where(((point - new) * (new - last)).sum(dim=0) > 0, 1.0, momentum)
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        swing = (momentum - 1) / grown
        point = new + swing * (new - last)
        scores = new_scores + swing * (new_scores - last_scores)
        last, last_scores, momentum = new, new_scores, grown
    return last
