"""Ways of choosing heads; every published one is a small class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from routehead_plugins.backbone import EMBEDDED, FrozenLM
from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet

_EMBEDDED_LLM = "smollm2-135m-instruct"


class Selector(Protocol):
    """Names the heads to read for a query; only ``select`` must be written."""

    @property
    def layout(self) -> str | None:
        """The prompt layout its heads were chosen for; ``None`` where any will do."""
        return None

    def layers(self, num_layers: int) -> int:
        """How many leading layers of an LLM it needs, whatever the query.

        Args:
            num_layers: How many there are.
        """
        return num_layers

    def check(self, llm: FrozenLM) -> None:
        """Check that the LLM has the heads that may be chosen, before the first query.

        Raises:
            HeadError: It has not.
        """
        self.select("", llm)

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
class AllHeads(Selector):
    """Every head (ICR, arXiv 2410.02642)."""

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose every head of the LLM."""
        return llm.heads


@dataclass(frozen=True)
class LayerInterval(Selector):
    """All heads of some consecutive layers (Selective-ICR, arXiv 2602.22591).

    The paper finds relevance to follow a bell curve over the layers and reads a centred interval;
    by default that is the middle third.

    Attributes:
        first: First layer, counted from 0; ``None`` for a third of the way.
        last: Last layer, included; ``None`` for two thirds of the way.
    """

    first: int | None = None
    last: int | None = None

    def layers(self, num_layers: int) -> int:
        """Count the layers up to the interval's end."""
        return 2 * num_layers // 3 if self.last is None else self.last + 1

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose the heads of the interval.

        Raises:
            HeadError: The interval holds no head of the LLM.
        """
        layers = llm.num_layers
        first = layers // 3 if self.first is None else self.first
        last = self.layers(layers) - 1
        heads = [head for head in llm.heads if first <= head.layer <= last]
        if not heads or last >= layers:
            raise HeadError(
                f"layers {first}-{last} are not layers of {llm.name!r}; "
                f"it has layers 0 to {layers - 1}, given as first-last."
            )
        return HeadSet(heads, model=llm.name, method=f"layers:{first}-{last}")


@dataclass(frozen=True)
class FixedHeads(Selector):
    """The same heads for every query.

    Attributes:
        heads: The heads.
    """

    heads: HeadSet

    @property
    def layout(self) -> str | None:
        """The layout that the head set records."""
        return self.heads.layout

    def layers(self, num_layers: int) -> int:  # noqa: ARG002
        """Count the layers up to the deepest head."""
        return self.heads.last_layer + 1

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose the fixed heads.

        Raises:
            HeadError: The LLM does not have them, or they were chosen for another one.
        """
        _check_model(self.heads.model, llm.name)
        self.heads.check_within(llm.heads, llm.name)
        return self.heads


def short_name(model: str) -> str:
    """Return an LLM's name in small letters and without its owner; the embedded LLM's own name."""
    short = model.rsplit("/", 1)[-1].lower()
    return _EMBEDDED_LLM if short == EMBEDDED else short


def same_model(name: str, other: str) -> bool:
    """Tell whether two names may mean one LLM; a folder or file may hold any LLM."""
    if os.path.exists(name) or os.path.exists(other):
        return True
    return short_name(name) == short_name(other)


def _check_model(chosen_for: str | None, model: str) -> None:
    """Refuse heads of another LLM."""
    if chosen_for is not None and not same_model(chosen_for, model):
        raise HeadError(
            f"the heads were chosen for {chosen_for!r}, but the LLM is {model!r}; choose heads for "
            "this one, or give them as layer-head to try them all the same."
        )
