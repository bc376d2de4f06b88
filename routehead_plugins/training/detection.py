"""Detect the heads that follow relevance, from the signals of judged queries.

Every detector is a function that gives each head a score; `METHODS` are their names. Only the
choice of a temperature is random, and it is seeded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from routehead_plugins.data import as_number
from routehead_plugins.errors import InputError, short_repr
from routehead_plugins.heads import Head, HeadSet, Recipe
from routehead_plugins.signals import QuerySignals, SignalSet, margin, ndcg
from routehead_plugins.training.checks import check_choice, check_seed, check_signals, is_whole
from routehead_plugins.training.offline import each_ndcg

TEMPERATURES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Temperatures to choose from; CoRe's own lie between 0.001 and 0.1."""


def detect(
    signals: SignalSet,
    method: str,
    count: int = 8,
    *,
    temperature: float | None = None,
    seed: int = 0,
) -> HeadSet:
    """Choose the heads that follow relevance best.

    Args:
        signals: Signals of judged queries; queries without contrast are left out.
        method: ``"ndcg"`` (QRHead as released), ``"qr"`` (QRHead as printed), ``"core"``,
            ``"layers"`` (Selective-ICR) or ``"discriminability"`` (after HeadRank).
        count: Number of heads; ``"layers"`` returns all heads of its interval instead.
        temperature: Temperature of ``"core"``; ``None`` calls `choose_temperature`.
        seed: Random seed of that choice.

    Returns:
        The heads, best first, with their scores; ties go to the shallower head. ``method`` records
        the interval (``layers:10-19``) or the temperature (``core(temperature=0.001)``).

    Raises:
        InputError: The method is unknown, ``count`` or ``temperature`` is out of range, signals are
            not finite, or no query has both relevant and other candidates.
    """
    check_detection(signals, method, count, temperature=temperature, seed=seed)
    signals.check_finite()
    if method == "core" and temperature is None:
        temperature = choose_temperature(signals, count, seed)
    options = {} if temperature is None else {"temperature": temperature}
    scores = _DETECTORS[method](signals, **options)
    heads = best_heads(signals, scores, len(scores) if method == "layers" else count)
    # Detectors score heads one by one, with outlier tokens dropped head by head.
    recipe = Recipe(aggregation="mean")
    return replace(heads, method=_record(method, heads, temperature), recipe=recipe)


def check_detection(
    signals: SignalSet,
    method: str,
    count: int = 8,
    *,
    temperature: float | None = None,
    seed: int = 0,
) -> None:
    """Check what `detect` needs besides signals, to raise its errors before the LLM runs.

    Args:
        signals: The queries, with or without signals.
        method: See `detect`, as for the other arguments.
        count: Number of heads.
        temperature: Temperature of ``"core"``.
        seed: Random seed.

    Raises:
        InputError: The arguments or the queries cannot be used.
    """
    check_signals(signals)
    _check_options(signals, method, count, temperature)
    check_seed(seed)
    queries = signals.with_contrast
    if method == "core":
        _two_sided(signals.subset(queries), 1 if temperature is not None else 2)


def single_head_ndcg(signals: SignalSet) -> Tensor:
    """Measure the ranking by each head alone, as QRHead's released code does (arXiv 2506.09944).

    Returns:
        Mean nDCG@10 of the calibrated signals, shape (heads,).
    """
    return mean_over_queries(
        ndcg(query.calibrated, query.gains, query.ideal_gains) for query in signals.with_contrast
    )


def relevant_mass(signals: SignalSet) -> Tensor:
    """Measure the mean attention of each head to all relevant documents together, shape (heads,).

    This is QRHead as printed (arXiv 2506.09944, Eq. 2-4): the attention is not calibrated, and
    the attention to other documents does not count. The released code uses `single_head_ndcg`.
    """
    return mean_over_queries(
        query.mass[:, query.gains > 0].double().sum(dim=-1) for query in signals.with_contrast
    )


def contrast(signals: SignalSet, temperature: float) -> Tensor:
    """Measure how well each head separates relevant documents from others, shape (heads,) (CoRe).

    The score is InfoNCE on the uncalibrated attention (arXiv 2510.02219)::

        exp(a+ / t) / (exp(a+ / t) + sum of exp(a- / t))

    CoRe's queries have one relevant document. Here, the mean is taken over the relevant documents
    of a query, each compared with all others, then over queries.

    Attention to a document is around 0.01 to 0.2. With a temperature t of 0.1 or more the score is
    close to a difference of means; with 0.001, to the share of queries in which the relevant
    document comes first.
    """
    return mean_over_queries(_contrast(query, temperature) for query in _two_sided(signals))


def best_interval(signals: SignalSet) -> Tensor:
    """Find the interval of layers that ranks best (Selective-ICR, arXiv 2602.22591).

    For every interval, the mean calibrated signal over all its heads is measured by nDCG@10. Of
    equally good intervals, the one with the shallowest last layer is chosen, since it is the
    cheapest to run, then the one with the shallowest first layer. Return its mean nDCG@10 for its
    heads, minus infinity for others, shape (heads,).
    """
    head_layers = torch.tensor([head.layer for head in signals.heads])
    layers, rows = head_layers.unique(return_inverse=True)
    ends, starts = torch.tril_indices(len(layers), len(layers))  # by end, then by start
    quality = mean_over_queries(
        ndcg(_interval_sums(query.calibrated, rows)[starts, ends], query.gains, query.ideal_gains)
        for query in signals.with_contrast
    )
    best = quality.argmax()  # the first of equals
    inside = (rows >= starts[best]) & (rows <= ends[best])
    return torch.where(inside, quality[best], -math.inf)


def discriminability(signals: SignalSet) -> Tensor:
    """Measure how far each head separates grades of relevance, and how few documents it attends to.

    The idea is HeadRank's (arXiv 2604.17237): heads that separate adjacent grades with low entropy.
    HeadRank also trains the LLM, and its formulas are not public. The formulas below are ours, for
    a frozen LLM, and are not expected to reach its results. The score, shape (heads,), is a mean
    over queries. For each query, with calibrated signal s and attention a::

        gap   = mean over adjacent grades g < g' among the candidates of
                (mean of s in g' - mean of s in g) / standard deviation of s in g and g' together
        focus = 1 - entropy(a / sum of a) / log(number of candidates)
        score = gap * focus

    The deviation is that of both grades together, because the deviation within grades may be
    arbitrarily small and the gap of such a query would dominate the mean.
    """
    return mean_over_queries(_gap(query) * _focus(query.mass) for query in signals.with_contrast)


def choose_temperature(signals: SignalSet, count: int, seed: int = 0) -> float:
    """Choose CoRe's temperature from `TEMPERATURES`.

    Heads are detected with each temperature on one half of the queries, and their mean calibrated
    signal is measured by nDCG@10 on the other half. Neighbouring temperatures often detect the same
    heads; of equally good ones the middle one is chosen, as the furthest from those that do not.

    Raises:
        InputError: Fewer than 2 queries have both relevant and other candidates.
    """
    queries = sorted(_two_sided(signals, 2), key=lambda query: shuffle_key(query, seed))
    middle = len(queries) // 2
    held_out, rest = queries[:middle], signals.subset(queries[middle:])

    def quality(temperature: float) -> float:
        indices = best_indices(contrast(rest, temperature), signals.heads, count)
        scores = [query.calibrated[indices].double().mean(dim=0) for query in held_out]
        return mean_over_queries(each_ndcg(scores, held_out)).item()

    qualities = [quality(temperature) for temperature in TEMPERATURES]
    best = [t for t, value in zip(TEMPERATURES, qualities, strict=True) if value == max(qualities)]
    return best[len(best) // 2]


_DETECTORS: dict[str, Callable[..., Tensor]] = {
    "ndcg": single_head_ndcg,
    "qr": relevant_mass,
    "core": contrast,
    "layers": best_interval,
    "discriminability": discriminability,
}

METHODS = tuple(_DETECTORS)


def mean_over_queries(values: Iterable[Tensor]) -> Tensor:
    """Average one tensor per query, each of shape (heads,).

    Values are sorted and added one after the other, so that neither the order of the queries nor
    that of the heads changes the last digit, and equal heads stay equal.
    """
    ascending = torch.stack(list(values)).sort(dim=0).values  # (queries, heads)
    return ascending.cumsum(dim=0)[-1] / len(ascending)


def best_indices(scores: Tensor, heads: HeadSet, count: int) -> list[int]:
    """Return the indices of the best heads, best first, without scores of minus infinity.

    Ties go to the lower layer, then to the lower head.
    """
    values = scores.tolist()
    finite = [index for index, value in enumerate(values) if value > -math.inf]
    return sorted(finite, key=lambda index: (-values[index], heads[index]))[:count]


def best_heads(signals: SignalSet, scores: Tensor, count: int) -> HeadSet:
    """Return the best heads, best first, with their scores and the data they were chosen on."""
    indices = best_indices(scores, signals.heads, count)
    return HeadSet(
        signals.heads.pick(indices),
        model=signals.model,
        adapter=signals.adapter,
        layout=signals.layout,
        data=f"{', '.join(signals.data)}, {len(signals.with_contrast)} queries",
        scores=scores[indices].tolist(),
    )


def _record(method: str, heads: Sequence[Head], temperature: float | None) -> str:
    """Name the method, with the interval or the temperature it chose."""
    if method == "layers":
        return f"layers:{heads[0].layer}-{heads[-1].layer}"
    return method if temperature is None else f"{method}(temperature={temperature})"


def _two_sided(signals: SignalSet, least: int = 1) -> list[QuerySignals]:
    """Return the queries with relevant and other candidates, not just with several grades.

    Raises:
        InputError: There are fewer than ``least``, which is 1 or 2.
    """
    queries = [
        query
        for query in signals.with_contrast
        if (query.gains > 0).any() and (query.gains <= 0).any()
    ]
    if not queries:
        raise InputError(
            f"no query of {', '.join(signals.data)} has both relevant candidates and candidates "
            "that are not; method='core' compares the two: give queries with both."
        )
    if len(queries) < least:
        raise InputError(
            "only 1 query has both relevant and other candidates, but choosing a temperature takes "
            "2 or more; give more queries, or a temperature."
        )
    return queries


def _contrast(query: QuerySignals, temperature: float) -> Tensor:
    logits = query.mass.double() / temperature
    relevant = query.gains > 0
    others = logits[:, ~relevant].logsumexp(dim=-1, keepdim=True)  # (heads, 1)
    # A sigmoid of the difference, since the exponentials of InfoNCE may overflow.
    return (logits[:, relevant] - others).sigmoid().mean(dim=-1)


def _interval_sums(calibrated: Tensor, rows: Tensor) -> Tensor:
    """Sum signals over the heads of each interval, shape (starts, ends, documents).

    Sums rank documents as means do. They are cumulative sums from each start, because differences
    of sums from layer 0 would carry rounding errors of the layers outside the interval. ``rows``
    holds the rank of each head's layer among all layers, shape (heads,).
    """
    size = int(rows.max()) + 1
    by_layer = calibrated.new_zeros(size, calibrated.shape[-1], dtype=torch.float64)
    by_layer.index_add_(0, rows, calibrated.double())
    from_start = torch.ones(size, size, dtype=torch.float64).triu()[..., None]
    return (from_start * by_layer).cumsum(dim=1)


def _gap(query: QuerySignals) -> Tensor:
    """Return the mean gap between adjacent grades, shape (heads,)."""
    gaps = []
    for lower, upper in pairwise(query.gains.unique().tolist()):  # ascending
        both = (query.gains == lower) | (query.gains == upper)
        gaps.append(margin(query.calibrated[:, both], query.gains[both] - lower))
    return torch.stack(gaps).mean(dim=0)


def _focus(mass: Tensor) -> Tensor:
    """Return 1 for attention to a single document, 0 for equal attention to all; (heads,)."""
    total = mass.double().sum(dim=-1, keepdim=True)
    documents = mass.shape[-1]
    shares = torch.where(total > 0, mass / total, 1 / documents)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return 1 - entropy / math.log(documents)


def shuffle_key(query: QuerySignals, seed: int) -> bytes:
    """Return a key for random choices that do not depend on the order of the queries."""
    key = repr((seed, query.query_id, query.query, query.docids))
    return hashlib.sha256(key.encode()).digest()


def _check_options(signals: SignalSet, method: str, count: int, temperature: float | None) -> None:
    check_choice("method", method, METHODS)
    available = len(signals.heads)
    if method != "layers" and not (is_whole(count) and 1 <= count <= available):
        raise InputError(
            f"count={short_repr(count)} is out of range; give 1 to {available}, the number of "
            "heads with signals."
        )
    if temperature is None:
        return
    if method != "core":
        raise InputError(
            f"temperature={short_repr(temperature)} is for method='core'; leave it out."
        )
    number = as_number(temperature)
    if number is None or not 0 < number < math.inf:
        raise InputError(
            f"temperature={short_repr(temperature)} is out of range; give a finite number above "
            "0, or None to choose one."
        )
