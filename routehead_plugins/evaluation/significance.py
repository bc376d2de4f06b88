"""Compare methods on the same queries: confidence intervals and significance tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from routehead_plugins.errors import InputError
from routehead_plugins.evaluation.measures import Evaluation

if TYPE_CHECKING:
    import numpy as np

    Differences: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]

RESAMPLES = 10_000

_BATCH = 1_000  # resamples held in memory at once
_TIE = 1e-9  # rounding errors between equal values are smaller


@dataclass(frozen=True)
class Comparison:
    """Comparison of a method with the baseline, on the same queries.

    Attributes:
        method: Name of the method.
        baseline: Name of the baseline.
        measure: Name of the measure.
        queries: Number of queries.
        difference: Mean of the method minus mean of the baseline.
        low: Lower end of the 95 % paired bootstrap confidence interval of the difference.
        high: Upper end of the interval.
        p: p-value of the two-sided paired randomisation test.
        p_holm: p-value after Holm's correction for the number of methods compared.
        wins: Number of queries on which the method is better.
        ties: Number of queries without a difference.
        losses: Number of queries on which the method is worse.
    """

    method: str
    baseline: str
    measure: str
    queries: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    wins: int
    ties: int
    losses: int


def compare(
    evaluations: Mapping[str, Evaluation], baseline: str, measure: str, seed: int = 0
) -> list[Comparison]:
    """Compare every method with the baseline, query by query.

    Args:
        evaluations: Evaluations by method, baseline included, all on the same queries.
        baseline: Name of the method that the others are compared with.
        measure: Name of the measure.
        seed: Random seed. Only ``p_holm`` depends on which other methods are compared.

    Returns:
        One comparison for each method but the baseline, in the order given.

    Raises:
        InputError: The baseline or measure is missing, or the queries differ.
    """
    if baseline not in evaluations:
        raise InputError(
            f"baseline={baseline!r} was not evaluated; "
            f"expected one of {', '.join(evaluations)}; evaluate it too."
        )
    base = evaluations[baseline].per_query(measure)
    differences = {
        method: _differences(method, evaluation.per_query(measure), baseline, base)
        for method, evaluation in evaluations.items()
        if method != baseline
    }
    tests = {method: _resample(values, seed) for method, values in differences.items()}
    corrected = _holm({method: p for method, (p, _, _) in tests.items()})
    return [
        Comparison(
            method=method,
            baseline=baseline,
            measure=measure,
            queries=values.size,
            difference=math.fsum(values) / values.size,
            low=tests[method][1],
            high=tests[method][2],
            p=tests[method][0],
            p_holm=corrected[method],
            wins=int((values > 0).sum()),
            ties=int((values == 0).sum()),
            losses=int((values < 0).sum()),
        )
        for method, values in differences.items()
    ]


def _differences(
    method: str, values: Mapping[str, float], baseline: str, base: Mapping[str, float]
) -> Differences:
    import numpy as np

    if values.keys() != base.keys():
        raise InputError(
            f"{method!r} was evaluated on {len(values)} queries and the baseline {baseline!r} on "
            f"{len(base)}, which are not the same; expected one set; use the same qrels for both."
        )
    differences = np.array([values[query] - base[query] for query in base], dtype=np.float64)
    differences[np.abs(differences) < _TIE] = 0.0
    return differences


def _resample(differences: Differences, seed: int) -> tuple[float, float, float]:
    """Return the p-value of the randomisation test and both ends of the bootstrap interval."""
    import numpy as np
    from scipy.stats import bootstrap, permutation_test

    # scipy needs two observations; with one, both signs are equally extreme.
    if differences.size < 2:
        return 1.0, float(differences[0]), float(differences[0])
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "batch": _BATCH, "vectorized": True}
    sample = ((differences,), np.mean)
    test = permutation_test(*sample, permutation_type="samples", rng=seed, **options)
    low, high = bootstrap(*sample, method="percentile", rng=seed, **options).confidence_interval
    return float(test.pvalue), float(low), float(high)


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    # Holm (1979): the smallest of m p-values times m, the next times m - 1, never decreasing.
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, method in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[method]))
        corrected[method] = largest
    return corrected
