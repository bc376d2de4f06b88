"""Compute from stored signals the scores that the re-ranker gives with the same heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet
from routehead_plugins.scoring import aggregate, fuse, standardise
from routehead_plugins.selection import Router
from routehead_plugins.signals import QuerySignals, SignalSet, ndcg

FIRST_STAGE_WEIGHTS = (0.25, 0.5, 1.0, 2.0)
"""Weights of the first stage to choose from, both sides standardised."""


def offline_scores(query: QuerySignals, heads: HeadSet, available: HeadSet) -> Tensor:
    """Score a query's candidates by a head set, shape (documents,).

    With weights, the score is ``sum_h w_h z_h + w_fs z_fs``, and the sum over heads is not
    standardised.

    Args:
        query: The signals.
        heads: The heads to read, with weights or an aggregation.
        available: The heads of the signals, in their order.

    Raises:
        HeadError: The signals are not those of ``available`` or lack a head, or the heads have no
            aggregation.
    """
    if len(available) != len(query.mass):
        raise HeadError(
            f"the signals of query {query.query_id!r} have {len(query.mass)} heads, but "
            f"{len(available)} are given as available; give the heads of the signals."
        )
    recipe = heads.recipe
    how = recipe.aggregation or ("mean" if recipe.weights is not None else None)
    if how is None:
        raise HeadError(
            f"heads {heads} have no aggregation, so signals cannot be combined into scores; give "
            'one, such as "mean".'
        )
    rows = available.indices_of(heads)
    scores = aggregate(how, query.calibrated[rows], query.mass[rows], recipe.weights)
    weight = recipe.first_stage_weight or 0.0
    if recipe.weights is not None:
        return scores + weight * standardise(query.first_stage)
    return fuse(scores, query.first_stage, weight) if weight else scores


def routed_scores(
    router: Router, queries: Sequence[QuerySignals], embeddings: Tensor, available: HeadSet
) -> list[Tensor]:
    """Score the candidates of several queries by a router; see `offline_scores`.

    Args:
        router: The router.
        queries: The signals.
        embeddings: Embeddings of the queries after the router's layer, shape (queries, width).
        available: The heads of the signals, in their order.
    """
    return [
        offline_scores(query, router.choose(logits), available)
        for query, logits in zip(queries, router.logits(embeddings), strict=True)
    ]


def each_ndcg(scores: Sequence[Tensor], queries: Sequence[QuerySignals]) -> Tensor:
    """Compute the nDCG@10 of every query, shape (queries,), float64."""
    values = [
        ndcg(row[None], query.gains, query.ideal_gains)
        for row, query in zip(scores, queries, strict=True)
    ]
    return torch.cat(values) if values else torch.empty(0, dtype=torch.float64)


def with_first_stage(signals: SignalSet, heads: HeadSet) -> HeadSet:
    """Add a weight of the first stage's scores to heads that have no weights of their own.

    Args:
        signals: Signals of judged queries, such as those the heads were chosen on.
        heads: Heads with an aggregation, from `detect`.

    Returns:
        The heads with the one of ``FIRST_STAGE_WEIGHTS`` that gives the best nDCG@10.

    Raises:
        InputError: No query has both relevant and other candidates.
        HeadError: The heads have no aggregation, or there are no signals of one.
    """
    queries = signals.with_contrast
    scores = [offline_scores(query, heads, signals.heads) for query in queries]

    def measure(weight: float) -> float:
        pairs = zip(scores, queries, strict=True)
        fused = [fuse(own, query.first_stage, weight) for own, query in pairs]
        return float(each_ndcg(fused, queries).mean())

    recipe = replace(heads.recipe, first_stage_weight=max(FIRST_STAGE_WEIGHTS, key=measure))
    return replace(heads, recipe=recipe)
