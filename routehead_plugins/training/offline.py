"""Score candidates from kept signals, as the re-ranker would by reading the same heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet
from routehead_plugins.scoring import aggregate, fuse
from routehead_plugins.selection import Router
from routehead_plugins.signals import QuerySignals, ndcg
from routehead_plugins.training.weights import weighted_scores


def offline_scores(query: QuerySignals, heads: HeadSet, available: HeadSet) -> Tensor:
    """Score a query's candidates by a head set.

    Args:
        query: The signals.
        heads: The heads to read, with an aggregation.
        available: The heads that the signals are of, in their order.

    Returns:
        Shape (documents,).

    Raises:
        HeadError: There are no signals of a head, or no aggregation.
    """
    if heads.recipe.weights is not None:
        return weighted_scores(query, heads, available)
    places = {head: place for place, head in enumerate(available)}
    missing = [str(head) for head in heads if head not in places]
    if missing:
        raise HeadError(
            f"there are no signals of head {', '.join(missing[:5])}; compute them for these heads."
        )
    if heads.recipe.aggregation is None:
        raise HeadError(
            f"heads {heads} have no aggregation, and signals do not tell what they then say "
            'together; give one, such as "mean".'
        )
    rows = [places[head] for head in heads]
    scores = aggregate(heads.recipe.aggregation, query.calibrated[rows], query.mass[rows])
    weight = heads.recipe.first_stage_weight
    return fuse(scores, query.first_stage, weight) if weight else scores


def routed_scores(
    router: Router, queries: Sequence[QuerySignals], embeddings: Tensor, available: HeadSet
) -> list[Tensor]:
    """Score the candidates of several queries by a router.

    Args:
        router: The router.
        queries: The signals.
        embeddings: Of the queries, after the router's layer, shape (queries, width).
        available: The heads that the signals are of.
    """
    chosen = [router.choose(logits) for logits in router.logits(embeddings)]
    return [offline_scores(q, heads, available) for q, heads in zip(queries, chosen, strict=True)]


def each_ndcg(scores: Sequence[Tensor], queries: Sequence[QuerySignals]) -> Tensor:
    """nDCG@10 of every query, shape (queries,), float64."""
    figures = [
        ndcg(found[None], query.gains, query.ideal_gains)
        for found, query in zip(scores, queries, strict=True)
    ]
    return torch.cat(figures) if figures else torch.empty(0, dtype=torch.float64)
