"""How much there is to route: whether what heads are worth differs by query, beyond noise.

A head's utility for a query is the correlation of its signals with the judgments, measured on one
random half of the candidates and once more on the other. Where both halves agree over heads after
averaging over queries, the utility is *static*; where they still agree when a head's average is
taken away, it is *query-specific*, and choosing heads by query can gain something.

What the best head of each query would reach says nothing by itself: the best of as many random
rankings reaches nearly the same. The two are only given together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.signals import QuerySignals, correlation, ndcg

_TRIES = 100  # random halves drawn until both have documents of different relevance
_NOTHING = 1e-12  # variance below this is rounding


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap confidence interval over queries.

    Attributes:
        value: The figure on all queries.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Reliability:
    """Correlations of both halves, means over several ways of halving.

    Attributes:
        queries: How many could be halved; it takes two candidates or more that are not like the
            others, so that collections with one relevant document per query have none.
        splits: How many ways of halving.
        static: Over heads, of the mean over queries. Both halves are of the same queries, so that
            it says how well these queries tell heads apart, not that others would agree.
        specific: Over queries and heads, of what is left without the mean over queries.
        routable: The same without each query's mean over heads as well. That some queries are easy
            for all heads raises ``specific``, but no choice of heads gains from it.
    """

    queries: int
    splits: int
    static: Estimate
    specific: Estimate
    routable: Estimate


@dataclass(frozen=True)
class Oracle:
    """nDCG@10 of the best head for each query, beside that of chance.

    Attributes:
        queries: How many.
        heads: How many heads there are to choose from, and how many random rankings.
        best_head: The best head for each query, chosen in hindsight.
        best_random: The best random ranking for each query, chosen the same way.
        difference: The first less the second.
        static_head: One head for all queries, chosen in hindsight too.
        random: A random ranking that nobody chose.
    """

    queries: int
    heads: int
    best_head: float
    best_random: float
    difference: Estimate
    static_head: float
    random: float


def split_half(
    queries: Sequence[QuerySignals], *, splits: int = 10, resamples: int = 1000, seed: int = 0
) -> Reliability | None:
    """Measure the split-half reliability of static and query-specific utility.

    Args:
        queries: Signals of judged queries.
        splits: Random ways of halving, over which correlations are averaged.
        resamples: Bootstrap samples of the queries.
        seed: Of the halves, which depend on the query's id only, and of the samples.

    Returns:
        ``None`` where fewer than two queries can be halved.
    """
    tables = [
        table for query in queries if (table := half_utilities(query, splits, seed)) is not None
    ]
    if len(tables) < 2:
        return None
    both = torch.stack(tables, dim=2)  # (splits, halves, queries, heads)
    counts = bootstrap_counts(len(tables), resamples, seed)
    return Reliability(
        queries=len(tables),
        splits=splits,
        static=_estimate(_over_splits(static_reliability, both, counts)),
        specific=_estimate(_over_splits(specific_reliability, both, counts)),
        routable=_estimate(
            _over_splits(specific_reliability, both - both.mean(dim=-1, keepdim=True), counts)
        ),
    )


def oracle(
    queries: Sequence[QuerySignals], *, draws: int = 20, resamples: int = 1000, seed: int = 0
) -> Oracle | None:
    """Measure the best head of each query, and the best of as many random rankings.

    Args:
        queries: Signals of judged queries.
        draws: How often as many random rankings are drawn; what they reach is averaged.
        resamples: Bootstrap samples of the queries.
        seed: Of the rankings, which depend on the query's id only, and of the samples.

    Returns:
        ``None`` where there are no queries.
    """
    if not queries:
        return None
    single, best_random, unchosen = [], [], []
    for query in queries:
        heads, documents = query.calibrated.shape
        generator = torch.Generator().manual_seed(_lot(seed, query).getrandbits(63))
        rankings = torch.rand(draws * heads, documents, generator=generator)
        chance = ndcg(rankings, query.gains, query.ideal_gains).view(draws, heads)
        single.append(ndcg(query.calibrated, query.gains, query.ideal_gains))
        best_random.append(chance.amax(dim=1).mean())
        unchosen.append(chance.mean())
    table, chances = torch.stack(single), torch.stack(best_random)  # (queries, heads), (queries,)
    best = table.amax(dim=1)
    counts = bootstrap_counts(len(table), resamples, seed)
    return Oracle(
        queries=len(table),
        heads=table.shape[1],
        best_head=float(best.mean()),
        best_random=float(chances.mean()),
        difference=_estimate(counts @ (best - chances) / len(table)),
        static_head=float(table.mean(dim=0).max()),
        random=float(torch.stack(unchosen).mean()),
    )


def half_utilities(query: QuerySignals, splits: int, seed: int) -> Tensor | None:
    """Measure every head's utility on both halves of a query's candidates.

    Args:
        query: The signals.
        splits: Random ways of halving.
        seed: Of the halves, together with the query's id.

    Returns:
        Correlations, shape (splits, 2, heads); ``None`` where the query cannot be halved.
    """
    lot, found = _lot(seed, query), []
    for _ in range(splits):
        parts = halves(query.gains, lot)
        if parts is None:
            return None
        found.append(
            torch.stack(
                [correlation(query.calibrated[:, half], query.gains[half]) for half in parts]
            )
        )
    return torch.stack(found)


def halves(gains: Tensor, lot: random.Random) -> tuple[list[int], list[int]] | None:
    """Halve candidates at random so that neither half is all of one relevance.

    Args:
        gains: Judgments, shape (documents,).
        lot: Where chance comes from.

    Returns:
        Places of the documents in either half; ``None`` where that cannot be had.
    """
    values, places = gains.tolist(), list(range(len(gains)))
    # Two that are unlike the rest, one for each half, is the least it takes.
    if len(values) < 4 or len(values) - max(map(values.count, values)) < 2:
        return None
    for _ in range(_TRIES):
        lot.shuffle(places)
        first, second = places[: len(places) // 2], places[len(places) // 2 :]
        if all(len({values[place] for place in half}) > 1 for half in (first, second)):
            return first, second
    return None


def static_reliability(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Correlate the mean utility of both halves over heads.

    Args:
        first: Utility on one half, shape (queries, heads).
        second: On the other half.
        counts: How often each query is in each sample, shape (samples, queries).

    Returns:
        Shape (samples,).
    """
    shares = counts / counts.sum(dim=1, keepdim=True)
    one, other = shares @ first, shares @ second  # (samples, heads)
    one, other = one - one.mean(dim=1, keepdim=True), other - other.mean(dim=1, keepdim=True)
    return _correlation(
        (one * other).mean(dim=1), one.square().mean(dim=1), other.square().mean(dim=1)
    )


def specific_reliability(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Correlate what is left of both halves without each head's mean, over queries and heads.

    Args:
        first: Utility on one half, shape (queries, heads).
        second: On the other half.
        counts: How often each query is in each sample, shape (samples, queries).

    Returns:
        Shape (samples,).
    """
    shares = counts / counts.sum(dim=1, keepdim=True)
    one, other = shares @ first, shares @ second

    def covariance(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
        # Without its mean per head, so that the mean over everything is 0 already.
        return shares @ (a * b).mean(dim=1) - (mean_a * mean_b).mean(dim=1)

    return _correlation(
        covariance(first, second, one, other),
        covariance(first, first, one, one),
        covariance(second, second, other, other),
    )


def bootstrap_counts(queries: int, resamples: int, seed: int) -> Tensor:
    """Draw samples of queries with replacement.

    Returns:
        How often each query is in each sample, shape (1 + resamples, queries); the first sample
        has every query once.
    """
    drawn = torch.randint(
        queries, (resamples, queries), generator=torch.Generator().manual_seed(seed)
    )
    counts = torch.zeros(resamples, queries, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones(1, queries, dtype=torch.float64), counts])


def _over_splits(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor], both: Tensor, counts: Tensor
) -> Tensor:
    """Average a reliability over the ways of halving, shape (samples,)."""
    return torch.stack([measure(first, second, counts) for first, second in both]).mean(dim=0)


def _correlation(covariance: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """From covariance and variances; 0 where there is nothing to correlate."""
    some = (one > _NOTHING) & (other > _NOTHING)
    scale = torch.where(some, one * other, 1.0).sqrt()
    return torch.where(some, covariance / scale, 0.0)


def _estimate(samples: Tensor) -> Estimate:
    """The first sample is the whole, all others the bootstrap's."""
    drawn = samples[1:] if len(samples) > 1 else samples
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(float(samples[0]), low, high)


def _lot(seed: int, query: QuerySignals) -> random.Random:
    return random.Random(f"{seed} {query.query_id}")
