"""What every choice in the training of a router is worth, each changed alone, with one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from router_data import JUDGED, KINDS, SYNTHESIZED, Corpora, Task, joined, own_synthesized, unseen
from router_methods import STRENGTHS, Fit, Trainer, fitted
from router_report import Row, Variant, measured

from routehead_plugins.errors import InputError
from routehead_plugins.training import FitOptions, LabelOptions, label_reliability

UNSEEN, OWN = "unseen", "own, synthesized"
_GROUPS = 8
_TEACHER = 0.3
_SHALLOW = 2 / 3  # of the layers


@dataclass(frozen=True)
class Change:
    """One thing that is done differently.

    Attributes:
        name: What, for the table; empty for nothing.
        how: To train with it.
        kinds: Of queries to train on, where the collection is unseen.
        teacher: Share of the query likelihood in judgments, likewise.
    """

    name: str
    how: Fit
    kinds: Sequence[str] = KINDS
    teacher: float = 0.0

    @property
    def data(self) -> tuple[tuple[str, ...], float]:
        """What is trained on."""
        return tuple(self.kinds), self.teacher


def changes(layers: Sequence[int], depth: int) -> Iterator[Change]:
    """Every change that is tried, wherever it is tried.

    Args:
        layers: After which queries are embedded, the last one by default.
        depth: Layers of the LLM.
    """
    plain = Fit(FitOptions(layer=layers[-1]), STRENGTHS["listwise"])
    yield Change("", plain)
    for strength in (10.0, 3.0, 0.3):
        yield Change(f"strength {strength:g}", replace(plain, strength=strength))
    for name, values in (("rank", (2, 32)), ("coordinates", (8, 64)), ("layer", layers[:-1])):
        for value in values:
            yield Change(f"{name} {value}", _with(plain, **{name: value}))
    deepest = int(_SHALLOW * depth) - 1
    # As `routehead train` has it, queries are embedded no deeper than heads are read.
    layer = max((each for each in layers if each <= deepest), default=layers[0])
    yield Change(f"max_layer {deepest}", _with(plain, max_layer=deepest, layer=layer))
    labels = _with(replace(plain, strength=STRENGTHS["labels"]), objective="labels")
    yield Change("", labels)
    for strength in (1.0, 0.3, 0.0):
        yield Change(f"strength {strength:g}", replace(labels, strength=strength))
    yield Change("no bias", replace(labels, unbiased=True))
    for name, options in denoised().items():
        if name:
            yield Change(name, _with(labels, labels=options))


def denoised() -> dict[str, LabelOptions]:
    """Ways of searching for labels, by their names; the default has none."""
    found = {"": LabelOptions()}
    found |= {f"K {count}": LabelOptions(candidates=count) for count in (16, 64)}
    found |= {f"P {count}": LabelOptions(max_heads=count) for count in (4, 16)}
    for utility in ("ndcg", "correlation", "margin"):
        for shrinkage in (0.0, 0.5):
            names = [utility] * (utility != "ndcg") + [f"shrinkage {shrinkage}"] * (shrinkage > 0)
            found[", ".join(names)] = LabelOptions(utility=utility, shrinkage=shrinkage)
    return found | {f"groups {_GROUPS}": LabelOptions(groups=_GROUPS)}


def data_changes(layer: int, *, synthesized: bool) -> Iterator[Change]:
    """What to train on for unseen collections.

    Args:
        layer: After which queries are embedded.
        synthesized: Whether there are synthesized queries; without, all are judged anyway.
    """
    plain = Fit(FitOptions(layer=layer), STRENGTHS["listwise"])
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

    Args:
        trainer: Fits the routers.
        corpora: What is trained and tested on.
        wanted: Questions, and changes.
        hits: Candidates per query.
        advance: Called after every change.

    Returns:
        What was measured, and what could not be, and why.
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
            found = [
                _rows(trainer, tasks[key], how, hits)
                for how in (replace(change.how, strength=None, unbiased=False), change.how)
            ]
            variants.append(Variant(question, objective, change.name, *found))
        except InputError as error:  # such as groups of fewer queries
            notes.append(f"{question}, {objective}, {change.name}: {error}")
        advance()
    return variants, notes


def questions(corpora: Corpora, layers: Sequence[int], depth: int) -> list[tuple[str, Change]]:
    """All that can be asked of the collections there are."""
    synthesized = all(SYNTHESIZED in found for found in corpora.values())
    several = len(corpora) > 1
    found = [(OWN, change) for change in changes(layers, depth) if synthesized]
    if several:
        found += [(UNSEEN, change) for change in changes(layers, depth)]
        found += [(UNSEEN, each) for each in data_changes(layers[-1], synthesized=synthesized)]
    return found


def label_reliabilities(
    trainer: Trainer, corpora: Corpora, layer: int
) -> dict[str, dict[str, Any]]:
    """Measure labels of judged queries on documents that they were not searched on.

    Those of synthesized queries cannot be: there is one relevant document, which cannot be halved.

    Returns:
        Way of searching -> figures; none where no query can be halved.
    """
    judged = joined([found[JUDGED] for found in corpora.values()])
    embeddings = judged.embeddings[layer][[query.has_contrast for query in judged.signals.queries]]
    found = {}
    for name, options in denoised().items():

        def measure(options: LabelOptions = options) -> dict[str, Any]:
            try:
                return asdict(label_reliability(judged.signals, options, embeddings=embeddings))
            except InputError:
                return {}

        what = ["reliability", asdict(options), layer, judged.digest]
        figures = trainer.shelf.kept(what, measure)
        if figures:
            found[name] = figures
    return found


def _rows(trainer: Trainer, tasks: Mapping[str, Task], how: Fit, hits: int) -> dict[str, Row]:
    return {
        name: measured(task.sample, {"": fitted(trainer, task, how)}, hits)[""]
        for name, task in tasks.items()
    }


def _with(how: Fit, **changed: Any) -> Fit:
    return replace(how, options=replace(how.options, **changed))
