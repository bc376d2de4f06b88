"""Search for the heads that rank a query's candidates best together, many queries at a time.

Every query belongs to a group, and a group has one set: that with the best mean objective of its
queries. All groups advance together, and a group is finished when no move
improves its set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.data import as_number, check_count
from routehead_plugins.errors import InputError, short_repr
from routehead_plugins.scoring import features
from routehead_plugins.signals import (
    Judgments,
    QuerySignals,
    correlation,
    margin,
    ndcg,
    reciprocal_rank,
)
from routehead_plugins.training.checks import check_choice, check_seed

UTILITIES: dict[str, Callable[[Judgments, Tensor], Tensor]] = {
    "ndcg": Judgments.ndcg,
    "reciprocal_rank": Judgments.reciprocal_rank,
    "correlation": Judgments.correlation,
    "margin": Judgments.margin,
}
"""Measures that a search can maximise."""

_LEAST_GAIN = 1e-9  # smaller differences are rounding errors
_MOST_SWAPS = 20  # after each addition; a handful is common
# Signals are rounded to multiples of this, so that their sums are exact: a set gives the same
# scores, and the same ties, in whatever order its heads were added.
_GRID = 2.0**-36
_TABLE = 2**22  # numbers in a batch, 32 MiB
_SCORES = 2**17  # scores that are measured together; more would not stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Options of the search for labels.

    Attributes:
        candidates: K, number of heads that may be chosen, the best by their own utility.
        max_heads: P, maximum number of heads of a set.
        utility: Measure of a set on a query: ``"ndcg"`` (at 10), ``"reciprocal_rank"``,
            ``"correlation"`` or ``"margin"``; see ``signals.measures``. The last two are smooth.
        shrinkage: s, from 0 to 1. The objective is (1 - s) * utility of the set + s * mean over the
            set's heads of the utility of each head alone, on average over all queries. The second
            part favours small sets: at 1 every set is the best head alone.
        groups: Number of groups of queries, by k-means of their embeddings, that share the set that
            is best for them on average; ``None`` for a set per query.
        seed: Random seed of groups, halves and random sets. The search itself is deterministic.

    Raises:
        InputError: A value is out of range.
    """

    candidates: int = 32
    max_heads: int = 8
    utility: str = "ndcg"
    shrinkage: float = 0.0
    groups: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("candidates", self.candidates)
        check_count("max_heads", self.max_heads)
        if self.groups is not None:
            check_count("groups", self.groups)
        check_choice("utility", self.utility, tuple(UTILITIES))
        shrinkage = as_number(self.shrinkage)
        if shrinkage is None or not 0 <= shrinkage <= 1:
            raise InputError(f"shrinkage={short_repr(self.shrinkage)} must be from 0 to 1.")
        check_seed(self.seed)


@dataclass(frozen=True)
class Batch:
    """Signals of several queries by the candidate heads, padded to the longest list."""

    signals: Tensor  # z-scores by each head, shape (queries, heads, documents), 0 in the padding
    judgments: Judgments

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.signals[rows], self.judgments[rows])


def tabulate(queries: Sequence[QuerySignals], heads: Sequence[int]) -> Iterator[Batch]:
    """Yield the signals of many queries at the heads of these indices, batch after batch."""
    longest = max(len(query.gains) for query in queries)
    size = max(1, _TABLE // (len(heads) * longest))
    for start in range(0, len(queries), size):
        yield _batch(queries[start : start + size], list(heads))


def alone(utility: str, query: QuerySignals) -> Tensor:
    """Measure each head of the signals alone, shape (heads,), in float64."""
    if utility == "ndcg":
        return ndcg(query.calibrated, query.gains, query.ideal_gains)
    others = {"reciprocal_rank": reciprocal_rank, "correlation": correlation, "margin": margin}
    return others[utility](query.calibrated, query.gains)


def measure(
    utility: str, queries: Sequence[QuerySignals], heads: Sequence[int], gates: Tensor
) -> Tensor:
    """Measure sets of heads on each query, shape (queries, sets), in float64.

    ``heads`` are the indices of the candidate heads among those of the signals, ``gates`` the mask
    of the candidates in each set, shape (queries, sets, candidates); no set is empty.
    """
    values, start = [], 0
    for batch in tabulate(queries, heads):  # one in memory at a time
        sets = gates[start : start + len(batch)].double()
        values.append(UTILITIES[utility](batch.judgments, sets @ batch.signals))
        start += len(batch)
    return torch.cat(values)


def search(
    queries: Sequence[QuerySignals],
    heads: Sequence[int],
    static: Sequence[float],
    groups: Tensor | None,
    options: LabelOptions,
) -> Tensor:
    """Search for each query's set by forward selection with swaps (RouteHead, arXiv 2604.24608).

    A head is added, then heads of the set are swapped for others, always by the best move, as long
    as that improves the objective. Of equal moves the one with the largest margin is made, then the
    first in the order of the candidates: of the head removed, then of the head added.

    Args:
        queries: The signals.
        heads: Indices of the candidate heads among those of the signals.
        static: Utility of each candidate alone.
        groups: Group of each query, from 0 without gaps, shape (queries,); ``None`` for a set each.
        options: Utility, maximum number of heads of a set, and shrinkage to ``static``.

    Returns:
        Mask of shape (queries, candidates), true for 1 to ``max_heads`` candidates of each query.
    """
    if groups is not None:
        return _Search(list(tabulate(queries, heads)), groups, static, options).run()
    gates = []
    for batch in tabulate(queries, heads):  # one in memory at a time
        gates.append(_Search([batch], torch.arange(len(batch)), static, options).run())
    return torch.cat(gates)


class _Search:
    """A search for the sets of some groups, with the current set of each."""

    def __init__(
        self,
        batches: Sequence[Batch],
        groups: Tensor,
        static: Sequence[float],
        options: LabelOptions,
    ) -> None:
        self._batches = batches
        self._groups = groups
        self._sizes = groups.bincount()
        self._static = torch.tensor(static, dtype=torch.float64)
        self._options = options
        self._gates = torch.zeros(len(self._sizes), len(static), dtype=torch.bool)
        self._objective = torch.full((len(self._sizes),), -torch.inf, dtype=torch.float64)

    def run(self) -> Tensor:
        """Search until no move improves any set; return each query's set."""
        heads = len(self._static)
        active = torch.arange(len(self._gates))
        for size in range(1, min(self._options.max_heads, heads) + 1):
            active = self._move(active, size - 1, swap=False)
            moved = active
            for _ in range(_MOST_SWAPS if 1 < size < heads else 0):
                moved = self._move(moved, size, swap=True)
        return self._gates[self._groups]

    def _move(self, groups: Tensor, size: int, *, swap: bool) -> Tensor:
        """Make the best move of groups, all with sets of one size; return those that improved."""
        if not len(groups):
            return groups
        order = self._gates[groups].byte().argsort(dim=1, descending=True, stable=True)
        inside, outside = order[:, :size], order[:, size:]
        values, margins = self._measure(groups, inside, outside, swap)
        choice = _first_best(values.flatten(1), margins.flatten(1))
        value = values.flatten(1).gather(1, choice)[:, 0]
        improved = value > self._objective[groups] + _LEAST_GAIN
        moved, choice = groups[improved], choice[improved]
        added = outside.shape[1]
        if swap:
            self._gates[moved, inside[improved].gather(1, choice // added)[:, 0]] = False
        self._gates[moved, outside[improved].gather(1, choice % added)[:, 0]] = True
        self._objective[moved] = value[improved]
        return moved

    def _measure(
        self, groups: Tensor, inside: Tensor, outside: Tensor, swap: bool
    ) -> tuple[Tensor, Tensor]:
        """Measure all moves: objectives and margins, shape (groups, heads removed, heads added)."""
        removed = inside.shape[1] if swap else 1
        shape = (len(groups), removed, outside.shape[1])
        values = torch.zeros(shape, dtype=torch.float64)
        margins = torch.zeros_like(values)
        row_of = torch.full((len(self._gates),), -1)
        row_of[groups] = torch.arange(len(groups))
        utility = UTILITIES[self._options.utility]
        rows_of_batches = row_of[self._groups].split([len(batch) for batch in self._batches])
        for batch, rows in zip(self._batches, rows_of_batches, strict=True):
            considered = (rows >= 0).nonzero()[:, 0]
            together = max(1, _SCORES // (removed * shape[2] * batch.signals.shape[2]))
            for indices in considered.split(together):
                part, row = batch[indices], rows[indices]
                scores = _moved(part.signals, inside[row], outside[row], swap)
                for sums, measured in ((values, utility), (margins, Judgments.margin)):
                    moves = measured(part.judgments, scores).unflatten(1, shape[1:])
                    sums.index_add_(0, row, moves)
        counts = self._sizes[groups][:, None, None]
        heads = inside.shape[1] + (not swap)
        static = _moved(self._static[None, :, None], inside, outside, swap).view(shape) / heads
        shrinkage = self._options.shrinkage
        share = 1 - shrinkage
        # Margins are multiplied by the same share: at shrinkage 1 the query must not decide ties.
        return share * values / counts + shrinkage * static, share * margins / counts


def _batch(queries: Sequence[QuerySignals], heads: list[int]) -> Batch:
    judgments = Judgments.stack(
        [query.gains for query in queries], [query.ideal_gains for query in queries]
    )
    documents = judgments.gains.shape[1]
    signals = torch.zeros(len(queries), len(heads), documents, dtype=torch.float64)
    for row, query in enumerate(queries):
        calibrated, mass = query.calibrated[heads].double(), query.mass[heads].double()
        standard = features("standardised", calibrated, mass)
        signals[row, :, : standard.shape[1]] = (standard / _GRID).round() * _GRID
    return Batch(signals, judgments)


def _moved(signals: Tensor, inside: Tensor, outside: Tensor, swap: bool) -> Tensor:
    """Sum signals over the heads of each set that one move leads to.

    From signals of shape (queries or 1, heads, documents), heads of the current sets of shape
    (queries, size), and all others, to shape (queries, heads removed * heads added, documents).
    """
    query = torch.arange(len(signals))[:, None]
    members = signals[query, inside]
    base = members.sum(dim=1, keepdim=True)
    if swap:
        base = base - members
    return (base[:, :, None] + signals[query, outside][:, None]).flatten(1, 2)


def _first_best(values: Tensor, margins: Tensor) -> Tensor:
    """Return the index of each row's best value, by margin and index if equal, shape (rows, 1)."""
    margins = margins.masked_fill(~_is_best(values), -torch.inf)
    early = torch.arange(values.shape[1], 0, -1)
    return (_is_best(margins) * early).argmax(dim=1, keepdim=True)


def _is_best(values: Tensor) -> Tensor:
    return values >= values.amax(dim=1, keepdim=True) - _LEAST_GAIN
