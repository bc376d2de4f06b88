"""Training examples: a query, its candidates, and what is known of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routehead_plugins.data import as_list, as_number, check_text
from routehead_plugins.errors import InputError


@dataclass(frozen=True)
class AlignmentExample:
    """A query with candidates to rank.

    Attributes:
        query: The query.
        documents: Texts of the candidates, at least two, none of them blank.
        grades: Relevance grade of each; ``None`` if they are not judged.
        teacher: Score of each by a teacher, higher is better; ``None`` if there is none.

    Raises:
        InputError: A value is none of those above, or there is neither a grade nor a score.
    """

    query: str
    documents: Sequence[str]
    grades: Sequence[float] | None = None
    teacher: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_text("query", self.query)
        documents = as_list(self.documents, "documents", "texts")
        for index, document in enumerate(documents):
            check_text(f"documents[{index}]", document)
        if len(documents) < 2:
            raise InputError(f"documents has {len(documents)} texts; give at least two to rank.")
        object.__setattr__(self, "documents", tuple(documents))
        if self.grades is None and self.teacher is None:
            raise InputError("an example has neither grades nor teacher scores; give one of them.")
        for name in ("grades", "teacher"):
            numbers = _numbers(name, getattr(self, name), len(documents))
            object.__setattr__(self, name, numbers)

    def pick(self, indices: Sequence[int]) -> AlignmentExample:
        """Return the example with some of its documents only."""
        return AlignmentExample(
            self.query,
            [self.documents[index] for index in indices],
            None if self.grades is None else [self.grades[index] for index in indices],
            None if self.teacher is None else [self.teacher[index] for index in indices],
        )

    def sample(self, count: int, chance: random.Random) -> AlignmentExample:
        """Draw candidates for one step; the best graded one is always among them.

        Args:
            count: Number of documents to keep.
            chance: Source of randomness.
        """
        indices = list(range(len(self.documents)))
        if len(indices) <= count:
            return self
        chance.shuffle(indices)
        if self.grades is not None:
            grades = self.grades
            best = max(indices, key=lambda index: grades[index])
            indices.remove(best)
            indices.insert(0, best)
        return self.pick(sorted(indices[:count]))


def _numbers(name: str, values: Any, count: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = [as_number(value) for value in as_list(values, name, "numbers")]
    finite = tuple(n for n in numbers if n is not None and math.isfinite(n))
    if len(finite) != count or len(numbers) != count:
        raise InputError(
            f"{name} has {len(finite)} finite numbers for {count} documents; give one for each."
        )
    return finite
