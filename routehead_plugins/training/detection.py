"""Detectors: which heads follow relevance, found in the signals of judged queries.

Each is a function that gives every head a score; a row of `_DETECTORS` makes it a method of
`detect`. Nothing is random but the choice of a temperature, which is seeded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.heads import Head, HeadSet, Recipe
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.signals import measures as utility

# CoRe's own lie between 0.001 and 0.1.
TEMPERATURES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


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
        signals: Of judged queries. Those whose candidates are all equally relevant are left out.
        method: ``"ndcg"`` (QRHead as released), ``"qr"`` (QRHead as printed), ``"core"``,
            ``"layers"`` (Selective-ICR) or ``"discriminability"`` (after HeadRank).
        count: How many heads; ``"layers"`` takes all heads of its interval instead.
        temperature: For ``"core"``; ``None`` has one chosen, see `choose_temperature`.
        seed: Of that choice.

    Returns:
        The heads, best first, with their scores; equal ones from shallow to deep. ``method``
        records the interval (``layers:10-19``) or the temperature (``core(temperature=0.001)``).

    Raises:
        InputError: The method is unknown, ``count`` or ``temperature`` does not make sense, a
            signal is no number, or no query has both relevant and other candidates.
    """
    _check_options(signals, method, count, temperature)
    _check_finite(signals.with_contrast)
    options = {}
    if method == "core":
        if temperature is None:
            temperature = choose_temperature(signals, count, seed)
        options["temperature"] = temperature
    scores = _DETECTORS[method](signals, **options)
    places = _best(scores, signals.heads, count if method != "layers" else len(scores))
    heads = [signals.heads[place] for place in places]
    return HeadSet(
        heads,
        model=signals.model,
        layout=signals.layout,
        method=_record(method, heads, temperature),
        # As the heads were judged: signal by signal, outliers dropped head by head.
        recipe=Recipe(aggregation="mean"),
        data=f"{', '.join(signals.data)}, {len(signals.with_contrast)} queries",
        scores=scores[places].tolist(),
    )


def single_head_ndcg(signals: SignalSet) -> Tensor:
    """Measure the ranking that each head gives alone.

    The detector of QRHead's code (arXiv 2506.09944), which differs from its paper's: see
    `relevant_mass`.

    Returns:
        Mean nDCG@10 of the calibrated signals, shape (heads,).
    """
    return _mean(
        utility.ndcg(query.calibrated, query.gains, query.ideal_gains)
        for query in signals.with_contrast
    )


def relevant_mass(signals: SignalSet) -> Tensor:
    """Measure the attention that each head pays to relevant documents.

    QRHead as printed (arXiv 2506.09944, Eq. 2-4): uncalibrated, and blind to what the other
    documents receive. The authors' code ranks heads by `single_head_ndcg`.

    Returns:
        Mean attention on all relevant documents together, shape (heads,), between 0 and 1.
    """
    return _mean(
        query.mass[:, query.gains > 0].double().sum(dim=-1) for query in signals.with_contrast
    )


def contrast(signals: SignalSet, temperature: float) -> Tensor:
    """Measure how each head tells a relevant document from the others (CoRe, arXiv 2510.02219).

    InfoNCE of the uncalibrated attention: exp(a+ / t) / (exp(a+ / t) + sum of exp(a- / t)). CoRe's
    queries have one relevant document; here each of several is set against all others alone.

    Args:
        signals: Signals of judged queries; those without relevant or without other candidates are
            left out.
        temperature: t. Attention on a document is around 0.01 to 0.2, so that 0.1 and more is
            close to a difference of means, and 0.001 to the share of queries that are won.

    Returns:
        Mean over the relevant documents of a query, then over queries, shape (heads,).

    Raises:
        InputError: No query has both relevant and other candidates.
    """
    return _mean(_contrast(query, temperature) for query in _two_sided(signals))


def best_interval(signals: SignalSet) -> Tensor:
    """Find the consecutive layers that rank best together (Selective-ICR, arXiv 2602.22591).

    Every interval is tried: the mean calibrated signal over all its heads, by nDCG@10. Of equal
    intervals the one that ends first is taken, as it is the cheapest to run, then the one that
    begins first.

    Returns:
        The interval's mean nDCG@10 for its heads, minus infinity for others; shape (heads,).
    """
    layers, places = torch.tensor([head.layer for head in signals.heads]).unique(
        return_inverse=True
    )
    ends, starts = torch.tril_indices(len(layers), len(layers))  # by end, then by start
    quality = _mean(
        utility.ndcg(
            _interval_sums(query.calibrated, places)[starts, ends], query.gains, query.ideal_gains
        )
        for query in signals.with_contrast
    )
    best = quality.argmax()  # the first of equals
    inside = (places >= starts[best]) & (places <= ends[best])
    return torch.where(inside, quality[best], -math.inf)


def discriminability(signals: SignalSet) -> Tensor:
    """Measure how far each head sets grades of relevance apart, and how few documents it looks at.

    After the idea of HeadRank (arXiv 2604.17237): heads that tell adjacent grades apart, at low
    entropy. HeadRank also trains the LLM's weights, and its formulas are not public; these are
    ours, for a frozen LLM, and its results are not to be expected of them. Per query, with s the
    calibrated signal and a the attention::

        gap   = mean over adjacent grades g < g' among the candidates of
                (mean of s in g' - mean of s in g) / deviation of s in g and g' together
        focus = 1 - entropy(a / sum of a) / log(number of candidates)
        score = gap * focus

    Dividing by the deviation of both grades together, not by that within them, keeps a query with
    a document of each from counting without bound.

    Returns:
        Mean score over queries, shape (heads,).
    """
    return _mean(_gap(query) * _focus(query.mass) for query in signals.with_contrast)


def choose_temperature(signals: SignalSet, count: int, seed: int = 0) -> float:
    """Choose CoRe's temperature among `TEMPERATURES`.

    Heads are found with each on one half of the queries; what counts is nDCG@10 of their mean
    calibrated signal on the other half. Neighbouring temperatures often find the same heads; of
    equals the middle one is taken, which is the furthest from those that find others.

    Args:
        signals: Signals of judged queries.
        count: How many heads make a set.
        seed: Of the halves, which do not depend on the order of the queries.

    Raises:
        InputError: Fewer than 2 queries have both relevant and other candidates.
    """
    queries = sorted(_two_sided(signals), key=lambda query: _lot(query, seed))
    if len(queries) < 2:
        raise InputError(
            "only 1 query has both relevant and other candidates, and a temperature is chosen on 2 "
            "or more; give more queries, or a temperature."
        )
    middle = len(queries) // 2
    held_out, rest = queries[:middle], signals.subset(queries[middle:])

    def quality(temperature: float) -> float:
        places = _best(contrast(rest, temperature), signals.heads, count)
        return _mean(
            utility.ndcg(
                query.calibrated[places].double().mean(dim=0, keepdim=True),
                query.gains,
                query.ideal_gains,
            )
            for query in held_out
        ).item()

    found = [quality(temperature) for temperature in TEMPERATURES]
    equal = [t for t, value in zip(TEMPERATURES, found, strict=True) if value == max(found)]
    return equal[len(equal) // 2]


_DETECTORS: dict[str, Callable[..., Tensor]] = {
    "ndcg": single_head_ndcg,
    "qr": relevant_mass,
    "core": contrast,
    "layers": best_interval,
    "discriminability": discriminability,
}

METHODS = tuple(_DETECTORS)


def _mean(per_query: Iterable[Tensor]) -> Tensor:
    """Average over queries, shape (heads,).

    Sorted and added one after the other: to the last digit, neither the order of the queries nor
    the place of a head makes a difference, so that equal heads stay equal.
    """
    values = torch.stack(list(per_query)).sort(dim=0).values  # (queries, heads)
    return values.cumsum(dim=0)[-1] / len(values)


def _best(scores: Tensor, heads: HeadSet, count: int) -> list[int]:
    """Places of the best heads, best first; ties go to the shallower, lower-numbered head."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda place: (-values[place], heads[place]))
    return [place for place in order[:count] if values[place] > -math.inf]


def _record(method: str, heads: Sequence[Head], temperature: float | None) -> str:
    """The method, with what it settled on."""
    if method == "layers":
        return f"layers:{heads[0].layer}-{heads[-1].layer}"
    return method if temperature is None else f"{method}(temperature={temperature})"


def _two_sided(signals: SignalSet) -> list[QuerySignals]:
    """Queries with relevant and with other candidates; grades alone do not make two sides."""
    found = [
        query
        for query in signals.with_contrast
        if (query.gains > 0).any() and (query.gains <= 0).any()
    ]
    if not found:
        raise InputError(
            f"all candidates of every query of {', '.join(signals.data)} are relevant, or none is; "
            "method='core' sets the ones against the others: give queries with both."
        )
    return found


def _contrast(query: QuerySignals, temperature: float) -> Tensor:
    logits = query.mass.double() / temperature
    relevant = query.gains > 0
    others = logits[:, ~relevant].logsumexp(dim=-1, keepdim=True)  # (heads, 1)
    # e^p / (e^p + sum of e^n), where neither may overflow.
    return (logits[:, relevant] - others).sigmoid().mean(dim=-1)


def _interval_sums(calibrated: Tensor, layers: Tensor) -> Tensor:
    """Sum signals over the heads of each interval, shape (starts, ends, documents).

    Sums rank as means do. They run from each start, rather than being differences of sums from
    layer 0, so that layers outside an interval do not reach it as rounding.

    Args:
        calibrated: Shape (heads, documents).
        layers: Layer of each head, counted without gaps, shape (heads,).
    """
    size = int(layers.max()) + 1
    by_layer = calibrated.new_zeros(size, calibrated.shape[-1], dtype=torch.float64)
    by_layer.index_add_(0, layers, calibrated.double())
    from_start = torch.ones(size, size, dtype=torch.float64).triu()[..., None]
    return (from_start * by_layer).cumsum(dim=1)


def _gap(query: QuerySignals) -> Tensor:
    """Mean gap between adjacent grades, shape (heads,)."""
    gaps = []
    for lower, upper in pairwise(query.gains.unique().tolist()):  # ascending
        both = (query.gains == lower) | (query.gains == upper)
        gaps.append(utility.margin(query.calibrated[:, both], query.gains[both] - lower))
    return torch.stack(gaps).mean(dim=0)


def _focus(mass: Tensor) -> Tensor:
    """1 for attention on a single document, 0 for the same on each, shape (heads,)."""
    total = mass.double().sum(dim=-1, keepdim=True)
    documents = mass.shape[-1]
    shares = torch.where(total > 0, mass / total, 1 / documents)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return 1 - entropy / math.log(documents)


def _lot(query: QuerySignals, seed: int) -> bytes:
    """A seeded random key of a query, whatever the order in which queries come."""
    key = repr((seed, query.query_id, query.query, query.docids))
    return hashlib.sha256(key.encode()).digest()


def _check_options(signals: SignalSet, method: str, count: int, temperature: float | None) -> None:
    if method not in _DETECTORS:
        raise InputError(f"method={method!r} is unknown; give one of: {', '.join(_DETECTORS)}.")
    available = len(signals.heads)
    if method != "layers" and not 1 <= count <= available:
        raise InputError(
            f"count={count!r} heads cannot be chosen; give 1 to {available}, the number of heads "
            "with signals."
        )
    if temperature is None:
        return
    if method != "core":
        raise InputError(f"temperature={temperature!r} is for method='core'; leave it out.")
    if not 0 < temperature < math.inf:
        raise InputError(
            f"temperature={temperature!r} is not a temperature; give a number above 0, or None to "
            "have one chosen."
        )


def _check_finite(queries: Sequence[QuerySignals]) -> None:
    for query in queries:
        if not (query.mass.isfinite().all() and query.calibrated.isfinite().all()):
            raise InputError(
                f"query {query.query_id!r} has signals that are no numbers; compute them again "
                'with the LLM loaded in dtype="float32".'
            )
