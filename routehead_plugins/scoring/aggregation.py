"""Combination of the signals of several heads into one score per document.

The three ways, under their names in head-set files:

``mean``
    Average of the calibrated signals. With equal weights, documents are in the order of ICR's sum
    (Eq. 1 of arXiv 2410.02642). Heads that receive more attention count more.
``standardised``
    Average of the calibrated signals after each head is z-scored over the query's documents, which
    makes heads and queries comparable.
``log``
    Average of the logarithms of the uncalibrated attention, z-scored in the same way. They compare
    documents by ratios of attention, so constant factors of a head cancel, such as the share that
    its attention sinks absorb.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.heads import AGGREGATIONS
from routehead_plugins.scoring.token_scores import standardise

# Smaller attention is raised to this value: the logarithms of smaller values are mostly noise.
_LEAST_MASS = 1e-9


COMPARABLE = ("standardised", "log")
"""Aggregations that give all heads' features the same spread, so that weights are comparable."""


def features(how: str, calibrated: Tensor, mass: Tensor) -> Tensor:
    """Compute features: scores are weighted sums of them, and weights are learned on them.

    Args:
        how: One of ``heads.AGGREGATIONS``; see the top of this module.
        calibrated: Attention to each document minus the null query's, shape (heads, documents).
        mass: Attention before calibration, shape (heads, documents).

    Returns:
        Shape (heads, documents). A row is NaN where a head's signals are not finite.

    Raises:
        InputError: The aggregation is unknown, or the shapes differ.
    """
    if how not in AGGREGATIONS:
        raise InputError(
            f"aggregation={how!r} does not exist; choose one of {', '.join(AGGREGATIONS)}."
        )
    if calibrated.ndim != 2 or calibrated.shape != mass.shape:
        raise InputError(
            f"calibrated has shape {tuple(calibrated.shape)} and mass {tuple(mass.shape)}; "
            "give both as (heads, documents) of the same heads and documents."
        )
    if how == "mean":
        return calibrated
    signals = calibrated if how == "standardised" else mass.clamp(min=_LEAST_MASS).log()
    return standardise(signals, not_finite=math.nan)


def aggregate(
    how: str,
    calibrated: Tensor,
    mass: Tensor,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Combine the signals of several heads into one score per document.

    Args:
        how: Name of the aggregation.
        calibrated: See ``features``.
        mass: See ``features``.
        weights: Signed weights of a sum over the heads, shape (heads,); ``None`` for the mean.

    Returns:
        Shape (documents,); higher is more relevant.

    Raises:
        InputError: The aggregation is unknown, or the shapes do not match.
    """
    table = features(how, calibrated, mass)
    if weights is None:
        return table.mean(dim=0)
    signed = torch.as_tensor(weights, dtype=table.dtype, device=table.device)
    if signed.shape != table.shape[:1]:
        raise InputError(
            f"weights have shape {tuple(signed.shape)} for {len(table)} heads; "
            "give one weight per head."
        )
    # A caller's autocast would round the product to half the digits.
    with torch.autocast(table.device.type, enabled=False):
        return signed @ table
