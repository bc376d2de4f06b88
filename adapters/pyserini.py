"""Pyserini: re-rank what BM25, or any other of its searchers, retrieves.

Example:
    >>> index = build_index("corpus.jsonl", "index")
    >>> stage = HeadRoutedStage.from_index(index, model="embedded", hits=20)
    >>> for hit in stage.search("what does prenatal care include", k=3):
    ...     hit.rank, hit.docid, hit.score, hit.retrieval_rank
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import TEXT_FIELDS, Run

from . import _jvm
from ._hits import Hit, hits_of
from ._lucene import (
    bm25_run,
    build_index,
    check_count,
    is_index,
    load_topics,
)
from ._texts import TextSource

if TYPE_CHECKING:
    from routehead_plugins.data import Ranking

__all__ = [
    "TEXT_FIELDS",
    "HeadRoutedStage",
    "Hit",
    "Reranker",
    "Run",
    "bm25_run",
    "build_index",
    "load_topics",
]


class Reranker(Protocol):
    """What the stage asks of a ``HeadRoutedAttentionReranker``."""

    def rerank(
        self, query: str, documents: Sequence[Document], top_n: int | None = None
    ) -> Ranking:
        """Rank the documents, best first."""
        ...


class HeadRoutedStage:
    """A re-ranking stage behind any Pyserini searcher.

    Args:
        searcher: Anything with Pyserini's ``search(query, k)``, and with ``doc(docid)`` unless
            ``corpus`` is given, such as a ``LuceneSearcher``.
        reranker: A ready ``HeadRoutedAttentionReranker``; None: one is loaded at first use.
        corpus: Documents by id, asked before the searcher. A ``FaissSearcher`` over an index of
            one's own stores no texts and needs it.
        hits: Candidates to retrieve and re-rank.
        top_n: Most results for a query, whatever is asked for; None: no such limit.
        text_fields: Where a stored JSON document has its text, the most wanted field first.
        remove_query: Drop the candidate whose id is the query's (as ArguAna needs).
        **from_pretrained: Arguments of ``HeadRoutedAttentionReranker.from_pretrained``, such
            as ``model="embedded"``; only without ``reranker``.

    Raises:
        InputError: A number is less than one, there is no source of texts, or a ready
            ``reranker`` is given together with arguments to load one.
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
        **from_pretrained: Any,
    ) -> None:
        check_count("hits", hits)
        if top_n is not None:
            check_count("top_n", top_n)
        if reranker is not None and from_pretrained:
            raise InputError(
                f"{', '.join(from_pretrained)} cannot change a ready reranker; "
                "expected either reranker= or the arguments to load one; drop one of the two."
            )
        self.searcher = searcher
        self.hits = hits
        self.top_n = top_n
        self.remove_query = remove_query
        self._texts = TextSource(searcher, corpus, text_fields)
        self._reranker = reranker
        self._from_pretrained = from_pretrained
        self._lock = threading.Lock()

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
            k1: BM25's term saturation.
            b: BM25's length normalisation.
            **arguments: As for the class.

        Raises:
            CollectionError: The folder holds no Lucene index.
            JavaError: No JDK that Lucene can run on was found.
            MissingExtraError: Pyserini is not installed.
        """
        folder = Path(index_dir)
        if not is_index(folder):
            raise CollectionError(
                f"index_dir={str(folder)!r} holds no Lucene index; expected a folder made by "
                "build_index or Pyserini; check the path, or build it."
            )
        searcher = _jvm.load("pyserini.search.lucene").LuceneSearcher(str(folder))
        searcher.set_bm25(k1, b)
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
        """Search one of Pyserini's prebuilt indexes with BM25, downloading it if need be.

        Args:
            name: Pyserini's name for it, such as ``beir-v1.0.0-scifact.flat``.
            reranker: As for the class.
            k1: BM25's term saturation.
            b: BM25's length normalisation.
            **arguments: As for the class.

        Raises:
            CollectionError: Pyserini does not know the name or cannot download the index.
            JavaError: No JDK that Lucene can run on was found.
            MissingExtraError: Pyserini is not installed.
        """
        searcher_class = _jvm.load("pyserini.search.lucene").LuceneSearcher
        # Pyserini prints what went wrong and returns None.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            searcher = searcher_class.from_prebuilt_index(name)
        if searcher is None:
            reason = printed.getvalue().strip().rpartition("\n")[2].rstrip(".")
            raise CollectionError(
                f"no prebuilt index {name!r} ({reason}); expected a name from "
                "LuceneSearcher.list_prebuilt_indexes(); check the name and the network."
            )
        searcher.set_bm25(k1, b)
        return cls(searcher, reranker, **arguments)

    @property
    def reranker(self) -> Reranker:
        """The re-ranker, loaded at first use."""
        with self._lock:
            if self._reranker is None:
                from routehead_plugins import HeadRoutedAttentionReranker

                self._reranker = HeadRoutedAttentionReranker.from_pretrained(
                    **self._from_pretrained
                )
            return self._reranker

    def search(self, query: str, k: int = 10, *, query_id: str | None = None) -> list[Hit]:
        """Retrieve ``hits`` candidates, re-rank them and return the best.

        Args:
            query: What to search for.
            k: How many; those asked for beyond ``hits`` follow in first-stage order.
            query_id: The query's id, for ``remove_query``.

        Raises:
            CollectionError: The text of a candidate is nowhere to be found.
            InputError: ``k`` is less than one.
        """
        check_count("k", k)
        candidates = self._retrieve(query, max(k, self.hits), query_id)
        return self._rerank(query, candidates, self.hits)[:k]

    def retrieve(self, query: str, *, query_id: str | None = None) -> list[Document]:
        """Return the candidates as the first stage orders and scores them.

        Args:
            query: What to search for.
            query_id: The query's id, for ``remove_query``.

        Raises:
            CollectionError: The text of a candidate is nowhere to be found.
        """
        return self._texts.documents(self._retrieve(query, self.hits, query_id))

    def documents(
        self, scored: Iterable[tuple[Any, Any]], *, query_id: str | None = None
    ) -> list[Document]:
        """Look the documents of some ids up, in this order.

        Args:
            scored: Pairs of document id and first-stage score.
            query_id: The query's id, for ``remove_query``.

        Raises:
            CollectionError: The text of a document is nowhere to be found.
        """
        return self._texts.documents(self._candidates(scored, query_id))

    def rerank_hits(
        self, query: str, hits: Iterable[Any], *, query_id: str | None = None
    ) -> list[Hit]:
        """Re-rank the hits of any Pyserini searcher, all of them.

        Args:
            query: What they were retrieved for.
            hits: Objects with ``docid`` and ``score``, best first; left as they are.
            query_id: The query's id, for ``remove_query``.

        Raises:
            CollectionError: The text of a hit is nowhere to be found.
        """
        candidates = self._candidates(((hit.docid, hit.score) for hit in hits), query_id)
        return self._rerank(query, candidates, len(candidates))

    def rerank_documents(
        self, query: str, documents: Sequence[Document], depth: int | None = None
    ) -> list[Hit]:
        """Re-rank documents that are at hand, wherever they came from.

        Args:
            query: What they are ranked for.
            documents: Best first; left as they are.
            depth: How many to re-rank; the others follow in their order. None: all.
        """
        if not documents:
            return []
        depth = len(documents) if depth is None else depth
        ranking = self.reranker.rerank(query, documents[:depth])
        return hits_of(ranking, documents)[: self.top_n]

    def rerank_run(
        self,
        run: Mapping[Any, Mapping[Any, float]],
        topics: Mapping[Any, str],
        *,
        depth: int | None = None,
        keep_tail: bool = True,
        on_query: Callable[[str, list[Hit]], None] | None = None,
    ) -> Iterator[tuple[str, list[Hit]]]:
        """Re-rank the best candidates of every query of a run, one query at a time.

        Args:
            run: Scores by document id by query id; ties keep the run's order.
            topics: Queries by id; ids may be integers here and in the run.
            depth: How many candidates to re-rank; None: ``hits``.
            keep_tail: Append the candidates below ``depth`` in first-stage order, which keeps
                recall, instead of dropping them.
            on_query: Told of each query when it is done, as a progress bar needs.

        Returns:
            Pairs of query id and hits, computed as they are asked for, in the run's order.

        Raises:
            CollectionError: The run has a query that the topics lack (at once), or the text of
                a candidate is nowhere to be found (when its query is reached).
            InputError: ``depth`` is less than one.
        """
        depth = self.hits if depth is None else depth
        check_count("depth", depth)
        queries = {str(qid): query for qid, query in topics.items()}
        for qid in run:
            if str(qid) not in queries:
                raise CollectionError(
                    f"query {str(qid)!r} of the run is not in the topics; expected a topic for "
                    "each query of the run; give the topics that the run was made with."
                )

        def rerank_each() -> Iterator[tuple[str, list[Hit]]]:
            for qid, scores in run.items():
                ordered = sorted(scores.items(), key=lambda item: item[1], reverse=True)
                candidates = self._candidates(ordered, str(qid))
                kept = candidates if keep_tail else candidates[:depth]
                hits = self._rerank(queries[str(qid)], kept, depth)
                if on_query is not None:
                    on_query(str(qid), hits)
                yield str(qid), hits

        # The generator is inside, so that errors above come before the first query is asked for.
        return rerank_each()

    def _retrieve(self, query: str, count: int, query_id: str | None) -> list[tuple[str, float]]:
        # One more, lest dropping the query's own document leaves one too few.
        hits = self.searcher.search(query, count + 1 if self.remove_query else count)
        return self._candidates(((hit.docid, hit.score) for hit in hits), query_id)[:count]

    def _candidates(
        self, scored: Iterable[tuple[Any, Any]], query_id: str | None
    ) -> list[tuple[str, float]]:
        """Give ids and scores their Python types, and drop the query's own document."""
        unwanted = query_id if self.remove_query else None
        return [(str(docid), float(score)) for docid, score in scored if str(docid) != unwanted]

    def _rerank(self, query: str, candidates: Sequence[tuple[str, float]], depth: int) -> list[Hit]:
        return self.rerank_documents(query, self._texts.documents(candidates), depth)
