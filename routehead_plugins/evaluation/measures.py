"""Measure rankings against relevance judgments, through ir_measures."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from routehead_plugins.errors import InputError
from routehead_plugins.io import Qrels, Rankings, decreasing_run

if TYPE_CHECKING:
    from ir_measures import Measure

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@20")

_MEASURE = re.compile(r"(?P<name>\w+)(?:\((?P<options>.*)\))?(?:@(?P<at>[\d.]+))?")


@dataclass(frozen=True)
class Evaluation:
    """Values of one or more measures for every judged query.

    Attributes:
        values: Measure -> query -> value, for every judged query, in the judgments' order.
    """

    values: Mapping[str, Mapping[str, float]]

    @property
    def means(self) -> dict[str, float]:
        """Mean of each measure over all judged queries."""
        return {measure: self.mean(measure) for measure in self.values}

    def mean(self, measure: str) -> float:
        """Mean of one measure over all judged queries.

        Raises:
            InputError: The measure was not evaluated.
        """
        values = self.per_query(measure).values()
        return math.fsum(values) / len(values)

    def per_query(self, measure: str) -> Mapping[str, float]:
        """Values of one measure, by query.

        Args:
            measure: Name of the measure, or an alias: ``MRR@10`` stands for ``RR@10``.

        Raises:
            InputError: The measure was not evaluated.
        """
        name = measure if measure in self.values else str(parse_measures([measure])[0])
        if name not in self.values:
            raise InputError(
                f"measure {measure!r} was not evaluated; expected one of "
                f"{', '.join(self.values)}; add it to the measures."
            )
        return self.values[name]


def parse_measures(names: Sequence[str] = DEFAULT_MEASURES) -> tuple[Measure, ...]:
    """Parse names such as ``nDCG@10``, ``MRR@10`` or ``AP(rel=2)@100``.

    Args:
        names: Names in the notation of ir_measures; duplicates and aliases are merged.

    Raises:
        InputError: There is no name, or a measure is unknown or cannot be computed here.
    """
    if isinstance(names, str) or not names:
        raise InputError(
            f"measures={names!r} is not a list of names; give one such as {list(DEFAULT_MEASURES)}."
        )
    return tuple(dict.fromkeys(_parse_measure(name) for name in names))


def _parse_measure(name: str) -> Measure:
    # ir_measures' own parser needs ast.Num, which Python 3.14 no longer has.
    import ir_measures
    from ir_measures.measures import registry

    providers: Any = ir_measures.DefaultPipeline
    match = _MEASURE.fullmatch(name.strip())
    try:
        if match is None:
            raise ValueError(name)
        prototype = registry[match["name"]]
        options = [text.partition("=") for text in (match["options"] or "").split(",") if text]
        arguments = {key.strip(): ast.literal_eval(value) for key, _, value in options}
        if match["at"] is not None:
            arguments[prototype.AT_PARAM] = ast.literal_eval(match["at"])
        measure: Measure = prototype(**arguments)
        # supports() also checks the values of the options.
        if not providers.supports(measure) or arguments.get("cutoff", 1) < 1:
            raise ValueError(name)
    except (KeyError, ValueError, SyntaxError, AssertionError) as error:
        raise InputError(
            f"measure {name!r} cannot be computed; expected a name of ir_measures such as "
            f"{', '.join(DEFAULT_MEASURES)} or AP(rel=2)@100; check the spelling."
        ) from error
    return measure


def evaluate(run: Rankings, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES) -> Evaluation:
    """Measure rankings against judgments; the order given counts, not the scores.

    Args:
        run: A ranking per query, best first; queries without judgments are ignored.
        qrels: The judgments; a judged query that the run lacks has the value 0.
        measures: Names of the measures, see `parse_measures`.

    Raises:
        InputError: There are no judgments, no query of the run is judged, a measure is unknown, or
            a ranking has a NaN score or a document twice.
    """
    import ir_measures

    parsed = parse_measures(measures)
    judged = {query: judgments for query, judgments in qrels.items() if judgments}
    if not judged:
        raise InputError("the qrels judge no document; expected judgments; check the qrels file.")
    rankings = {query: ranking for query, ranking in run.items() if query in judged}
    if run and not rankings:
        raise InputError(
            f"no query of the run is judged: the run has {next(iter(run))!r}, the qrels have "
            f"{next(iter(judged))!r}; expected the same ids; use the run's own qrels."
        )
    values = {str(measure): dict.fromkeys(judged, 0.0) for measure in parsed}
    for metric in ir_measures.iter_calc(parsed, judged, decreasing_run(rankings)):
        values[str(metric.measure)][metric.query_id] = float(metric.value)
    return Evaluation(values)
