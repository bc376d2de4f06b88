"""Selectors: the ways to choose the heads for a query, except routers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from routehead_plugins.backbone import EMBEDDED, FrozenLM, same_adapter
from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet

_EMBEDDED_LLM = "smollm2-135m-instruct"


class Selector(Protocol):
    """Interface of everything that chooses heads; only ``select`` has no default."""

    @property
    def layout(self) -> str | None:
        """The prompt layout its heads were chosen for; ``None`` for any layout."""
        return None

    def layers(self, num_layers: int) -> int:
        """Return how many layers of an LLM to load, counted from the first, for all queries.

        Args:
            num_layers: Number of layers that the LLM has.
        """
        return num_layers

    def check(self, llm: FrozenLM) -> None:
        """Check before the first query that the LLM has the heads that may be chosen.

        Raises:
            HeadError: It does not have them.
        """
        self.select("", llm)

    def candidates(self, llm: FrozenLM) -> HeadSet:
        """Return every head that may be chosen for some query, for the keys that are kept of it.

        Raises:
            HeadError: The LLM does not have them.
        """
        return self.select("", llm)

    def select(self, query: str, llm: FrozenLM) -> HeadSet:
        """Choose heads.

        Args:
            query: Text of the query.
            llm: The LLM whose heads to choose from.

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
    """All heads of consecutive layers (Selective-ICR, arXiv 2602.22591).

    In the paper, relevance follows a bell curve over the layers, and a centred interval is read;
    the default is the middle third.

    Attributes:
        first: First layer, counted from 0; ``None`` for the start of the middle third.
        last: Last layer, included; ``None`` for the end of the middle third.
    """

    first: int | None = None
    last: int | None = None

    def layers(self, num_layers: int) -> int:
        """Count the layers up to the interval's end."""
        return 2 * num_layers // 3 if self.last is None else self.last + 1

    def select(self, query: str, llm: FrozenLM) -> HeadSet:  # noqa: ARG002
        """Choose the heads of the interval.

        Raises:
            HeadError: The interval is empty, or reaches beyond the layers of the LLM.
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
        method = f"layers:{first}-{last}"
        return HeadSet(heads, model=llm.name, adapter=llm.adapter_label, method=method)


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
        if not same_model(self.heads.model, llm.name):
            raise HeadError(
                f"the heads were chosen for {self.heads.model!r}, but the LLM is {llm.name!r}; "
                "choose heads for this one, or give them as layer-head to try them all the same."
            )
        if not fits_adapter(self.heads, llm):
            raise HeadError(
                f"the heads were chosen with {named_adapter(self.heads.adapter)}, but the LLM has "
                f"{named_adapter(llm.adapter_label)}; load the same, or choose heads for this one."
            )
        self.heads.check_within(llm.heads, llm.name)
        return self.heads


def fits_adapter(heads: HeadSet, llm: FrozenLM) -> bool:
    """Tell whether heads were chosen with the adapter of an LLM; plain lists fit any."""
    if heads.model is None and heads.adapter is None:
        return True
    return same_adapter(heads.adapter, llm.adapter)


def named_adapter(label: str | None) -> str:
    """Write a label of an adapter for a message."""
    return "no adapter" if label is None else f"the adapter {label!r}"


def short_name(model: str) -> str:
    """Return an LLM's name in lower case without its owner; for the embedded one, its real name."""
    short = model.rsplit("/", 1)[-1].lower()
    return _EMBEDDED_LLM if short == EMBEDDED else short


def same_model(recorded: str | None, name: str) -> bool:
    """Tell whether a recorded name may be that of an LLM; ``None`` fits any LLM."""
    # A folder or file may hold any LLM.
    if recorded is None or os.path.exists(recorded) or os.path.exists(name):
        return True
    return short_name(recorded) == short_name(name)
