"""Signals of many heads to one score per document: pure functions of tensors.

``mean``
    Average of the calibrated signals. With equal weights the order is that of ICR's sum (Eq. 1 of
    arXiv 2410.02642); heads that receive much attention have the larger say.
``sum``
    The same without dividing by the number of heads: the same order, another scale.
``standardised``
    Each head's calibrated signals at mean 0 and standard deviation 1 over the query's documents:
    heads become comparable, and so do queries.
``log``
    The same of the logarithm of the uncalibrated attention: what counts is by which factor one
    document draws more attention than another. A head's constant factors, such as the attention
    that its first tokens swallow, cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.errors import InputError

# Below this attention is as good as none, and its logarithm would only spread noise.
_LEAST_MASS = 1e-9


@dataclass(frozen=True)
class Aggregation:
    """One way of making scores of signals.

    Attributes:
        features: From calibrated signals and attention mass, each (heads, documents), to a table
            of the same shape, of which scores are weighted sums over the heads.
        divided: Whether equal weights are 1 / heads, rather than 1.
        comparable: Whether every head's row has the same spread, so that weights can be compared.
    """

    features: Callable[[Tensor, Tensor], Tensor]
    divided: bool
    comparable: bool


def standardise_heads(signals: Tensor) -> Tensor:
    """Apply ``scoring.standardise`` to every head at once.

    Args:
        signals: Shape (heads, documents).

    Returns:
        The same shape; each row has mean 0 and standard deviation 1, or is zero where the head
        gives all documents the same.
    """
    constant = (signals == signals[:, :1]).all(dim=1, keepdim=True)
    centred = signals - signals.mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    # Rounding would make something of nothing; and squares of the very small are 0.
    nothing = constant | (deviation == 0)
    return torch.where(nothing, 0.0, centred / torch.where(nothing, 1.0, deviation))


def _calibrated(calibrated: Tensor, mass: Tensor) -> Tensor:  # noqa: ARG001
    return calibrated


def _standardised(calibrated: Tensor, mass: Tensor) -> Tensor:  # noqa: ARG001
    return standardise_heads(calibrated)


def _log(calibrated: Tensor, mass: Tensor) -> Tensor:  # noqa: ARG001
    return standardise_heads(mass.clamp(min=_LEAST_MASS).log())


# All but `sum` can be recorded in a head set: `heads.AGGREGATIONS` holds their names.
_AGGREGATIONS = {
    "mean": Aggregation(_calibrated, divided=True, comparable=False),
    "sum": Aggregation(_calibrated, divided=False, comparable=False),
    "standardised": Aggregation(_standardised, divided=True, comparable=True),
    "log": Aggregation(_log, divided=True, comparable=True),
}


def get_aggregation(how: str) -> Aggregation:
    """Look an aggregation up by its name.

    Raises:
        InputError: There is none of that name.
    """
    if how not in _AGGREGATIONS:
        raise InputError(
            f"aggregation={how!r} does not exist; choose one of {', '.join(_AGGREGATIONS)}."
        )
    return _AGGREGATIONS[how]


def features(how: str, calibrated: Tensor, mass: Tensor) -> Tensor:
    """Prepare the table of which scores are weighted sums: what weights are learned on.

    Args:
        how: Name of the aggregation.
        calibrated: Attention that each document receives, less that from the query without
            content, shape (heads, documents).
        mass: The same before calibration.

    Returns:
        Shape (heads, documents).

    Raises:
        InputError: There is no such aggregation, or the shapes differ.
    """
    aggregation = get_aggregation(how)
    if calibrated.ndim != 2 or calibrated.shape != mass.shape:
        raise InputError(
            f"calibrated has shape {tuple(calibrated.shape)} and mass {tuple(mass.shape)}; "
            "give both as (heads, documents) of the same heads and documents."
        )
    return aggregation.features(calibrated, mass)


def aggregate(
    how: str,
    calibrated: Tensor,
    mass: Tensor,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Make one score per document of the signals of many heads.

    Args:
        how: ``"mean"``, ``"sum"``, ``"standardised"`` or ``"log"``; see the top of this module.
        calibrated: Attention that each document receives, less that from the query without
            content, shape (heads, documents).
        mass: The same before calibration.
        weights: Signed weight of each head, shape (heads,); scores are the weighted sum, divided by
            nothing. ``None`` for equal weights.

    Returns:
        Shape (documents,); higher is more relevant.

    Raises:
        InputError: There is no such aggregation, or the shapes do not go together.
    """
    table = features(how, calibrated, mass)
    if weights is None:
        return table.mean(dim=0) if get_aggregation(how).divided else table.sum(dim=0)
    signed = torch.as_tensor(weights, dtype=table.dtype, device=table.device)
    if signed.shape != table.shape[:1]:
        raise InputError(
            f"weights have shape {tuple(signed.shape)} for {len(table)} heads; "
            "give one weight per head."
        )
    return signed @ table
