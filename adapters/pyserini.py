"""Pyserini: re-rank the results of BM25, or of any other of its searchers.

Example:
    >>> index = build_index("corpus.jsonl", "index")
    >>> stage = HeadRoutedStage.from_index(index, model="embedded", hits=20)
    >>> for hit in stage.search("what does prenatal care include", k=3):
    ...     hit.rank, hit.docid, hit.score, hit.retrieval_rank
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from routehead_plugins.data import (
    Document,
    as_documents,
    as_list,
    check_count,
    check_flag,
    check_number,
    check_text,
    check_top_n,
)
from routehead_plugins.errors import CollectionError, InputError, class_name, short_repr
from routehead_plugins.io import TEXT_FIELDS, Run
from routehead_plugins.options import RerankerOptions

# Nothing here imports Pyserini, which starts a JVM; ``_jvm.load`` does, and reports its absence.
from . import _jvm
from ._hits import Hit, hits_of
from ._lazy import LazyReranker, Reranker, asking, check_options, check_reranker
from ._lucene import (
    as_score,
    bm25_run,
    build_index,
    load_topics,
    open_index,
    scored_ids,
    search,
    stored_documents,
    texts_by_id,
)
from ._texts import TextSource

__all__ = [
    "TEXT_FIELDS",
    "HeadRoutedStage",
    "Hit",
    "Reranker",
    "Run",
    "bm25_run",
    "build_index",
    "load_topics",
    "stored_documents",
]


class HeadRoutedStage:
    """A re-ranking stage behind any Pyserini searcher.

    Args:
        searcher: Anything with Pyserini's ``search(query, k)``, and with ``doc(docid)`` unless
            ``corpus`` is given, such as a ``LuceneSearcher``.
        reranker: A ready ``HeadRoutedAttentionReranker``; ``None`` loads one at first use.
        corpus: Documents or texts by id, looked up before those of the searcher. A
            ``FaissSearcher`` over an index of one's own stores no texts and needs it.
        hits: Number of candidates to retrieve and re-rank.
        top_n: Largest number of results per query; ``None`` for no limit.
        text_fields: Fields of a stored JSON document that may hold its text, in order of
            preference.
        remove_query: Whether to drop the candidate whose id is the query's (as ArguAna needs).
        instruction: A sentence or two on which documents are relevant to a query, where a query
            has none of its own.
        **options: Options of ``RerankerOptions`` to load the re-ranker with, such as
            ``model="embedded"``; only without ``reranker``.

    Raises:
        InputError: A number is below 1, there is no source of texts, an argument has a wrong
            type, or a ready ``reranker`` is given together with options to load one.
        TypeError: An argument is unknown.
    """

    def __init__(
        self,
        searcher: Any,
        reranker: Reranker | None = None,
        *,
        corpus: Mapping[str, Document] | None = None,
        hits: int = 100,
        top_n: int | None = None,
        text_fields: Sequence[str] = TEXT_FIELDS,
        remove_query: bool = False,
        instruction: str | None = None,
        **options: Any,
    ) -> None:
        check_options(options, reranker)
        self.searcher = searcher
        self.hits = check_count("hits", hits)
        self.top_n = check_top_n(top_n)
        self.remove_query = check_flag("remove_query", remove_query)
        asking(instruction)
        self.instruction = instruction
        self._texts = TextSource(searcher, corpus, text_fields)
        self._lazy = LazyReranker(RerankerOptions(**options) if options else None, reranker)

    @classmethod
    def from_index(
        cls,
        index_dir: str | Path,
        reranker: Reranker | None = None,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        **arguments: Any,
    ) -> Self:
        """Search a Lucene index on disk with BM25.

        Args:
            index_dir: Folder of the index; ``build_index`` makes one.
            reranker: As for the class.
            k1: Term saturation of BM25.
            b: Length normalisation of BM25.
            **arguments: As for the class.

        Raises:
            CollectionError: The folder holds no Lucene index.
            InputError: ``k1`` is negative, or ``b`` is not between 0 and 1.
            JavaError: No JDK that Lucene can run on was found.
            MissingExtraError: Pyserini is not installed.
        """
        bm25 = _check_bm25(k1, b)
        searcher = open_index(index_dir)
        searcher.set_bm25(*bm25)
        return cls(searcher, reranker, **arguments)

    @classmethod
    def from_prebuilt(
        cls,
        name: str,
        reranker: Reranker | None = None,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        **arguments: Any,
    ) -> Self:
        """Search one of Pyserini's prebuilt indexes with BM25; download it if necessary.

        Args:
            name: Pyserini's name of the index, such as ``beir-v1.0.0-scifact.flat``.
            reranker: As for the class.
            k1: Term saturation of BM25.
            b: Length normalisation of BM25.
            **arguments: As for the class.

        Raises:
            CollectionError: Pyserini does not know the name or cannot download the index.
            InputError: ``k1`` is negative, or ``b`` is not between 0 and 1.
            JavaError: No JDK that Lucene can run on was found.
            MissingExtraError: Pyserini is not installed.
        """
        bm25 = _check_bm25(k1, b)
        check_text("name", name)
        searcher_class = _jvm.load("pyserini.search.lucene").LuceneSearcher
        searcher, reason = None, ""
        # Pyserini prints the reason of most failures and returns None.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                searcher = searcher_class.from_prebuilt_index(name)
            except OSError as error:  # Pyserini 2 downloads its lists of names, too
                reason = " ".join(str(error).split())
        if searcher is None:
            reason = reason or printed.getvalue().strip().rpartition("\n")[2].rstrip(".")
            raise CollectionError(
                f"no prebuilt index {name!r} ({reason}); expected a name from "
                "LuceneSearcher.list_prebuilt_indexes(); check the name and the network."
            )
        searcher.set_bm25(*bm25)
        return cls(searcher, reranker, **arguments)

    @property
    def reranker(self) -> Reranker:
        """The re-ranker, loaded at first use."""
        return check_reranker(self._lazy.get())  # type: ignore[no-any-return]

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        query_id: str | None = None,
        instruction: str | None = None,
    ) -> list[Hit]:
        """Retrieve ``hits`` candidates, re-rank them and return the best.

        Args:
            query: The query.
            k: Number of results; those beyond ``hits`` follow in first-stage order.
            query_id: The query's id, for ``remove_query``.
            instruction: Which documents are relevant to this query; by default the stage's.

        Raises:
            CollectionError: The text of a candidate is missing.
            InputError: ``k`` is below 1, or the query is not a text.
        """
        k = check_count("k", k)
        candidates = self._retrieve(query, max(k, self.hits), query_id)
        return self._rerank(query, candidates, self.hits, instruction)[:k]

    def retrieve(self, query: str, *, query_id: str | None = None) -> list[Document]:
        """Return the candidates in the order and with the scores of the first stage.

        Args:
            query: The query.
            query_id: The query's id, for ``remove_query``.

        Raises:
            CollectionError: The text of a candidate is missing.
        """
        return self._texts.documents(self._retrieve(query, self.hits, query_id))

    def documents(
        self, scored: Iterable[tuple[Any, Any]], *, query_id: str | None = None
    ) -> list[Document]:
        """Look up documents by id, in the order given.

        Args:
            scored: Pairs of document id and first-stage score.
            query_id: The query's id, for ``remove_query``.

        Raises:
            CollectionError: The text of a document is missing.
            InputError: A score is not a number.
        """
        pairs = as_list(scored, "scored", "pairs of id and score")
        for index, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(
                    f"scored[{index}] is a {class_name(pair)}; give a pair of id and score."
                )
        return self._texts.documents(self._candidates(pairs, query_id))

    def rerank_hits(
        self,
        query: str,
        hits: Iterable[Any],
        *,
        query_id: str | None = None,
        instruction: str | None = None,
    ) -> list[Hit]:
        """Re-rank all hits of any Pyserini searcher.

        Args:
            query: The query that they were retrieved for.
            hits: Objects with ``docid`` and ``score``, best first; not modified.
            query_id: The query's id, for ``remove_query``.
            instruction: See ``search``.

        Raises:
            CollectionError: The text of a hit is missing.
            InputError: A hit has no id or no score, or the query is blank.
        """
        check_text("query", query)
        listed = as_list(hits, "hits", "objects with docid and score")
        candidates = self._candidates(scored_ids(listed), query_id)
        return self._rerank(query, candidates, len(candidates), instruction)

    def rerank_documents(
        self,
        query: str,
        documents: Sequence[Document],
        depth: int | None = None,
        *,
        instruction: str | None = None,
    ) -> list[Hit]:
        """Re-rank documents from any source.

        Args:
            query: The query.
            documents: Best first; not modified.
            depth: Number of documents to re-rank; the others follow in their order. ``None`` for
                all.
            instruction: See ``search``.

        Raises:
            InputError: The query is blank, ``depth`` is below 1, or an item is not a document.
        """
        candidates = as_documents(documents)
        if depth is not None:
            depth = check_count("depth", depth)
        if not candidates:
            return []
        check_text("query", query)
        own = asking(self.instruction if instruction is None else instruction)
        # A re-ranker of another kind needs no such argument.
        reranker: Any = self.reranker
        ranking = reranker.rerank(query, candidates[:depth], **own)
        return hits_of(ranking, candidates)[: self.top_n]

    def rerank_run(
        self,
        run: Mapping[Any, Mapping[Any, float]],
        topics: Mapping[Any, str],
        *,
        depth: int | None = None,
        keep_tail: bool = True,
        instructions: Mapping[str, str] | None = None,
        on_query: Callable[[str, list[Hit]], None] | None = None,
    ) -> Iterator[tuple[str, list[Hit]]]:
        """Re-rank the best candidates of every query of a run, one query at a time.

        Args:
            run: Query id -> document id -> score; ties keep the run's order.
            topics: Queries by id; ids may be integers here and in the run.
            depth: Number of candidates to re-rank; ``None`` for ``hits``.
            keep_tail: Whether to append the candidates below ``depth`` in first-stage order, which
                keeps recall, instead of dropping them.
            instructions: Which documents are relevant, by query id; others have the stage's.
            on_query: Called with the id and the hits of each finished query, such as for a
                progress bar.

        Returns:
            Pairs of query id and hits, computed on demand, in the run's order.

        Raises:
            CollectionError: The run has a query that the topics lack (raised at once), or the
                text of a candidate is missing (raised when its query is reached).
            InputError: ``depth`` is below 1, or run or topics have wrong types (raised at once).
        """
        depth = check_count("depth", self.hits if depth is None else depth)
        keep_tail = check_flag("keep_tail", keep_tail)
        queries = texts_by_id(topics)
        _check_run(run, queries)
        asked = texts_by_id({} if instructions is None else instructions)

        def rerank_queries() -> Iterator[tuple[str, list[Hit]]]:
            for qid, scores in run.items():
                candidates = sorted(self._candidates(scores.items(), str(qid)), key=_rank_last)
                candidates = candidates if keep_tail else candidates[:depth]
                hits = self._rerank(queries[str(qid)], candidates, depth, asked.get(str(qid)))
                if on_query is not None:
                    on_query(str(qid), hits)
                yield str(qid), hits

        # The generator is inside, so that the errors above come before the first query is read.
        return rerank_queries()

    def _retrieve(self, query: str, count: int, query_id: str | None) -> list[tuple[str, float]]:
        # One more, in case the query's own document is dropped.
        hits = search(self.searcher, query, count + 1 if self.remove_query else count)
        return self._candidates(scored_ids(hits), query_id)[:count]

    def _candidates(
        self, scored: Iterable[tuple[Any, Any]], query_id: str | None
    ) -> list[tuple[str, float]]:
        """Convert ids and scores to Python types, and drop the query's own document."""
        dropped = None if query_id is None or not self.remove_query else str(query_id)
        return [
            (str(docid), as_score(docid, score)) for docid, score in scored if str(docid) != dropped
        ]

    def _rerank(
        self,
        query: str,
        candidates: Sequence[tuple[str, float]],
        depth: int,
        instruction: str | None = None,
    ) -> list[Hit]:
        documents = self._texts.documents(candidates)
        return self.rerank_documents(query, documents, depth, instruction=instruction)


def _check_bm25(k1: object, b: object) -> tuple[float, float]:
    return check_number("k1", k1, least=0), check_number("b", b, least=0, most=1)


def _check_run(run: Any, queries: Mapping[str, str]) -> None:
    """Check the types of a run, and that there is a query for each of its ids."""
    if not isinstance(run, Mapping):
        raise InputError(
            f"run is a {class_name(run)}; give a mapping from query ids to scores by document id."
        )
    seen: set[str] = set()
    for qid, scores in run.items():
        if not isinstance(scores, Mapping):
            raise InputError(
                f"run[{short_repr(qid)}] is a {class_name(scores)}; "
                "give a mapping from document ids to scores."
            )
        for docid, score in scores.items():
            as_score(docid, score)
        if str(qid) in seen:
            raise InputError(f"two queries of the run have the id {short_repr(str(qid))}.")
        seen.add(str(qid))
        if str(qid) not in queries:
            raise CollectionError(
                f"query {short_repr(str(qid))} of the run is not in the topics; expected a topic "
                "for each query of the run; give the topics that the run was made with."
            )
        if scores:
            check_text(f"topics[{short_repr(str(qid))}]", queries[str(qid)])


def _rank_last(candidate: tuple[str, float]) -> float:
    """Sort by falling score; one that is not a number has no rank and stands last."""
    return math.inf if math.isnan(candidate[1]) else -candidate[1]
