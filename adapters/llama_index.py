"""LlamaIndex: re-rank the nodes of any retriever or query engine.

Example:
    >>> rerank = HeadRoutedRerank("embedded", top_n=3)
    >>> engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[rerank])
    >>> for hit in rerank.postprocess_nodes(nodes, query_str="what does prenatal care include"):
    ...     hit.score, hit.node.get_content()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from routehead_plugins.data import Document, Ranking, ScoredDocument, check_top_n
from routehead_plugins.errors import InputError, missing_extra
from routehead_plugins.heads import HeadSet

from ._lazy import LazyReranker, check_options

try:
    from llama_index.core import instrumentation
    from llama_index.core.bridge.pydantic import Field, ValidationError, field_serializer
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

    from ._fields import OptionFields
except ImportError as error:
    raise missing_extra(error, "llama-index") from error

if TYPE_CHECKING:
    from routehead_plugins.options import OptionValues
    from routehead_plugins.reranker import HeadRoutedAttentionReranker

__all__ = ["HeadRoutedRerank"]

dispatcher = instrumentation.get_dispatcher(__name__)  # type: ignore[attr-defined, unused-ignore]


class HeadRoutedRerank(OptionFields, BaseNodePostprocessor):
    """Node postprocessor that ranks by the attention of a frozen LLM's heads.

    The LLM is loaded at first use, by whichever thread comes first, and again when one of its
    options changes. Nodes are passed on unchanged, in new ``NodeWithScore`` objects; those without
    text rank last. The retriever's scores reach the re-ranker, which adds them with
    ``first_stage_weight``.

    Copies share the loaded LLM. Serialised and pickled forms hold no weights: they load the LLM
    again, from the fields. This includes a ready ``reranker``: set ``heads`` and the other fields
    to its values, or give it again with ``from_dict(data, reranker=...)``.

    Args:
        model: ``"embedded"`` by default, or the LLM of ``reranker``; see ``RerankerOptions``.
        top_n: How many nodes to return; ``None`` for all.
        keep_retrieval_score: Whether to keep the retriever's score as metadata.
        metadata_mode: Which metadata is read with the text.
        score_threshold: Lowest score of a node that is returned; ``None`` for no limit.
        relevant_spans: Whether to say in the metadata where in the text a score came from.
        reranker: A ready re-ranker, used instead of loading one.
        callback_manager: Receives the events of re-ranking.
        **options: The other options of ``RerankerOptions``. Pairs of heads become a ``HeadSet``;
            paths and torch's objects become strings.

    Raises:
        InputError: A value cannot be used, such as ``top_n=0``.
        TypeError: An argument is unknown.
    """

    top_n: int | None = Field(description="How many nodes to return; None for all.")
    keep_retrieval_score: bool = Field(
        description='Whether to keep the retriever\'s score as metadata "retrieval_score".'
    )
    metadata_mode: MetadataMode = Field(description="Which metadata is read with the text.")
    score_threshold: float | None = Field(
        description="Lowest score of a node that is returned; None for no limit.",
        allow_inf_nan=False,
    )
    relevant_spans: bool = Field(
        description='Whether metadata "relevant_spans" says where in the node\'s text the score '
        "came from: start, end (half-open, in characters) and score of each span, highest first."
    )

    def __init__(
        self,
        model: str | Path | None = None,
        top_n: int | None = None,
        *,
        keep_retrieval_score: bool = False,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        score_threshold: float | None = None,
        relevant_spans: bool = False,
        reranker: HeadRoutedAttentionReranker | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[OptionValues],
    ) -> None:
        check_options(options)
        if isinstance(top_n, int):
            check_top_n(top_n)
        heads = options.get("heads")
        fields: dict[str, Any] = {
            **options,
            "model": model or (reranker.llm.name if reranker else "embedded"),
            "top_n": top_n,
            "heads": _as_heads(heads),
            # The serialised text of heads does not hold their layout.
            "layout": options.get("layout") or getattr(heads, "layout", None),
            "keep_retrieval_score": keep_retrieval_score,
            "metadata_mode": metadata_mode,
            "score_threshold": score_threshold,
            "relevant_spans": relevant_spans,
            "callback_manager": callback_manager or CallbackManager(),
        }
        try:
            super().__init__(**{name: _as_json(value) for name, value in fields.items()})
        except ValidationError as error:
            raise _one_line(error) from error
        if reranker is not None:
            self._lazy = LazyReranker(self._options(), reranker)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that serialised forms carry."""
        return "HeadRoutedRerank"

    @property
    def reranker(self) -> HeadRoutedAttentionReranker:
        """The re-ranker, loaded at first use; see its ``from_pretrained`` for the errors."""
        return self._load_reranker()  # type: ignore[no-any-return]

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
    def _heads_to_text(self, heads: HeadSet | str | None) -> str | None:
        return None if heads is None else str(heads)


def _as_heads(heads: Any) -> Any:
    """Turn pairs into a ``HeadSet``."""
    is_pairs = isinstance(heads, Sequence) and not isinstance(heads, HeadSet | str)
    return HeadSet(heads) if is_pairs else heads


def _as_json(value: Any) -> Any:
    """Turn a path or an object of torch, such as a dtype, into a string."""
    if isinstance(value, Path) or type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return value


def _spans_of(hit: ScoredDocument, node: BaseNode) -> list[dict[str, float]]:
    """Map spans to the node's own text, which may follow metadata in the text that was read."""
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    shift = max(0, hit.document.text.rfind(text))
    spans = (
        span._replace(start=max(0, span.start - shift), end=min(span.end - shift, len(text)))
        for span in hit.spans
    )
    return [span._asdict() for span in spans if span.start < span.end]


def _with_metadata(node: BaseNode, added: Mapping[str, Any]) -> BaseNode:
    """Copy a node with more metadata, which neither embedders nor LLMs read."""
    hidden = {
        name: list(dict.fromkeys([*getattr(node, name), *added]))
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    return node.model_copy(update={"metadata": {**node.metadata, **added}, **hidden})


def _one_line(error: ValidationError) -> InputError:
    """Turn the several lines of pydantic's error into one."""
    first = error.errors()[0]
    return InputError(f"{first['loc'][0]}={first['input']!r} cannot be used: {first['msg']}.")
