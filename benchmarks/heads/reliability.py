"""Split-half reliability of the heads' utility: how much choosing heads per query can gain.

A head's utility for a query is the correlation of its signals with the judgments, measured on one
random half of the candidates and again on the other. Agreement of both halves over heads, after
averaging over queries, is *static* utility; agreement that remains without each head's average is
*query-specific*, and choosing heads per query can gain from it.

The best head of each query, chosen in hindsight, means nothing by itself: the best of as many
random rankings is nearly as good. The two are only reported together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.signals import QuerySignals, correlation, ndcg

_TRIES = 100  # random halves drawn until both have documents of different relevance
_ROUNDING = 1e-12  # variance below this is rounding error


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap confidence interval over queries.

    Attributes:
        value: The figure on all queries.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Reliability:
    """Correlations between both halves, means over several random splits.

    Attributes:
        queries: Number of queries that could be halved. That takes two candidates or more that
            differ in relevance from the others, so that collections with one relevant document per
            query have none.
        splits: Number of random splits.
        static: Correlation over heads of the mean over queries. Both halves are of the same
            queries, so that it does not show that other queries would agree.
        specific: Correlation over queries and heads, less the mean over queries.
        routable: The same, less each query's mean over heads as well. Queries that are easy for all
            heads raise ``specific``, but no choice of heads gains from them.
    """

    queries: int
    splits: int
    static: Estimate
    specific: Estimate
    routable: Estimate


@dataclass(frozen=True)
class Oracle:
    """nDCG@10 of the best head for each query, beside chance.

    Attributes:
        queries: Number of queries.
        heads: Number of heads to choose from, and of random rankings.
        best_head: The best head for each query, chosen in hindsight.
        best_random: The best random ranking for each query, chosen in hindsight.
        difference: ``best_head`` less ``best_random``.
        static_head: The best single head for all queries, chosen in hindsight.
        random: Mean of the random rankings.
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
        splits: Number of random splits, over which correlations are averaged.
        resamples: Bootstrap samples of the queries.
        seed: Random seed; a query's halves depend on nothing else but its id.

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
        draws: Number of times that as many random rankings as heads are drawn; the best of each
            draw are averaged.
        resamples: Bootstrap samples of the queries.
        seed: Random seed; a query's rankings depend on nothing else but its id.

    Returns:
        ``None`` where there are no queries.
    """
    if not queries:
        return None
    single, best_random, unchosen = [], [], []
    for query in queries:
        heads, documents = query.calibrated.shape
        generator = torch.Generator().manual_seed(_generator(seed, query).getrandbits(63))
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
    """Measure every head's utility on random halves of a query's candidates.

    Returns:
        Correlations, shape (splits, 2, heads); ``None`` where the query cannot be halved.
    """
    generator, utilities = _generator(seed, query), []
    for _ in range(splits):
        parts = halves(query.gains, generator)
        if parts is None:
            return None
        utilities += [correlation(query.calibrated[:, half], query.gains[half]) for half in parts]
    return torch.stack(utilities).view(splits, 2, -1)


def halves(gains: Tensor, generator: random.Random) -> tuple[list[int], list[int]] | None:
    """Halve candidates at random so that both halves have documents of different relevance.

    Returns:
        Indices of the documents in each half; ``None`` where no such halves exist.
    """
    values, indices = gains.tolist(), list(range(len(gains)))
    # At least two must differ from the rest, one for each half.
    if len(values) < 4 or len(values) - max(map(values.count, values)) < 2:
        return None
    for _ in range(_TRIES):
        generator.shuffle(indices)
        first, second = indices[: len(indices) // 2], indices[len(indices) // 2 :]
        if all(len({values[index] for index in half}) > 1 for half in (first, second)):
            return first, second
    return None


def static_reliability(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Correlate the mean utility of both halves over heads.

    Args:
        first: Utility on one half, shape (queries, heads).
        second: Utility on the other half, shape (queries, heads).
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
    """Correlate both halves, less each head's mean, over queries and heads; (samples,)."""
    shares = counts / counts.sum(dim=1, keepdim=True)
    one, other = shares @ first, shares @ second

    def covariance(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
        # Less each head's mean, the mean over queries and heads is 0 already.
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
    """Average a reliability over the splits, shape (samples,)."""
    return torch.stack([measure(first, second, counts) for first, second in both]).mean(dim=0)


def _correlation(covariance: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Divide covariance by variances; 0 where a variance is 0."""
    varies = (one > _ROUNDING) & (other > _ROUNDING)
    scale = torch.where(varies, one * other, 1.0).sqrt()
    return torch.where(varies, covariance / scale, 0.0)


def _estimate(samples: Tensor) -> Estimate:
    """Make an estimate of the figure on all queries, which is first, and on bootstrap samples."""
    drawn = samples[1:] if len(samples) > 1 else samples
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(float(samples[0]), low, high)


def _generator(seed: int, query: QuerySignals) -> random.Random:
    return random.Random(f"{seed} {query.query_id}")
