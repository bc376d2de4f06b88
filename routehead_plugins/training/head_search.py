"""Search for the heads that rank a query's candidates best together, many queries at a time.

Every query has a group, and a group has one set: that with the best mean objective of its queries.
Groups advance side by side, and one that has found its set leaves. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from routehead_plugins.scoring import features
from routehead_plugins.signals import QuerySignals, correlation, margin, ndcg, reciprocal_rank

DEPTH = 10  # ranks that count for nDCG

_LEAST_GAIN = 1e-9  # what is less is rounding
_LEAST_DEVIATION = 1e-9  # likewise, of scores
_MOST_SWAPS = 20  # after each addition; a handful is common
# Signals are rounded to multiples of this, so that their sums are exact: a set gives the same
# scores, and the same ties, in whatever order its heads came.
_GRID = 2.0**-36
_TABLE = 2**22  # numbers in a batch, 32 MiB
_SCORES = 2**17  # scores that are looked at together; more would not stay in the processor's cache


@dataclass(frozen=True)
class Batch:
    """Signals of some queries by the candidate heads, padded to the longest list.

    Attributes:
        signals: Standardised per query and head, shape (queries, heads, documents); 0 where there
            is no document.
        gains: Judged relevance, shape (queries, documents); 0 where there is no document.
        sizes: Number of documents, shape (queries,).
        ideal: DCG of the best order of all judged documents, shape (queries,).
    """

    signals: Tensor
    gains: Tensor
    sizes: Tensor
    ideal: Tensor

    def __getitem__(self, places: Tensor) -> Batch:
        """The same for some of the queries."""
        return Batch(
            self.signals[places], self.gains[places], self.sizes[places], self.ideal[places]
        )

    @cached_property
    def present(self) -> Tensor:
        """Which places hold a document, shape (queries, documents)."""
        return torch.arange(self.gains.shape[1]) < self.sizes[:, None]

    @cached_property
    def margin_weights(self) -> Tensor:
        """What scores are multiplied with for the margin, shape (queries, documents)."""
        relevant = (self.gains > 0).double()
        other = self.present.double() - relevant
        counts = [kind.sum(dim=1, keepdim=True) for kind in (relevant, other)]
        both = (counts[0] > 0) & (counts[1] > 0)
        return torch.where(both, relevant / counts[0] - other / counts[1], 0.0)

    @cached_property
    def correlation_weights(self) -> Tensor:
        """The same for the correlation: standardised gains over the number of documents."""
        sizes = self.sizes[:, None]
        centred = (self.gains - self.gains.sum(dim=1, keepdim=True) / sizes) * self.present
        deviation = (centred.square().sum(dim=1, keepdim=True) / sizes).sqrt()
        return torch.where(deviation > _LEAST_DEVIATION, centred / deviation / sizes, 0.0)


def tabulate(queries: Sequence[QuerySignals], heads: Sequence[int]) -> Iterator[Batch]:
    """Lay signals out for the search, batch after batch.

    Args:
        queries: The signals.
        heads: Places of the candidate heads among those of the signals.
    """
    longest = max(len(query.gains) for query in queries)
    size = max(1, _TABLE // (len(heads) * longest))
    for start in range(0, len(queries), size):
        yield _batch(queries[start : start + size], heads)


def alone(utility: str, query: QuerySignals) -> Tensor:
    """Measure each head of the signals alone, shape (heads,), in float64."""
    if utility == "ndcg":
        return ndcg(query.calibrated, query.gains, query.ideal_gains, DEPTH)
    others = {"reciprocal_rank": reciprocal_rank, "correlation": correlation, "margin": margin}
    return others[utility](query.calibrated, query.gains)


def measure(
    utility: str, queries: Sequence[QuerySignals], heads: Sequence[int], gates: Tensor
) -> Tensor:
    """Measure sets of heads on each query.

    Args:
        utility: One of ``UTILITIES``.
        queries: The signals.
        heads: Places of the candidate heads among those of the signals.
        gates: The candidates of each set, shape (queries, sets, candidates); no set is empty.

    Returns:
        Shape (queries, sets), in float64.
    """
    found, done = [], 0
    for batch in tabulate(queries, heads):
        sets = gates[done : done + len(batch.sizes)]
        found.append(UTILITIES[utility](batch, sets.double() @ batch.signals))
        done += len(sets)
    return torch.cat(found)


def search(
    queries: Sequence[QuerySignals],
    heads: Sequence[int],
    static: Tensor,
    groups: Tensor | None,
    *,
    utility: str,
    max_heads: int,
    shrinkage: float,
) -> Tensor:
    """Find each query's set by forward selection with swaps (RouteHead, arXiv 2604.24608).

    A head is added, then heads are swapped one for another, always by the best move there is, for
    as long as that improves the objective. Of equal moves the one with the largest margin is made,
    then the first in the order of the candidates: of the head that leaves, then of the one that
    comes.

    Args:
        queries: The signals.
        heads: Places of the candidate heads among those of the signals.
        static: Utility of each candidate alone, shape (candidates,), in float64.
        groups: Group of each query, counted from 0 without gaps, shape (queries,); those of a group
            share the set with the best mean objective. ``None`` for a set of each query.
        utility: One of ``UTILITIES``.
        max_heads: Most heads of a set.
        shrinkage: Share of the mean of ``static`` over the set's heads in the objective.

    Returns:
        Shape (queries, candidates); true for 1 to ``max_heads`` of each query.
    """
    batches: Iterable[list[Batch]]
    if groups is None:
        batches = ([batch] for batch in tabulate(queries, heads))  # one in memory at a time
    else:
        batches = [list(tabulate(queries, heads))]
    found = []
    for some in batches:
        count = sum(len(batch.sizes) for batch in some)
        group_of = torch.arange(count) if groups is None else groups
        state = _State(some, group_of, static, utility, shrinkage)
        state.run(max_heads)
        found.append(state.gates[group_of])
    return torch.cat(found)


class _State:
    """The sets so far, one per group."""

    def __init__(
        self,
        batches: Sequence[Batch],
        groups: Tensor,
        static: Tensor,
        utility: str,
        shrinkage: float,
    ) -> None:
        self._batches = batches
        self._group_of = groups.split([len(batch.sizes) for batch in batches])
        self._sizes = groups.bincount()
        self._static = static
        self._utility = UTILITIES[utility]
        self._shrinkage = shrinkage
        self.gates = torch.zeros(len(self._sizes), len(static), dtype=torch.bool)
        self._objective = torch.full((len(self._sizes),), -torch.inf, dtype=torch.float64)

    def run(self, max_heads: int) -> None:
        """Search until no move improves anything."""
        heads = len(self._static)
        active = torch.arange(len(self.gates))
        for size in range(1, min(max_heads, heads) + 1):
            active = self._move(active, size - 1, swap=False)
            moved = active
            for _ in range(_MOST_SWAPS if 1 < size < heads else 0):
                moved = self._move(moved, size, swap=True)

    def _move(self, groups: Tensor, size: int, *, swap: bool) -> Tensor:
        """Make the best move of each group, if it improves anything.

        Args:
            groups: Those to look at, shape (groups,); all have sets of the same size.
            size: That size.
            swap: Whether a head leaves for the one that comes.

        Returns:
            The groups that moved.
        """
        if not len(groups):
            return groups
        order = self.gates[groups].byte().argsort(dim=1, descending=True, stable=True)
        inside, outside = order[:, :size], order[:, size:]
        values, margins = self._measure(groups, inside, outside, swap)
        choice = _first_best(values.flatten(1), margins.flatten(1))
        value = values.flatten(1).gather(1, choice)[:, 0]
        improved = value > self._objective[groups] + _LEAST_GAIN
        moved, choice = groups[improved], choice[improved]
        added = outside.shape[1]
        if swap:
            self.gates[moved, inside[improved].gather(1, choice // added)[:, 0]] = False
        self.gates[moved, outside[improved].gather(1, choice % added)[:, 0]] = True
        self._objective[moved] = value[improved]
        return moved

    def _measure(
        self, groups: Tensor, inside: Tensor, outside: Tensor, swap: bool
    ) -> tuple[Tensor, Tensor]:
        """Objective and margin of every move, shape (groups, heads that leave, that come)."""
        leaving = inside.shape[1] if swap else 1
        shape = (len(groups), leaving, outside.shape[1])
        values = torch.zeros(shape, dtype=torch.float64)
        margins = torch.zeros_like(values)
        row_of = torch.full((len(self.gates),), -1)
        row_of[groups] = torch.arange(len(groups))
        for whole, group_of in zip(self._batches, self._group_of, strict=True):
            rows = row_of[group_of]
            wanted = (rows >= 0).nonzero()[:, 0]
            together = max(1, _SCORES // (leaving * shape[2] * whole.gains.shape[1]))
            for places in wanted.split(together):
                batch, row = whole[places], rows[places]
                scores = _moved(batch.signals, inside[row], outside[row], swap)
                part = (len(places), *shape[1:])
                values.index_add_(0, row, self._utility(batch, scores).view(part))
                margins.index_add_(0, row, _margin(batch, scores).view(part))
        sizes = self._sizes[groups][:, None, None]
        after = inside.shape[1] + (not swap)
        static = _moved(self._static[None, :, None], inside, outside, swap).view(shape) / after
        share = 1 - self._shrinkage
        # Margins as well, so that nothing is left of the query where nothing is to be.
        return share * values / sizes + self._shrinkage * static, share * margins / sizes


def _batch(queries: Sequence[QuerySignals], heads: Sequence[int]) -> Batch:
    sizes = torch.tensor([len(query.gains) for query in queries])
    longest = int(sizes.max())
    signals = torch.zeros(len(queries), len(heads), longest, dtype=torch.float64)
    gains = torch.zeros(len(queries), longest, dtype=torch.float64)
    ideal = torch.zeros(len(queries), DEPTH, dtype=torch.float64)
    places = list(heads)
    for row, query in enumerate(queries):
        found = features(
            "standardised", query.calibrated[places].double(), query.mass[places].double()
        )
        signals[row, :, : len(query.gains)] = (found / _GRID).round() * _GRID
        gains[row, : len(query.gains)] = query.gains
        best = query.ideal_gains.double().sort(descending=True).values[:DEPTH]
        ideal[row, : len(best)] = best
    return Batch(signals, gains, sizes, _discounted(ideal))


def _moved(signals: Tensor, inside: Tensor, outside: Tensor, swap: bool) -> Tensor:
    """Sum signals over the heads of each set that is one move away.

    Args:
        signals: Shape (queries or 1, heads, documents).
        inside: Heads of the sets, shape (queries, size).
        outside: The others, shape (queries, others).
        swap: Whether a head leaves for the one that comes.

    Returns:
        Shape (queries, heads that leave * heads that come, documents).
    """
    query = torch.arange(len(signals))[:, None]
    kept = signals[query, inside]
    base = kept.sum(dim=1, keepdim=True)
    if swap:
        base = base - kept
    return (base[:, :, None] + signals[query, outside][:, None]).flatten(1, 2)


def _first_best(values: Tensor, margins: Tensor) -> Tensor:
    """Place of the best value of each row, by margin and then the first of equals: (rows, 1)."""
    margins = margins.masked_fill(~_best(values), -torch.inf)
    early = torch.arange(values.shape[1], 0, -1)
    return (_best(margins) * early).argmax(dim=1, keepdim=True)


def _best(figures: Tensor) -> Tensor:
    return figures >= figures.amax(dim=1, keepdim=True) - _LEAST_GAIN


def _ndcg(batch: Batch, scores: Tensor) -> Tensor:
    found = _discounted(_ranked(batch, scores, batch.gains.clamp(min=0), DEPTH))
    return torch.where(batch.ideal > 0, found.T / batch.ideal, 0.0).T


def _reciprocal_rank(batch: Batch, scores: Tensor) -> Tensor:
    relevant = _ranked(batch, scores, (batch.gains > 0).double(), scores.shape[-1])
    return (relevant / torch.arange(1, scores.shape[-1] + 1)).amax(dim=-1)


def _correlation(batch: Batch, scores: Tensor) -> Tensor:
    return _linear(batch, scores, batch.correlation_weights)


def _margin(batch: Batch, scores: Tensor) -> Tensor:
    return _linear(batch, scores, batch.margin_weights)


# Those of `utility`, for scores of mean 0, shape (queries, sets, documents), to (queries, sets).
UTILITIES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "ndcg": _ndcg,
    "reciprocal_rank": _reciprocal_rank,
    "correlation": _correlation,
    "margin": _margin,
}


def _linear(batch: Batch, scores: Tensor, weights: Tensor) -> Tensor:
    """A weighted sum of scores over their deviation; 0 where they are all equal."""
    deviation = (scores.square().sum(dim=-1) / batch.sizes[:, None]).sqrt()
    products = (scores @ weights[:, :, None])[:, :, 0]
    return torch.where(deviation > _LEAST_DEVIATION, products / deviation, 0.0)


def _ranked(batch: Batch, scores: Tensor, gains: Tensor, depth: int) -> Tensor:
    """Gains in the order of the scores, shape (queries, sets, ranks)."""
    shown = scores.masked_fill(~batch.present[:, None], -torch.inf)
    order = shown.argsort(dim=-1, descending=True, stable=True)[..., :depth]
    return gains[:, None].expand_as(scores).gather(2, order)


def _discounted(gains: Tensor) -> Tensor:
    """Sum gains in order of rank; one after the other, so that the best order comes to 1."""
    ranks = torch.arange(1, gains.shape[-1] + 1, dtype=torch.float64)
    return pad(gains.clamp(min=0) / (ranks + 1).log2(), (0, 1)).cumsum(dim=-1)[..., -1]
