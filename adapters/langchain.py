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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from routehead_plugins import data
from routehead_plugins.errors import InputError, class_name, missing_extra

from ._lazy import OPTION_NAMES, asking, check_options, check_reranker, naming

try:
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough
    from pydantic import Field, ValidationError

    from ._fields import OptionFields, one_line
except ImportError as error:
    raise missing_extra(error, "langchain") from error

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks
    from langchain_core.retrievers import RetrieverLike
    from langchain_core.runnables import Runnable

__all__ = ["HeadRoutedCompressor"]


class HeadRoutedCompressor(OptionFields, BaseDocumentCompressor):
    """Document compressor that ranks by the attention of a frozen LLM's heads.

    All options of ``RerankerOptions`` are fields; ``None`` takes the default. The LLM is loaded at
    the first query, and again when an option changes; copies share it, pickles hold no weights.
    Scores are comparable within one query.
    """

    reranker: Any = Field(
        None,
        description="A ready HeadRoutedAttentionReranker, instead of options to load one.",
    )
    top_n: int | None = Field(3, description="How many documents to return; None for all.")
    score_threshold: float | None = Field(
        None, description="Lowest score of a document that is returned; None for no limit."
    )
    score_key: str | None = Field(
        None, description="Metadata key of the retriever's score, for first_stage_weight."
    )
    relevant_spans: bool = Field(
        False,
        description='Whether metadata["relevant_spans"] says where in the text a score came from: '
        "start and end (half-open, in characters) and score of each span, highest score first, "
        "as in Cohere's API.",
    )
    instruction: str | None = Field(
        None, description="A sentence or two on which documents are relevant to a query."
    )

    def __init__(self, **fields: Any) -> None:
        """Check the fields.

        Args:
            **fields: The fields by name.

        Raises:
            InputError: A field is unknown or has the wrong type, ``top_n`` is below 1,
                ``score_threshold`` is NaN, or a ready ``reranker`` is given together with options
                to load one.
        """
        if isinstance(fields.get("top_n"), int):
            data.check_top_n(fields["top_n"])  # pydantic would take True for 1
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(one_line(error)) from error
        # Not in a validator: pydantic would spread the one line over several of its own.
        data.check_top_n(self.top_n)
        asking(self.instruction)
        if self.score_threshold is not None and math.isnan(self.score_threshold):
            raise InputError("score_threshold=nan is not a number; give one, or None for no limit.")
        defaults = HeadRoutedCompressor.model_fields
        check_options(
            [name for name in OPTION_NAMES if getattr(self, name) != defaults[name].default],
            self.reranker,
        )

    def rerank(
        self, documents: Sequence[str | Document], query: str, *, top_n: int | None = -1
    ) -> list[dict[str, Any]]:
        """Score documents and return the indices of the best.

        Args:
            documents: Candidates, best first if they have an order; not modified. Blank ones rank
                last.
            query: The query.
            top_n: How many to return; -1 for the compressor's ``top_n``, None for all.

        Returns:
            ``index`` and ``relevance_score`` of each, best first; ties keep the order.

        Raises:
            InputError: The query is blank, ``top_n`` is 0 or below -1, or an item is not a
                document.
            RouteHeadError: The LLM cannot be loaded, or the documents do not fit its context.
        """
        return [
            {"index": hit.index, **self._to_metadata(hit)}
            for hit in self._rank(_to_langchain(documents), query, top_n)
        ]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents, with their score in ``metadata["relevance_score"]``.

        Args:
            documents: Candidates, best first if they have an order; not modified.
            query: The query.
            callbacks: Callbacks for this run; None takes those of the calling chain.

        Returns:
            Copies that keep ``id`` and the other metadata, best first.

        Raises:
            InputError: The query is blank, or an item is not a document.
            RouteHeadError: The LLM cannot be loaded, or the documents do not fit its context.
        """
        inputs = {"documents": documents, "query": query}
        return self._step().invoke(inputs, {"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Run ``compress_documents`` without blocking the event loop."""
        inputs = {"documents": documents, "query": query}
        return await self._step().ainvoke(inputs, {"callbacks": callbacks})

    def as_runnable(self, retriever: RetrieverLike) -> Runnable[str, list[Document]]:
        """Chain a retriever and this compressor: a query in, the best documents out.

        Args:
            retriever: Takes a query and returns documents, more than ``top_n`` of them.
        """
        return {"documents": retriever, "query": RunnablePassthrough[str]()} | self._step()

    def _step(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        # LangChain's own wrapper of a function: callbacks, tracing, and a thread when async.
        return RunnableLambda(self._compress, name=type(self).__name__)

    def _compress(self, inputs: dict[str, Any]) -> list[Document]:
        documents = _to_langchain(inputs["documents"])
        return [
            documents[hit.index].model_copy(
                update={"metadata": documents[hit.index].metadata | self._to_metadata(hit)}
            )
            for hit in self._rank(documents, inputs["query"], -1)
        ]

    def _rank(
        self, documents: Sequence[Document], query: str, top_n: int | None
    ) -> list[data.ScoredDocument]:
        data.check_text("query", query)
        top_n = self.top_n if top_n == -1 else top_n
        top_n = data.check_top_n(top_n)
        if not documents:
            return []
        reranker = self._load_reranker() if self.reranker is None else self.reranker
        check_reranker(reranker)
        candidates = []
        for index, document in enumerate(documents):
            with naming(f"documents[{index}]"):
                candidates.append(_to_document(document, self.score_key))
        options = {"spans": self.relevant_spans, **asking(self.instruction)}
        ranking = reranker.rerank(query, candidates, top_n, **options)
        threshold = self.score_threshold
        return [hit for hit in ranking if threshold is None or hit.score >= threshold]

    def _to_metadata(self, hit: data.ScoredDocument) -> dict[str, Any]:
        """Name the score and the spans as Cohere's API does."""
        metadata: dict[str, Any] = {"relevance_score": float(hit.score)}
        if self.relevant_spans:
            metadata["relevant_spans"] = [span._asdict() for span in hit.spans]
        return metadata


def _to_langchain(documents: Any) -> list[Document]:
    """Accept texts and LangChain's documents, and nothing else."""
    items = data.as_list(documents, expected="LangChain Documents or texts")
    converted = [Document(item) if isinstance(item, str) else item for item in items]
    for index, item in enumerate(converted):
        if not isinstance(item, Document):
            raise InputError(
                f"documents[{index}] is a {class_name(item)}; give a LangChain Document or a str."
            )
    return converted


def _to_document(document: Document, score_key: str | None) -> data.Document:
    score = None if score_key is None else data.as_number(document.metadata.get(score_key))
    return data.Document(document.page_content, document.id, document.metadata, score)
