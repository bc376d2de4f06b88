"""Whether one method beats another on the same queries, beyond chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from routehead_plugins.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from routehead_plugins.evaluation.table import Evaluation

    Differences: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]

RESAMPLES = 10_000

_BATCH = 1_000  # resamples held in memory at once
_TIE = 1e-9  # rounding may part two equal values by less


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline, on the same queries.

    Attributes:
        method: The method.
        baseline: What it is compared with.
        measure: By which measure.
        queries: How many queries were compared.
        difference: Mean of the method minus mean of the baseline.
        low: Lower end of the 95 % paired bootstrap confidence interval of the difference.
        high: Its upper end.
        p: Of the two-sided paired randomisation test.
        p_holm: The same, corrected by Holm's method for the number of methods compared.
        wins: Queries on which the method is better.
        ties: Queries without a difference.
        losses: Queries on which the method is worse.
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
        evaluations: By the method's name, the baseline among them, on the same queries.
        baseline: Name of the method the others are compared with.
        measure: By which measure.
        seed: Of the resampling; the result for a method depends on nothing else.

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
    paired = {
        method: _differences(method, evaluation.per_query(measure), baseline, base)
        for method, evaluation in evaluations.items()
        if method != baseline
    }
    p_values = {name: _randomisation_p(values, seed) for name, values in paired.items()}
    corrected, compared = _holm(p_values), []
    for method, values in paired.items():
        low, high = _interval(values, seed)
        compared.append(
            Comparison(
                method=method,
                baseline=baseline,
                measure=measure,
                queries=values.size,
                difference=math.fsum(values) / values.size,
                low=low,
                high=high,
                p=p_values[method],
                p_holm=corrected[method],
                wins=int((values > 0).sum()),
                ties=int((values == 0).sum()),
                losses=int((values < 0).sum()),
            )
        )
    return compared


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


def _randomisation_p(differences: Differences, seed: int) -> float:
    import numpy as np
    from scipy.stats import permutation_test

    # With one query both signs are as extreme as each other; scipy asks for two observations.
    if differences.size < 2:
        return 1.0
    test = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _interval(differences: Differences, seed: int) -> tuple[float, float]:
    import numpy as np

    rng = np.random.default_rng(seed)
    size = differences.size
    means = [
        differences[rng.integers(size, size=(_BATCH, size))].mean(axis=1)
        for _ in range(RESAMPLES // _BATCH)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    # Holm (1979): the smallest of m p-values times m, the next times m - 1, never decreasing.
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, method in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[method]))
        corrected[method] = largest
    return corrected
