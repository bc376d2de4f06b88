"""Checks of arguments that the functions of this room share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor

from routehead_plugins.errors import InputError, class_name, short_repr
from routehead_plugins.signals import QuerySignals, SignalSet

_SEEDS = 2**63


def check_signals(signals: object) -> None:
    """Check that an argument is a set of signals whose shapes fit and whose judgments are finite.

    The signals themselves may be missing, shape (0, documents); see also ``check_finite``.

    Raises:
        InputError: It is something else, has no queries, or a query's tensors do not fit.
    """
    if not isinstance(signals, SignalSet):
        raise InputError(f"signals is a {class_name(signals)}; give a SignalSet.")
    if not signals.queries:
        raise InputError("signals has no queries; compute signals of judged queries first.")
    for query in signals.queries:
        _check_query(query, len(signals.heads))


def _check_query(query: QuerySignals, heads: int) -> None:
    documents = len(query.docids)
    shapes = {
        "mass": (heads, documents),
        "calibrated": (heads, documents),
        "gains": (documents,),
        "first_stage": (documents,),
    }
    for name, shape in shapes.items():
        tensor = getattr(query, name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InputError(
                f"{name} of query {short_repr(query.query_id)} is not a floating-point tensor; "
                "compute the signals again."
            )
        if tuple(tensor.shape) not in (shape, (0, *shape[1:])):
            raise InputError(
                f"{name} of query {short_repr(query.query_id)} has shape {tuple(tensor.shape)}; "
                f"expected {shape}; compute the signals again."
            )
    for gains in (query.gains, query.ideal_gains):
        if not bool(gains.isfinite().all()):
            raise InputError(
                f"judgments of query {short_repr(query.query_id)} are not finite numbers; "
                "repair the qrels, or the teacher's likelihoods."
            )


def check_embeddings(embeddings: object, count: int) -> None:
    """Check that an argument is a matrix with a finite row for each of ``count`` queries.

    Raises:
        InputError: It is not.
    """
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise InputError(
            f"embeddings is a {class_name(embeddings)}; give a floating-point tensor of shape "
            f"({count}, width)."
        )
    if embeddings.ndim != 2 or not embeddings.shape[1]:
        raise InputError(
            f"embeddings has shape {tuple(embeddings.shape)}; give one of shape ({count}, width)."
        )
    if len(embeddings) != count:
        raise InputError(
            f"there are {len(embeddings)} embeddings for {count} queries; give one for each."
        )
    if not bool(embeddings.isfinite().all()):
        raise InputError("embeddings are not finite numbers; compute them again.")


def check_seed(seed: object) -> None:
    """Check that a random seed is one that every generator takes.

    Raises:
        InputError: It is not a whole number, or has more than 63 bits.
    """
    if not is_whole(seed) or not -_SEEDS < seed < _SEEDS:
        raise InputError(
            f"seed={short_repr(seed)} is not a seed; give a whole number of at most 63 bits."
        )


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument is one of several names.

    Raises:
        InputError: It is not.
    """
    if value not in choices:
        raise InputError(
            f"{name}={short_repr(value)} does not exist; choose one of {', '.join(choices)}."
        )
