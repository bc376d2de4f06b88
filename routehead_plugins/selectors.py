"""Ways of choosing heads; every published one is a small class."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet

_INTERVAL = re.compile(r"layers(?::(\d+)-(\d+))?")


class Selector(Protocol):
    """Names the heads to read for a query."""

    def select(self, query: str, llm: FrozenLM) -> HeadSet:
        """Choose heads.

        Args:
            query: What is looked for.
            llm: The LLM whose heads there are to choose from.

        Raises:
            HeadError: The choice names heads that the LLM does not have.
        """
        ...


@dataclass(frozen=True)
class AllHeads:
    """Every head (ICR, arXiv 2410.02642)."""

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose every head of the LLM."""
        return llm.heads


@dataclass(frozen=True)
class LayerInterval:
    """All heads of some consecutive layers (Selective-ICR, arXiv 2602.22591).

    The paper finds relevance to follow a bell curve over the layers and reads a centred interval;
    by default that is the middle third.

    Attributes:
        first: First layer, counted from 0; ``None`` for a third of the way.
        last: Last layer, included; ``None`` for two thirds of the way.
    """

    first: int | None = None
    last: int | None = None

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose the heads of the interval.

        Raises:
            HeadError: The interval holds no head of the LLM.
        """
        layers = llm.num_layers
        first = layers // 3 if self.first is None else self.first
        last = 2 * layers // 3 - 1 if self.last is None else self.last
        heads = [head for head in llm.heads if first <= head.layer <= last]
        if not heads or last >= layers:
            raise HeadError(
                f"layers {first}-{last} are not layers of {llm.name!r}; "
                f"it has layers 0 to {layers - 1}, given as first-last."
            )
        return HeadSet(heads, model=llm.name, method=f"layers:{first}-{last}")


@dataclass(frozen=True)
class FixedHeads:
    """The same heads for every query.

    Attributes:
        heads: The heads.
    """

    heads: HeadSet

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose the fixed heads.

        Raises:
            HeadError: The LLM does not have them.
        """
        self.heads.check_within(llm.heads, llm.name)
        return self.heads


def as_selector(heads: HeadSet | str | Path | Sequence[tuple[int, int]] | None) -> Selector:
    """Read the ways in which heads can be named.

    Args:
        heads: ``None`` or ``"all"``; ``"layers"`` or ``"layers:10-19"``; ``"13-18,13-1"``; the path
            of a head-set file; a ``HeadSet`` or a sequence of pairs.

    Raises:
        HeadError: It is none of these.
    """
    if heads is None or heads == "all":
        return AllHeads()
    if isinstance(heads, str):
        interval = _INTERVAL.fullmatch(heads)
        if interval is not None:
            first, last = (None if bound is None else int(bound) for bound in interval.groups())
            return LayerInterval(first, last)
        if HeadSet.looks_like(heads):
            return FixedHeads(HeadSet.parse(heads))
    if isinstance(heads, str | Path):
        if not os.path.isfile(heads):
            raise HeadError(
                f"heads={str(heads)!r} is neither a list of heads nor a file; "
                'give "all", "layers:10-19", "13-18,13-1" or the path of a head-set file.'
            )
        return FixedHeads(HeadSet.load(heads))
    return FixedHeads(heads if isinstance(heads, HeadSet) else HeadSet(heads))
