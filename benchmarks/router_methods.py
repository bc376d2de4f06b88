"""Every row of the report as scores of candidates, computed from signals alone.

Routers are those of `training.fit`. What holds for all queries is fitted once for each set of
examples, with seed 0, and so is the fifth that decides whether a correction is kept; seeds vary
where learning a correction starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from compare_methods import ALL, BM25, FUSED, HEADS
from router_data import Examples, Sample, Task
from router_shelf import PENALTY, Shelf
from torch import Tensor

from routehead_plugins import HeadSet
from routehead_plugins.scoring import fuse
from routehead_plugins.selection import Router
from routehead_plugins.signals import QuerySignals
from routehead_plugins.training import (
    FitOptions,
    detect,
    each_ndcg,
    fit,
    offline_scores,
    routed_scores,
    split_folds,
)

# Objective -> its row without any correction, and the one with it.
ROWS = {
    "listwise": ("weights", "routed-listwise"),
    "labels": ("labels", "routed-labels"),
    "neighbours": ("neighbours-static", "neighbours"),
}
FORCED = "-forced"  # a correction of one strength, kept whether it helps or not
STRENGTHS = {"listwise": 1.0, "labels": 0.1, "neighbours": 0.0}
ROUTED = {
    f"{routed}{forced}": static for static, routed in ROWS.values() for forced in ("", FORCED)
}
"""Rows that choose by query, each with the row that it falls back to."""
LEARNED = (*ROUTED, *(static for static, _ in ROWS.values()))
_FUSION = (0.25, 0.5, 1.0)  # weights of the first stage, one of which training queries choose
_LIKELIHOOD_FUSION = 0.5

Scores = dict[str, Tensor | None]
"""Query -> scores of its candidates in the signals' order; ``None`` for the order they have."""


@dataclass(frozen=True)
class Found:
    """One row on one sample.

    Attributes:
        scores: Of each seed; one where there is nothing to draw.
        strengths: Those that were chosen, split by split and seed by seed; ``None`` for the static
            bias. Empty where there was nothing to choose.
    """

    scores: list[Scores]
    strengths: list[list[float | None]] = field(default_factory=list)

    def __add__(self, other: Found) -> Found:
        """Put the queries of two splits together."""
        scores = [one | more for one, more in zip(self.scores, other.scores, strict=True)]
        return Found(scores, [*self.strengths, *other.strengths])


@dataclass(frozen=True)
class Fit:
    """One way of training.

    Attributes:
        options: How; their strengths and seed are not looked at.
        strength: Of the penalty; ``None`` for the static bias alone.
        start: Seed of where learning starts.
        unbiased: Whether to learn without a bias, as if nothing were known of the heads.
    """

    options: FitOptions
    strength: float | None
    start: int = 0
    unbiased: bool = False


class Trainer:
    """Fits routers, or finds what they said.

    Args:
        shelf: Where that is kept.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def scores(self, how: Fit, train: Examples, test: Examples) -> list[Tensor]:
        """Score the candidates of all queries tested."""
        what = ["scores", asdict(_plain(how)), train.digest, test.digest]

        def score() -> list[Tensor]:
            return _scored(self.router(how, train), test, how.options.layer)

        return self.shelf.scores(what, score)

    def router(self, how: Fit, train: Examples) -> Router:
        """Fit a router on all examples."""
        base = self._base(how.options, train, part=False)
        if how.unbiased:
            base = replace(base, bias=torch.zeros_like(base.bias), threshold=0.0)
        return fit.corrected(base, how.strength, replace(how.options, seed=how.start))

    def choice(self, options: FitOptions, train: Examples, start: int) -> float | None:
        """Choose a strength, or none, as `fit_router` does."""
        what = ["choice", asdict(_plain(Fit(options, None, start))), train.digest]
        found: float | None = self.shelf.kept(what, lambda: self._choose(options, train, start))
        return found

    def _choose(self, options: FitOptions, train: Examples, start: int) -> float | None:
        base = self._base(options, train, part=True)
        held_out = _held_out(_usable(options, train))

        def measured(strength: float | None) -> Tensor:
            router = fit.corrected(base, strength, replace(options, seed=start))
            scores = _scored(router, held_out, options.layer)
            return each_ndcg(scores, held_out.signals.queries)

        static = measured(None)
        figures = {strength: measured(strength) for strength in fit.STRENGTHS[options.objective]}
        best = max(figures, key=lambda strength: float(figures[strength].mean()))
        return best if fit.clearly_better(figures[best] - static) else None

    def _base(self, options: FitOptions, train: Examples, *, part: bool) -> fit.Base:
        """What holds for all queries; of a part of them where the rest is to decide on it."""
        options = _plain(Fit(options, None)).options
        usable = _usable(options, train)
        used = _held_out(usable, rest=True) if part else usable
        # Neither the correction nor, unless queries are grouped, what they are embedded by matters.
        shared = asdict(options) | dict.fromkeys(["rank", "coordinates"])
        shared["layer"] = None if options.labels.groups is None else options.layer

        def make() -> dict[str, Any]:
            embeddings = used.embeddings[options.layer]
            return _written(fit.static_base(used.signals, embeddings, options, penalty()))

        def penalty() -> float | None:
            names = ("objective", "max_layer", "aggregation", "first_stage")
            what = ["l1", *(getattr(options, name) for name in names), train.digest]
            found: float | None = self.shelf.kept(
                what, lambda: fit.static_l1(_held_out(usable, rest=True).signals, options), PENALTY
            )
            return found

        kept = self.shelf.kept(["base", shared, part, train.digest], make)
        return _base_of(kept, used, options.layer)


def unseen_rows(
    trainer: Trainer, task: Task, layer: int, seeds: int, advance: Callable[[], None]
) -> dict[str, Found]:
    """Score a sample by every method, trained or not, in the order of the table."""
    rows: dict[str, Found] = {
        BM25: Found([{query.query_id: None for query in task.sample.queries}])
    }
    rows |= _over_splits(task, lambda train, test: _plain_rows(trainer, train, test))
    rows |= learned_rows(trainer, task, layer, seeds, advance)
    return rows | _likelihood_rows(task.sample)


def own_rows(
    trainer: Trainer, task: Task, layer: int, seeds: int, advance: Callable[[], None]
) -> dict[str, Found]:
    """Score a sample by the candidates' order and by everything that is learned."""
    rows = {BM25: Found([{query.query_id: None for query in task.sample.queries}])}
    return rows | learned_rows(trainer, task, layer, seeds, advance)


def learned_rows(
    trainer: Trainer, task: Task, layer: int, seeds: int, advance: Callable[[], None]
) -> dict[str, Found]:
    """Score a sample by static and routed heads of every objective.

    Args:
        trainer: Fits the routers.
        task: What is tested, and trained on.
        layer: After which queries are embedded.
        seeds: How many.
        advance: Called after every split.
    """

    def of_split(train: Examples, test: Examples) -> dict[str, Found]:
        found: dict[str, Found] = {}
        for objective, (static, routed) in ROWS.items():
            options = FitOptions(layer=layer, objective=objective)
            # A vote of neighbours leaves nothing to draw.
            starts = range(1 if objective == "neighbours" else seeds)
            chosen = [trainer.choice(options, train, start) for start in starts]
            fits = {
                static: [Fit(options, None)],
                routed: [Fit(options, s, start) for s, start in zip(chosen, starts, strict=True)],
                f"{routed}{FORCED}": [Fit(options, STRENGTHS[objective], s) for s in starts],
            }
            for row, ways in fits.items():
                scores = [_by_id(test, trainer.scores(way, train, test)) for way in ways]
                found[row] = Found(scores, [chosen] if row == routed else [])
        advance()
        return found

    return _over_splits(task, of_split)


def fitted(trainer: Trainer, task: Task, how: Fit) -> Found:
    """Score a sample by one way of training."""

    def of_split(train: Examples, test: Examples) -> dict[str, Found]:
        return {"": Found([_by_id(test, trainer.scores(how, train, test))])}

    return _over_splits(task, of_split)[""]


def _plain_rows(trainer: Trainer, train: Examples, test: Examples) -> dict[str, Found]:
    """All heads, and the best few, both also with the first stage's scores."""
    heads = trainer.shelf.kept(
        ["ndcg", HEADS, train.digest], lambda: str(detect(train.signals, "ndcg", HEADS))
    )
    few = replace(HeadSet.parse(heads), aggregation="mean")

    def averaged(query: QuerySignals) -> Tensor:
        return query.averaged

    def by_few(query: QuerySignals) -> Tensor:
        return offline_scores(query, few, train.signals.heads)

    return {
        ALL: Found([{query.query_id: query.averaged for query in test.signals.queries}]),
        f"{ALL}{FUSED}": Found([_fused(averaged, train, test)]),
        f"ndcg-{HEADS}{FUSED}": Found([_fused(by_few, train, test)]),
    }


def _fused(score: Callable[[QuerySignals], Tensor], train: Examples, test: Examples) -> Scores:
    """Add first-stage scores with the weight that is best on the training queries."""
    queries = train.signals.with_contrast
    scores = [score(query) for query in queries]

    def measured(weight: float) -> float:
        found = [fuse(s, q.first_stage, weight) for s, q in zip(scores, queries, strict=True)]
        return float(each_ndcg(found, queries).mean())

    weight = max(_FUSION, key=measured)
    return {q.query_id: fuse(score(q), q.first_stage, weight) for q in test.signals.queries}


def _likelihood_rows(sample: Sample) -> dict[str, Found]:
    plain: Scores = {q.query_id: sample.likelihoods[q.query_id] for q in sample.queries}
    fused: Scores = {
        q.query_id: fuse(sample.likelihoods[q.query_id], q.first_stage, _LIKELIHOOD_FUSION)
        for q in sample.queries
    }
    return {"likelihood": Found([plain]), f"likelihood{FUSED}": Found([fused])}


def _over_splits(
    task: Task, score: Callable[[Examples, Examples], Mapping[str, Found]]
) -> dict[str, Found]:
    """Score split by split, and put the queries together."""
    whole: dict[str, Found] = {}
    for train, test in task.splits:
        for row, found in score(train, test).items():
            whole[row] = whole[row] + found if row in whole else found
    return whole


def _by_id(test: Examples, scores: Sequence[Tensor]) -> Scores:
    return {q.query_id: s for q, s in zip(test.signals.queries, scores, strict=True)}


def _scored(router: Router, test: Examples, layer: int) -> list[Tensor]:
    signals = test.signals
    return routed_scores(router, signals.queries, test.embeddings[layer], signals.heads)


def _usable(options: FitOptions, train: Examples) -> Examples:
    layer = options.layer
    signals, embeddings = fit.usable(train.signals, train.embeddings[layer], options)
    return Examples(signals, {layer: embeddings})


def _held_out(usable: Examples, *, rest: bool = False) -> Examples:
    """The fifth of the queries that `fit_router` decides by with seed 0, or the rest."""
    parts = torch.tensor(split_folds(usable.signals.queries, fit.PARTS, 0))
    return usable.some(parts != 0 if rest else parts == 0)


def _plain(how: Fit) -> Fit:
    """The same without what is not looked at."""
    return replace(how, options=replace(how.options, strengths=None, seed=0))


def _written(base: fit.Base) -> dict[str, Any]:
    heads = base.heads
    return {
        "heads": [str(head) for head in heads],
        "named": {name: getattr(heads, name) for name in ("model", "layout", "aggregation")},
        "first_stage_weight": heads.first_stage_weight,
        "bias": base.bias.tolist(),
        "threshold": base.threshold,
        "gates": None if base.gates is None else base.gates.int().tolist(),
    }


def _base_of(kept: Mapping[str, Any], used: Examples, layer: int) -> fit.Base:
    heads = replace(
        HeadSet.parse(",".join(kept["heads"])),
        **kept["named"],
        first_stage_weight=kept["first_stage_weight"],
    )
    gates = None if kept["gates"] is None else torch.tensor(kept["gates"]).bool()
    bias, threshold = torch.tensor(kept["bias"]), kept["threshold"]
    return fit.Base(used.signals, used.embeddings[layer], heads, bias, threshold, gates)
