"""Search an index without a first stage: read every document, in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from routehead_plugins.backbone import FrozenLM, isolated
from routehead_plugins.heads import HeadSet
from routehead_plugins.index.document_index import DocumentIndex
from routehead_plugins.layouts import LateLayout, LateTails
from routehead_plugins.scoring import DocumentSums, Readout


class SearchHit(NamedTuple):
    """A document of an index that a search returned.

    Attributes:
        id: Its id, if it has one.
        score: Higher is more relevant; comparable within one search.
        number: Its number in the index.
    """

    id: str | None
    score: float
    number: int


def read_all(
    index: DocumentIndex,
    llm: FrozenLM,
    layout: LateLayout,
    tails: LateTails,
    heads: HeadSet,
    readout: Readout,
) -> tuple[list[int], list[DocumentSums]]:
    """Read some heads on every document of an index, as if all stood in one list of candidates.

    Args:
        index: The documents.
        llm: The frozen LLM.
        layout: The layout that ran the tails.
        tails: The tails of the query.
        heads: The heads to read.
        readout: Sums attention over the tokens of each document.

    Returns:
        Numbers of the documents, and their sums, which are to be combined.

    Raises:
        IndexMismatchError: The index was made for something else.
        IndexDamagedError: A document was damaged.
    """
    index = index.snapshot()
    index.check(llm, layout.frame(llm), heads, tails.options.max_doc_tokens)
    numbers: list[int] = []
    sums: list[DocumentSums] = []
    with torch.inference_mode(), isolated(llm.device):
        # The softmax is over the tokens of all documents, so that its sums come first.
        totals = torch.full((), -torch.inf, device=llm.device)
        for chunk in index.chunks():
            own = tails.queries.log_sums(chunk.keys.to(llm.device), heads)
            totals = torch.logaddexp(totals, own)
        for chunk in index.chunks():
            attention = tails.queries.attention(chunk.keys.to(llm.device), heads, totals)
            read = tails.attention_to_spans(chunk.spans, attention)
            numbers += chunk.numbers.tolist()
            sums.append(readout.sums(read, heads.recipe))
    return numbers, sums
