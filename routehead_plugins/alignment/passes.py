"""Signals that gradients flow through: what the heads pay to documents in the late layout.

The same passes as at query time, behind one prefix: the documents of several queries in one padded
forward, all tails as one tree of tokens, and a softmax over the prefix, the tokens of a query's own
candidates and its tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routehead_plugins.backbone import (
    DocumentKeys,
    DocumentPiece,
    FrozenLM,
    Gradients,
    KeyColumns,
    KeyValues,
    Pieces,
    TailQueries,
    batches,
)
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts import LateFrame, LateLayout

# Tokens that run in one forward, padding included.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Signals:
    """What the heads pay to the documents of one query.

    Attributes:
        mass: Mean over the tail's tokens of the attention to all tokens of a document, shape
            (heads, documents); between 0 and 1.
        null_mass: The same for the null query; ``None`` where it is not asked for.
    """

    mass: Tensor
    null_mass: Tensor | None

    @property
    def calibrated(self) -> Tensor:
        """Attention minus that of the null query, shape (heads, documents)."""
        return self.mass if self.null_mass is None else self.mass - self.null_mass


def late_signals(
    llm: FrozenLM,
    passes: Gradients,
    prompts: Sequence[Pieces],
    heads: HeadSet,
    *,
    calibrate: bool = True,
    layout: LateLayout | None = None,
) -> list[Signals]:
    """Read the heads' attention to the documents of several queries, in the late layout.

    Outlier tokens are not dropped: what is dropped gets no gradient.

    Args:
        llm: The LLM, with its adapter.
        passes: Its passes; see ``FrozenLM.gradients``.
        prompts: Query and documents of each.
        heads: The heads.
        calibrate: Whether to run the null query as well.
        layout: The layout, for the room between prefix and tail; a new one by default.

    Raises:
        PromptTooLongError: A tail or document does not fit.
        HeadError: The LLM does not have these heads.
    """
    frame = (layout or LateLayout()).frame(llm)
    columns = llm.key_columns(heads)
    (prefix,) = passes.prefill([frame.prefix], last_layer=heads.last_layer, length=frame.length)
    for prompt in prompts:
        frame.check_tail(prompt, llm)
        frame.check_documents(prompt.documents, llm)
    keys = _document_keys(passes, frame, prompts, columns, prefix)
    tails = [prompt.tail for prompt in prompts]
    if calibrate:
        tails.append(prompts[0].null_tail)
    queries = passes.tail_queries(prefix, tails, heads, start=frame.start, length=frame.length)
    signals = []
    for index, prompt in enumerate(prompts):
        own = [index, len(prompts)] if calibrate else [index]
        masses = _masses(queries.of_tails(own), keys[index], heads, prompt.documents)
        signals.append(Signals(masses[0], masses[1] if calibrate else None))
    return signals


def _document_keys(
    passes: Gradients,
    frame: LateFrame,
    prompts: Sequence[Pieces],
    columns: KeyColumns,
    prefix: KeyValues,
) -> list[DocumentKeys]:
    """Run all documents, equal ones once, and join the keys of each query's."""
    distinct = list({piece.ids: None for prompt in prompts for piece in prompt.documents})
    keys: dict[tuple[int, ...], DocumentKeys] = {}
    for indices in batches([len(ids) for ids in distinct], BATCH_TOKENS):
        batch = [distinct[index] for index in indices]
        ran = passes.prefill(
            batch, last_layer=columns.last_layer, behind=prefix, length=frame.length
        )
        keys |= zip(batch, map(columns.keys, ran), strict=True)
    return [
        DocumentKeys.join([keys[piece.ids] for piece in prompt.documents]) for prompt in prompts
    ]


def _masses(
    queries: TailQueries, keys: DocumentKeys, heads: HeadSet, documents: Sequence[DocumentPiece]
) -> Tensor:
    """Sum the attention of tails to each document, (tails, heads, documents).

    Scores of all rows and tokens are many, and cheap: gradients compute them again.
    """
    owners = torch.full((len(keys.table),), len(documents), device="cpu")
    start = 0
    for number, piece in enumerate(documents):
        owners[start + piece.text.start : start + piece.text.end] = number
        start += len(piece.ids)
    indices = owners.to(keys.table.device)
    masses: Tensor = checkpoint(
        queries.masses, keys, heads, indices, len(documents), use_reentrant=False
    )
    return masses
