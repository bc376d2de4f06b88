"""Query likelihood as a teacher: what the same LLM says of the candidates, at a higher price."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routehead_plugins import __version__
from routehead_plugins.backbone import FrozenLM, QueryLikelihood
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection, Journal, make_folder
from routehead_plugins.scoring import fuse
from routehead_plugins.signals.store import QuerySignals, SignalSet

# Of the retrieval scores beside the likelihood: 0.5 was best, or near it, on each of four unlike
# collections.
_FIRST_STAGE = 0.5


def collect_likelihoods(
    collection: Collection,
    llm: FrozenLM,
    folder: str | Path,
    *,
    hits: int,
    max_doc_tokens: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Compute how likely each query is given each of its candidates.

    What is in the folder already is not computed again; a run that is stopped goes on there.

    Args:
        collection: With candidates.
        llm: The frozen LLM, with all its layers.
        folder: Where likelihoods are kept.
        hits: Candidates per query.
        max_doc_tokens: Where documents are cut.
        advance: Called after every query.

    Returns:
        Query -> mean log likelihood of its tokens given each candidate that is not blank, in the
        run's order.

    Raises:
        InputError: The folder cannot be made.
        UnsupportedModelError: The LLM was loaded without its last layers.
        CollectionError: There are no candidates.
    """
    scorer = QueryLikelihood(llm, max_doc_tokens=max_doc_tokens)
    state: dict[str, Any] = {
        "model": llm.name,
        "dtype": str(llm.dtype),
        "max_doc_tokens": max_doc_tokens,
        "version": __version__,
    }
    # A journal of other settings would be dropped; hours of work are better kept apart.
    path = make_folder(folder, "likelihoods") / f"likelihood-{collection.name}-{_digest(state)}"
    found = {}
    with Journal(path, state) as journal:
        for query_id, query in collection.topics.items():
            documents = readable(collection, query_id, hits)
            if documents:
                shown = [query, [[document.id, document.text] for document in documents]]
                key = f"{query_id} {_digest(shown)}"
                if key not in journal.done:
                    journal.append(key, scorer.score(query, documents))
                found[query_id] = torch.tensor(journal.done[key])
            advance()
    return found


def readable(collection: Collection, query_id: str, hits: int) -> list[Document]:
    """The candidates that signals are of: all that are not blank."""
    candidates = collection.candidates(query_id, hits)
    return [document for document in candidates if not document.is_blank]


def mix_teacher(signals: SignalSet, likelihoods: Mapping[str, Tensor], share: float) -> SignalSet:
    """Mix a teacher's opinion into the judgments.

    The opinion is the softmax, over the query's candidates, of likelihood and retrieval scores,
    both standardised; the judgments are divided by their sum.

    Args:
        signals: The signals, with judgments.
        likelihoods: From ``collect_likelihoods``; queries without any keep their judgments.
        share: Of the teacher, from 0 to 1.

    Returns:
        The same signals with other gains, which sum to 1 for each query that has likelihoods.

    Raises:
        InputError: The share is out of range, or likelihoods are of other candidates.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the teacher's share {share!r} is out of range; give 0 to 1.")
    return signals.subset(
        [
            _mixed(query, likelihoods[query.query_id], share)
            if query.query_id in likelihoods
            else query
            for query in signals.queries
        ]
    )


def _mixed(query: QuerySignals, likelihood: Tensor, share: float) -> QuerySignals:
    if likelihood.shape != query.gains.shape:
        raise InputError(
            f"query {query.query_id!r} has {len(query.gains)} candidates in the signals but "
            f"{len(likelihood)} likelihoods; compute both from the same candidates."
        )
    opinion = fuse(likelihood, query.first_stage, _FIRST_STAGE).softmax(dim=0)
    judged = query.gains.clamp(min=0)
    total = float(judged.sum())
    # Where nothing is judged relevant the teacher alone is right.
    gains = (1 - share) * judged / total + share * opinion if total else opinion
    ideal = gains[gains > 0].sort(descending=True).values
    return replace(query, gains=gains, ideal_gains=ideal)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
