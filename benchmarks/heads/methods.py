"""Scores of candidates by every selector, computed from signals alone.

Heads are chosen on other collections than the one tested, or, in the rows named ``-within``, on
other queries of the same collection. Heads tested with shuffled candidates were chosen with
candidates in BM25's order, as in practice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any

from torch import Tensor

from benchmarks.common import Cache, signals_digest
from routehead_plugins import HeadSet, Recipe
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Evaluation, evaluate
from routehead_plugins.io import Collection
from routehead_plugins.scoring import fuse
from routehead_plugins.selection import ALL, FIRST_STAGE, FUSED
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training import detect, fit_weights, offline_scores, split_folds

MEASURES = ("nDCG@10", "RR@10")
HEADS = 8  # of every detected set but that of whole layers
FOLDS = 5
FIRST_STAGE_WEIGHT = 1.0
WITHIN = "-within"

# Row -> detector; plain sets, to which BM25 is added with a weight that is not fitted.
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
    """Heads for one collection in one layout; ``None`` where a method could not choose any.

    Attributes:
        transferred: Row -> heads chosen on the other collections; empty where there are none.
        within: For each fold, the ids of its queries, and row -> heads chosen on the other folds.
        notes: Reasons why heads could not be chosen.
    """

    transferred: dict[str, HeadSet | None] = field(default_factory=dict)
    within: list[tuple[frozenset[str], dict[str, HeadSet | None]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(
    name: str,
    signals: Mapping[str, SignalSet],
    *,
    seed: int = 0,
    cache: Cache | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Chosen:
    """Choose heads for one collection by every method.

    Args:
        name: The collection that they will be tested on.
        signals: Collection -> its signals, of one layout, candidates in BM25's order. Every query
            of the other collections counts the same.
        seed: Random seed.
        cache: Keeps the heads for the next run.
        advance: Callback after each of the `steps`.
    """
    chosen, cache = Chosen(), cache or Cache(None)

    def choose_rows(rows: Sequence[str], train: SignalSet, where: str) -> dict[str, HeadSet | None]:
        heads: dict[str, HeadSet | None] = dict.fromkeys(rows)
        digest = signals_digest(train)
        for row in rows:
            try:
                key = [row, HEADS, seed, digest]
                heads[row] = cache.heads(key, partial(_choose, row, train, seed))
            except InputError as error:
                chosen.notes.append(f"{row} on {where}: {error}")
            advance()
        return heads

    others = [other for other_name, other in signals.items() if other_name != name]
    if others:
        joined = reduce(add, others)
        chosen.transferred.update(choose_rows(_TRANSFERRED, joined, "the other collections"))
    own = signals[name]
    for number, held_out in enumerate(folds(own.queries, seed), start=1):
        rest = own.subset([query for query in own.queries if query.query_id not in held_out])
        heads = choose_rows(_CROSS_VALIDATED, rest, f"all but fold {number}")
        chosen.within.append((held_out, heads))
    return chosen


def steps(signals: Mapping[str, SignalSet]) -> int:
    """Return how often `choose` advances."""
    return FOLDS * len(_CROSS_VALIDATED) + (len(_TRANSFERRED) if len(signals) > 1 else 0)


def score_rows(
    signals: SignalSet, chosen: Chosen, likelihoods: Mapping[str, Tensor]
) -> dict[str, Scores]:
    """Score the candidates by every method.

    Args:
        signals: Signals of the collection and variant to test.
        chosen: Heads for this collection and layout.
        likelihoods: Query -> query likelihood given each candidate.

    Returns:
        Row -> scores, in the order of the table.
    """
    queries = {query.query_id: query for query in signals.queries}
    rows: dict[str, Scores] = {FIRST_STAGE: dict.fromkeys(queries)}

    def add_row(row: str, scores: Scores) -> None:
        rows[row] = scores
        if row.removesuffix(WITHIN) not in _LEARNED and not row.endswith(FUSED):
            rows[f"{row}{FUSED}"] = {
                query_id: None
                if values is None
                else fuse(values, queries[query_id].first_stage, FIRST_STAGE_WEIGHT)
                for query_id, values in scores.items()
            }

    add_row(ALL, {query_id: query.averaged for query_id, query in queries.items()})
    add_row("layers", _by_heads(signals, middle_third(signals.heads)))
    for row, heads in chosen.transferred.items():
        add_row(row, _by_heads(signals, heads))
    for row in _CROSS_VALIDATED if chosen.within else ():
        within: dict[str, Tensor | None] = {}
        for held_out, heads_by_row in chosen.within:
            part = [query for query in signals.queries if query.query_id in held_out]
            within |= _by_heads(signals.subset(part), heads_by_row[row])
        base = row.removesuffix(FUSED)
        add_row(f"{base}{WITHIN}{FUSED if row != base else ''}", within)
    add_row("likelihood", {query_id: likelihoods[query_id] for query_id in queries})
    return rows


def measure_rows(
    collection: Collection, signals: SignalSet, rows: Mapping[str, Scores], hits: int
) -> dict[str, Evaluation]:
    """Measure every row on all judged queries of a collection.

    Args:
        collection: Collection with candidates; all its judged queries count.
        signals: Signals that the scores were computed from.
        rows: Row -> scores, from `score_rows`.
        hits: Candidates per query.
    """
    docids = {query.query_id: query.docids for query in signals.queries}
    evaluations = {}
    for row, scores in rows.items():
        run = {}
        for query_id in collection.topics:
            candidates = collection.candidates(query_id, hits)
            values = scores.get(query_id)
            ranking = [(str(d.id), -float(rank)) for rank, d in enumerate(candidates)]
            if values is not None:
                # Blank candidates, which have no signals, come last.
                known = dict(zip(docids[query_id], values.tolist(), strict=True))
                ranking = [(docid, known.get(docid, float("-inf"))) for docid, _ in ranking]
                ranking.sort(key=lambda pair: -pair[1])
            run[query_id] = ranking
        evaluations[row] = evaluate(run, collection.qrels, MEASURES)
    return evaluations


def middle_third(heads: HeadSet) -> HeadSet:
    """Return the heads of the middle third of the layers, like `LayerInterval`."""
    layers = heads.last_layer + 1
    inside = range(layers // 3, 2 * layers // 3)
    return HeadSet(
        [head for head in heads if head.layer in inside], recipe=Recipe(aggregation="mean")
    )


def folds(queries: Sequence[QuerySignals], seed: int) -> list[frozenset[str]]:
    """Split queries by their text into folds of query ids; none if all have the same text."""
    if len({query.query for query in queries}) < 2:
        return []
    parts = split_folds(queries, FOLDS, seed)
    return [
        frozenset(q.query_id for q, part in zip(queries, parts, strict=True) if part == fold)
        for fold in range(max(parts) + 1)
    ]


def _choose(row: str, train: SignalSet, seed: int) -> HeadSet:
    base = row.removesuffix(FUSED)
    if base in _DETECTED:
        return detect(train, _DETECTED[base], HEADS, seed=seed)
    options: dict[str, Any] = _LEARNED[base]
    return fit_weights(train, first_stage=row != base, seed=seed, **options)


def _by_heads(signals: SignalSet, heads: HeadSet | None) -> dict[str, Tensor | None]:
    if heads is None:
        return {query.query_id: None for query in signals.queries}
    if heads.recipe.aggregation is None:
        heads = replace(heads, recipe=replace(heads.recipe, aggregation="mean"))
    return {
        query.query_id: offline_scores(query, heads, signals.heads) for query in signals.queries
    }
