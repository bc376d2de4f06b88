"""Documents for an index, and a re-ranker of a tiny LLM that reads them in the late layout."""

from __future__ import annotations

from typing import Any

import families

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.layouts import LateLayout
from routehead_plugins.selection import FixedHeads

TEXTS = [
    "a wolf ran over the hill",
    "rain",
    "seven grey stones by a river, one of them wet",
    "the wolf slept while it rained on the hill",
]
HEADS = "2-3,1-0,3-1"


def documents() -> list[Document]:
    return [Document(text, f"d{number}") for number, text in enumerate(TEXTS)]


def reranker(
    index: Any = None, *, heads: str = HEADS, seed: int = 0, **options: Any
) -> HeadRoutedAttentionReranker:
    """Read a tiny LLM in the late layout; with an index, from it."""
    llm = FrozenLM(families.tiny_model("llama", seed=seed), families.tiny_tokenizer(), name="tiny")
    layout = LateLayout(documents=index)
    return HeadRoutedAttentionReranker(
        llm, FixedHeads(HeadSet.parse(heads)), layout=layout, **options
    )
