"""Signed weights over all heads, learned from signals; the LLM stays as it is.

Scores are ``sum_h w_h z_h + w_fs z_fs``: z_h is head h's row of ``aggregation.features``, z_fs the
standardised retrieval score. With a penalty ``l1 * sum_h |w_h|`` most weights are exactly zero, and
heads without one are never read. Losses are means over the queries that have any contrast:

``listwise``
    Cross-entropy between the softmax of the scores and the judged gains divided by their sum
    (ListNet with one draw, Cao et al., ICML 2007).
``pairs``
    Logistic loss of the pairs of documents of adjacent relevance grades, each query's pairs
    weighing 1 together. That is the idea of HeadRank (arXiv 2604.17237) on a frozen LLM: the paper
    trains the LLM's weights as well, and its formulas are not public, so none is copied here.

To either, ``spread`` adds ``spread / (1 + v)``, v the variance of the scores in the middle third
of the candidates: HeadRank observes that attention hardly tells these apart.

Without ``spread`` the problem is convex. It is solved by accelerated proximal gradient steps
(FISTA, Beck and Teboulle 2009; restarts of O'Donoghue and Candes 2015) on the heads that matter,
in float64, without chance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.errors import HeadError, InputError
from routehead_plugins.heads import AGGREGATIONS, HeadSet, Recipe
from routehead_plugins.scoring import aggregate, standardise
from routehead_plugins.signals import QuerySignals, SignalSet, ndcg
from routehead_plugins.training.proximal import Table, solve, tabulate

OBJECTIVES = ("listwise", "pairs")

_STRENGTHS = 12
_WEAKEST = 0.01  # of the strength that leaves no head
_ROUGH = 1e-4  # of the same: how far from the optimum fits may be that only compare strengths


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What ``fit_weights`` is asked for, checked."""

    aggregation: str
    objective: str
    l1: float | None
    first_stage: bool
    spread: float
    folds: int
    one_standard_error: bool
    seed: int

    def __post_init__(self) -> None:
        for name, names in (("aggregation", AGGREGATIONS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in names:
                raise InputError(
                    f"{name}={getattr(self, name)!r} does not exist; "
                    f"choose one of {', '.join(names)}."
                )
        for name in ("l1", "spread"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name}={value!r} is not a strength; give 0 or more.")
        if self.folds < 2:
            raise InputError(f"folds={self.folds!r} leaves nothing to validate on; give 2 or more.")


def fit_weights(
    signals: SignalSet,
    *,
    aggregation: str = "standardised",
    objective: str = "listwise",
    l1: float | None = None,
    first_stage: bool = True,
    spread: float = 0.0,
    folds: int = 5,
    one_standard_error: bool = False,
    seed: int = 0,
) -> HeadSet:
    """Learn signed weights over heads; those that matter make the head set.

    Args:
        signals: What every head says of judged candidates.
        aggregation: What is weighted: ``"standardised"``, ``"log"`` or ``"mean"``.
        objective: ``"listwise"`` or ``"pairs"``; see the top of this module.
        l1: Strength of the penalty on the weights (for ``"mean"``, on weights of signals divided by
            each head's deviation within queries). ``None`` chooses the one of twelve with the best
            nDCG@10 in cross-validation over queries.
        first_stage: Whether to fit a weight of the retrieval score as well: 0 or more, and not
            penalised.
        spread: Strength of the term against scores that are alike in the middle of the list.
        folds: Parts of the cross-validation; fewer where there are fewer queries.
        one_standard_error: Prefer the strongest penalty whose nDCG@10 is no more than one standard
            error (of the difference, query by query) below the best: fewer heads.
        seed: Decides which queries share a part.

    Returns:
        The heads with weights other than 0, largest first, to be scored as ``weighted_scores``
        does. ``first_stage_weight`` is in the scale of the weighted sum as that stands, which is
        why it is not to be standardised again: its spread says how sure the heads are of a query.

    Raises:
        InputError: A setting is out of range, no query has contrast, signals are not finite, there
            are too few queries to choose ``l1`` by, or no head is left.
    """
    settings = _Settings(
        aggregation=aggregation,
        objective=objective,
        l1=l1,
        first_stage=first_stage,
        spread=spread,
        folds=folds,
        one_standard_error=one_standard_error,
        seed=seed,
    )
    weights = _fit(signals, settings)
    heads, retrieval = weights[:-1], float(weights[-1])
    if not bool(heads.any()):
        raise InputError(
            f"no head of {signals.model!r} earns a weight on {', '.join(signals.data)}; give more "
            "queries, harder ones, or more candidates for each (hits); or a smaller l1."
        )
    order = heads.abs().argsort(descending=True, stable=True)
    chosen = [place for place in order.tolist() if heads[place] != 0]
    return HeadSet(
        [signals.heads[place] for place in chosen],
        model=signals.model,
        layout=signals.layout,
        method="weights",
        data=",".join(signals.data),
        recipe=Recipe(
            weights=heads[chosen].tolist(),
            aggregation=aggregation,
            first_stage_weight=retrieval if first_stage else None,
        ),
    )


def choose_l1(
    signals: SignalSet,
    *,
    aggregation: str = "standardised",
    first_stage: bool = True,
    seed: int = 0,
) -> float:
    """Choose a strength as ``fit_weights`` does, for more than one fit; raises what that does."""
    settings = _Settings(
        aggregation=aggregation,
        objective="listwise",
        l1=None,
        first_stage=first_stage,
        spread=0.0,
        folds=5,
        one_standard_error=False,
        seed=seed,
    )
    return _cross_validated(_table(signals, settings), signals.with_contrast, settings)[0]


def weighted_scores(
    query: QuerySignals, heads: HeadSet, available: HeadSet | None = None
) -> Tensor:
    """Score a query's candidates by a weighted head set: the reference for every other way.

    Args:
        query: The signals.
        heads: Heads with weights, as ``fit_weights`` returns them.
        available: The heads that the signals are of, in their order; ``None`` when these are
            ``heads`` themselves.

    Returns:
        ``sum_h w_h z_h + w_fs z_fs``, shape (documents,), neither side standardised afterwards.

    Raises:
        HeadError: The heads have no weights, or are not those of the signals.
    """
    rows = list(heads if available is None else available)
    if heads.recipe.weights is None:
        raise HeadError(f"heads {heads} have no weights; fit them, or give a set that has some.")
    if len(rows) != len(query.mass):
        raise HeadError(
            f"the signals of query {query.query_id!r} are of {len(query.mass)} heads, not of "
            f"{len(rows)}; name the heads they are of as available."
        )
    places = {head: place for place, head in enumerate(rows)}
    missing = [str(head) for head in heads if head not in places]
    if missing:
        raise HeadError(
            f"there are no signals of head {', '.join(missing[:5])}; compute them for these heads."
        )
    chosen = [places[head] for head in heads]
    how = heads.recipe.aggregation or "mean"
    scores = aggregate(how, query.calibrated[chosen], query.mass[chosen], heads.recipe.weights)
    return _with_first_stage(scores, query, heads.recipe.first_stage_weight or 0.0)


def cross_validated_scores(
    signals: SignalSet,
    folds: int = 5,
    seed: int = 0,
    *,
    aggregation: str = "standardised",
    objective: str = "listwise",
    l1: float | None = None,
    first_stage: bool = True,
    spread: float = 0.0,
    one_standard_error: bool = False,
) -> list[Tensor]:
    """Score every query by weights fitted without it, for tables that are honest.

    Queries of the same text are held out together, and the parts do not depend on their order.
    ``l1=None`` is chosen anew for each part, on the other parts alone.

    Args:
        signals: What every head says of judged candidates.
        folds: Parts; fewer where there are fewer queries.
        seed: Decides which queries share a part.
        aggregation: This and all that follow as for ``fit_weights``.
        objective: Likewise.
        l1: Likewise.
        first_stage: Likewise.
        spread: Likewise.
        one_standard_error: Likewise.

    Returns:
        Scores of each query's candidates, shape (documents,) each, in the order of the queries.
        Where no head earns a weight they are those of the first stage, or all 0.

    Raises:
        InputError: As ``fit_weights``; and the queries are too few to part.
    """
    settings = _Settings(
        aggregation=aggregation,
        objective=objective,
        l1=l1,
        first_stage=first_stage,
        spread=spread,
        folds=folds,
        one_standard_error=one_standard_error,
        seed=seed,
    )
    parts = split_folds(signals.queries, folds, seed)
    found: dict[int, Tensor] = {}
    for part in sorted(set(parts)):
        others = [q for q, other in zip(signals.queries, parts, strict=True) if other != part]
        weights = _fit(signals.subset(others), settings)
        for place, query in enumerate(signals.queries):
            if parts[place] == part:
                scores = aggregate(aggregation, query.calibrated, query.mass, weights[:-1])
                found[place] = _with_first_stage(scores, query, float(weights[-1]))
    return [found[place] for place in range(len(signals.queries))]


def _with_first_stage(scores: Tensor, query: QuerySignals, weight: float) -> Tensor:
    return scores + weight * standardise(query.first_stage) if len(scores) else scores


def _fit(signals: SignalSet, settings: _Settings) -> Tensor:
    """Learn the weight of every head, most of them 0, and of the first stage: (heads + 1,)."""
    queries, table = signals.with_contrast, _table(signals, settings)
    if settings.l1 is None:
        l1, start = _cross_validated(table, queries, settings)
    else:
        l1, start = settings.l1, torch.zeros(len(table.scale), 1, dtype=torch.float64)
    shares = torch.full((len(queries), 1), 1 / len(queries), dtype=torch.float64)
    return solve(table, shares, l1, start)[:, 0] / table.scale


def _table(signals: SignalSet, settings: _Settings) -> Table:
    return tabulate(
        signals.with_contrast,
        settings.aggregation,
        settings.objective,
        first_stage=settings.first_stage,
        spread=settings.spread,
    )


def _cross_validated(
    table: Table, queries: Sequence[QuerySignals], settings: _Settings
) -> tuple[float, Tensor]:
    """Choose the strength of the penalty.

    Returns:
        The strength, and weights near the optimum on all queries, shape (heads + 1, 1).
    """
    parts = torch.tensor(split_folds(queries, settings.folds, settings.seed))
    # One fit without each part, and one with all queries for where to start in the end.
    fits = torch.arange(int(parts.max()) + 2)
    shares = (parts[:, None] != fits).double()
    shares /= shares.sum(dim=0)
    weights = torch.zeros(len(table.scale), len(fits), dtype=torch.float64)
    weights = solve(table, shares, math.inf, weights)
    strongest = float(table.gradient(weights, shares)[:-1, -1].abs().max())
    found, held_out = [], []
    for step in range(1, _STRENGTHS + 1):  # strong to weak, each starting where the last one ended
        l1 = strongest * _WEAKEST ** (step / _STRENGTHS)
        weights = solve(table, shares, l1, weights, _ROUGH * strongest)
        scores = (table.rows @ weights).view(*table.gains.shape, -1)
        held_out.append(scores[torch.arange(len(parts)), :, parts])
        found.append((l1, weights[:, -1:]))
    measured = [
        ndcg(scores[:, : len(query.gains)], query.gains, query.ideal_gains)
        for query, scores in zip(queries, torch.stack(held_out, dim=1), strict=True)
    ]
    return found[_best(torch.stack(measured, dim=1), settings.one_standard_error)]


def _best(measured: Tensor, one_standard_error: bool) -> int:
    """Choose among strengths, strongest first, by what queries measure: (strengths, queries)."""
    means = measured.mean(dim=1).tolist()
    best = means.index(max(means))  # the strongest of equals
    if one_standard_error:
        # Query by query: what queries differ by among themselves says nothing of strengths.
        for place, deficit in enumerate(measured[best] - measured[:best]):
            error = float(deficit.std(correction=0)) / math.sqrt(len(deficit))
            if float(deficit.mean()) <= error:
                return place
    return best


def split_folds(queries: Sequence[QuerySignals], folds: int, seed: int) -> list[int]:
    """Deal queries into parts by the hash of their text.

    Args:
        queries: In any order; those of the same text come into the same part.
        folds: How many parts; fewer where there are fewer texts.
        seed: Decides which texts share a part.

    Returns:
        The part of each query, from 0.

    Raises:
        InputError: All queries have the same text.
    """
    texts = {query.query for query in queries}
    if len(texts) < 2:
        raise InputError(
            "one query cannot be cross-validated; give more judged queries, or a strength l1."
        )
    dealt = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    part = {text: place % folds for place, text in enumerate(dealt)}
    return [part[query.query] for query in queries]
