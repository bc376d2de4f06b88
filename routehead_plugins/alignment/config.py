"""Settings of the training of aligned heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from routehead_plugins.alignment.head_weights import SIGNALS, WEIGHTS
from routehead_plugins.backbone import PROJECTIONS, FrozenLM, check_max_doc_tokens
from routehead_plugins.data import as_list, check_count, check_flag, check_number, check_text
from routehead_plugins.errors import HeadError, InputError, short_repr
from routehead_plugins.heads import HeadSet

LAYOUTS = ("late", "parallel")
"""Layouts in which documents attend to themselves only, so that memory is linear in them."""

SCHEDULES = ("cosine", "linear")
"""How the learning rate falls to 0 after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses; 0 switches one off. See ``losses``.

    Attributes:
        distillation: Of the cross-entropy to the teacher; needs teacher scores.
        preference: Of preference pairs; needs grades.
        spread: Of the penalty on scores that are nearly equal in the middle of the list.
        head_entropy: Of the entropy of the choice of heads.
        attention_entropy: Of the entropy of the heads' attention over documents.

    Raises:
        InputError: A weight is negative, or all are 0.
    """

    distillation: float = 1.0
    preference: float = 1.0
    spread: float = 0.0
    head_entropy: float = 0.0
    attention_entropy: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            check_number(name, weight, least=0)
        if not self.distillation and not self.preference:
            raise InputError(
                "distillation=0 and preference=0 leave nothing to learn; give one a weight above 0."
            )


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Settings of ``align``.

    Attributes:
        layout: Layout in which documents are read: ``"late"`` or ``"parallel"``.
        layers: First and last layer whose heads are read; the adapter reaches from layer 0 to the
            last one.
        heads: Heads to read instead of all in these layers; they decide how deep the adapter is.
        rank: Rank of the adapter (arXiv 2106.09685).
        alpha: The adapter's change is multiplied by ``alpha / rank``.
        projections: Names of the projections that the adapter changes.
        signal: What the heads are read by: ``"log"`` or ``"calibrated"``; see ``head_weights``.
        standardise: Whether each head is z-scored over a query's candidates, as head sets are read.
        head_weights: ``"softmax"`` or ``"signed"``.
        scale: Sum of the heads' weights before training; larger scores are surer of themselves.
        losses: Weights of the losses.
        temperature: Temperature of the teacher's distribution.
        hard_share: Share of the preference pairs that counts, smallest margins first.
        candidates: Documents drawn per query and step.
        max_doc_tokens: Longer documents are cut here.
        epochs: How often every query is seen.
        batch_queries: Queries whose documents run together.
        accumulate: Batches per step of the optimizer.
        learning_rate: Of the adapter, at its highest.
        head_learning_rate: Of the heads' weights, at its highest.
        weight_decay: Of the adapter.
        warmup: Share of the steps in which the learning rate rises.
        schedule: One of ``SCHEDULES``.
        max_gradient: Longer gradients are cut to this length.
        held_out: Share of the queries that training never sees.
        evaluate_every: Steps between two looks at the held-out queries.
        patience: Looks without a gain after which training stops; ``None``: never.
        checkpoints: Whether intermediate results are computed again to save memory.
        seed: Random seed.

    Raises:
        InputError: A value is out of range.
        HeadError: The layers are not a range.
    """

    layout: str = "late"
    layers: tuple[int, int] = (5, 13)
    heads: HeadSet | None = None
    rank: int = 16
    alpha: float = 32.0
    projections: Sequence[str] = PROJECTIONS
    signal: str = "log"
    standardise: bool = True
    head_weights: str = "softmax"
    scale: float = 1.0
    losses: LossWeights = field(default_factory=LossWeights)
    temperature: float = 0.05
    hard_share: float = 0.5
    candidates: int = 8
    max_doc_tokens: int | None = 96
    epochs: int = 1
    batch_queries: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float = 0.05
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "cosine"
    max_gradient: float = 1.0
    held_out: float = 0.1
    evaluate_every: int = 50
    patience: int | None = 4
    checkpoints: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        if self.patience is not None:
            check_count("patience", self.patience)
        check_max_doc_tokens(self.max_doc_tokens)
        for name, most in _RANGES.items():
            check_number(name, getattr(self, name), least=0, most=most)
        for name in _ABOVE_ZERO:
            if not getattr(self, name):
                raise InputError(f"{name}=0 trains nothing; give a number above 0.")
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        check_flag("standardise", self.standardise)
        check_flag("checkpoints", self.checkpoints)
        for name in as_list(self.projections, "projections", "names"):
            check_text("projections", name)
        object.__setattr__(self, "projections", tuple(self.projections))
        _check_layers(self.layers)

    def chosen_heads(self, llm: FrozenLM) -> HeadSet:
        """Return the heads to read of an LLM.

        Raises:
            HeadError: The LLM does not have them.
        """
        if self.heads is not None:
            self.heads.check_within(llm.heads, llm.name)
            return HeadSet(self.heads.heads)
        first, last = self.layers
        chosen = HeadSet([head for head in llm.heads if first <= head.layer <= last])
        if not len(chosen) or last > llm.heads.last_layer:
            raise HeadError(
                f"layers={self.layers} are not all among those of {llm.name!r}, which has "
                f"layers 0 to {llm.heads.last_layer}; name others."
            )
        return chosen

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON holds them, for records."""
        content = asdict(self) | {"heads": None if self.heads is None else str(self.heads)}
        return content | {"layers": list(self.layers), "projections": list(self.projections)}


_COUNTS = (
    "rank",
    "candidates",
    "epochs",
    "batch_queries",
    "accumulate",
    "evaluate_every",
)
_RANGES = {
    "alpha": math.inf,
    "scale": math.inf,
    "temperature": math.inf,
    "hard_share": 1,
    "learning_rate": math.inf,
    "head_learning_rate": math.inf,
    "weight_decay": math.inf,
    "warmup": 1,
    "max_gradient": math.inf,
    "held_out": 0.9,
}
_ABOVE_ZERO = ("alpha", "scale", "temperature", "hard_share", "learning_rate", "max_gradient")
_CHOICES = {"layout": LAYOUTS, "signal": SIGNALS, "head_weights": WEIGHTS, "schedule": SCHEDULES}


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(
            f"{name}={short_repr(value)} does not exist; choose one of {', '.join(allowed)}."
        )


def _check_layers(layers: Any) -> None:
    numbers = isinstance(layers, tuple | list) and all(type(layer) is int for layer in layers)
    if not numbers or len(layers) != 2 or not 0 <= layers[0] <= layers[1]:
        raise HeadError(
            f"layers={short_repr(layers)} is not a range; give the first and the last layer, "
            "such as (5, 13)."
        )
