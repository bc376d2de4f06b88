"""LlamaIndex: re-rank what any retriever or query engine finds.

Example:
    >>> rerank = HeadRoutedRerank("embedded", top_n=3)
    >>> engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[rerank])
    >>> for hit in rerank.postprocess_nodes(nodes, query_str="what does prenatal care include"):
    ...     hit.score, hit.node.get_content()
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from routehead_plugins.data import Document, Ranking, ScoredDocument, check_top_n
from routehead_plugins.errors import InputError, missing_extra
from routehead_plugins.heads import HeadSet

try:
    from llama_index.core import instrumentation
    from llama_index.core.bridge.pydantic import (
        Field,
        PrivateAttr,
        ValidationError,
        field_serializer,
    )
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise missing_extra(error, "llama-index") from error

if TYPE_CHECKING:
    import torch

    from routehead_plugins.reranker import HeadRoutedAttentionReranker

__all__ = ["HeadRoutedRerank"]

dispatcher = instrumentation.get_dispatcher(__name__)  # type: ignore[attr-defined, unused-ignore]

# Shared by all instances: loading sets stderr and transformers' verbosity for the whole process.
_LOADING = threading.Lock()

# The other fields are arguments of ``from_pretrained``.
_OWN_FIELDS = {
    "callback_manager",
    "keep_retrieval_score",
    "metadata_mode",
    "relevant_spans",
    "score_threshold",
    "top_n",
}


class HeadRoutedRerank(BaseNodePostprocessor):
    """Node postprocessor that ranks by the attention of a frozen LLM's heads.

    The LLM is loaded at first use, once, whichever thread comes first. Nodes are handed on as
    they are, in new ``NodeWithScore`` objects; those without text rank last. The retriever's
    scores reach the re-ranker, which uses them where ``first_stage_weight`` says so.

    Copies share the loaded LLM. Serialised and pickled forms hold no weights: what comes of them
    loads the LLM again, from the fields. That goes for a ready ``reranker`` too: state ``heads``
    and the other fields as it has them, or give it once more: ``from_dict(data, reranker=...)``.

    Every other argument is a field of the same name, described there; model arguments left at
    ``None`` take the defaults of ``HeadRoutedAttentionReranker.from_pretrained``. They are read
    once, when the LLM is loaded.

    Args:
        reranker: A ready re-ranker, used instead of loading one.

    Raises:
        InputError: A value cannot be used, such as ``top_n=0``.
    """

    model: str = Field(description='"embedded", a Hub id, a local directory, or a .gguf file.')
    top_n: int | None = Field(description="How many nodes to return; None for all.")
    heads: HeadSet | str | None = Field(
        description='Heads to read: "all", "layers:10-19", "13-18,13-1", a HeadSet, or its file.'
    )
    router: Any = Field(description="Chooses the heads per query: a directory or a Hub id.")
    device: str | None = Field(description="None picks cuda, then mps, then cpu.")
    dtype: str = Field(description='Number format, such as "float32"; "auto" picks the fastest.')
    layout: str | None = Field(description="Prompt layout; None: the one the heads are for.")
    document_cache: str | int | None = Field(description='Memory for documents, such as "2GB".')
    window: int | None = Field(description="Documents read at once, sequential layout.")
    stride: int | None = Field(description="Documents by which windows are apart.")
    max_doc_tokens: int | None = Field(description="Longer documents are cut here.")
    first_stage_weight: float | None = Field(description="Weight of the retriever's scores.")
    local_files_only: bool = Field(description="Never ask the Hub, use its local cache.")
    keep_retrieval_score: bool = Field(description='Keep it as metadata "retrieval_score".')
    metadata_mode: MetadataMode = Field(description="Which metadata is read with the text.")
    score_threshold: float | None = Field(description="Drop lower scores.", allow_inf_nan=False)
    relevant_spans: bool = Field(
        description="Say in metadata where in the node's text the score came from: start, end "
        "(half-open, in characters) and score of each span, most telling first."
    )

    _reranker: HeadRoutedAttentionReranker | None = PrivateAttr(default=None)

    def __init__(
        self,
        model: str | Path | None = None,
        top_n: int | None = None,
        *,
        heads: HeadSet | str | Path | Sequence[tuple[int, int]] | None = None,
        router: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        layout: str | None = None,
        document_cache: str | int | None = None,
        window: int | None = None,
        stride: int | None = None,
        max_doc_tokens: int | None = None,
        first_stage_weight: float | None = None,
        local_files_only: bool = False,
        keep_retrieval_score: bool = False,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        score_threshold: float | None = None,
        relevant_spans: bool = False,
        reranker: HeadRoutedAttentionReranker | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if isinstance(top_n, int):
            check_top_n(top_n)
        fields: dict[str, Any] = {
            "model": str(model or (reranker.llm.name if reranker else "embedded")),
            "top_n": top_n,
            "heads": _as_heads(heads),
            "router": str(router) if isinstance(router, Path) else router,
            "device": None if device is None else str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout or getattr(heads, "layout", None),  # lost where heads become text
            "document_cache": document_cache,
            "window": window,
            "stride": stride,
            "max_doc_tokens": max_doc_tokens,
            "first_stage_weight": first_stage_weight,
            "local_files_only": local_files_only,
            "keep_retrieval_score": keep_retrieval_score,
            "metadata_mode": metadata_mode,
            "score_threshold": score_threshold,
            "relevant_spans": relevant_spans,
            "callback_manager": callback_manager or CallbackManager(),
        }
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _one_line(error) from error
        self._reranker = reranker

    @classmethod
    def class_name(cls) -> str:
        """Return the name that serialised forms carry."""
        return "HeadRoutedRerank"

    @property
    def reranker(self) -> HeadRoutedAttentionReranker:
        """The re-ranker, loaded at first use; see its ``from_pretrained`` for what is raised."""
        if self._reranker is None:
            with _LOADING:
                if self._reranker is None:
                    from routehead_plugins import HeadRoutedAttentionReranker

                    names = HeadRoutedRerank.model_fields.keys() - _OWN_FIELDS
                    given = {name: getattr(self, name) for name in names}
                    self._reranker = HeadRoutedAttentionReranker.from_pretrained(
                        **{name: value for name, value in given.items() if value is not None}
                    )
        return self._reranker

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("Missing query bundle in extra info.")
        if not nodes:
            return []
        reranker, query = self.reranker, query_bundle.query_str
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=self.model)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            documents = self._to_documents(nodes)
            ranking = reranker.rerank(query, documents, top_n=top_n, spans=self.relevant_spans)
            reranked = self._from_ranking(ranking, nodes)
            event.on_end(payload={EventPayload.NODES: reranked})
        dispatcher.event(ReRankEndEvent(nodes=reranked))
        return reranked

    def _to_documents(self, nodes: Sequence[NodeWithScore]) -> list[Document]:
        return [
            Document(
                retrieved.node.get_content(metadata_mode=self.metadata_mode),
                id=retrieved.node.node_id,
                score=None if retrieved.score is None else float(retrieved.score),
            )
            for retrieved in nodes
        ]

    def _from_ranking(
        self, ranking: Ranking, nodes: Sequence[NodeWithScore]
    ) -> list[NodeWithScore]:
        reranked = []
        for hit in ranking:
            if self.score_threshold is not None and hit.score < self.score_threshold:
                break
            node = nodes[hit.index].node
            added: dict[str, Any] = {}
            if self.keep_retrieval_score:
                added["retrieval_score"] = hit.document.score
            if self.relevant_spans:
                added["relevant_spans"] = _spans_of(hit, node)
            node = _with_metadata(node, added) if added else node
            reranked.append(NodeWithScore(node=node, score=hit.score))
        return reranked

    @field_serializer("heads")
    def _written_heads(self, heads: HeadSet | str | None) -> str | None:
        return None if heads is None else str(heads)

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex pickles every attribute to see whether it can: the weights must be off first.
        bare = self.__copy__()
        object.__setattr__(bare, "__pydantic_private__", None)
        state: dict[str, Any] = BaseNodePostprocessor.__getstate__(bare)
        return state

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self._reranker)] = self._reranker
        return super().__deepcopy__(memo)


def _spans_of(hit: ScoredDocument, node: BaseNode) -> list[dict[str, float]]:
    """Place the spans in the node's own text, which metadata may stand before."""
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    shift = max(0, hit.document.text.rfind(text))
    placed = (
        span._replace(start=max(0, span.start - shift), end=min(span.end - shift, len(text)))
        for span in hit.spans
    )
    return [span._asdict() for span in placed if span.start < span.end]


def _as_heads(heads: Any) -> Any:
    """Make paths texts and pairs a ``HeadSet``."""
    if isinstance(heads, Sequence) and not isinstance(heads, HeadSet | str):
        return HeadSet(heads)
    return str(heads) if isinstance(heads, Path) else heads


def _with_metadata(node: BaseNode, added: Mapping[str, Any]) -> BaseNode:
    """Copy a node with more metadata, which neither embedders nor LLMs get to read."""
    hidden = {
        name: list(dict.fromkeys([*getattr(node, name), *added]))
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    return node.model_copy(update={"metadata": {**node.metadata, **added}, **hidden})


def _one_line(error: ValidationError) -> InputError:
    """Say in one line what pydantic says in four."""
    first = error.errors()[0]
    return InputError(f"{first['loc'][0]}={first['input']!r} cannot be used: {first['msg']}.")
