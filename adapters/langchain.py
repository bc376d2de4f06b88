"""LangChain: a document compressor that keeps the most relevant documents.

Example:
    >>> compressor = HeadRoutedCompressor(model="embedded", top_n=3)
    >>> chain = compressor.as_runnable(retriever)
    >>> chain.invoke("how warm should water for yeast be")
    >>> ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)
    >>> RunnableLambda(lambda x: compressor.compress_documents(x["documents"], x["query"]))
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

from routehead_plugins import data
from routehead_plugins.errors import InputError, missing_extra

try:
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough
    from pydantic import ConfigDict, PrivateAttr
except ImportError as error:
    raise missing_extra(error, "langchain") from error

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks
    from langchain_core.retrievers import RetrieverLike
    from langchain_core.runnables import Runnable

__all__ = ["HeadRoutedCompressor"]

# The other fields are arguments of from_pretrained.
_OWN_FIELDS = ("reranker", "top_n", "score_threshold", "score_key", "relevant_spans")

# One for all compressors: a lock among the fields could be neither pickled nor copied.
_LOADING = threading.Lock()


class HeadRoutedCompressor(BaseDocumentCompressor):
    """Re-ranks documents by the attention that heads of a frozen LLM pay to them.

    The LLM is loaded at the first query. Scores are comparable within one query.

    Attributes:
        model: As the fields down to ``local_files_only``, an argument of
            ``HeadRoutedAttentionReranker.from_pretrained``; None leaves it to its default.
        heads: Which heads to read.
        router: What chooses heads per query.
        device: Where the LLM runs.
        dtype: The precision it runs in.
        layout: How documents and query are arranged.
        document_cache: Memory for what was computed of the documents, such as "2GB".
        window: Documents read at once in the sequential layout.
        stride: Documents by which windows are apart.
        max_doc_tokens: Longer documents are cut here.
        first_stage_weight: Weight of the retriever's scores, see ``score_key``.
        local_files_only: Never ask the Hub.
        reranker: A ready ``HeadRoutedAttentionReranker``, instead of these arguments.
        top_n: How many documents to return; None for all.
        score_threshold: Documents that score less are left out; None for no such limit.
        score_key: Where a document's metadata has the retriever's score, if anywhere.
        relevant_spans: Whether to say in ``metadata["relevant_spans"]`` where in the text a score
            came from: ``start`` and ``end`` (half-open, in characters) and ``score`` of each
            span, most telling first, as in Cohere's API.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "embedded"
    heads: Any = None
    router: Any = None
    device: Any = None
    dtype: Any = "auto"
    layout: str | None = None
    document_cache: str | int | None = None
    window: int | None = None
    stride: int | None = None
    max_doc_tokens: int | None = None
    first_stage_weight: float | None = None
    local_files_only: bool = False
    reranker: Any = None
    top_n: int | None = 3
    score_threshold: float | None = None
    score_key: str | None = None
    relevant_spans: bool = False

    _loaded: tuple[dict[str, Any], Any] | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        """Check the fields.

        Raises:
            InputError: ``top_n`` is below 1, ``score_threshold`` is no number, or a ready
                ``reranker`` is given together with arguments to load one.
            ValidationError: A field is unknown or has the wrong type.
        """
        super().__init__(**fields)
        # Not in a validator: pydantic would wrap the one line in several of its own.
        data.check_top_n(self.top_n)
        if self.score_threshold is not None and math.isnan(self.score_threshold):
            raise InputError("score_threshold=nan is no number; give one, or None for no limit.")
        given = [name for name, default in _model_arguments() if getattr(self, name) != default]
        if self.reranker is not None and given:
            raise InputError(
                f"{', '.join(given)} cannot change a ready reranker; "
                "expected either reranker= or the arguments to load one; drop one of the two."
            )

    def rerank(
        self, documents: Sequence[str | Document], query: str, *, top_n: int | None = -1
    ) -> list[dict[str, Any]]:
        """Score documents and say where in the list the best ones are.

        Args:
            documents: Candidates, best first where there is an order; left as they are. Blank
                ones rank last.
            query: What is looked for.
            top_n: How many to return; -1 for the compressor's ``top_n``, None for all.

        Returns:
            ``index`` and ``relevance_score`` of each, best first; ties keep the order.

        Raises:
            InputError: The query is blank, ``top_n`` is 0 or below -1, or an item is no document.
            RouteHeadError: The LLM cannot be loaded, or cannot read so much text.
        """
        return [
            {"index": hit.index, **self._from_hit(hit)}
            for hit in self._rank(_to_langchain(documents), query, top_n)
        ]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents, with their score in ``metadata["relevance_score"]``.

        Args:
            documents: Candidates, best first where there is an order; left as they are.
            query: What is looked for.
            callbacks: Told of a run of the compressor's name; None: those of the calling chain.

        Returns:
            Copies that keep ``id`` and the other metadata, best first.

        Raises:
            InputError: The query is blank, or an item is no document.
            RouteHeadError: The LLM cannot be loaded, or cannot read so much text.
        """
        inputs = {"documents": documents, "query": query}
        return self._step().invoke(inputs, {"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Do as ``compress_documents`` does, off the event loop."""
        inputs = {"documents": documents, "query": query}
        return await self._step().ainvoke(inputs, {"callbacks": callbacks})

    def as_runnable(self, retriever: RetrieverLike) -> Runnable[str, list[Document]]:
        """Chain a retriever and this compressor: a query in, the best documents out.

        Args:
            retriever: Takes a query and returns documents; more than ``top_n`` of them.
        """
        return {"documents": retriever, "query": RunnablePassthrough[str]()} | self._step()

    def _step(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        """LangChain's own way to run a function: callbacks, tracing, and a thread when async."""
        return RunnableLambda(self._compress, name=type(self).__name__)

    def _compress(self, inputs: dict[str, Any]) -> list[Document]:
        documents = _to_langchain(inputs["documents"])
        return [
            documents[hit.index].model_copy(
                update={"metadata": documents[hit.index].metadata | self._from_hit(hit)}
            )
            for hit in self._rank(documents, inputs["query"], -1)
        ]

    def _rank(
        self, documents: Sequence[Document], query: str, top_n: int | None
    ) -> list[data.ScoredDocument]:
        data.check_text("query", query)
        top_n = self.top_n if top_n == -1 else top_n
        data.check_top_n(top_n)
        if not documents:
            return []
        candidates = [_to_document(document, self.score_key) for document in documents]
        ranking = self._ready().rerank(query, candidates, top_n, spans=self.relevant_spans)
        threshold = self.score_threshold
        return [hit for hit in ranking if threshold is None or hit.score >= threshold]

    def _from_hit(self, hit: data.ScoredDocument) -> dict[str, Any]:
        """Say what was found out about a document, under the names of Cohere's API."""
        found: dict[str, Any] = {"relevance_score": float(hit.score)}
        if self.relevant_spans:
            found["relevant_spans"] = [span._asdict() for span in hit.spans]
        return found

    def _ready(self) -> Any:
        """Return the re-ranker, loaded by whichever thread comes first."""
        if self.reranker is not None:
            return self.reranker
        values = {name: getattr(self, name) for name, _ in _model_arguments()}
        arguments = {name: value for name, value in values.items() if value is not None}
        loaded = self._loaded
        if loaded is None or loaded[0] != arguments:
            with _LOADING:
                loaded = self._loaded
                if loaded is None or loaded[0] != arguments:
                    from routehead_plugins import HeadRoutedAttentionReranker

                    reranker = HeadRoutedAttentionReranker.from_pretrained(**arguments)
                    self._loaded = loaded = (arguments, reranker)
        return loaded[1]

    def __getstate__(self) -> dict[Any, Any]:
        # The weights stay out of pickles.
        return super().__getstate__() | {"__pydantic_private__": {"_loaded": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # One LLM in memory: copies share it, since using it never changes it.
        memo = {} if memo is None else memo
        memo.update((id(held), held) for held in (self.reranker, self._loaded))
        return super().__deepcopy__(memo)


def _model_arguments() -> list[tuple[str, Any]]:
    # Of this class, lest a subclass's own fields be taken for more of them.
    fields = HeadRoutedCompressor.model_fields.items()
    return [(name, field.default) for name, field in fields if name not in _OWN_FIELDS]


def _to_langchain(documents: Any) -> list[Document]:
    """Accept texts and LangChain's documents alike, and nothing else."""
    if documents is None or isinstance(documents, str):
        name = type(documents).__name__
        raise InputError(f"documents is a {name}; give a list of LangChain Documents or texts.")
    converted = [Document(item) if isinstance(item, str) else item for item in documents]
    for index, item in enumerate(converted):
        if not isinstance(item, Document):
            name = type(item).__name__
            raise InputError(f"documents[{index}] is a {name}; give a LangChain Document or a str.")
    return converted


def _to_document(document: Document, score_key: str | None) -> data.Document:
    score = None if score_key is None else document.metadata.get(score_key)
    found = float(score) if isinstance(score, Real) else None
    return data.Document(document.page_content, document.id, document.metadata, found)
