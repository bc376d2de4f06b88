"""Write a corpus of short passages to align heads on: Wikipedia and news, from a package on PyPI.

gensim's wheel has 99 articles of the English Wikipedia (CC BY-SA) and the 300 news stories of the
Lee background corpus among its test data. None of them is a collection that figures are reported
on, so that an adapter that learned from them is tested on texts that it has not seen.

Needs `pip install gensim==4.4.0`. Example: python -m benchmarks.alignment.corpus wikipedia-a
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import run
from routehead_plugins.errors import MissingExtraError
from routehead_plugins.io import CORPUS_FILE, atomic_write_text, make_folder

_ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"(])")
_SHORTEST_PARAGRAPH = 25  # words
_SHORTEST_PASSAGE = 12
_MARKUP = re.compile(r"'{2,}|\s+")


def passages(text: str, size: int) -> Iterator[str]:
    """Divide a text between sentences.

    Args:
        text: The text.
        size: Words of a passage, at most; a longer sentence is a passage of its own.

    Yields:
        Passages of at least 12 words.
    """
    sentences = [sentence.split() for sentence in _SENTENCE.split(text)]
    passage: list[str] = []
    for words in [*sentences, []]:
        if not words or len(passage) + len(words) > size:
            if len(passage) >= _SHORTEST_PASSAGE:
                yield " ".join(passage)
            passage = []
        passage += words


def articles() -> Iterator[tuple[str, str]]:
    """Yield title and text of every article and story.

    Raises:
        MissingExtraError: gensim is not installed.
    """
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
        from gensim.test.utils import datapath
    except ImportError as error:
        raise MissingExtraError(
            "the texts are in gensim, which is not installed; run: pip install gensim==4.4.0",
            name="gensim",
        ) from error
    with bz2.open(datapath(_ARTICLES)) as file:
        for title, text, _ in extract_pages(file, filter_namespaces=("0",)):
            for paragraph in filter_wiki(text).split("\n"):
                cleaned = _MARKUP.sub(" ", paragraph).strip()
                if len(cleaned.split()) >= _SHORTEST_PARAGRAPH and cleaned[0] not in "|*#:;!={":
                    yield title, cleaned
    for story in Path(datapath(_NEWS)).read_text("utf-8").splitlines():
        yield "", story.strip()


def corpus(
    folder: Annotated[Path, typer.Argument(help="BEIR folder to write.")],
    words: Annotated[int, typer.Option(help="Words of a passage, at most.")] = 60,
) -> None:
    """Write corpus.jsonl, without queries."""
    rows = [
        {"_id": str(number), "title": title, "text": passage}
        for number, (title, passage) in enumerate(
            (title, passage) for title, text in articles() for passage in passages(text, words)
        )
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(make_folder(folder, "a corpus") / CORPUS_FILE, lines)
    typer.echo(f"{folder}: {len(rows):,} passages")


if __name__ == "__main__":
    run(corpus)
