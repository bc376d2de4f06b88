"""Pseudo-labels: for each query the heads that rank its candidates best, found by search.

That is what RouteHead's router is trained on (arXiv 2604.24608): the best heads by their own
quality are candidates, and for every query a set of them is found by forward selection with swaps.
The paper maximises nDCG@10, which over some twenty candidates fits noise: among many heads one is
right by luck. Three remedies are ours: utilities that change with every score, shrinkage to what
heads are worth over all queries, and one set for a group of similar queries. Which of them helps is
measured: `label_reliability` searches on half of each query's documents and looks at the others.

A set scores a document by the mean of its heads' calibrated signals, each head standardised over
the query's documents (``standardised`` of ``aggregation``).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routehead_plugins.errors import InputError, missing_extra
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training.head_search import UTILITIES, alone, measure, search

_DRAWS = 10  # random sets per query
_STARTS = 5  # of k-means


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How labels are searched for.

    Attributes:
        candidates: K, how many heads may be chosen, the best by their own utility; fewer where
            there are fewer heads.
        max_heads: P, most heads of a set.
        utility: What a set is worth on a query: ``"ndcg"`` (at 10), ``"reciprocal_rank"``,
            ``"correlation"`` or ``"margin"``; see ``utility``. The last two are smooth.
        shrinkage: s, from 0 to 1. The objective is (1 - s) * utility of the set + s * mean over the
            set's heads of what each is worth alone, on average over all queries. The second part
            favours small sets: at 1 each is the best head alone.
        groups: Queries are put in so many groups by k-means of their embeddings, and those of a
            group share the set that is best for them on average; ``None`` for a set of each query.
        seed: Of groups, halves and random sets. The search itself leaves nothing to chance.

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
        for name in ("candidates", "max_heads", "groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value!r} leaves nothing to choose; give 1 or more.")
        if self.utility not in UTILITIES:
            raise InputError(
                f"utility={self.utility!r} does not exist; choose one of {', '.join(UTILITIES)}."
            )
        if not 0 <= self.shrinkage <= 1:
            raise InputError(f"shrinkage={self.shrinkage!r} is not a share; give 0 to 1.")


@dataclass(frozen=True)
class Labels:
    """The heads to read for each query, as far as its judged candidates tell.

    Attributes:
        heads: The candidate heads, best first, with their mean utility over all queries.
        queries: Those with contrast, in the order of the signals.
        gates: Which of the heads make the set of each query, shape (queries, heads); bool, at least
            one each.
        utilities: What each query's set is worth on it, without shrinkage, shape (queries,).
            These are figures of the search's own data: `label_reliability` has honest ones.
    """

    heads: HeadSet
    queries: tuple[QuerySignals, ...]
    gates: Tensor
    utilities: Tensor


@dataclass(frozen=True)
class Reliability:
    """What labels are worth on documents that they were not searched on.

    All figures are mean nDCG@10 over queries, whatever utility was maximised, so that labels of
    different options can be compared. The ideal order is that of the same half of the documents.

    Attributes:
        found: Of each query's set, on the half that it was searched on.
        kept: Of the same set, on the other half: what there is to learn.
        static: Of one set for all queries, on the other half. It is searched for on the first
            halves as well, with the same candidates and utility and without shrinkage. Labels that
            keep less than that had better not be learned.
        chance: Of random sets of the same sizes among the same candidates, on the other half.
        queries: How many were measured: those of which both halves have contrast.
    """

    found: float
    kept: float
    static: float
    chance: float
    queries: int


def pseudo_labels(
    signals: SignalSet,
    options: LabelOptions | None = None,
    *,
    embeddings: Tensor | None = None,
) -> Labels:
    """Search for the heads that rank each query's candidates best.

    Args:
        signals: Of judged queries. Those whose candidates are all equally relevant are left out.
        options: How; ``None`` for the defaults, which are the paper's utility without remedies.
        embeddings: Of the queries that have contrast, in their order, shape (queries, width).
            Needed for groups only.

    Returns:
        The labels. Neither they nor the candidates depend on the order of the queries, but for
        groups.

    Raises:
        InputError: No query has contrast, signals are not finite, or groups are asked for and
            ``embeddings`` are missing, not one per query, not finite, or fewer than groups.
        MissingExtraError: Groups are asked for and faiss is not installed.
    """
    options = options or LabelOptions()
    queries = signals.with_contrast
    groups = _groups(embeddings, len(queries), range(len(queries)), options)
    heads, places = _candidates(signals, options)
    gates = _gates(queries, heads, places, options, groups)
    found = measure(options.utility, queries, places, gates[:, None])[:, 0]
    return Labels(heads, queries, gates, found)


def label_reliability(
    signals: SignalSet,
    options: LabelOptions | None = None,
    *,
    embeddings: Tensor | None = None,
) -> Reliability:
    """Search on half of each query's documents, and measure on the other half.

    Documents are dealt at random, grade by grade, so that both halves have relevant and other ones
    wherever there are enough. Candidates are chosen on the first halves alone.

    Args:
        signals: As for `pseudo_labels`.
        options: As for `pseudo_labels`; ``options.seed`` decides the halves as well, by the query
            and not by its place.
        embeddings: As for `pseudo_labels`.

    Raises:
        InputError: As for `pseudo_labels`; and no query can be halved.
        MissingExtraError: As for `pseudo_labels`.
    """
    options = options or LabelOptions()
    halves = [_halves(query, options.seed) for query in signals.with_contrast]
    usable = [place for place, pair in enumerate(halves) if all(map(_measurable, pair))]
    if not usable:
        raise InputError(
            f"none of the {len(halves)} queries of {', '.join(signals.data)} has relevant and "
            "other documents for two halves; give more candidates per query."
        )
    groups = _groups(embeddings, len(halves), usable, options)
    first, second = ([halves[place][side] for place in usable] for side in (0, 1))
    heads, places = _candidates(signals.subset(first), options)
    gates = _gates(first, heads, places, options, groups)
    everybody = torch.zeros(len(first), dtype=torch.long)
    static = _gates(first, heads, places, replace(options, shrinkage=0.0), everybody)
    sets = torch.cat([torch.stack([gates, static], dim=1), _random(gates, options.seed)], dim=1)
    measured = measure("ndcg", second, places, sets)
    return Reliability(
        found=float(measure("ndcg", first, places, gates[:, None]).mean()),
        kept=float(measured[:, 0].mean()),
        static=float(measured[:, 1].mean()),
        chance=float(measured[:, 2:].mean()),
        queries=len(usable),
    )


def most_reliable(
    signals: SignalSet,
    choices: Sequence[LabelOptions],
    *,
    embeddings: Tensor | None = None,
) -> tuple[LabelOptions, list[Reliability]]:
    """Choose options by what their labels are worth on documents they were not searched on.

    The measure is ``kept``, nDCG@10 for all choices whatever they maximise. Give all the same seed,
    so that they are measured on the same halves. Of equals the first is taken. As the best of
    several, its own figure is a little too good.

    Args:
        signals: As for `pseudo_labels`.
        choices: One or more.
        embeddings: As for `pseudo_labels`.

    Returns:
        The choice, and the figures of all choices in their order.

    Raises:
        InputError: As for `label_reliability`; and there are no choices.
        MissingExtraError: As for `label_reliability`.
    """
    if not choices:
        raise InputError("there are no label options to choose from; give at least one.")
    found = [label_reliability(signals, choice, embeddings=embeddings) for choice in choices]
    kept = [reliability.kept for reliability in found]
    return choices[kept.index(max(kept))], found


def _candidates(signals: SignalSet, options: LabelOptions) -> tuple[HeadSet, list[int]]:
    """The best heads by their own mean utility, and their places among those of the signals."""
    queries = signals.with_contrast
    for query in queries:
        if not bool(query.calibrated.isfinite().all()):
            raise InputError(
                f"signals of query {query.query_id!r} are not finite numbers; compute them again."
            )
    figures = torch.stack([alone(options.utility, query) for query in queries])
    # Sorted and added one after the other: the order of the queries makes no difference.
    static = (figures.sort(dim=0).values.cumsum(dim=0)[-1] / len(queries)).tolist()
    order = sorted(range(len(static)), key=lambda place: (-static[place], signals.heads[place]))
    places = order[: options.candidates]
    heads = HeadSet(
        [signals.heads[place] for place in places],
        model=signals.model,
        layout=signals.layout,
        method="pseudo-labels",
        recipe=Recipe(aggregation="standardised"),
        data=f"{', '.join(signals.data)}, {len(queries)} queries",
        scores=[static[place] for place in places],
    )
    return heads, places


def _gates(
    queries: Sequence[QuerySignals],
    heads: HeadSet,
    places: Sequence[int],
    options: LabelOptions,
    groups: Tensor | None,
) -> Tensor:
    """Search for the set of each query: shape (queries, candidates)."""
    return search(
        queries,
        places,
        torch.tensor(heads.scores, dtype=torch.float64),
        groups,
        utility=options.utility,
        max_heads=options.max_heads,
        shrinkage=options.shrinkage,
    )


def _groups(
    embeddings: Tensor | None, queries: int, among: Sequence[int], options: LabelOptions
) -> Tensor | None:
    """Group of some of the queries by k-means, counted from 0 without gaps."""
    if options.groups is None:
        return None
    if embeddings is None or embeddings.ndim != 2 or len(embeddings) != queries:
        given = None if embeddings is None else f"of shape {tuple(embeddings.shape)}"
        raise InputError(
            f"groups={options.groups} cannot be made of embeddings {given}; give one per query "
            f"with contrast: ({queries}, width)."
        )
    if options.groups > len(among):
        raise InputError(
            f"groups={options.groups} cannot be made of {len(among)} queries; give fewer."
        )
    points = embeddings[list(among)].detach().float().cpu()
    if not bool(points.isfinite().all()):
        raise InputError("embeddings are not finite numbers; compute them again.")
    try:
        import faiss
    except ImportError as error:
        raise missing_extra(error, "faiss") from error
    # The limits are those at which faiss warns, or looks at a part of the points only; and of one
    # start alone, k-means often makes one group of two.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    seed = options.seed % 2**31
    kmeans = faiss.Kmeans(points.shape[1], options.groups, seed=seed, nredo=_STARTS, **limits)
    kmeans.train(points.numpy())
    nearest = torch.from_numpy(kmeans.assign(points.numpy())[1])
    groups: Tensor = nearest.unique(return_inverse=True)[1]
    return groups


def _halves(query: QuerySignals, seed: int) -> tuple[QuerySignals, QuerySignals]:
    """Deal the documents in two, each half in the order of the candidates."""
    key = repr((seed, query.query_id, query.query, query.docids))
    chance = random.Random(hashlib.sha256(key.encode()).digest())
    gains = query.gains.tolist()
    count = {gain: gains.count(gain) for gain in gains}
    places = list(range(len(gains)))
    chance.shuffle(places)
    # Grades of one document first: dealt in turn, they fall on both sides if there are two, and
    # every other grade does anyway.
    places.sort(key=lambda place: (count[gains[place]], -gains[place]))
    start = chance.randrange(2)
    return _part(query, sorted(places[start::2])), _part(query, sorted(places[1 - start :: 2]))


def _part(query: QuerySignals, places: list[int]) -> QuerySignals:
    """A query with some of its documents, as if there were no others."""
    return replace(
        query,
        docids=tuple(query.docids[place] for place in places),
        mass=query.mass[:, places],
        null_mass=query.null_mass[:, places],
        calibrated=query.calibrated[:, places],
        gains=query.gains[places],
        first_stage=query.first_stage[places],
        ideal_gains=query.gains[places].sort(descending=True).values,
        averaged=query.averaged[places] if len(query.averaged) else query.averaged,
    )


def _measurable(query: QuerySignals) -> bool:
    """Whether nDCG tells rankings of its candidates apart."""
    return query.has_contrast and bool((query.gains > 0).any())


def _random(gates: Tensor, seed: int) -> Tensor:
    """Random sets as large as those given: (queries, heads) to (queries, draws, heads)."""
    generator = torch.Generator().manual_seed(seed)
    lots = torch.rand(len(gates), _DRAWS, gates.shape[1], generator=generator)
    return lots.argsort(dim=-1).argsort(dim=-1) < gates.sum(dim=1)[:, None, None]
