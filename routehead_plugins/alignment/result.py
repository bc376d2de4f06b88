"""The result of a training run: an adapter, the heads to read with it, and how it went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from routehead_plugins.backbone import Adapter
from routehead_plugins.files import StrPath, encode_json
from routehead_plugins.heads import HeadSet

HISTORY_FILE, CARD_FILE = "history.json", "README.md"


@dataclass(frozen=True)
class Gain:
    """What held-out queries gained.

    Attributes:
        measure: ``"ndcg@10"`` where queries are judged, else ``"loss"``, whose fall is the gain.
        before: Mean before training, with equal weights of all heads.
        after: Mean after it.
        difference: Mean gain per query.
        standard_error: Standard error of that mean.
        queries: Number of queries.
    """

    measure: str
    before: float
    after: float
    difference: float
    standard_error: float
    queries: int

    @classmethod
    def of(cls, measure: str, before: Tensor, after: Tensor, *, sign: int) -> Gain:
        """Compare figures of the same queries.

        Args:
            measure: What they measure.
            before: Before training, shape (queries,).
            after: After it, same shape.
            sign: 1 where higher is better, -1 where lower is.
        """
        gains = sign * (after - before).double()
        error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        means = (float(before.mean()), float(after.mean()), float(gains.mean()))
        return cls(measure, *means, error, len(gains))

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.before:.4f} to {self.after:.4f}, a gain of "
            f"{self.difference:.4f} with a standard error of {self.standard_error:.4f}"
        )

    @property
    def is_clear(self) -> bool:
        """Whether the gain is above two standard errors."""
        return self.difference > 2 * self.standard_error


@dataclass(frozen=True)
class Alignment:
    """An adapter with the heads to read.

    Attributes:
        adapter: The LoRA adapter.
        heads: The heads that were trained, with their weights as a recipe.
        gain: What held-out queries gained; ``None`` without any.
        history: Records of steps and of looks at the held-out queries.
        settings: Settings of the run.
        llm: Name of the LLM.
        queries: Number of queries that were learned from.
    """

    adapter: Adapter
    heads: HeadSet
    gain: Gain | None
    history: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    llm: str
    queries: int

    def save(self, folder: StrPath, *, card: str | None = None) -> None:
        """Write a folder that peft reads as an adapter, with head set, history and card.

        Args:
            folder: The folder; made if it is missing.
            card: Text of a model card, in Markdown; ``None`` leaves an existing card as it is.

        Raises:
            InputError: The folder cannot be written.
        """
        content = {"settings": self.settings, "queries": self.queries, "history": self.history}
        others = {HISTORY_FILE: encode_json(content, "the history") + "\n"}
        if card is not None:
            others[CARD_FILE] = card
        replace(self.adapter, heads=self.heads).save_pretrained(folder, others)
