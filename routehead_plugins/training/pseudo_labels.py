"""Pseudo-labels: for each query the heads that rank its candidates best, and their reliability.

RouteHead's router is trained on such labels (arXiv 2604.24608): the best single heads are
candidates, and for every query a set of them is found by forward selection with swaps. The paper
maximises nDCG@10, which over some twenty candidates fits noise: among many sets one is best by
luck. This module adds three remedies: utilities that change with every score, shrinkage to the
utility of a head over all queries, and one set for a group of similar queries. `label_reliability`
measures which of them helps: it searches on half of each query's documents and measures on the
other half, and `choose_labels` compares options by it.

A set scores a document by the mean of its heads' calibrated signals, each head z-scored over the
query's documents (the aggregation ``standardised``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from routehead_plugins.errors import InputError, missing_extra
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training.checks import check_signals
from routehead_plugins.training.detection import best_heads, mean_over_queries, shuffle_key
from routehead_plugins.training.head_search import LabelOptions, alone, measure, search

_DRAWS = 10  # random sets per query
_STARTS = 5  # of k-means
_TRIED_UTILITIES = ("ndcg", "correlation", "margin")
_TRIED_SHRINKAGES = (0.0, 0.5)


class _UnmeasurableError(InputError):
    """Too few queries can be split in halves; an InputError to all but `choose_labels`."""


@dataclass(frozen=True)
class Labels:
    """The heads to read for each query with contrast, according to its judged candidates."""

    heads: HeadSet  # the candidates, best first, with their mean utility over all queries
    gates: Tensor  # mask of the heads in each query's set, none empty, shape (queries, heads)


@dataclass(frozen=True)
class Reliability:
    """Quality of labels on documents that they were not searched on.

    All values are mean nDCG@10 over queries for every utility, so that labels of
    different options can be compared. The ideal order is that of the same half of the documents.

    Attributes:
        found: nDCG@10 of each query's set on the half that it was searched on.
        kept: nDCG@10 of the same sets on the other half, which is what a router can learn.
        static: nDCG@10 on the other half of one set for all queries, searched on the first halves
            with the same candidates and utility and without shrinkage. Labels whose ``kept`` is
            lower are not worth learning.
        chance: nDCG@10 on the other half of random sets of the same sizes and candidates.
        queries: Number of queries with contrast in both halves.
    """

    found: float
    kept: float
    static: float
    chance: float
    queries: int


@dataclass(frozen=True)
class LabelChoice:
    """Chosen options of the search, and the reliability of its labels.

    Attributes:
        options: The options.
        reliability: Their reliability; ``None`` if it cannot be measured, as for synthesized
            queries, whose one relevant passage cannot be in both halves.
    """

    options: LabelOptions
    reliability: Reliability | None

    def to_dict(self) -> dict[str, object]:
        """Return the choice and its reliability as JSON values."""
        choice = {name: getattr(self.options, name) for name in ("utility", "shrinkage", "groups")}
        measured = {} if self.reliability is None else asdict(self.reliability)
        return choice | {name: round(value, 4) for name, value in measured.items()}


def pseudo_labels(
    signals: SignalSet, options: LabelOptions | None = None, *, embeddings: Tensor | None = None
) -> Labels:
    """Search for the heads that rank each query's candidates best; see `label_reliability`.

    Neither labels nor candidates depend on the order of the queries, except by groups.
    """
    check_signals(signals)
    options = options or LabelOptions()
    queries = signals.with_contrast
    groups = _groups(embeddings, len(queries), range(len(queries)), options)
    heads, indices = _candidates(signals, options)
    return Labels(heads, search(queries, indices, heads.scores or (), groups, options))


def label_reliability(
    signals: SignalSet, options: LabelOptions | None = None, *, embeddings: Tensor | None = None
) -> Reliability:
    """Search on half of each query's documents, and measure on the other half.

    Documents are split at random, grade by grade, so that both halves have relevant and other
    documents if there are enough. Candidates are chosen on the first halves alone.

    Args:
        signals: Signals of judged queries; queries without contrast are left out.
        options: Options of the search; ``None`` for the paper's utility without remedies.
        embeddings: Embeddings of the queries with contrast, in their order, shape (queries, width);
            needed for groups only.

    Raises:
        InputError: No query can be split in halves, signals are not finite, or there are groups and
            ``embeddings`` are missing, not one per query, not finite, or fewer than groups.
        MissingExtraError: There are groups and faiss is not installed.
    """
    check_signals(signals)
    options = options or LabelOptions()
    halves = [_halves(query, options.seed) for query in signals.with_contrast]
    usable = _measurable_in_both(halves, signals)
    groups = _groups(embeddings, len(halves), usable, options)
    first, second = ([halves[index][side] for index in usable] for side in (0, 1))
    heads, indices = _candidates(signals.subset(first), options)
    gates = search(first, indices, heads.scores or (), groups, options)
    one_group = torch.zeros(len(first), dtype=torch.long)
    static = search(first, indices, heads.scores or (), one_group, replace(options, shrinkage=0.0))
    sets = torch.cat([torch.stack([gates, static], dim=1), _random(gates, options.seed)], dim=1)
    held_out = measure("ndcg", second, indices, sets)
    return Reliability(
        found=float(measure("ndcg", first, indices, gates[:, None]).mean()),
        kept=float(held_out[:, 0].mean()),
        static=float(held_out[:, 1].mean()),
        chance=float(held_out[:, 2:].mean()),
        queries=len(usable),
    )


def label_choices(options: LabelOptions) -> list[LabelOptions]:
    """Return variants of the options: every utility and shrinkage that is worth trying."""
    return [
        replace(options, utility=utility, shrinkage=shrinkage)
        for utility in _TRIED_UTILITIES
        for shrinkage in _TRIED_SHRINKAGES
    ]


def choose_labels(
    signals: SignalSet, embeddings: Tensor | None, choices: Sequence[LabelOptions]
) -> LabelChoice:
    """Choose options by the nDCG@10 of their labels on documents they were not searched on.

    As the best of several, the value of the choice itself is slightly too high. Of equal options
    the first is chosen, and also if no query can be split in halves.

    Args:
        signals: Signals of queries with contrast.
        embeddings: Embeddings of these queries, shape (queries, width); needed for groups only.
        choices: Options with the same seed, and so with the same halves.

    Raises:
        InputError: There are no choices, no query has contrast, signals are not finite, or there
            are groups and ``embeddings`` cannot be grouped; see `label_reliability`.
        MissingExtraError: There are groups and faiss is not installed.
    """
    if not choices:
        raise InputError("there are no label options to choose from; give at least one.")
    try:
        values = [label_reliability(signals, choice, embeddings=embeddings) for choice in choices]
    except _UnmeasurableError:
        return LabelChoice(choices[0], None)
    return LabelChoice(*max(zip(choices, values, strict=True), key=lambda choice: choice[1].kept))


def _candidates(signals: SignalSet, options: LabelOptions) -> tuple[HeadSet, list[int]]:
    """Choose the best heads by their own mean utility; return the heads and their indices."""
    signals.check_finite()
    utility = mean_over_queries(alone(options.utility, query) for query in signals.with_contrast)
    heads = best_heads(signals, utility, options.candidates)
    heads = replace(heads, method="pseudo-labels", recipe=Recipe(aggregation="standardised"))
    return heads, signals.heads.indices_of(heads)


def _groups(
    embeddings: Tensor | None, queries: int, among: Sequence[int], options: LabelOptions
) -> Tensor | None:
    """Group some of the queries by k-means; groups are counted from 0 without gaps."""
    if options.groups is None:
        return None
    if embeddings is None or embeddings.ndim != 2 or len(embeddings) != queries:
        given = None if embeddings is None else f"of shape {tuple(embeddings.shape)}"
        raise InputError(
            f"groups={options.groups} cannot be made of embeddings {given}; give one per query "
            f"with contrast: ({queries}, width)."
        )
    if options.groups > len(among):
        raise _UnmeasurableError(
            f"groups={options.groups} cannot be made of {len(among)} queries; give fewer."
        )
    points = embeddings[list(among)].detach().float().cpu()
    if not bool(points.isfinite().all()):
        raise InputError("embeddings are not finite numbers; compute them again.")
    check_faiss()
    import faiss

    # Without these limits faiss warns, or uses a part of the points only. With one start, k-means
    # often merges two groups.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    seed = options.seed % 2**31
    kmeans = faiss.Kmeans(points.shape[1], options.groups, seed=seed, nredo=_STARTS, **limits)
    kmeans.train(points.numpy())
    nearest = torch.from_numpy(kmeans.assign(points.numpy())[1])
    groups: Tensor = nearest.unique(return_inverse=True)[1]
    return groups


def check_faiss() -> None:
    """Check that faiss, which groups queries, is installed; raise MissingExtraError if not."""
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise missing_extra(error, "faiss") from error


def _halves(query: QuerySignals, seed: int) -> tuple[QuerySignals, QuerySignals]:
    """Split the documents in two halves, each in the order of the candidates."""
    generator = random.Random(shuffle_key(query, seed))
    gains = query.gains.tolist()
    count = {gain: gains.count(gain) for gain in gains}
    indices = list(range(len(gains)))
    generator.shuffle(indices)
    # Documents alternate between the halves, grades of a single document first: two such grades are
    # then in different halves, and every larger grade is in both.
    indices.sort(key=lambda index: (count[gains[index]], -gains[index]))
    start = generator.randrange(2)
    return _part(query, sorted(indices[start::2])), _part(query, sorted(indices[1 - start :: 2]))


def _part(query: QuerySignals, indices: list[int]) -> QuerySignals:
    """Keep some of a query's documents, as if there were no others."""
    return replace(
        query,
        docids=tuple(query.docids[index] for index in indices),
        mass=query.mass[:, indices],
        calibrated=query.calibrated[:, indices],
        gains=query.gains[indices],
        first_stage=query.first_stage[indices],
        ideal_gains=query.gains[indices].sort(descending=True).values,
        averaged=query.averaged[indices] if len(query.averaged) else query.averaged,
    )


def _measurable_in_both(
    halves: Sequence[tuple[QuerySignals, QuerySignals]], signals: SignalSet
) -> list[int]:
    """Return the indices of the queries both of whose halves can be measured, at least one."""
    usable = [index for index, pair in enumerate(halves) if all(map(_measurable, pair))]
    if not usable:
        raise _UnmeasurableError(
            f"none of the {len(halves)} queries of {', '.join(signals.data)} has relevant and "
            "other documents for two halves; give more candidates per query."
        )
    return usable


def _measurable(query: QuerySignals) -> bool:
    """Return whether nDCG can differ between rankings of the candidates."""
    return query.has_contrast and bool((query.gains > 0).any())


def _random(gates: Tensor, seed: int) -> Tensor:
    """Draw random sets of the same sizes: (queries, heads) to (queries, draws, heads)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(gates), _DRAWS, gates.shape[1], generator=generator)
    return draws.argsort(dim=-1).argsort(dim=-1) < gates.sum(dim=1)[:, None, None]
