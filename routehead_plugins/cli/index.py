"""`routehead index`: run the documents of a corpus once, and keep what later queries read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routehead_plugins.adapters.pyserini import stored_documents
from routehead_plugins.cli.options import HEADS, LLM, with_options
from routehead_plugins.cli.runtime import (
    check_new_folder,
    check_reading,
    err,
    load_reranker,
    progress,
    resumable,
)
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import CORPUS_FILE, check_corpus, read_documents
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.index import IndexReport


@dataclass(frozen=True)
class IndexArguments:
    """Options of `routehead index`."""

    output: Annotated[Path, "Folder of the index; documents are added to one that exists."]
    corpus: Annotated[Path | None, "Texts: corpus.jsonl (BEIR or Pyserini), or its folder."] = None
    index: Annotated[Path | None, "Texts: a Lucene index that stores them."] = None
    keys: Annotated[str, "Number format of the keys: **int8** or **float16**."] = "int8"
    budget: Annotated[
        float, typer.Option(help="Share of each document's tokens to keep.", min=0, max=1)
    ] = 1.0
    verify: Annotated[
        bool, "Compare every document of the index with its checksum; without texts, only that."
    ] = False


@with_options(*HEADS, *LLM, "max_doc_tokens", "on_too_long")
def index(arguments: IndexArguments, options: RerankerOptions) -> None:
    """Run the documents of a corpus once, and keep their keys at the heads that may be read.

    `routehead rerank --documents` then runs nothing but the query. New documents are added,
    changed ones replaced, and a job that was stopped goes on when the same command is run again.

    Example: routehead index --corpus corpus.jsonl --output documents --max-doc-tokens 120
    """
    from routehead_plugins.index import DocumentIndex
    from routehead_plugins.selection import choose_selector

    _check(arguments)
    if arguments.corpus is not None or arguments.index is not None:
        options = replace(options, layout="late")
        selector = choose_selector(options)
        check_reading(options, selector)
        total, documents = _documents(arguments)
        builder = load_reranker(options, selector).index_builder(
            arguments.output, dtype=arguments.keys, budget=arguments.budget
        )
        with resumable() as keep, builder, progress("Indexing", total, keep) as advance:
            for count in builder.add(documents):
                advance(count)
        report = builder.report
        err.print(
            f"{report.added} documents added, {report.replaced} replaced, {report.unchanged} "
            f"unchanged, {report.blank} blank{_cut(report)}: {arguments.output}"
        )
    opened = DocumentIndex(arguments.output)
    if arguments.verify:
        err.print(f"{opened.verify()} documents are as they were written: {arguments.output}")
    if len(opened):
        size = opened.nbytes / 1e6
        err.print(f"{len(opened)} documents, {size:.1f} MB, {size / len(opened) * 1e3:.0f} KB each")


def _cut(report: IndexReport) -> str:
    return f", {report.cut} too long for the LLM and cut" if report.cut else ""


def _check(arguments: IndexArguments) -> None:
    """Check the arguments before anything is read or loaded."""
    if arguments.corpus is not None and arguments.index is not None:
        raise InputError("--corpus and --index are two sources of texts; leave one of them out.")
    if arguments.corpus is None and arguments.index is None:
        if not arguments.verify:
            raise InputError("there are no texts; give --corpus or --index.")
        return
    check_new_folder("--output", arguments.output)


def _documents(arguments: IndexArguments) -> tuple[int, Iterator[Document]]:
    """Return the number of documents, and the documents one after the other."""
    if arguments.index is not None:
        total, documents = stored_documents(arguments.index)
        return total, documents
    corpus = arguments.corpus or Path()
    path = corpus / CORPUS_FILE if corpus.is_dir() else corpus
    # Read twice: what is wrong with the last line is said before the first document is run.
    with err.status(f"Reading {path} ..."):
        total = check_corpus(path)
    return total, read_documents(path)
