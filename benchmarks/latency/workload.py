"""Documents of equal length, and queries, made of the bundled collection."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

from routehead_plugins.backbone import PromptEncoder
from routehead_plugins.errors import InputError
from routehead_plugins.io import BUNDLED, read_corpus, read_topics


def make_documents(encoder: PromptEncoder, count: int, tokens: int) -> list[str]:
    """Cut the bundled collection into distinct documents of a minimum length, in tokens.

    Read with ``max_doc_tokens=tokens``, all have exactly that length.

    Raises:
        InputError: The collection is too short.
    """
    texts = [document.text for document in read_corpus(BUNDLED / "corpus.jsonl").values()]
    words = re.findall(r"\S+\s*", "\n\n".join(texts))
    documents: list[str] = []
    start = lap = 0
    while len(documents) < count:
        ends = range(start + 1, min(start + tokens, len(words)) + 1)
        # From the second lap on, documents begin with its number, so that none comes twice.
        first = [f"{lap} "] if lap else []
        # Every word is at least one token, and more words are more tokens.
        index = bisect_left(
            ends, tokens, key=lambda end: len(_tokens(encoder, [*first, *words[start:end]]))
        )
        if index == len(ends):  # start again with an offset, so that all documents differ
            lap += 1
            start = 17 * lap
            if lap > count:
                raise InputError(
                    f"--doc-tokens={tokens} is more than the collection has; give fewer."
                )
            continue
        documents.append("".join([*first, *words[start : ends[index]]]).strip())
        start = ends[index]
    cut = {_tokens(encoder, [document])[:tokens] for document in documents}
    if len(cut) < count:
        raise InputError(f"{count} documents of {tokens} tokens are not all different; give fewer.")
    return documents


def _tokens(encoder: PromptEncoder, words: Sequence[str]) -> tuple[int, ...]:
    piece = encoder.pieces("", ["".join(words).strip()], numbered=False).documents[0]
    return piece.ids[piece.text.start : piece.text.end]


def make_queries(encoder: PromptEncoder, count: int) -> list[str]:
    """Return the bundled collection's queries nearest to the median length, repeated if few."""
    queries = list(read_topics(BUNDLED / "queries.jsonl").values())
    lengths = dict(zip(queries, map(len, encoder.encode(queries)), strict=True))
    median = sorted(lengths.values())[len(lengths) // 2]
    nearest = sorted(queries, key=lambda query: abs(lengths[query] - median))
    return [nearest[index % len(nearest)] for index in range(count)]
