"""Train routers on signals; the LLM is not run, and stays as it is.

Three objectives, the heads being read the same way after each of them:

``listwise``
    Signed weights of all heads are fitted first (``training.weights``) and become the bias. Then
    the correction is learned by the same loss, on the scores that both give together.
``labels``
    As published (RouteHead, arXiv 2604.24608): the gates learn the pseudo-labels by cross-entropy
    with a penalty for sparsity. The bias starts at how often a head is in a label, which is its
    static utility, and the threshold where the bias alone chooses the best few heads for all
    queries. The paper's exact form is not public.
``neighbours``
    Nothing is learned: the labels of the nearest training queries vote.

How strong the penalty is, is decided on a fifth of the queries. No correction at all, which leaves
the static bias alone, is among the choices and is kept unless one is better by more than two
standard errors of the difference query by query: a router that has nothing to say should say
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routehead_plugins.backbone import check_pooling
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.scoring import fuse
from routehead_plugins.selection import HeadRouter, NeighbourRouter, QuerySpace, Router
from routehead_plugins.signals import SignalSet
from routehead_plugins.training.correction import cross_entropy, learn, listwise
from routehead_plugins.training.offline import each_ndcg, offline_scores, routed_scores
from routehead_plugins.training.pseudo_labels import LabelOptions, pseudo_labels
from routehead_plugins.training.weights import choose_l1, fit_weights, split_folds

STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "listwise": (10.0, 3.0, 1.0, 0.3),
    "labels": (1.0, 0.3, 0.1, 0.0),
    "neighbours": (0.0,),
}
"""Objective -> strengths of its penalty to choose among; a vote has none."""
OBJECTIVES = tuple(STRENGTHS)

PARTS = 5
"""One of so many parts of the queries decides whether a correction is kept."""
_ERRORS = 2  # standard errors by which a correction must be better
_COUNTS = (1, 2, 4)  # heads that are tried for all queries alike, besides as many as are allowed
_FUSION = (0.0, 0.25, 0.5, 1.0)  # weights of the first stage that gates are tried with
_RAREST = 0.01  # share of labels below which a head counts as if it were in so many


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a router is trained.

    Attributes:
        layer: After which the queries were embedded.
        pooling: How they were.
        objective: One of ``OBJECTIVES``.
        rank: d, length of a head's embedding.
        coordinates: Of the space in which queries are compared.
        max_layer: No head of a deeper layer is chosen, so that none need be run.
        aggregation: ``"standardised"`` or ``"log"``.
        first_stage: Whether the retrieval scores take part.
        strengths: Of the penalty, to choose among; ``None`` for the objective's own choices. A
            single one is taken without a look at whether it helps.
        labels: How labels are searched for.
        seed: Of the fifth that is held out, and of where training starts.

    Raises:
        InputError: A value is out of range.
    """

    layer: int
    pooling: str = "mean"
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
        if self.objective not in OBJECTIVES:
            raise InputError(
                f"objective={self.objective!r} does not exist; choose one of "
                f"{', '.join(OBJECTIVES)}."
            )
        for name in ("rank", "coordinates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} is too few; give 1 or more.")
        if self.strengths is None:
            return
        if not self.strengths or not all(0 <= s < math.inf for s in self.strengths):
            raise InputError(
                f"strengths={self.strengths!r} are none to choose among; give some, each 0 or more."
            )


@dataclass(frozen=True)
class Base:
    """A router before any correction, and what it learns from.

    Attributes:
        signals: Of the training queries.
        embeddings: Of the same, shape (queries, width).
        heads: Those that may be chosen, with the weight of the first stage.
        bias: What is said of all queries alike, shape (heads,).
        threshold: A head is read above it.
        gates: The labels, where they are learned, shape (queries, heads).
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
        signals: What every head says of judged candidates; the judgments may be a teacher's.
        embeddings: Of all its queries, in their order, shape (queries, width).
        options: How.

    Returns:
        The router. Its ``description`` says which strength was chosen, and the nDCG@10 of every one
        and of the static bias on the queries held out for that.

    Raises:
        InputError: No query has contrast, there are too few queries to hold some out, or no head is
            shallow enough.
    """
    if len(embeddings) != len(signals.queries):
        raise InputError(
            f"there are {len(embeddings)} embeddings for {len(signals.queries)} queries; give one "
            "for each."
        )
    signals, embeddings = usable(signals, embeddings, options)
    if options.strengths is not None and len(options.strengths) == 1:
        base = static_base(signals, embeddings, options, static_l1(signals, options))
        strength = options.strengths[0]
        return _described(corrected(base, strength, options), {"strength": strength})
    strengths = options.strengths or STRENGTHS[options.objective]
    parts = torch.tensor(split_folds(signals.queries, PARTS, options.seed))
    l1 = static_l1(_some(signals, parts != 0), options)
    base = static_base(_some(signals, parts != 0), embeddings[parts != 0], options, l1)
    held_out = _some(signals, parts == 0).queries

    def measured(strength: float | None) -> Tensor:
        router = corrected(base, strength, options)
        scores = routed_scores(router, held_out, embeddings[parts == 0], signals.heads)
        return each_ndcg(scores, held_out)

    static = measured(None)
    figures = {strength: measured(strength) for strength in strengths}
    best = max(figures, key=lambda strength: float(figures[strength].mean()))
    chosen = best if clearly_better(figures[best] - static) else None
    router = corrected(static_base(signals, embeddings, options, l1), chosen, options)
    if isinstance(router, HeadRouter) and not router.routes:
        router = router.trimmed()
    found = {
        "strength": chosen,
        "held_out_queries": len(held_out),
        "held_out_ndcg@10": {"static": round(float(static.mean()), 4)}
        | {str(strength): round(float(each.mean()), 4) for strength, each in figures.items()},
    }
    return _described(router, found)


def _described(router: Router, found: Mapping[str, Any]) -> Router:
    return replace(router, description={**(router.description or {}), **found})


def usable(signals: SignalSet, embeddings: Tensor, options: FitOptions) -> tuple[SignalSet, Tensor]:
    """Leave out queries without contrast, and heads that are too deep.

    Args:
        signals: Of all queries.
        embeddings: Of the same, shape (queries, width).
        options: Their ``max_layer`` counts.

    Raises:
        InputError: Nothing is left.
    """
    _ = signals.with_contrast  # complains where there is none
    contrast = torch.tensor([query.has_contrast for query in signals.queries])
    signals, embeddings = _some(signals, contrast), embeddings[contrast]
    if options.max_layer is None:
        return signals, embeddings
    rows = [row for row, head in enumerate(signals.heads) if head.layer <= options.max_layer]
    if not rows:
        raise InputError(
            f"max_layer={options.max_layer!r} leaves no head of {signals.model!r}; give 0 or more."
        )
    names = ("mass", "calibrated")
    queries = tuple(
        replace(query, **{name: getattr(query, name)[rows] for name in names})
        for query in signals.queries
    )
    heads = HeadSet([signals.heads[row] for row in rows])
    return replace(signals, heads=heads, queries=queries), embeddings


def _some(signals: SignalSet, wanted: Tensor) -> SignalSet:
    return signals.subset([signals.queries[place] for place in wanted.nonzero()[:, 0].tolist()])


def static_l1(signals: SignalSet, options: FitOptions) -> float | None:
    """Choose how sparse static weights are to be; ``None`` where there are none."""
    if options.objective != "listwise":
        return None
    return choose_l1(
        signals, aggregation=options.aggregation, first_stage=options.first_stage, seed=options.seed
    )


def static_base(
    signals: SignalSet, embeddings: Tensor, options: FitOptions, l1: float | None
) -> Base:
    """Find what holds for all queries.

    Args:
        signals: What is learned from.
        embeddings: Of the same queries; labels of groups need them.
        options: How.
        l1: From `static_l1`.
    """
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
        found = fit(l1=l1)
    except InputError:  # what was chosen on a part of few queries may leave no head on all of them
        found = fit(l1=None)
    weight = dict(zip(found, found.recipe.weights or (), strict=True))
    bias = torch.tensor([weight.get(head, 0.0) for head in signals.heads])
    heads = replace(found, heads=list(signals.heads), recipe=replace(found.recipe, weights=None))
    return Base(signals, embeddings, heads, bias)


def _labelled(signals: SignalSet, embeddings: Tensor, options: FitOptions) -> Base:
    labels = pseudo_labels(signals, options.labels, embeddings=embeddings)
    share = labels.gates.float().mean(dim=0).clamp(_RAREST, 1 - _RAREST)
    bias = share if options.objective == "neighbours" else share.logit()
    heads = replace(labels.heads, scores=None, recipe=Recipe(aggregation=options.aggregation))
    count, weight = _static_choice(signals, heads, bias, options)
    heads = replace(heads, recipe=replace(heads.recipe, first_stage_weight=weight))
    return Base(signals, embeddings, heads, bias, _above(bias, count), labels.gates)


def _static_choice(
    signals: SignalSet, heads: HeadSet, bias: Tensor, options: FitOptions
) -> tuple[int, float | None]:
    """How many heads to read where no query is told from another, and the first stage's weight."""
    queries, found = signals.queries, {}
    order = bias.argsort(descending=True, stable=True).tolist()
    most = min(options.labels.max_heads, len(order))
    for count in sorted({most, *(c for c in _COUNTS if c < most)}, reverse=True):
        chosen = replace(heads, heads=heads.pick(order[:count]))
        scores = [offline_scores(query, chosen, signals.heads) for query in queries]
        for weight in _FUSION if options.first_stage else (None,):
            fused = [
                fuse(s, q.first_stage, weight or 0.0) for s, q in zip(scores, queries, strict=True)
            ]
            found[count, weight] = float(each_ndcg(fused, queries).mean())
    return max(found, key=lambda choice: found[choice])


def _above(bias: Tensor, count: int) -> float:
    """A threshold that the largest so many are above, but for equal ones."""
    ordered = bias.sort(descending=True).values
    return float(ordered[count]) if count < len(ordered) else float(ordered[-1]) - 1.0


def corrected(base: Base, strength: float | None, options: FitOptions) -> Router:
    """Learn the correction.

    Args:
        base: What it corrects.
        strength: Of the penalty; ``None`` for no correction at all.
        options: How.
    """
    votes = strength is not None and options.objective == "neighbours"
    space = QuerySpace.fit(
        base.embeddings,
        options.layer,
        pooling=options.pooling,
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
        projection = torch.zeros(options.rank, queries.shape[1])
        embeddings = torch.zeros(len(base.bias), options.rank)
    else:
        if base.gates is not None:
            loss = cross_entropy(base.gates, strength)
        else:
            weight = base.heads.recipe.first_stage_weight
            loss = listwise(base.signals.queries, options.aggregation, weight, strength)
        projection, embeddings = learn(loss, queries, base.bias, options.rank, options.seed)
    return HeadRouter(**shared, projection=projection, embeddings=embeddings)


def clearly_better(differences: Tensor) -> bool:
    """Whether the mean of differences, shape (queries,), is more than two standard errors.

    One would let every other correction through that is the best of several by luck.
    """
    if len(differences) < 2:
        return False
    # Where one query alone differs, the error is the mean itself, but for rounding.
    error = differences.std(correction=1) / math.sqrt(len(differences))
    return bool(differences.mean() > _ERRORS * error * (1 + 1e-9))
