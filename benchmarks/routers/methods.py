"""Scores of candidates for every row of the report, computed from signals alone.

Routers are those of `fit_router`. The part that holds for all queries is fitted once for each set
of examples, with seed 0, and the same fifth of them decides whether a correction is used; seeds
vary where learning a correction starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import FITTING, Cache, heads_from_json, source_files
from benchmarks.heads.methods import HEADS
from benchmarks.routers.data import Examples, Sample, Task
from routehead_plugins.scoring import fuse
from routehead_plugins.selection import ALL, FIRST_STAGE, FUSED, Router
from routehead_plugins.signals import QuerySignals
from routehead_plugins.training import (
    PARTS,
    STRENGTHS,
    Base,
    FitOptions,
    clearly_better,
    corrected,
    detect,
    each_ndcg,
    offline_scores,
    routed_scores,
    split_folds,
    static_base,
    static_l1,
    usable,
)

# Objective -> its row without any correction, and the row with a correction.
ROWS = {
    "listwise": ("weights", "routed-listwise"),
    "labels": ("labels", "routed-labels"),
    "neighbours": ("neighbours-static", "neighbours"),
}
FORCED = "-forced"  # a correction of one strength, used whether it helps or not
FORCED_STRENGTHS = {"listwise": 1.0, "labels": 0.1, "neighbours": 0.0}
ROUTED = {
    f"{routed}{forced}": static for static, routed in ROWS.values() for forced in ("", FORCED)
}
"""Rows that choose by query, each with the row that it falls back to."""
LEARNED = (*ROUTED, *(static for static, _ in ROWS.values()))

# Choosing the penalty takes longer than everything else together, so that changes elsewhere do not
# repeat it.
_PENALTY = source_files(
    "scoring", "signals/measures.py", "training/weights.py", "training/proximal.py"
)
_FUSION = (0.25, 0.5, 1.0)  # weights of the first stage, to choose from on the training queries
_LIKELIHOOD_FUSION = 0.5

Scores = dict[str, Tensor | None]
"""Query -> scores of its candidates in the signals' order; ``None`` for the order they have."""


@dataclass(frozen=True)
class RowScores:
    """Scores of one row on one sample.

    Attributes:
        scores: Scores by each seed; one entry where nothing is random.
        strengths: The chosen strengths, by split and seed; ``None`` for the static bias. Empty
            where there was nothing to choose.
    """

    scores: list[Scores]
    strengths: list[list[float | None]] = field(default_factory=list)

    def __add__(self, other: RowScores) -> RowScores:
        """Join the queries of two splits."""
        scores = [one | more for one, more in zip(self.scores, other.scores, strict=True)]
        return RowScores(scores, [*self.strengths, *other.strengths])


@dataclass(frozen=True)
class Fit:
    """One way of training.

    Attributes:
        options: Options of the training; their strengths and seed are ignored.
        strength: Strength of the penalty; ``None`` for the static bias alone.
        start: Random seed of the correction.
        unbiased: Whether to learn without a bias, as if nothing were known of the heads.
    """

    options: FitOptions
    strength: float | None
    start: int = 0
    unbiased: bool = False


class Trainer:
    """Fits routers, or loads their scores.

    Args:
        folder: Folder of the scores and of everything that is fitted.
    """

    def __init__(self, folder: Path) -> None:
        self.cache = Cache(folder, (*FITTING, Path(__file__)))

    def scores(self, how: Fit, train: Examples, test: Examples) -> list[Tensor]:
        """Score the candidates of all test queries."""
        key = ["scores", asdict(_relevant(how)), train.digest, test.digest]

        def score() -> list[Tensor]:
            return _routed(self.router(how, train), test, how.options.layer)

        return self.cache.scores(key, score)

    def router(self, how: Fit, train: Examples) -> Router:
        """Fit a router on all examples."""
        base = self._base(how.options, train, part=False)
        if how.unbiased:
            base = replace(base, bias=torch.zeros_like(base.bias), threshold=0.0)
        return corrected(base, how.strength, replace(how.options, seed=how.start))

    def choice(self, options: FitOptions, train: Examples, start: int) -> float | None:
        """Choose a strength, or none, like `fit_router`."""
        key = ["choice", asdict(_relevant(Fit(options, None, start))), train.digest]
        strength: float | None = self.cache.get(key, lambda: self._choose(options, train, start))
        return strength

    def _choose(self, options: FitOptions, train: Examples, start: int) -> float | None:
        base = self._base(options, train, part=True)
        held_out = _held_out(_usable(options, train))

        def measure(strength: float | None) -> Tensor:
            router = corrected(base, strength, replace(options, seed=start))
            scores = _routed(router, held_out, options.layer)
            return each_ndcg(scores, held_out.signals.queries)

        static = measure(None)
        figures = {strength: measure(strength) for strength in STRENGTHS[options.objective]}
        best = max(figures, key=lambda strength: float(figures[strength].mean()))
        return best if clearly_better(figures[best] - static) else None

    def _base(self, options: FitOptions, train: Examples, *, part: bool) -> Base:
        """Fit what holds for all queries; on a part of them if the rest is held out."""
        options = _relevant(Fit(options, None)).options
        usable_examples = _usable(options, train)
        examples = _held_out(usable_examples, rest=True) if part else usable_examples
        # The correction's options do not matter, nor does the layer unless queries are grouped.
        shared = asdict(options) | dict.fromkeys(["rank", "coordinates"])
        shared["layer"] = None if options.labels.groups is None else options.layer

        def compute() -> dict[str, Any]:
            embeddings = examples.embeddings[options.layer]
            return _base_to_json(static_base(examples.signals, embeddings, options, penalty()))

        def penalty() -> float | None:
            names = ("objective", "max_layer", "aggregation", "first_stage")
            key = ["l1", *(getattr(options, name) for name in names), train.digest]
            signals = _held_out(usable_examples, rest=True).signals
            l1: float | None = self.cache.get(key, lambda: static_l1(signals, options), _PENALTY)
            return l1

        content = self.cache.get(["base", shared, part, train.digest], compute)
        return _base_from_json(content, examples, options.layer)


def unseen_rows(
    trainer: Trainer, task: Task, layer: int, seeds: int, advance: Callable[[], None]
) -> dict[str, RowScores]:
    """Score a sample by every method, in the order of the table; see ``learned_rows``."""
    rows = _first_stage_row(task.sample)
    rows |= _over_splits(task, lambda train, test: _plain_rows(trainer, train, test))
    rows |= learned_rows(trainer, task, layer, seeds, advance)
    return rows | _likelihood_rows(task.sample)


def own_rows(
    trainer: Trainer, task: Task, layer: int, seeds: int, advance: Callable[[], None]
) -> dict[str, RowScores]:
    """Score a sample by the candidates' order and all learned methods; see ``learned_rows``."""
    return _first_stage_row(task.sample) | learned_rows(trainer, task, layer, seeds, advance)


def learned_rows(
    trainer: Trainer, task: Task, layer: int, seeds: int, advance: Callable[[], None]
) -> dict[str, RowScores]:
    """Score a sample by static and routed heads of every objective.

    Args:
        trainer: Fits the routers.
        task: Queries to test and to train on.
        layer: Layer after which queries are embedded.
        seeds: Number of seeds.
        advance: Callback after every split.
    """

    def rows_of_split(train: Examples, test: Examples) -> dict[str, RowScores]:
        rows: dict[str, RowScores] = {}
        for objective, (static, routed) in ROWS.items():
            options = FitOptions(layer=layer, objective=objective)
            # Nothing is random in a vote of neighbours.
            starts = range(1 if objective == "neighbours" else seeds)
            chosen = [trainer.choice(options, train, start) for start in starts]
            fits = {
                static: [Fit(options, None)],
                routed: [Fit(options, s, start) for s, start in zip(chosen, starts, strict=True)],
                f"{routed}{FORCED}": [Fit(options, FORCED_STRENGTHS[objective], s) for s in starts],
            }
            for row, ways in fits.items():
                scores = [_by_id(test, trainer.scores(way, train, test)) for way in ways]
                rows[row] = RowScores(scores, [chosen] if row == routed else [])
        advance()
        return rows

    return _over_splits(task, rows_of_split)


def fitted(trainer: Trainer, task: Task, how: Fit) -> RowScores:
    """Score a sample by one way of training."""

    def row_of_split(train: Examples, test: Examples) -> dict[str, RowScores]:
        return {"": RowScores([_by_id(test, trainer.scores(how, train, test))])}

    return _over_splits(task, row_of_split)[""]


def _first_stage_row(sample: Sample) -> dict[str, RowScores]:
    return {FIRST_STAGE: RowScores([{query.query_id: None for query in sample.queries}])}


def _plain_rows(trainer: Trainer, train: Examples, test: Examples) -> dict[str, RowScores]:
    """Score by all heads and by the best few, both also fused with the first stage."""
    key = ["ndcg", HEADS, train.digest]
    heads = trainer.cache.heads(key, lambda: detect(train.signals, "ndcg", HEADS))

    def by_all(query: QuerySignals) -> Tensor:
        return query.averaged

    def by_few(query: QuerySignals) -> Tensor:
        return offline_scores(query, heads, train.signals.heads)

    return {
        ALL: RowScores([{query.query_id: query.averaged for query in test.signals.queries}]),
        f"{ALL}{FUSED}": RowScores([_fused(by_all, train, test)]),
        f"ndcg-{HEADS}{FUSED}": RowScores([_fused(by_few, train, test)]),
    }


def _fused(score: Callable[[QuerySignals], Tensor], train: Examples, test: Examples) -> Scores:
    """Add first-stage scores with the weight that is best on the training queries."""
    queries = train.signals.with_contrast
    scores = [score(query) for query in queries]

    def measure(weight: float) -> float:
        fused = [fuse(s, q.first_stage, weight) for s, q in zip(scores, queries, strict=True)]
        return float(each_ndcg(fused, queries).mean())

    weight = max(_FUSION, key=measure)
    return {q.query_id: fuse(score(q), q.first_stage, weight) for q in test.signals.queries}


def _likelihood_rows(sample: Sample) -> dict[str, RowScores]:
    plain: Scores = {q.query_id: sample.likelihoods[q.query_id] for q in sample.queries}
    fused: Scores = {
        q.query_id: fuse(sample.likelihoods[q.query_id], q.first_stage, _LIKELIHOOD_FUSION)
        for q in sample.queries
    }
    return {"likelihood": RowScores([plain]), f"likelihood{FUSED}": RowScores([fused])}


def _over_splits(
    task: Task, score: Callable[[Examples, Examples], Mapping[str, RowScores]]
) -> dict[str, RowScores]:
    """Score split by split, and join the queries."""
    whole: dict[str, RowScores] = {}
    for train, test in task.splits:
        for row, scores in score(train, test).items():
            whole[row] = whole[row] + scores if row in whole else scores
    return whole


def _by_id(test: Examples, scores: Sequence[Tensor]) -> Scores:
    return {q.query_id: s for q, s in zip(test.signals.queries, scores, strict=True)}


def _routed(router: Router, test: Examples, layer: int) -> list[Tensor]:
    signals = test.signals
    return routed_scores(router, signals.queries, test.embeddings[layer], signals.heads)


def _usable(options: FitOptions, train: Examples) -> Examples:
    layer = options.layer
    signals, embeddings = usable(train.signals, train.embeddings[layer], options)
    return Examples(signals, {layer: embeddings})


def _held_out(examples: Examples, *, rest: bool = False) -> Examples:
    """Return the fifth of the queries that `fit_router` decides on with seed 0, or the rest."""
    parts = torch.tensor(split_folds(examples.signals.queries, PARTS, 0))
    return examples.select(parts != 0 if rest else parts == 0)


def _relevant(how: Fit) -> Fit:
    """Reset the options that are ignored."""
    return replace(how, options=replace(how.options, strengths=None, seed=0))


def _base_to_json(base: Base) -> dict[str, Any]:
    return {
        "heads": asdict(base.heads),
        "bias": base.bias.tolist(),
        "threshold": base.threshold,
        "gates": None if base.gates is None else base.gates.int().tolist(),
    }


def _base_from_json(content: Mapping[str, Any], examples: Examples, layer: int) -> Base:
    gates = None if content["gates"] is None else torch.tensor(content["gates"]).bool()
    return Base(
        examples.signals,
        examples.embeddings[layer],
        heads_from_json(content["heads"]),
        torch.tensor(content["bias"]),
        content["threshold"],
        gates,
    )
