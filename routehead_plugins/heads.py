"""Sets of attention heads: written, ordered, saved and loaded.

A head is written ``layer-head``, both counted from zero: ``13-18``. A head-set file is JSON::

    {"format": "routehead-heads", "version": 1, "heads": ["13-18", "13-1"],
     "model": "...", "layout": "sequential", "method": "...", "scores": [0.08, 0.07],
     "source": "...", "data": "...",
     "weights": [0.41, -0.12], "aggregation": "standardised", "first_stage_weight": 0.6}

Only ``format``, ``version`` and ``heads`` must be there.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast, overload

from routehead_plugins.data import Head
from routehead_plugins.errors import HeadError

_FORMAT, _VERSION = "routehead-heads", 1
_RECORDS = ("model", "layout", "method", "source", "data", "aggregation", "first_stage_weight")
_PER_HEAD = ("scores", "weights")
_HEAD = re.compile(r"\s*(\d{1,9})-(\d{1,9})\s*")

# Ways of making one score of many heads' signals; what they compute stands in `aggregation`, which
# needs torch, and head sets do not.
AGGREGATIONS = ("mean", "standardised", "log")


@dataclass(frozen=True)
class HeadSet(Sequence[Head]):
    """An ordered set of heads, best first where the order means anything.

    Attributes:
        heads: ``(layer, head)`` pairs without repetitions; kept as a tuple of ``Head``.
        model: The LLM they were chosen for; ``None`` when that is not recorded.
        layout: The prompt layout they were chosen for, likewise.
        method: How they were chosen, likewise.
        scores: One figure per head from the method that chose them, likewise.
        source: Where they were published, likewise.
        data: What they were chosen on, likewise.
        weights: One signed number per head; ``None`` gives every head the same say.
        aggregation: How the heads' signals become one score, one of ``AGGREGATIONS``; ``None`` for
            the plain mean of ICR.
        first_stage_weight: Weight of the standardised retrieval score, fitted together with the
            heads, 0 or more; ``None`` when none was fitted. Next to ``weights`` it is added to
            their weighted sum as that stands; without them, to the standardised attention score.

    Raises:
        HeadError: A head is repeated or negative, there is not one score or weight per head, or a
            value is not one of those above.
    """

    heads: Sequence[tuple[int, int]]
    model: str | None = field(default=None, kw_only=True)
    layout: str | None = field(default=None, kw_only=True)
    method: str | None = field(default=None, kw_only=True)
    scores: Sequence[float] | None = field(default=None, kw_only=True)
    source: str | None = field(default=None, kw_only=True)
    data: str | None = field(default=None, kw_only=True)
    weights: Sequence[float] | None = field(default=None, kw_only=True)
    aggregation: str | None = field(default=None, kw_only=True)
    first_stage_weight: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        try:
            heads = tuple(Head(int(layer), int(index)) for layer, index in self.heads)
        except (TypeError, ValueError) as error:
            raise HeadError(
                f"{self.heads!r} is not a list of heads; give (layer, head) pairs of numbers."
            ) from error
        _check(heads)
        object.__setattr__(self, "heads", heads)
        for name in _PER_HEAD:
            numbers = _one_per_head(name, getattr(self, name), heads)
            object.__setattr__(self, name, numbers)
        _check_aggregation(self.aggregation)
        weight = _checked_first_stage_weight(self.first_stage_weight)
        object.__setattr__(self, "first_stage_weight", weight)

    @classmethod
    def parse(cls, text: str) -> HeadSet:
        """Read heads as they are written: ``"13-18,13-1"``.

        Raises:
            HeadError: An item is not of the form ``layer-head``.
        """
        heads = []
        for item in text.split(","):
            match = _HEAD.fullmatch(item)
            if match is None:
                raise HeadError(
                    f"{item.strip()!r} is not a head; write layer-head, such as 13-18,13-1."
                )
            heads.append(Head(int(match[1]), int(match[2])))
        return cls(heads)

    @classmethod
    def looks_like(cls, text: str) -> bool:
        """Whether a text is meant as a list of heads rather than as a path."""
        return all(_HEAD.fullmatch(item) for item in text.split(","))

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read a head-set file.

        Raises:
            HeadError: The file is missing, or not a head-set file; the message names it.
        """
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HeadError(f"{str(path)!r} cannot be read as a head-set file: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise HeadError(
                f'{str(path)!r} is not a head-set file; expected "format": "{_FORMAT}".'
            )
        if content.get("version") != _VERSION:
            raise HeadError(
                f"{str(path)!r} has version {content.get('version')!r}; "
                f"this release reads version {_VERSION}: upgrade routehead-plugins."
            )
        heads = content.get("heads")
        if not isinstance(heads, list) or not heads or not all(isinstance(h, str) for h in heads):
            raise HeadError(f'{str(path)!r} lists no heads; expected "heads": ["13-18", ...].')
        try:
            return cls(
                cls.parse(",".join(heads)),
                **{key: content.get(key) for key in (*_RECORDS, *_PER_HEAD)},
            )
        except (HeadError, TypeError, ValueError) as error:
            raise HeadError(f"{str(path)!r} is not a valid head-set file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a head-set file that ``load`` reads."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            **{key: getattr(self, key) for key in _RECORDS},
            "heads": [str(head) for head in self],
            **{key: getattr(self, key) for key in _PER_HEAD},
        }
        content = {key: value for key, value in content.items() if value is not None}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @cached_property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> indices of its heads, layers ascending."""
        layers: dict[int, list[int]] = {}
        for layer, index in sorted(self._heads):
            layers.setdefault(layer, []).append(index)
        return {layer: tuple(indices) for layer, indices in layers.items()}

    @cached_property
    def places_by_layer(self) -> list[int]:
        """For each head in this set's order, its place when the heads are sorted by layer."""
        places = {head: place for place, head in enumerate(sorted(self._heads))}
        return [places[head] for head in self._heads]

    @property
    def last_layer(self) -> int:
        """The deepest layer; nothing beyond it has to be run. -1 for an empty set."""
        return max((head.layer for head in self._heads), default=-1)

    def check_within(self, available: HeadSet, model: str) -> None:
        """Make sure that an LLM has these heads.

        Args:
            available: Every head of the LLM.
            model: Its name, for the message.

        Raises:
            HeadError: The set is empty, or names heads that the LLM does not have.
        """
        if not self.heads:
            raise HeadError("the head set is empty; name at least one head, such as 13-18.")
        unknown = [str(head) for head in self._heads if head not in available._members]
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
    def _members(self) -> frozenset[Head]:
        return frozenset(self._heads)

    @overload
    def __getitem__(self, place: int) -> Head: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Head, ...]: ...
    def __getitem__(self, place: int | slice) -> Head | tuple[Head, ...]:
        return self._heads[place]

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __contains__(self, head: object) -> bool:
        return head in self._members

    def __str__(self) -> str:
        return ",".join(str(head) for head in self._heads)


def _check(heads: Sequence[Head]) -> None:
    repeated = [head for head, count in Counter(heads).items() if count > 1]
    if repeated:
        raise HeadError(f"head {repeated[0]} is given twice; name each head once.")
    negative = [head for head in heads if min(head) < 0]
    if negative:
        raise HeadError(f"head {tuple(negative[0])} is negative; layers and heads count from 0.")


def _one_per_head(
    name: str, given: Sequence[float] | None, heads: Sequence[Head]
) -> tuple[float, ...] | None:
    if given is None:
        return None
    try:
        numbers = tuple(float(number) for number in given)
    except (TypeError, ValueError) as error:
        raise HeadError(f"{name}={given!r} is not a list of numbers; give one per head.") from error
    if len(numbers) != len(heads):
        raise HeadError(
            f"{len(numbers)} {name} for {len(heads)} heads; give one {name[:-1]} per head."
        )
    # Scores only inform, and a method may well have found nothing to say of a head.
    if name == "weights" and not all(map(math.isfinite, numbers)):
        place = next(place for place, number in enumerate(numbers) if not math.isfinite(number))
        raise HeadError(
            f"the weight of head {heads[place]} is {numbers[place]!r}; give a finite number."
        )
    return numbers


def _check_aggregation(aggregation: object) -> None:
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise HeadError(
            f"aggregation={aggregation!r} does not exist; choose one of {', '.join(AGGREGATIONS)}."
        )


def _checked_first_stage_weight(weight: float | None) -> float | None:
    if weight is None:
        return None
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise HeadError(
            f"first_stage_weight={weight!r} is not a weight; give 0 or more, or leave it out."
        )
    return number
