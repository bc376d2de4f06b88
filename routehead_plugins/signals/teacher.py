"""Query likelihood as a teacher: slower scores by the same LLM, mixed into the judgments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import as_number
from routehead_plugins.errors import InputError, short_repr
from routehead_plugins.io import Collection, StrPath
from routehead_plugins.scoring import fuse
from routehead_plugins.signals.store import QuerySignals, SignalSet
from routehead_plugins.signals.teachers import LikelihoodTeacher, collect_teacher

# Weight of the retrieval scores beside the likelihood. 0.5 was best, or nearly so, on each of four
# different collections.
_FIRST_STAGE_WEIGHT = 0.5


def collect_likelihoods(
    collection: Collection,
    llm: FrozenLM,
    folder: StrPath,
    *,
    hits: int,
    max_doc_tokens: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Compute the likelihood of each query given each of its candidates.

    Args:
        collection: A collection with candidates.
        llm: The frozen LLM, with all its layers.
        folder: Folder of finished likelihoods, from which an interrupted run resumes.
        hits: Number of candidates per query.
        max_doc_tokens: Length to which documents are cut, in tokens; ``None`` for no limit.
        advance: Callback after every query.

    Returns:
        Query id -> mean log likelihood of the query's tokens given each non-blank candidate, in
        first-stage order.

    Raises:
        InputError: The folder cannot be created.
        UnsupportedModelError: The LLM was loaded without its last layers.
        CollectionError: The collection has no candidates.
    """
    teacher = LikelihoodTeacher(llm, max_doc_tokens)
    return collect_teacher(collection, teacher, folder, hits=hits, advance=advance)


def mix_teacher(signals: SignalSet, likelihoods: Mapping[str, Tensor], share: float) -> SignalSet:
    """Mix the teacher's scores into the judgments.

    The teacher's scores are a softmax over the query's candidates of the sum of likelihoods and
    retrieval scores, both standardised. The judgments are divided by their sum.

    Args:
        signals: Signals with judgments.
        likelihoods: The result of ``collect_likelihoods``; queries it lacks keep their judgments.
        share: Share of the teacher, from 0 to 1.

    Returns:
        The same signals with other gains, which sum to 1 for each query that has likelihoods.

    Raises:
        InputError: The share is out of range, or the likelihoods are for other candidates.
    """
    number = as_number(share)
    if number is None or not 0 <= number <= 1:
        raise InputError(f"share={short_repr(share)} is out of range; give a number from 0 to 1.")
    return signals.subset(
        [_mix(query, likelihoods.get(query.query_id), share) for query in signals.queries]
    )


def with_teacher(
    signals: SignalSet, scores: Mapping[str, Tensor], temperature: float, share: float = 1.0
) -> SignalSet:
    """Replace the judgments, or a share of them, by a teacher's distribution over the candidates.

    Args:
        signals: Signals, judged or not.
        scores: The result of ``collect_teacher``; queries it lacks keep their judgments.
        temperature: Temperature of the teacher's distribution.
        share: Share of the teacher where a query has a relevant candidate; elsewhere it is 1.

    Returns:
        The same signals with other gains, which sum to 1 for each query that has scores.

    Raises:
        InputError: The scores are for other candidates.
    """
    return signals.subset(
        [
            _scored(query, scores[query.query_id], temperature, share)
            if query.query_id in scores
            else query
            for query in signals.queries
        ]
    )


def _scored(query: QuerySignals, scores: Tensor, temperature: float, share: float) -> QuerySignals:
    _check_shape(query, scores, "scores")
    if not share and bool((query.gains > 0).any()):
        return query
    return _blend(query, scores / temperature, share)


def _check_shape(query: QuerySignals, scores: Tensor, name: str) -> None:
    if scores.shape != query.gains.shape:
        raise InputError(
            f"query {query.query_id!r} has {len(query.gains)} candidates in the signals but "
            f"{len(scores)} {name}; compute both from the same candidates."
        )


def _blend(query: QuerySignals, logits: Tensor, share: float) -> QuerySignals:
    """Mix a softmax into the judgments of a query."""
    teacher = logits.softmax(dim=0)
    judged = query.gains.clamp(min=0)
    total = float(judged.sum())
    # Without a relevant document the judgments have no distribution to mix.
    gains = (1 - share) * judged / total + share * teacher if total else teacher
    return replace(query, gains=gains, ideal_gains=gains[gains > 0].sort(descending=True).values)


def _mix(query: QuerySignals, likelihood: Tensor | None, share: float) -> QuerySignals:
    if likelihood is None:
        return query
    _check_shape(query, likelihood, "likelihoods")
    fused = fuse(likelihood, query.first_stage, _FIRST_STAGE_WEIGHT)
    return _blend(query, fused, share)
