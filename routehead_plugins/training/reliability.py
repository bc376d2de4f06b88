"""Which pseudo-labels to learn: those worth most on documents that they were not searched on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.signals import SignalSet
from routehead_plugins.training.pseudo_labels import LabelOptions, Reliability, most_reliable

_UTILITIES = ("ndcg", "correlation", "margin")
_SHRINKAGES = (0.0, 0.5)


@dataclass(frozen=True)
class LabelChoice:
    """How labels are searched for, and how far they can be relied on.

    Attributes:
        options: What was chosen.
        reliability: Of that; ``None`` where it could not be measured, as for written queries, whose
            one relevant passage cannot be on both halves.
    """

    options: LabelOptions
    reliability: Reliability | None

    def to_dict(self) -> dict[str, object]:
        """Give the choice as JSON can hold it."""
        names = ("utility", "shrinkage", "groups")
        chosen = {name: getattr(self.options, name) for name in names}
        if self.reliability is None:
            return chosen
        return {
            **chosen,
            **{name: round(value, 4) for name, value in asdict(self.reliability).items()},
        }


def label_choices(options: LabelOptions) -> list[LabelOptions]:
    """Every utility and shrinkage that is worth trying, everything else being as given."""
    return [
        replace(options, utility=utility, shrinkage=shrinkage)
        for utility in _UTILITIES
        for shrinkage in _SHRINKAGES
    ]


def choose_labels(
    signals: SignalSet, embeddings: Tensor, choices: Sequence[LabelOptions]
) -> LabelChoice:
    """Choose options by what their labels keep on the other half of each query's documents.

    Args:
        signals: Of queries with contrast.
        embeddings: Of the same, shape (queries, width).
        choices: Options; of a single one the reliability is measured. Where no query can be halved,
            the first is taken.
    """
    try:
        best, found = most_reliable(signals, choices, embeddings=embeddings)
    except InputError:
        return LabelChoice(choices[0], None)
    return LabelChoice(best, found[list(choices).index(best)])
