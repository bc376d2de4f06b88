"""Train routers on stored signals; the LLM is not run, and stays frozen.

There are three objectives:

``listwise``
    Signed weights of all heads are fitted first (``training.weights``) and become the bias. Then
    the correction is learned by the same loss, on the scores that both give together.
``labels``
    As published (RouteHead, arXiv 2604.24608): the gates learn the pseudo-labels by cross-entropy
    with a penalty for sparsity. The bias is the logit of a head's frequency in the labels, its
    static utility, and the threshold is set so that the bias alone chooses the best few heads for
    all queries. The paper's exact form is not public.
``neighbours``
    Nothing is learned: the labels of the nearest training queries vote.

The strength of the penalty is chosen on a fifth of the queries. The choices include no correction
at all, which leaves the static bias alone. That is chosen unless a correction is better by more
than two standard errors of the per-query difference: a router should not route without evidence
that it helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routehead_plugins.data import as_number, check_count, check_flag, check_items
from routehead_plugins.errors import InputError, class_name, short_repr
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.scoring import COMPARABLE, fuse
from routehead_plugins.selection import (
    HeadRouter,
    NeighbourRouter,
    QuerySpace,
    Router,
    check_pooling,
    check_source,
)
from routehead_plugins.signals import SignalSet
from routehead_plugins.training.checks import (
    check_choice,
    check_embeddings,
    check_seed,
    check_signals,
    is_whole,
)
from routehead_plugins.training.correction import cross_entropy, learn, listwise
from routehead_plugins.training.head_search import LabelOptions
from routehead_plugins.training.offline import each_ndcg, offline_scores, routed_scores
from routehead_plugins.training.pseudo_labels import check_faiss, pseudo_labels
from routehead_plugins.training.weights import choose_l1, fit_weights, split_folds

STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "listwise": (10.0, 3.0, 1.0, 0.3),
    "labels": (1.0, 0.3, 0.1, 0.0),
    "neighbours": (0.0,),
}
"""Objective -> strengths of its penalty to choose from; votes have no penalty."""
OBJECTIVES = tuple(STRENGTHS)

PARTS = 5
"""Number of parts of the queries; one of them decides whether a correction is used."""
# A correction must be better by this many standard errors. With one, a correction that is the best
# of several by luck would often be accepted.
_ERRORS = 2
_COUNTS = (4, 2, 1)  # numbers of heads tried without routing, besides the maximum
_FUSION = (0.0, 0.25, 0.5, 1.0)  # weights of the first stage tried with gates
_RAREST = 0.01  # shares of the labels below this are raised to it


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of the training of a router.

    Attributes:
        layer: Layer after which the queries were embedded.
        pooling: Pooling method with which they were embedded.
        source: What they were embedded by; see ``QuerySpace``.
        objective: One of ``OBJECTIVES``.
        rank: d, length of a head's embedding.
        coordinates: Maximum number of dimensions of the space in which queries are compared.
        max_layer: Deepest layer to choose heads from; no deeper layer has to be run.
        aggregation: ``"standardised"`` or ``"log"``.
        first_stage: Whether the scores include the retrieval score.
        strengths: Strengths of the penalty to choose from, by default those of the objective. A
            single one is used without a check that it helps.
        labels: Options of the search for pseudo-labels.
        seed: Random seed of the held-out fifth and of the start of the training.

    Raises:
        InputError: A value is out of range.
    """

    layer: int
    pooling: str = "mean"
    source: str = "query"
    objective: str = "listwise"
    rank: int = 8
    coordinates: int = 32
    max_layer: int | None = None
    aggregation: str = "standardised"
    first_stage: bool = True
    strengths: Sequence[float] | None = None
    labels: LabelOptions = field(default_factory=LabelOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        check_pooling(self.pooling)
        check_source(self.source)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("aggregation", self.aggregation, COMPARABLE)
        check_count("rank", self.rank)
        check_count("coordinates", self.coordinates)
        check_flag("first_stage", self.first_stage)
        check_seed(self.seed)
        for name, layer in (("layer", self.layer), ("max_layer", self.max_layer)):
            if layer is not None and not is_whole(layer):
                raise InputError(f"{name}={short_repr(layer)} is not the number of a layer.")
        labels: Any = self.labels
        if not isinstance(labels, LabelOptions):
            raise InputError(f"labels is a {class_name(labels)}; give LabelOptions.")
        strengths = STRENGTHS[self.objective] if self.strengths is None else self.strengths
        numbers = [
            as_number(strength) for strength in check_items(strengths, "strengths", "numbers")
        ]
        if not numbers or not all(n is not None and 0 <= n < math.inf for n in numbers):
            raise InputError(
                f"strengths={self.strengths!r} must be a non-empty list of finite numbers >= 0."
            )


@dataclass(frozen=True)
class Base:
    """A router before any correction, with its training data.

    Attributes:
        signals: Signals of the training queries.
        embeddings: Embeddings of the training queries, shape (queries, width).
        heads: The heads that may be chosen, with the weight of the first stage.
        bias: Logits of the heads that are the same for all queries, shape (heads,).
        threshold: Heads with a logit above it are read.
        gates: Pseudo-labels, shape (queries, heads); ``None`` if the objective has none.
    """

    signals: SignalSet
    embeddings: Tensor
    heads: HeadSet
    bias: Tensor
    threshold: float = 0.0
    gates: Tensor | None = None


def fit_router(signals: SignalSet, embeddings: Tensor, options: FitOptions) -> Router:
    """Train a router.

    Args:
        signals: Signals of all heads for judged candidates; the judgments may be a teacher's.
        embeddings: Embeddings of all its queries, in their order, shape (queries, width).
        options: Options of the training.

    Returns:
        The router. Its ``description`` has the strength that was chosen, and the nDCG@10 of every
        strength and of the static bias on the held-out queries.

    Raises:
        InputError: There is not one embedding per query, no query has contrast, there are too few
            queries to hold some out, or no head is shallow enough.
    """
    check_fit(signals, options)
    signals, embeddings = usable(signals, embeddings, options)
    signals.check_finite()
    strengths = options.strengths or STRENGTHS[options.objective]
    if options.strengths is not None and len(strengths) == 1:
        base = static_base(signals, embeddings, options, static_l1(signals, options))
        return _described(corrected(base, strengths[0], options), {"strength": strengths[0]})
    held_out = torch.tensor(split_folds(signals.queries, PARTS, options.seed)) == 0
    train, test = _where(signals, ~held_out), _where(signals, held_out).queries
    l1 = static_l1(train, options)
    base = static_base(train, embeddings[~held_out], options, l1)

    def test_ndcg(strength: float | None) -> Tensor:
        router = corrected(base, strength, options)
        scores = routed_scores(router, test, embeddings[held_out], signals.heads)
        return each_ndcg(scores, test)

    static = test_ndcg(None)
    ndcg = {strength: test_ndcg(strength) for strength in strengths}
    best = max(ndcg, key=lambda strength: float(ndcg[strength].mean()))
    chosen = best if clearly_better(ndcg[best] - static) else None
    router = corrected(static_base(signals, embeddings, options, l1), chosen, options)
    if isinstance(router, HeadRouter) and not router.routes:
        router = router.trimmed()
    means = {"static": static} | {str(strength): values for strength, values in ndcg.items()}
    description = {
        "strength": chosen,
        "held_out_queries": len(test),
        "held_out_ndcg@10": {name: round(float(v.mean()), 4) for name, v in means.items()},
    }
    return _described(router, description)


def check_fit(signals: SignalSet, options: FitOptions) -> None:
    """Check what `fit_router` needs besides signals and embeddings, before the LLM runs.

    Args:
        signals: The queries, with or without signals.
        options: Options of the training.

    Raises:
        InputError: The queries are too few, have no contrast, or cannot be used with the options.
        MissingExtraError: The options need faiss, which is not installed.
    """
    check_signals(signals)
    given: Any = options
    if not isinstance(given, FitOptions):
        raise InputError(f"options is a {class_name(given)}; give FitOptions.")
    queries = signals.with_contrast
    _shallow(signals, options)
    if options.strengths is None or len(options.strengths) > 1 or options.objective == "listwise":
        split_folds(queries, PARTS, options.seed)
    if options.objective == "listwise":
        return
    groups = options.labels.groups
    if groups is not None and groups > len(queries):
        raise InputError(f"groups={groups} cannot be made of {len(queries)} queries; give fewer.")
    if groups is not None:
        check_faiss()


def _described(router: Router, description: Mapping[str, Any]) -> Router:
    return replace(router, description={**(router.description or {}), **description})


def usable(signals: SignalSet, embeddings: Tensor, options: FitOptions) -> tuple[SignalSet, Tensor]:
    """Leave out queries without contrast, and heads deeper than ``options.max_layer``.

    Raises:
        InputError: No query or no head is left.
    """
    check_signals(signals)
    check_embeddings(embeddings, len(signals.queries))
    contrast = torch.tensor([query.has_contrast for query in signals.queries])
    signals, embeddings = signals.subset(signals.with_contrast), embeddings[contrast]
    rows = _shallow(signals, options)
    if len(rows) == len(signals.heads):
        return signals, embeddings
    queries = tuple(
        replace(query, mass=query.mass[rows], calibrated=query.calibrated[rows])
        for query in signals.queries
    )
    return replace(signals, heads=HeadSet(signals.heads.pick(rows)), queries=queries), embeddings


def _shallow(signals: SignalSet, options: FitOptions) -> list[int]:
    """Return the indices of the heads that may be chosen."""
    deepest = math.inf if options.max_layer is None else options.max_layer
    rows = [row for row, head in enumerate(signals.heads) if head.layer <= deepest]
    if not rows:
        raise InputError(
            f"max_layer={options.max_layer!r} leaves no head of {signals.model!r}; give 0 or more."
        )
    return rows


def _where(signals: SignalSet, mask: Tensor) -> SignalSet:
    return signals.subset([signals.queries[index] for index in mask.nonzero()[:, 0].tolist()])


def static_l1(signals: SignalSet, options: FitOptions) -> float | None:
    """Choose the penalty of static weights; ``None`` for objectives without static weights."""
    if options.objective != "listwise":
        return None
    return choose_l1(
        signals, aggregation=options.aggregation, first_stage=options.first_stage, seed=options.seed
    )


def static_base(
    signals: SignalSet, embeddings: Tensor, options: FitOptions, l1: float | None
) -> Base:
    """Fit the part of a router that is the same for all queries; ``l1`` is from `static_l1`."""
    if options.objective != "listwise":
        return _labelled(signals, embeddings, options)
    fit = partial(
        fit_weights,
        signals,
        aggregation=options.aggregation,
        first_stage=options.first_stage,
        seed=options.seed,
    )
    try:
        fitted = fit(l1=l1)
    except InputError:  # a strength chosen on a part of few queries may leave no head on all
        fitted = fit(l1=None)
    weights = dict(zip(fitted, fitted.recipe.weights or (), strict=True))
    bias = torch.tensor([weights.get(head, 0.0) for head in signals.heads], dtype=torch.float32)
    recipe = replace(fitted.recipe, weights=None)
    heads = replace(fitted, heads=list(signals.heads), recipe=recipe)
    return Base(signals, embeddings, heads, bias)


def _labelled(signals: SignalSet, embeddings: Tensor, options: FitOptions) -> Base:
    """Fit the static part of objectives with pseudo-labels."""
    labels = pseudo_labels(signals, options.labels, embeddings=embeddings)
    share = labels.gates.float().mean(dim=0).clamp(_RAREST, 1 - _RAREST)
    bias = share if options.objective == "neighbours" else share.logit()
    heads = replace(labels.heads, scores=None, recipe=Recipe(aggregation=options.aggregation))
    count, weight = _static_choice(signals, heads, bias, options)
    heads = replace(heads, recipe=replace(heads.recipe, first_stage_weight=weight))
    return Base(signals, embeddings, heads, bias, _threshold(bias, count), labels.gates)


def _static_choice(
    signals: SignalSet, heads: HeadSet, bias: Tensor, options: FitOptions
) -> tuple[int, float | None]:
    """Choose by nDCG@10 how many heads to read for all queries, and the first stage's weight."""
    queries, ndcg = signals.queries, {}
    order = bias.argsort(descending=True, stable=True).tolist()
    most = min(options.labels.max_heads, len(order))
    for count in (most, *(count for count in _COUNTS if count < most)):
        best = replace(heads, heads=heads.pick(order[:count]))
        pairs = [(query, offline_scores(query, best, signals.heads)) for query in queries]
        for weight in _FUSION if options.first_stage else (None,):
            fused = [fuse(scores, query.first_stage, weight or 0.0) for query, scores in pairs]
            ndcg[count, weight] = float(each_ndcg(fused, queries).mean())
    return max(ndcg, key=lambda choice: ndcg[choice])


def _threshold(bias: Tensor, count: int) -> float:
    """Return a threshold that the largest ``count`` values exceed, unless some are equal."""
    ordered = bias.sort(descending=True).values
    return float(ordered[count]) if count < len(ordered) else float(ordered[-1]) - 1.0


def corrected(base: Base, strength: float | None, options: FitOptions) -> Router:
    """Learn a correction of a static router; without a strength, there is no correction at all."""
    votes = strength is not None and options.objective == "neighbours"
    space = QuerySpace.fit(
        base.embeddings,
        options.layer,
        pooling=options.pooling,
        source=options.source,
        coordinates=options.coordinates,
        **({"anchors": len(base.embeddings)} if votes else {}),
    )
    shared: dict[str, Any] = {
        "heads": base.heads,
        "space": space,
        "bias": base.bias,
        "reading": "weights" if base.gates is None else "gates",
        "threshold": base.threshold,
        "max_heads": None if base.gates is None else options.labels.max_heads,
        "description": {"objective": options.objective, "queries": len(base.embeddings)},
    }
    if votes and base.gates is not None:
        return NeighbourRouter(**shared, labels=base.gates.float())
    queries = space(base.embeddings)
    if strength is None:
        projection = torch.zeros(options.rank, queries.shape[1], dtype=torch.float32)
        embeddings = torch.zeros(len(base.bias), options.rank, dtype=torch.float32)
    else:
        if base.gates is not None:
            loss = cross_entropy(base.gates, strength)
        else:
            weight = base.heads.recipe.first_stage_weight
            loss = listwise(base.signals.queries, options.aggregation, weight, strength)
        projection, embeddings = learn(loss, queries, base.bias, options.rank, options.seed)
    return HeadRouter(**shared, projection=projection, embeddings=embeddings)


def clearly_better(differences: Tensor) -> bool:
    """Return whether the mean of differences, shape (queries,), exceeds two standard errors."""
    if len(differences) < 2:
        return False
    # If a single query differs, the error equals the mean except for rounding.
    error = differences.std(correction=1) / math.sqrt(len(differences))
    return bool(differences.mean() > _ERRORS * error * (1 + 1e-9))
