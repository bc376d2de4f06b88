"""`routehead rerank`: a run, or BM25 on the fly, re-ranked into a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from routehead_plugins.adapters.pyserini import HeadRoutedStage, bm25_run, load_topics
from routehead_plugins.cli.runtime import ModelOptions, bm25_stage, err, progress, stamp
from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import (
    CORPUS_FILE,
    Journal,
    Request,
    Run,
    Topics,
    read_corpus,
    read_requests,
    read_run,
    write_requests,
    write_run,
)
from routehead_plugins.reranker import HeadRoutedAttentionReranker
from routehead_plugins.selection import Selector

# A query's documents, best first, and their scores.
_Scored = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class RerankJob:
    """What to re-rank, and where to write it.

    Attributes:
        output: ``.jsonl`` for rank_llm's request format, anything else for a TREC run.
        topics: Queries; not needed with ``requests``.
        corpus: Texts by id, a corpus file or BEIR folder.
        index: A Lucene index, instead of the corpus or beside it.
        run: Candidates; BM25 finds them where there is none.
        requests: Queries with their candidates in rank_llm's format, instead of all of these.
        hits: Candidates to re-rank per query.
        heads: Which heads to read; ``None`` leaves the choice to the router.
        router: What chooses heads per query; ``None`` for the one that comes with the LLM.
        first_stage_weight: Weight of the candidates' own scores; ``None`` for the one fitted with
            the heads, if any.
        tag: The run's name in its last column.
        remove_query: Drop the candidate whose id is the query's.
        llm: How the LLM is loaded.
    """

    output: Path
    topics: str | None
    corpus: Path | None
    index: Path | None
    run: Path | None
    requests: Path | None
    hits: int
    heads: str | None
    router: str | None
    first_stage_weight: float | None
    tag: str
    remove_query: bool
    llm: ModelOptions

    @cached_property
    def selector(self) -> Selector:
        """What chooses the heads."""
        return self.llm.selector(self.heads, self.router)

    def settings(self) -> dict[str, Any]:
        """Everything the results depend on, for the journal."""
        inputs = ("index", "run", "requests")
        return {
            **{name: stamp(getattr(self, name)) for name in inputs},
            "topics": None if self.topics is None else stamp(Path(self.topics)) or self.topics,
            "corpus": stamp(_corpus_file(self.corpus)),
            "hits": self.hits,
            # What a head-set file holds, not what it is called.
            "heads": repr(self.selector),
            "first_stage_weight": self.first_stage_weight,
            "remove_query": self.remove_query,
            **self.llm.settings(),
        }


def rerank(job: RerankJob) -> None:
    """Re-rank every query and write the output when all are done.

    A job that was stopped goes on where it was when it is called again the same way.

    Raises:
        RouteHeadError: An input is missing or malformed, or the LLM cannot be loaded or run.
    """
    _check(job)
    with _inputs(job) as inputs, Journal(job.output, job.settings()) as journal:
        missing = [query_id for query_id in inputs.queries if query_id not in journal.done]
        if len(missing) < len(inputs.queries):
            err.print(f"Going on: {len(inputs.queries) - len(missing)} queries were done before.")
        if missing:
            stage = _stage(job)
            with progress("Re-ranking", len(missing)) as advance:
                for query_id in missing:
                    documents = inputs.candidates(query_id)
                    hits = stage.rerank_documents(inputs.queries[query_id], documents, job.hits)
                    journal.append(query_id, [[hit.docid, hit.score] for hit in hits])
                    advance()
        _write(job, inputs, {query_id: journal.done[query_id] for query_id in inputs.queries})
        journal.discard()
    err.print(f"{len(inputs.queries)} queries re-ranked: {job.output}")


@dataclass(frozen=True)
class _Inputs:
    """Queries by id, and how to get the candidates of one, best first."""

    queries: Mapping[str, str]
    candidates: Callable[[str], Sequence[Document]]


def _check(job: RerankJob) -> None:
    """Refuse what cannot work before anything is loaded."""
    if job.requests is not None:
        given = [name for name in ("topics", "corpus", "index", "run") if getattr(job, name)]
        if given:
            raise InputError(f"--requests holds queries and candidates; leave out --{given[0]}.")
    elif job.topics is None:
        raise InputError("there are no queries; give --topics, or --requests.")
    elif job.corpus is None and job.index is None:
        raise InputError("there are no texts; give --corpus or --index.")
    if job.hits < 1:
        raise InputError(f"--hits={job.hits} leaves nothing to re-rank; give 1 or more.")
    if not job.output.parent.is_dir():
        raise InputError(f"folder {str(job.output.parent)!r} does not exist; make it first.")
    _ = job.selector  # complains


@contextmanager
def _inputs(job: RerankJob) -> Iterator[_Inputs]:
    """Read the inputs; an index stays open while its texts are needed."""
    if job.requests is not None:
        requests = {request.query_id: request for request in read_requests(job.requests)}
        queries = {query_id: request.query for query_id, request in requests.items()}
        yield _Inputs(queries, lambda query_id: requests[query_id].candidates)
        return
    topics = load_topics(job.topics or "")
    corpus_file = _corpus_file(job.corpus)
    corpus = None if corpus_file is None else read_corpus(corpus_file)
    run = None if job.run is None else _asked(read_run(job.run), topics)
    if run is not None and job.index is None:
        yield _looked_up(job, topics, run, HeadRoutedStage(None, corpus=corpus))
        return
    with bm25_stage(job.corpus or Path(), job.hits, job.index) as stage:
        if run is None:
            with err.status("Searching with BM25 ..."):
                # One more, lest dropping the query's own document leaves one too few.
                run = bm25_run(stage.searcher, topics, job.hits + job.remove_query)
        yield _looked_up(job, topics, run, HeadRoutedStage(stage.searcher, corpus=corpus))


def _corpus_file(path: Path | None) -> Path | None:
    return path / CORPUS_FILE if path is not None and path.is_dir() else path


def _asked(run: Run, topics: Topics) -> Run:
    """Make sure that every query of the run has a text."""
    unknown = [query_id for query_id in run if query_id not in topics]
    if unknown:
        raise CollectionError(
            f"query {unknown[0]!r} of the run is not in the topics; "
            "give the topics that the run was made with."
        )
    return run


def _looked_up(job: RerankJob, topics: Topics, run: Run, texts: HeadRoutedStage) -> _Inputs:
    texts.remove_query = job.remove_query
    queries = {query_id: topics[query_id] for query_id in run}
    return _Inputs(
        queries, lambda query_id: texts.documents(run[query_id].items(), query_id=query_id)
    )


def _stage(job: RerankJob) -> HeadRoutedStage:
    """Load the LLM; only when there is work for it."""
    layout = job.llm.arrange(job.selector)
    reranker = HeadRoutedAttentionReranker(
        job.llm.load(job.selector),
        job.selector,
        layout=layout,
        max_doc_tokens=job.llm.max_doc_tokens,
        first_stage_weight=job.first_stage_weight,
    )
    return HeadRoutedStage(None, reranker, corpus={})


def _write(job: RerankJob, inputs: _Inputs, results: Mapping[str, _Scored]) -> None:
    if job.output.suffix != ".jsonl":
        write_run(
            job.output, {key: [(d, s) for d, s in hits] for key, hits in results.items()}, job.tag
        )
        return
    requests = []
    for query_id, hits in results.items():
        documents = {document.id: document for document in inputs.candidates(query_id)}
        ranked = tuple(replace(documents[docid], score=score) for docid, score in hits)
        requests.append(Request(query_id, inputs.queries[query_id], ranked))
    write_requests(job.output, requests)
