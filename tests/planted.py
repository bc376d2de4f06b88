"""Training examples of aligned heads, with relevance that tiny models can learn."""

from __future__ import annotations

import random
from typing import Any

import families

from routehead_plugins import FrozenLM
from routehead_plugins.alignment import AlignmentConfig, AlignmentExample

WORDS = ["wolf", "rain", "hill", "stone", "river", "moss", "hat", "pan", "salt", "lamp"]


def examples(count: int = 12, *, teacher: bool = True, grades: bool = False) -> list[Any]:
    """Queries of one word; a document is relevant if it has the word."""
    chance = random.Random(0)
    made = []
    for number in range(count):
        words = chance.sample(WORDS, 5)
        query = words[number % 5]
        labels = [float(word == query) for word in words]
        documents = [f"{chance.choice(WORDS)} and {word}" for word in words]
        made.append(
            AlignmentExample(
                query, documents, labels if grades else None, labels if teacher else None
            )
        )
    return made


def config(**options: Any) -> AlignmentConfig:
    given: dict[str, Any] = {
        "layers": (0, 2),
        "rank": 4,
        "candidates": 4,
        "batch_queries": 3,
        "epochs": 4,
        "learning_rate": 0.02,
        "temperature": 0.3,
        "held_out": 0.25,
        "evaluate_every": 3,
        "patience": None,
    }
    return AlignmentConfig(**given | options)


def tiny() -> FrozenLM:
    """A tiny LLM, the same every time."""
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")
