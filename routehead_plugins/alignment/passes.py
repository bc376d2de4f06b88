"""Signals that gradients flow through: what the heads pay to documents.

The same passes as at query time: the documents of several queries behind one prefix, in one padded
forward. In the late layout, all tails are one tree of tokens behind the prefix, and their queries
are compared with the keys of each query's own candidates; in the parallel layout, the tails of each
query run behind its candidates.
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
    KeyValues,
    Pieces,
    TailQueries,
    batches,
)
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts import LateLayout, ParallelLayout

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
    ran = _run_documents(passes, prompts, prefix, heads.last_layer, frame.length)
    keys = {ids: columns.keys(key_values) for ids, key_values in ran.items()}
    tails = [prompt.tail for prompt in prompts]
    if calibrate:
        tails.append(prompts[0].null_tail)
    queries = passes.tail_queries(prefix, tails, heads, start=frame.start, length=frame.length)
    null = [len(prompts)] if calibrate else []
    signals: dict[int, Signals] = {}
    for documents, sharing in _by_documents(prompts).items():
        joined = DocumentKeys.join([keys[piece.ids] for piece in documents])
        masses = _masses(queries.of_tails([*sharing, *null]), joined, heads, documents)
        own, null_mass = masses[: len(sharing)], masses[-1] if calibrate else None
        signals |= {
            index: Signals(mass, null_mass) for index, mass in zip(sharing, own, strict=True)
        }
    return [signals[index] for index in range(len(prompts))]


def parallel_signals(
    llm: FrozenLM,
    passes: Gradients,
    prompts: Sequence[Pieces],
    heads: HeadSet,
    *,
    calibrate: bool = True,
) -> list[Signals]:
    """Read the heads' attention to the documents of several queries, in the parallel layout.

    See ``late_signals``. Where rotary factors depend on the length of the prompt, all queries are
    rotated as the longest of them asks for.
    """
    layout = ParallelLayout()
    for prompt in prompts:
        layout.check_fits(prompt, llm)
    length = max(
        len(prompt.prefix) + max(len(piece.ids) for piece in prompt.documents) + prompt.tail_size
        for prompt in prompts
    )
    before = prompts[0].prefix
    (prefix,) = passes.prefill([before], last_layer=heads.last_layer, length=length)
    ran = _run_documents(passes, prompts, prefix, heads.last_layer, length)
    signals = []
    for prompt in prompts:
        context = [prefix, *(ran[piece.ids] for piece in prompt.documents)]
        tails = [prompt.tail, prompt.null_tail] if calibrate else [prompt.tail]
        attention = passes.read(context, tails, heads)  # (tails, heads, tokens)
        documents = prompt.documents
        owners = _owners(documents, len(before)).to(attention.device)
        sums = attention.new_zeros(*attention.shape[:2], len(documents) + 1)
        masses = sums.index_add(2, owners, attention)[..., : len(documents)]
        signals.append(Signals(masses[0], masses[1] if calibrate else None))
    return signals


def _by_documents(prompts: Sequence[Pieces]) -> dict[tuple[DocumentPiece, ...], list[int]]:
    """Gather the indices of prompts that have the same documents."""
    sharing: dict[tuple[DocumentPiece, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        sharing.setdefault(tuple(prompt.documents), []).append(index)
    return sharing


def _run_documents(
    passes: Gradients,
    prompts: Sequence[Pieces],
    prefix: KeyValues,
    last_layer: int,
    length: int,
) -> dict[tuple[int, ...], KeyValues]:
    """Run all documents, equal ones once; return their keys and values by their tokens."""
    distinct = list({piece.ids: None for prompt in prompts for piece in prompt.documents})
    ran: dict[tuple[int, ...], KeyValues] = {}
    for indices in batches([len(ids) for ids in distinct], BATCH_TOKENS):
        batch = [distinct[index] for index in indices]
        new = passes.prefill(batch, last_layer=last_layer, behind=prefix, length=length)
        ran |= zip(batch, new, strict=True)
    return ran


def _owners(documents: Sequence[DocumentPiece], before: int = 0) -> Tensor:
    """Return the index of each token's document; their number where it is not of a text."""
    total = before + sum(len(piece.ids) for piece in documents)
    owners = torch.full((total,), len(documents), device="cpu")
    start = before
    for number, piece in enumerate(documents):
        owners[start + piece.text.start : start + piece.text.end] = number
        start += len(piece.ids)
    return owners


def _masses(
    queries: TailQueries, keys: DocumentKeys, heads: HeadSet, documents: Sequence[DocumentPiece]
) -> Tensor:
    """Sum the attention of tails to each document, (tails, heads, documents).

    Scores of all rows and tokens are many, and cheap: gradients compute them again.
    """
    indices = _owners(documents).to(keys.table.device)
    masses: Tensor = checkpoint(
        queries.masses, keys, heads, indices, len(documents), use_reentrant=False
    )
    return masses
