"""Signed weights over all heads, fitted to the signals of a frozen LLM.

Scores are ``sum_h w_h z_h + w_fs z_fs``: z_h is head h's row of ``aggregation.features``, z_fs the
z-scored retrieval score. With a penalty ``l1 * sum_h |w_h|`` most weights are exactly zero, and
heads of weight zero are never read. Losses are means over the queries with contrast:

``listwise``
    Cross-entropy between the softmax of the scores and the judged gains divided by their sum
    (ListNet with one draw, Cao et al., ICML 2007).
``pairs``
    Logistic loss of the pairs of documents of adjacent relevance grades; the pairs of a query
    weigh 1 together. This is the idea of HeadRank (arXiv 2604.17237) for a frozen LLM: the paper
    trains the LLM's weights as well, and its formulas are not public, so none is copied here.

The problem is convex. It is solved by accelerated proximal gradient steps (FISTA, Beck and Teboulle
2009; restarts of O'Donoghue and Candes 2015) on the heads that matter, in float64 and without
randomness.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from routehead_plugins.data import check_count, check_flag, check_number
from routehead_plugins.errors import InputError
from routehead_plugins.heads import AGGREGATIONS, HeadSet, Recipe
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training.checks import check_choice, check_seed, check_signals
from routehead_plugins.training.proximal import OBJECTIVES, Table, solve, tabulate

_FOLDS = 5
_STRENGTHS = 12
_WEAKEST = 0.01  # in units of the smallest strength that leaves no head
_ROUGH = 1e-4  # in the same units: tolerance of fits that only compare strengths


def fit_weights(
    signals: SignalSet,
    *,
    aggregation: str = "standardised",
    objective: str = "listwise",
    l1: float | None = None,
    first_stage: bool = True,
    seed: int = 0,
) -> HeadSet:
    """Fit signed weights over heads; the heads of non-zero weight make the head set.

    Args:
        signals: Signals of all heads for judged candidates.
        aggregation: Features that are weighted: ``"standardised"``, ``"log"`` or ``"mean"``.
        objective: ``"listwise"`` or ``"pairs"``; see the top of this module.
        l1: Strength of the penalty on the weights (for ``"mean"``, on weights of signals divided by
            each head's standard deviation within queries). ``None`` chooses the one of twelve with
            the best nDCG@10 in 5-fold cross-validation over queries.
        first_stage: Whether to fit a weight of the retrieval score: 0 or more, not penalised.
        seed: Random seed of the folds.

    Returns:
        The heads with weights other than 0, largest first. The weighted sum must not be
        standardised before the first stage is added, as its spread shows how sure the heads are.

    Raises:
        InputError: An option is out of range, no query has contrast, signals are not finite, there
            are too few queries to choose ``l1``, or no head is left.
    """
    check_weights(
        signals,
        aggregation=aggregation,
        objective=objective,
        l1=l1,
        first_stage=first_stage,
        seed=seed,
    )
    signals.check_finite()
    queries = signals.with_contrast
    table = tabulate(queries, aggregation, objective, first_stage=first_stage)
    start = torch.zeros(len(table.scale), 1, dtype=torch.float64)
    if l1 is None:
        l1, start = _cross_validated(table, queries, seed)
    shares = torch.full((len(queries), 1), 1 / len(queries), dtype=torch.float64)
    fitted = solve(table, shares, l1, start)[:, 0] / table.scale
    recipe = Recipe(
        aggregation=aggregation, first_stage_weight=float(fitted[-1]) if first_stage else None
    )
    return _weighted(signals, fitted[:-1], recipe)


def _weighted(signals: SignalSet, weights: Tensor, recipe: Recipe) -> HeadSet:
    """Return the heads with weights other than 0, largest first."""
    order = weights.abs().argsort(descending=True, stable=True).tolist()
    indices = [index for index in order if weights[index] != 0]
    if not indices:
        raise InputError(
            f"no head of {signals.model!r} gets a weight on {', '.join(signals.data)}; give more "
            "queries, harder ones, or more candidates for each (hits); or a smaller l1."
        )
    return HeadSet(
        signals.heads.pick(indices),
        model=signals.model,
        adapter=signals.adapter,
        layout=signals.layout,
        method="weights",
        data=",".join(signals.data),
        recipe=replace(recipe, weights=weights[indices].tolist()),
    )


def check_weights(
    signals: SignalSet,
    *,
    aggregation: str = "standardised",
    objective: str = "listwise",
    l1: float | None = None,
    first_stage: bool = True,
    seed: int = 0,
) -> None:
    """Check what `fit_weights` needs besides signals, to raise its errors before the LLM runs.

    Args:
        signals: The queries, with or without signals.
        aggregation: See `fit_weights`, as for the other arguments.
        objective: Loss.
        l1: Strength of the penalty.
        first_stage: Whether the retrieval score has a weight.
        seed: Random seed.

    Raises:
        InputError: The arguments or the queries cannot be used.
    """
    check_signals(signals)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("objective", objective, OBJECTIVES)
    check_flag("first_stage", first_stage)
    check_seed(seed)
    if l1 is not None:
        check_number("l1", l1, least=0)
    queries = signals.with_contrast
    if l1 is None:
        split_folds(queries, _FOLDS, seed)


def choose_l1(
    signals: SignalSet,
    *,
    aggregation: str = "standardised",
    first_stage: bool = True,
    seed: int = 0,
) -> float:
    """Choose the strength of the penalty as ``fit_weights`` does, to use it for several fits."""
    check_weights(signals, aggregation=aggregation, first_stage=first_stage, seed=seed)
    signals.check_finite()
    queries = signals.with_contrast
    table = tabulate(queries, aggregation, first_stage=first_stage)
    return _cross_validated(table, queries, seed)[0]


def _cross_validated(
    table: Table, queries: Sequence[QuerySignals], seed: int
) -> tuple[float, Tensor]:
    """Choose the strength of the penalty by nDCG@10 on held-out queries.

    Return it, and weights near the optimum on all queries, shape (heads + 1, 1).
    """
    folds = torch.tensor(split_folds(queries, _FOLDS, seed))
    # One fit without each fold, and a last one on all queries as a start for the final fit.
    fits = torch.arange(int(folds.max()) + 2)
    shares = (folds[:, None] != fits).double()
    shares /= shares.sum(dim=0)
    weights = torch.zeros(len(table.scale), len(fits), dtype=torch.float64)
    weights = solve(table, shares, math.inf, weights)
    strongest = float(table.gradient(weights, shares)[:-1, -1].abs().max())
    choices, held_out = [], []
    for step in range(1, _STRENGTHS + 1):  # strong to weak, each starting from the last solution
        l1 = strongest * _WEAKEST ** (step / _STRENGTHS)
        weights = solve(table, shares, l1, weights, _ROUGH * strongest)
        scores = table.by_query(table.rows @ weights)
        held_out.append(scores[torch.arange(len(folds)), :, folds])
        choices.append((l1, weights[:, -1:]))
    ndcg = table.judgments.ndcg(torch.stack(held_out, dim=1))  # (queries, strengths)
    return choices[int(ndcg.T.contiguous().mean(dim=1).argmax())]  # the strongest of equals


def split_folds(queries: Sequence[QuerySignals], folds: int, seed: int) -> list[int]:
    """Split queries into folds by the hash of their text, independently of their order.

    Return the fold of each query, counted from 0. There are fewer than ``folds`` if there are fewer
    texts, since queries of the same text are in the same fold.

    Raises:
        InputError: All queries have the same text, or there are fewer than two folds.
    """
    check_seed(seed)
    if check_count("folds", folds) < 2:
        raise InputError(f"folds={folds!r} holds nothing out; give 2 or more.")
    texts = {query.query for query in queries}
    if len(texts) < 2:
        raise InputError(
            "one query cannot be cross-validated; give more judged queries, or a strength l1."
        )
    shuffled = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    fold_of = {text: index % folds for index, text in enumerate(shuffled)}
    return [fold_of[query.query] for query in queries]
