"""Ablations of the training of routers: every choice changed alone, with one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.routers.data import (
    JUDGED,
    KINDS,
    SYNTHESIZED,
    Corpora,
    Task,
    join_samples,
    own_synthesized,
    unseen,
)
from benchmarks.routers.methods import FORCED_STRENGTHS, Fit, Trainer, fitted
from benchmarks.routers.report import Row, Variant, measure_seeds
from routehead_plugins.errors import InputError
from routehead_plugins.training import FitOptions, LabelOptions, label_reliability

UNSEEN, OWN = "unseen", "own, synthesized"
_GROUPS = 8
_TEACHER = 0.3
_SHALLOW = 2 / 3  # of the layers


@dataclass(frozen=True)
class Change:
    """One difference in the training.

    Attributes:
        name: Name for the table; empty for the default.
        how: The training with this difference.
        kinds: Kinds of queries to train on if the collection is unseen.
        teacher: Share of the query likelihood in the judgments if the collection is unseen.
    """

    name: str
    how: Fit
    kinds: Sequence[str] = KINDS
    teacher: float = 0.0

    @property
    def data(self) -> tuple[tuple[str, ...], float]:
        """Kinds of queries and share of the teacher, which decide the training data."""
        return tuple(self.kinds), self.teacher


def changes(layers: Sequence[int], depth: int) -> Iterator[Change]:
    """Yield the default of each objective, which has no name, and its changes."""
    plain = Fit(FitOptions(layer=layers[-1]), FORCED_STRENGTHS["listwise"])
    yield Change("", plain)
    for strength in (10.0, 3.0, 0.3):
        yield Change(f"strength {strength:g}", replace(plain, strength=strength))
    for name, values in (("rank", (2, 32)), ("coordinates", (8, 64)), ("layer", layers[:-1])):
        for value in values:
            yield Change(f"{name} {value}", _with(plain, **{name: value}))
    deepest = int(_SHALLOW * depth) - 1
    # Like in `routehead train`, queries are embedded no deeper than heads are read.
    layer = max((layer for layer in layers if layer <= deepest), default=layers[0])
    yield Change(f"max_layer {deepest}", _with(plain, max_layer=deepest, layer=layer))
    labels = _with(replace(plain, strength=FORCED_STRENGTHS["labels"]), objective="labels")
    yield Change("", labels)
    for strength in (1.0, 0.3, 0.0):
        yield Change(f"strength {strength:g}", replace(labels, strength=strength))
    yield Change("no bias", replace(labels, unbiased=True))
    for name, options in denoised().items():
        if name:
            yield Change(name, _with(labels, labels=options))


def denoised() -> dict[str, LabelOptions]:
    """Return name -> options of the search for labels; the default's name is empty."""
    choices = {"": LabelOptions()}
    choices |= {f"K {count}": LabelOptions(candidates=count) for count in (16, 64)}
    choices |= {f"P {count}": LabelOptions(max_heads=count) for count in (4, 16)}
    for utility in ("ndcg", "correlation", "margin"):
        for shrinkage in (0.0, 0.5):
            names = [utility] * (utility != "ndcg") + [f"shrinkage {shrinkage}"] * (shrinkage > 0)
            choices[", ".join(names)] = LabelOptions(utility=utility, shrinkage=shrinkage)
    return choices | {f"groups {_GROUPS}": LabelOptions(groups=_GROUPS)}


def data_changes(layer: int, *, synthesized: bool) -> Iterator[Change]:
    """Yield changes of the training data for unseen collections."""
    plain = Fit(FitOptions(layer=layer), FORCED_STRENGTHS["listwise"])
    if synthesized:
        for kind in (JUDGED, SYNTHESIZED):
            yield Change(f"{kind} only", plain, (kind,))
    yield Change(f"{JUDGED}, teacher {_TEACHER}", plain, (JUDGED,), _TEACHER)


def ablate(
    trainer: Trainer,
    corpora: Corpora,
    wanted: Sequence[tuple[str, Change]],
    hits: int,
    advance: Callable[[], None],
) -> tuple[list[Variant], list[str]]:
    """Train with every change, and with the static bias alone.

    Returns:
        The figures, and the reasons why figures are missing.
    """
    tasks: dict[Any, Mapping[str, Task]] = {}
    variants, notes = [], []
    for question, change in wanted:
        key = (question, change.data)
        if key not in tasks:
            tasks[key] = (
                own_synthesized(corpora) if question == OWN else unseen(corpora, *change.data)
            )
        objective = change.how.options.objective
        try:
            static = replace(change.how, strength=None, unbiased=False)
            rows = [_rows(trainer, tasks[key], how, hits) for how in (static, change.how)]
            variants.append(Variant(question, objective, change.name, *rows))
        except InputError as error:  # such as groups of fewer queries
            notes.append(f"{question}, {objective}, {change.name}: {error}")
        advance()
    return variants, notes


def questions(corpora: Corpora, layers: Sequence[int], depth: int) -> list[tuple[str, Change]]:
    """List the pairs of question and change that these collections allow."""
    synthesized = all(SYNTHESIZED in samples for samples in corpora.values())
    pairs = [(OWN, change) for change in changes(layers, depth) if synthesized]
    if len(corpora) > 1:
        pairs += [(UNSEEN, change) for change in changes(layers, depth)]
        pairs += [(UNSEEN, change) for change in data_changes(layers[-1], synthesized=synthesized)]
    return pairs


def label_reliabilities(
    trainer: Trainer, corpora: Corpora, layer: int
) -> dict[str, dict[str, Any]]:
    """Measure labels of judged queries on documents that they were not searched on.

    Synthesized queries have one relevant document, which cannot be on both halves.

    Returns:
        Name of the options -> figures; none where no query can be halved.
    """
    judged = join_samples([samples[JUDGED] for samples in corpora.values()])
    embeddings = judged.embeddings[layer][[query.has_contrast for query in judged.signals.queries]]
    reliability = {}
    for name, options in denoised().items():

        def measure(options: LabelOptions = options) -> dict[str, Any]:
            try:
                return asdict(label_reliability(judged.signals, options, embeddings=embeddings))
            except InputError:
                return {}

        figures = trainer.cache.get(["reliability", asdict(options), layer, judged.digest], measure)
        if figures:
            reliability[name] = figures
    return reliability


def _rows(trainer: Trainer, tasks: Mapping[str, Task], how: Fit, hits: int) -> dict[str, Row]:
    return {
        name: measure_seeds(task.sample, {"": fitted(trainer, task, how)}, hits)[""]
        for name, task in tasks.items()
    }


def _with(how: Fit, **changed: Any) -> Fit:
    return replace(how, options=replace(how.options, **changed))
