"""`routehead rerank`: re-rank a run, or BM25's candidates, and write a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from routehead_plugins.adapters.pyserini import HeadRoutedStage, bm25_run, load_topics
from routehead_plugins.cli.options import HEADS, LLM, PROMPT, with_options
from routehead_plugins.cli.runtime import (
    bm25_stage,
    check_minimum,
    check_new_file,
    check_reading,
    err,
    load_reranker,
    path_of,
    progress,
    resumable,
    settings,
)
from routehead_plugins.data import Document, check_text
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import (
    CORPUS_FILE,
    Journal,
    Request,
    Run,
    Topics,
    check_run_names,
    encode_json,
    query_key,
    read_corpus,
    read_instructions,
    read_requests,
    read_run,
    write_requests,
    write_run,
)
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.selection import Selector


@dataclass(frozen=True)
class RerankArguments:
    """Options of `routehead rerank`."""

    output: Annotated[Path, "Output file: a TREC run, or rank_llm requests if it ends in .jsonl."]
    topics: Annotated[
        str | None, "Queries: .tsv, .jsonl or .trec file, or a name Pyserini knows."
    ] = None
    corpus: Annotated[Path | None, "Texts: corpus.jsonl (BEIR or Pyserini), or its folder."] = None
    index: Annotated[Path | None, "Texts: a Lucene index that stores them."] = None
    run: Annotated[Path | None, "Candidates: a TREC run.  [default: retrieved with BM25]"] = None
    requests: Annotated[
        Path | None, "Queries with candidates as rank_llm's JSONL, instead of all the above."
    ] = None
    hits: Annotated[int, "Candidates to re-rank per query; the others follow in order."] = 100
    instruction: Annotated[
        str | None,
        "Which documents are relevant, in a sentence or two; a query in a .jsonl file may have an "
        "instruction of its own.",
    ] = None
    tag: Annotated[str, "Name of the run, its last column."] = "routehead"
    remove_query: Annotated[bool, "Drop the candidate whose id is the query's (ArguAna)."] = False


@with_options(
    *HEADS,
    "first_stage_weight",
    *LLM,
    *PROMPT,
    *("document_cache", "documents", "refine", "drop_query_copies"),
    *("long_documents", "chunk_tokens", "chunk_stride", "chunk_aggregation", "on_too_long"),
)
def rerank(arguments: RerankArguments, options: RerankerOptions) -> None:
    """Re-rank a run, or the candidates of BM25, and write a run.

    The output is written when every query is done; a job that was stopped resumes when the same
    command is run again.

    Example: routehead rerank --corpus corpus.jsonl --topics queries.jsonl --run bm25.trec
    --hits 20 --output reranked.trec
    """
    from routehead_plugins.index import open_documents
    from routehead_plugins.selection import choose_selector

    _check(arguments, options)
    options, index = open_documents(options)
    selector = choose_selector(options)
    check_reading(options, selector)
    state = _settings(arguments, options, selector)
    if index is not None:
        state["keys"], state["budget"] = index.config.dtype, index.config.budget
    with _inputs(arguments) as inputs, resumable() as keep:
        keys = _keys(arguments, inputs)
        with Journal(arguments.output, state) as journal:
            missing = [query_id for query_id, key in keys.items() if key not in journal.done]
            if len(missing) < len(keys):
                keep()
                err.print(f"Resuming: {len(keys) - len(missing)} queries were done before.")
            if missing:
                stage = HeadRoutedStage(None, load_reranker(options, selector), corpus={})
                with progress("Re-ranking", len(missing), keep) as advance:
                    for query_id in missing:
                        hits = stage.rerank_documents(
                            inputs.queries[query_id],
                            inputs.candidates(query_id),
                            arguments.hits,
                            instruction=inputs.instruction(query_id, arguments),
                        )
                        journal.append(keys[query_id], [[hit.docid, hit.score] for hit in hits])
                        advance()
            _write(arguments, inputs, {key: journal.done[value] for key, value in keys.items()})
            journal.discard()
    err.print(f"{len(keys)} queries re-ranked: {arguments.output}")


@dataclass(frozen=True)
class _Inputs:
    """Queries by id, the candidates of a query id, best first, and instructions of some queries."""

    queries: Mapping[str, str]
    candidates: Callable[[str], Sequence[Document]]
    instructions: Mapping[str, str] = field(default_factory=dict)

    def instruction(self, query_id: str, arguments: RerankArguments) -> str | None:
        """Return the instruction of a query: its own, or that of all."""
        return self.instructions.get(query_id, arguments.instruction)


def _check(arguments: RerankArguments, options: RerankerOptions) -> None:
    """Check the arguments before anything is read or loaded."""
    if arguments.requests is not None:
        names = ("topics", "corpus", "index", "run")
        surplus = [name for name in names if getattr(arguments, name)]
        if surplus:
            raise InputError(f"--requests holds queries and candidates; leave out --{surplus[0]}.")
    elif arguments.topics is None:
        raise InputError("there are no queries; give --topics, or --requests.")
    elif arguments.corpus is None and arguments.index is None:
        raise InputError("there are no texts; give --corpus or --index.")
    check_minimum("--hits", arguments.hits)
    if arguments.instruction is not None:
        check_text("--instruction", arguments.instruction)
    if not os.path.isdir(arguments.output.parent):
        raise InputError(f"folder {str(arguments.output.parent)!r} does not exist; make it first.")
    files = [arguments.run, arguments.requests, _corpus_file(arguments.corpus)]
    named = map(path_of, (arguments.topics, options.heads, options.model))
    check_new_file("--output", arguments.output, [*files, *named])
    if not _writes_requests(arguments):
        check_run_names(arguments.tag)


def _writes_requests(arguments: RerankArguments) -> bool:
    return arguments.output.suffix == ".jsonl"


def _settings(
    arguments: RerankArguments, options: RerankerOptions, selector: Selector
) -> dict[str, Any]:
    """Return the settings that all results depend on; queries and texts are in the keys."""
    return {
        "hits": arguments.hits,
        # The description holds the content of a head-set file, so that a change is noticed.
        "heads": repr(selector),
        "first_stage_weight": options.first_stage_weight,
        **settings(options),
    }


def _keys(arguments: RerankArguments, inputs: _Inputs) -> dict[str, str]:
    """Return each query's key in the journal; check its candidates, before the first one is read.

    Raises:
        CollectionError: The text of a candidate is missing.
        InputError: The output cannot hold a query or a candidate.
    """
    keys = {}
    if not _writes_requests(arguments):
        check_run_names(arguments.tag, inputs.queries)
    for query_id, query in inputs.queries.items():
        documents = inputs.candidates(query_id)
        if _writes_requests(arguments):
            # Texts are always writable; an index may hold metadata that JSON cannot.
            for document in documents:
                name = f"the metadata of document {document.id!r}"
                encode_json(dict(document.metadata), name, allow_nan=False)
        else:
            check_run_names(arguments.tag, (), (str(document.id) for document in documents))
        instruction = inputs.instruction(query_id, arguments)
        asked = query if instruction is None else f"{instruction}\n{query}"
        keys[query_id] = query_key(query_id, asked, documents)
    return keys


@contextmanager
def _inputs(arguments: RerankArguments) -> Iterator[_Inputs]:
    """Read queries and candidates; an index stays open while its texts are needed."""
    if arguments.requests is not None:
        requests = {request.query_id: request for request in read_requests(arguments.requests)}
        queries = {query_id: request.query for query_id, request in requests.items()}
        own = {query_id: request.instruction for query_id, request in requests.items()}
        instructions = {query_id: text for query_id, text in own.items() if text is not None}
        yield _Inputs(queries, lambda query_id: requests[query_id].candidates, instructions)
        return
    topics = load_topics(arguments.topics or "")
    path = Path(arguments.topics or "")
    instructions = read_instructions(path) if path.is_file() else {}
    corpus_file = _corpus_file(arguments.corpus)
    corpus = None if corpus_file is None else read_corpus(corpus_file)
    run = None if arguments.run is None else read_run(arguments.run)
    drop = arguments.remove_query
    if run is not None and arguments.index is None:
        stage = HeadRoutedStage(None, corpus=corpus, remove_query=drop)
        yield _run_inputs(topics, run, stage, instructions)
        return
    with bm25_stage(arguments.corpus or Path(), arguments.hits, arguments.index) as stage:
        if run is None:
            with err.status("Searching with BM25 ..."):
                # One more candidate, since the query's own document may be dropped.
                run = bm25_run(stage.searcher, topics, arguments.hits + drop)
        texts = HeadRoutedStage(stage.searcher, corpus=corpus, remove_query=drop)
        yield _run_inputs(topics, run, texts, instructions)


def _run_inputs(
    topics: Topics, run: Run, texts: HeadRoutedStage, instructions: Mapping[str, str]
) -> _Inputs:
    """Combine a run with the texts of its queries and documents."""
    unknown = [query_id for query_id in run if query_id not in topics]
    if unknown:
        raise CollectionError(
            f"query {unknown[0]!r} of the run is not in the topics; "
            "give the topics that the run was made with."
        )
    return _Inputs(
        {query_id: topics[query_id] for query_id in run},
        lambda query_id: texts.documents(run[query_id].items(), query_id=query_id),
        instructions,
    )


def _corpus_file(path: Path | None) -> Path | None:
    return path / CORPUS_FILE if path is not None and path.is_dir() else path


def _write(
    arguments: RerankArguments, inputs: _Inputs, results: Mapping[str, Sequence[tuple[str, float]]]
) -> None:
    """Write the re-ranked candidates of every query in the format of the output's suffix."""
    if not _writes_requests(arguments):
        write_run(arguments.output, results, arguments.tag)
        return
    requests = []
    for query_id, hits in results.items():
        documents = {document.id: document for document in inputs.candidates(query_id)}
        candidates = tuple(replace(documents[docid], score=score) for docid, score in hits)
        own = inputs.instructions.get(query_id)
        requests.append(Request(query_id, inputs.queries[query_id], candidates, own))
    write_requests(arguments.output, requests)
