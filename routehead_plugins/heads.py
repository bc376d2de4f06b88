"""Attention heads, sets of them, and the recipe to read a set.

A head is written ``layer-head``, both counted from zero: ``13-18``. A head-set file is JSON::

    {"format": "routehead-heads", "version": 1, "heads": ["13-18", "13-1"],
     "model": "...", "adapter": "...", "layout": "sequential", "method": "...",
     "scores": [0.08, 0.07], "source": "...", "data": "...",
     "weights": [0.41, -0.12], "aggregation": "standardised", "first_stage_weight": 0.6}

Only ``format``, ``version`` and ``heads`` are required; the last line is the recipe.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

from routehead_plugins.errors import HeadError, class_name, short_repr
from routehead_plugins.files import atomic_write_text, encode_json, read_json, show, show_path

AGGREGATIONS = ("mean", "standardised", "log")
"""Names of the ways to combine the signals of several heads; see ``scoring.aggregation``."""

_FORMAT, _VERSION = "routehead-heads", 1
_PROVENANCE = ("model", "adapter", "layout", "method", "source", "data")
# Heads have nine digits at most, as in the next line.
_LIMIT = 10**9
_HEAD = re.compile(r"\s*(\d{1,9})-(\d{1,9})\s*")


class Head(NamedTuple):
    """Attention head; layers and heads are counted from zero, as in the literature."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}-{self.head}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rule that combines the signals of a head set into one score per document.

    Attributes:
        weights: One signed number per head; ``None`` weights all heads equally.
        aggregation: One of ``AGGREGATIONS``; ``None`` is the plain mean of ICR, in which outlier
            tokens are dropped after averaging over heads.
        first_stage_weight: Weight of the standardised retrieval score, 0 or more; ``None`` when
            none was fitted. With ``weights`` it is added to the weighted sum, without them to the
            standardised attention score.

    Raises:
        HeadError: A value is not one of those above.
    """

    weights: Sequence[float] | None = None
    aggregation: str | None = None
    first_stage_weight: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _numbers("weights", self.weights))
        if self.aggregation is not None and self.aggregation not in AGGREGATIONS:
            raise HeadError(
                f"aggregation={short_repr(self.aggregation)} does not exist; "
                f"choose one of {', '.join(AGGREGATIONS)}."
            )
        weight = _first_stage_weight(self.first_stage_weight)
        object.__setattr__(self, "first_stage_weight", weight)


@dataclass(frozen=True)
class HeadSet(Sequence[Head]):
    """An ordered set of heads, best first where the order means anything.

    Attributes:
        heads: ``(layer, head)`` pairs without repetitions; kept as a tuple of ``Head``.
        model: The LLM they were chosen for; ``None`` when not recorded, as for the next five.
        adapter: The LoRA adapter that the LLM had, as ``Adapter.label``; ``None`` for none.
        layout: The prompt layout they were chosen for.
        method: How they were chosen.
        scores: One figure per head from the method that chose them.
        source: Where they were published.
        data: The data they were chosen on.
        recipe: How their signals become one score per document.

    Raises:
        HeadError: A head is repeated or negative, scores or weights are not one per head, or a
            value has another type.
    """

    heads: Sequence[tuple[int, int]]
    model: str | None = field(default=None, kw_only=True)
    adapter: str | None = field(default=None, kw_only=True)
    layout: str | None = field(default=None, kw_only=True)
    method: str | None = field(default=None, kw_only=True)
    scores: Sequence[float] | None = field(default=None, kw_only=True)
    source: str | None = field(default=None, kw_only=True)
    data: str | None = field(default=None, kw_only=True)
    recipe: Recipe = field(default_factory=Recipe, kw_only=True)

    def __post_init__(self) -> None:
        heads = _as_heads(self.heads)
        _check_heads(heads)
        for name in _PROVENANCE:
            text = getattr(self, name)
            if text is not None and not isinstance(text, str):
                raise HeadError(
                    f"{name}={short_repr(text)} is a {class_name(text)}; give a text or None."
                )
        recipe: Any = self.recipe
        if not isinstance(recipe, Recipe):
            raise HeadError(f"recipe is a {class_name(recipe)}; give a Recipe.")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "scores", _numbers("scores", self.scores))
        for name, numbers in (("scores", self.scores), ("weights", self.recipe.weights)):
            if numbers is not None and len(numbers) != len(heads):
                raise HeadError(
                    f"{len(numbers)} {name} for {len(heads)} heads; give one {name[:-1]} per head."
                )
        _check_finite(heads, self.recipe.weights)

    @classmethod
    def parse(cls, text: str) -> HeadSet:
        """Read a list such as ``"13-18,13-1"``.

        Raises:
            HeadError: An item is not of the form ``layer-head``.
        """
        given: Any = text
        if not isinstance(given, str):
            raise HeadError(f"{short_repr(given)} is a {class_name(given)}; write 13-18,13-1.")
        heads = []
        for item in text.split(","):
            match = _HEAD.fullmatch(item)
            if match is None:
                raise HeadError(
                    f"{short_repr(item.strip())} is not a head; "
                    "write layer-head, such as 13-18,13-1."
                )
            heads.append(Head(int(match[1]), int(match[2])))
        return cls(heads)

    @classmethod
    def looks_like(cls, text: str) -> bool:
        """Tell whether a text is a list of heads, rather than a name or a path."""
        return all(_HEAD.fullmatch(item) for item in text.split(","))

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read a head-set file.

        Raises:
            HeadError: The file is missing, or not a head-set file; the message names it.
        """
        # A method may have no figure for a head; its score is NaN then.
        content = read_json(path, "a head-set file", HeadError, allow_nan=True)
        name = f"'{show_path(path, 90)}'"
        if content.get("format") != _FORMAT:
            raise HeadError(f'{name} is not a head-set file; expected "format": "{_FORMAT}".')
        if content.get("version") != _VERSION:
            raise HeadError(
                f"{name} has version {show(content.get('version'))}; "
                f"this release reads version {_VERSION}: upgrade routehead-plugins."
            )
        heads = content.get("heads")
        if not isinstance(heads, list) or not heads or not all(isinstance(h, str) for h in heads):
            raise HeadError(f'{name} lists no heads; expected "heads": ["13-18", ...].')
        try:
            return cls(
                cls.parse(",".join(heads)),
                **{key: content.get(key) for key in (*_PROVENANCE, "scores")},
                recipe=Recipe(**{f.name: content.get(f.name) for f in fields(Recipe)}),
            )
        except (HeadError, TypeError, ValueError) as error:
            raise HeadError(f"{name} is not a valid head-set file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a head-set file that ``load`` reads, whole or not at all.

        Raises:
            InputError: The file cannot be written.
        """
        atomic_write_text(path, self.to_json())

    def to_json(self) -> str:
        """Return the content of a head-set file."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            **{name: getattr(self, name) for name in _PROVENANCE},
            "aggregation": self.recipe.aggregation,
            "first_stage_weight": self.recipe.first_stage_weight,
            "heads": [str(head) for head in self],
            "scores": self.scores,
            "weights": self.recipe.weights,
        }
        content = {name: value for name, value in content.items() if value is not None}
        return encode_json(content, "the head set", indent=1) + "\n"

    def pick(self, indices: Sequence[int]) -> tuple[Head, ...]:
        """Return the heads at some indices, in the order of the indices."""
        return tuple(self._heads[index] for index in indices)

    def indices_of(self, heads: Sequence[Head]) -> list[int]:
        """Return the indices of heads in this set.

        Raises:
            HeadError: A head is not in this set.
        """
        missing = [str(head) for head in heads if head not in self._index_of]
        if missing:
            raise HeadError(
                f"there are no signals of head {', '.join(missing[:5])}; compute them for these "
                "heads."
            )
        return [self._index_of[head] for head in heads]

    @cached_property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> indices of its heads, layers ascending."""
        layers: dict[int, list[int]] = {}
        for layer, index in sorted(self._heads):
            layers.setdefault(layer, []).append(index)
        return {layer: tuple(indices) for layer, indices in layers.items()}

    @cached_property
    def indices_by_layer(self) -> list[int]:
        """For each head in this set's order, its index when the heads are sorted by layer."""
        return HeadSet(sorted(self._heads)).indices_of(self._heads)

    @property
    def last_layer(self) -> int:
        """The deepest layer of the heads, and so the last one to run; -1 for an empty set."""
        return max((head.layer for head in self._heads), default=-1)

    def check_within(self, available: HeadSet, model: str) -> None:
        """Check that an LLM has these heads.

        Args:
            available: Every head of the LLM.
            model: Its name, for the message.

        Raises:
            HeadError: The set is empty, or names heads that the LLM does not have.
        """
        if not self.heads:
            raise HeadError("the head set is empty; name at least one head, such as 13-18.")
        unknown = [str(head) for head in self._heads if head not in available]
        if unknown:
            layers = available.by_layer
            raise HeadError(
                f"{model!r} has no head {', '.join(unknown[:5])}; it has layers "
                f"{min(layers)} to {max(layers)} with {len(layers[max(layers)])} heads each, "
                "counted from 0."
            )

    @property
    def _heads(self) -> tuple[Head, ...]:
        return cast(tuple[Head, ...], self.heads)

    @cached_property
    def _index_of(self) -> dict[Head, int]:
        return {head: index for index, head in enumerate(self._heads)}

    @overload
    def __getitem__(self, index: int) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Head, ...]: ...
    def __getitem__(self, index: int | slice) -> Head | tuple[Head, ...]:
        return self._heads[index]

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __contains__(self, head: object) -> bool:
        return head in self._index_of

    def __str__(self) -> str:
        return ",".join(str(head) for head in self._heads)


def _as_heads(given: Any) -> tuple[Head, ...]:
    try:
        if isinstance(given, str | bytes | Mapping | set | frozenset):
            raise TypeError("not a list")
        return tuple(Head(_index(layer), _index(head)) for layer, head in given)
    except (TypeError, ValueError) as error:
        raise HeadError(
            f"{short_repr(given)} is not a list of heads; give (layer, head) pairs of numbers."
        ) from error


def _index(number: Any) -> int:
    """Convert a whole number, such as numpy's, without rounding others."""
    if isinstance(number, bool):
        raise TypeError("a boolean")
    return operator.index(number)


def _check_heads(heads: Sequence[Head]) -> None:
    for head in heads:
        if min(head) < 0:
            raise HeadError(
                f"head {short_repr(tuple(head))} is negative; layers and heads count from 0."
            )
        if max(head) >= _LIMIT:
            raise HeadError(f"head {short_repr(tuple(head))} is in no LLM; give smaller numbers.")
    repeated = [head for head, count in Counter(heads).items() if count > 1]
    if repeated:
        raise HeadError(f"head {repeated[0]} is given twice; name each head once.")


def _check_finite(heads: Sequence[Head], weights: Sequence[float] | None) -> None:
    # Scores are informative only, and a method may have no figure for a head.
    for head, weight in zip(heads, weights or (), strict=False):
        if not math.isfinite(weight):
            raise HeadError(f"the weight of head {head} is {weight!r}; give a finite number.")


def _numbers(name: str, given: Sequence[float] | None) -> tuple[float, ...] | None:
    if given is None:
        return None
    try:
        if isinstance(given, str | bytes | Mapping | set | frozenset):
            raise TypeError("not a list")
        return tuple(_number(number) for number in given)
    except (TypeError, ValueError, OverflowError) as error:
        raise HeadError(
            f"{name}={short_repr(given)} is not a list of numbers; give one per head."
        ) from error


def _number(value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise TypeError("not a number")
    return float(value)


def _first_stage_weight(weight: float | None) -> float | None:
    if weight is None:
        return None
    try:
        number = _number(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise HeadError(
            f"first_stage_weight={short_repr(weight)} must be a finite number, 0 or more; "
            "or leave it out."
        )
    return number
