"""Every selector as scores of candidates, computed from signals alone.

Heads are chosen on other collections than the one tested, or, in the rows named ``-within``, on
other queries of the same collection. What is tested with shuffled candidates was chosen with
candidates in BM25's order: nobody shuffles what heads are detected on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from compare_shelf import shelved
from torch import Tensor

from routehead_plugins import HeadSet
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Evaluation, evaluate
from routehead_plugins.io import Collection
from routehead_plugins.scoring import aggregate, fuse
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training import detect, fit_weights, weighted_scores

BM25, ALL = "bm25", "all"
MEASURES = ("nDCG@10", "RR@10")
HEADS = 8  # of every detected set but that of whole layers
FOLDS = 5
FIRST_STAGE_WEIGHT = 1.0
FUSED = f"+{BM25}"
WITHIN = "-within"

# Row -> detector; plain sets, to which BM25 is added with a weight that nobody fitted.
_DETECTED = {
    "ndcg": "ndcg",
    "qr": "qr",
    "core": "core",
    "layers-detected": "layers",
    "discriminability": "discriminability",
}
# Row -> options of `fit_weights`; each also with a weight of BM25 fitted together with the heads.
_LEARNED: dict[str, dict[str, str]] = {
    "weights": {},
    "weights-log": {"aggregation": "log"},
    "weights-pairs": {"objective": "pairs"},
}
_TRANSFERRED = (*_DETECTED, *(f"{name}{f}" for name in _LEARNED for f in ("", FUSED)))
_CROSS_VALIDATED = ("ndcg", "weights", f"weights{FUSED}")

Scores = Mapping[str, Tensor | None]
"""Query -> scores of its candidates in the signals' order; ``None`` for the order they have."""


@dataclass(frozen=True)
class Chosen:
    """What was chosen for one collection in one layout; ``None`` where nothing could be.

    Attributes:
        transferred: Row -> heads chosen on the other collections; empty where there are none.
        within: For each fold, the ids of its queries, and row -> heads chosen on the other folds.
        notes: What could not be chosen, and why.
    """

    transferred: dict[str, HeadSet | None] = field(default_factory=dict)
    within: list[tuple[frozenset[str], dict[str, HeadSet | None]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(
    name: str,
    signals: Mapping[str, SignalSet],
    *,
    seed: int = 0,
    kept: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Chosen:
    """Choose heads for one collection by every method.

    Args:
        name: The collection that they will be tested on.
        signals: Collection -> its signals, of one layout, candidates in BM25's order. Every query
            of the others counts the same.
        seed: Of everything that is drawn.
        kept: Folder in which heads are kept for the next time; ``None`` for nowhere.
        advance: Called `steps` times.
    """
    chosen = Chosen()

    def tried(row: str, train: SignalSet, on: str) -> HeadSet | None:
        try:
            return shelved(kept, [row, HEADS, seed], train, lambda: _choose(row, train, seed))
        except InputError as error:
            chosen.notes.append(f"{row} on {on}: {error}")
            return None
        finally:
            advance()

    others = [found for other, found in signals.items() if other != name]
    if others:
        joined = reduce(add, others)
        for row in _TRANSFERRED:
            chosen.transferred[row] = tried(row, joined, "the other collections")
    own = signals[name]
    for number, held_out in enumerate(folds(own.queries, seed), start=1):
        rest = own.subset([query for query in own.queries if query.query_id not in held_out])
        heads = {row: tried(row, rest, f"all but fold {number}") for row in _CROSS_VALIDATED}
        chosen.within.append((held_out, heads))
    return chosen


def steps(signals: Mapping[str, SignalSet]) -> int:
    """How often `choose` advances."""
    return FOLDS * len(_CROSS_VALIDATED) + (len(_TRANSFERRED) if len(signals) > 1 else 0)


def score_rows(
    signals: SignalSet, chosen: Chosen, likelihoods: Mapping[str, Tensor]
) -> dict[str, Scores]:
    """Score the candidates by every method.

    Args:
        signals: Of the collection and variant to test.
        chosen: Heads for this collection and layout.
        likelihoods: Query -> query likelihood given each candidate.

    Returns:
        Row -> scores, in the order of the table.
    """
    queries = {query.query_id: query for query in signals.queries}
    rows: dict[str, Scores] = {BM25: dict.fromkeys(queries)}

    def put(row: str, scores: Scores) -> None:
        rows[row] = scores
        if row.removesuffix(WITHIN) not in _LEARNED and not row.endswith(FUSED):
            rows[f"{row}{FUSED}"] = {
                query_id: None if found is None else _fused(found, queries[query_id])
                for query_id, found in scores.items()
            }

    put(ALL, {query_id: query.averaged for query_id, query in queries.items()})
    put("layers", _by_heads(signals, middle_third(signals.heads)))
    for row, heads in chosen.transferred.items():
        put(row, _by_heads(signals, heads))
    for row in _CROSS_VALIDATED if chosen.within else ():
        within: dict[str, Tensor | None] = {}
        for held_out, found in chosen.within:
            part = [query for query in signals.queries if query.query_id in held_out]
            within |= _by_heads(signals.subset(part), found[row])
        base = row.removesuffix(FUSED)
        put(f"{base}{WITHIN}{FUSED if row != base else ''}", within)
    put("likelihood", {query_id: likelihoods[query_id] for query_id in queries})
    return rows


def measure_rows(
    collection: Collection, signals: SignalSet, rows: Mapping[str, Scores], hits: int
) -> dict[str, Evaluation]:
    """Measure every row on all judged queries of a collection.

    Args:
        collection: With candidates; all its judged queries count.
        signals: Which candidates the scores are of.
        rows: As `score_rows` gives them.
        hits: Candidates per query.
    """
    docids = {query.query_id: query.docids for query in signals.queries}
    measured = {}
    for row, scores in rows.items():
        run = {}
        for query_id in collection.topics:
            candidates = collection.candidates(query_id, hits)
            found = scores.get(query_id)
            ranking = [(str(d.id), -float(rank)) for rank, d in enumerate(candidates)]
            if found is not None:
                # Blank candidates, of which there are no signals, come last.
                known = dict(zip(docids[query_id], found.tolist(), strict=True))
                ranking = [(docid, known.get(docid, float("-inf"))) for docid, _ in ranking]
                ranking.sort(key=lambda pair: -pair[1])
            run[query_id] = ranking
        measured[row] = evaluate(run, collection.qrels, MEASURES)
    return measured


def middle_third(heads: HeadSet) -> HeadSet:
    """The heads of the middle third of the layers, as `LayerInterval` has them."""
    layers = heads.last_layer + 1
    inside = range(layers // 3, 2 * layers // 3)
    return HeadSet([head for head in heads if head.layer in inside], aggregation="mean")


def folds(queries: Sequence[QuerySignals], seed: int) -> Iterator[frozenset[str]]:
    """Deal queries into parts, those of the same text into the same; none where there is one text.

    Returns:
        The query ids of each part.
    """
    texts = {query.query for query in queries}
    dealt = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    for start in range(min(FOLDS, len(dealt)) if len(dealt) > 1 else 0):
        part = set(dealt[start::FOLDS])
        yield frozenset(query.query_id for query in queries if query.query in part)


def _choose(row: str, train: SignalSet, seed: int) -> HeadSet:
    base = row.removesuffix(FUSED)
    if base in _DETECTED:
        return detect(train, _DETECTED[base], HEADS, seed=seed)
    options: dict[str, Any] = _LEARNED[base]
    return fit_weights(train, first_stage=row != base, seed=seed, **options)


def _by_heads(signals: SignalSet, heads: HeadSet | None) -> dict[str, Tensor | None]:
    if heads is None:
        return {query.query_id: None for query in signals.queries}
    if heads.weights is not None:
        return {
            query.query_id: weighted_scores(query, heads, signals.heads)
            for query in signals.queries
        }
    places = {head: place for place, head in enumerate(signals.heads)}
    chosen = [places[head] for head in heads]
    return {
        query.query_id: aggregate(
            heads.aggregation or "mean", query.calibrated[chosen], query.mass[chosen]
        )
        for query in signals.queries
    }


def _fused(scores: Tensor, query: QuerySignals) -> Tensor:
    return fuse(scores, query.first_stage, FIRST_STAGE_WEIGHT)
