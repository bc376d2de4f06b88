"""A layout without an LLM, for tests of the steps after attention is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.data import Span
from routehead_plugins.layouts import ReadOptions
from routehead_plugins.scoring import TokenAttention


@dataclass(frozen=True)
class PresetLayout:
    """Layout that gives each document one token, with the attention that its last word names."""

    name: str = "preset"

    def read(
        self,
        llm: FrozenLM,  # noqa: ARG002
        query: str,  # noqa: ARG002
        texts: Sequence[str],
        heads: HeadSet,  # noqa: ARG002
        options: ReadOptions,  # noqa: ARG002
    ) -> TokenAttention:
        values = torch.tensor([[float(text.split()[-1]) for text in texts]])
        spans = tuple(Span(index, index + 1) for index in range(len(texts)))
        return TokenAttention(values, None, spans)
