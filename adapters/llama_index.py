"""LlamaIndex: re-rank the nodes of any retriever or query engine.

Example:
    >>> rerank = HeadRoutedRerank("embedded", top_n=3)
    >>> engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[rerank])
    >>> for hit in rerank.postprocess_nodes(nodes, query_str="what does prenatal care include"):
    ...     hit.score, hit.node.get_content()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from routehead_plugins.data import (
    Document,
    Ranking,
    ScoredDocument,
    TextSpan,
    as_list,
    check_text,
    check_top_n,
)
from routehead_plugins.errors import InputError, class_name, missing_extra, short_repr
from routehead_plugins.heads import HeadSet

from ._lazy import LazyReranker, asking, check_options, check_reranker, naming

try:
    from llama_index.core import instrumentation
    from llama_index.core.bridge.pydantic import Field, ValidationError, field_serializer
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

    from ._fields import OptionFields, one_line
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
    text rank last, whatever their metadata. The retriever's scores reach the re-ranker, which adds
    them with ``first_stage_weight``.

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
        instruction: A sentence or two on which nodes are relevant to a query.
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
    instruction: str | None = Field(
        None, description="A sentence or two on which nodes are relevant to a query."
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
        instruction: str | None = None,
        reranker: HeadRoutedAttentionReranker | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[OptionValues],
    ) -> None:
        check_options(options)
        if reranker is not None:
            check_reranker(reranker)
        if isinstance(top_n, int):
            check_top_n(top_n)
        asking(instruction)
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
            "instruction": instruction,
            "callback_manager": callback_manager or CallbackManager(),
        }
        try:
            super().__init__(**{name: _as_json(value) for name, value in fields.items()})
        except ValidationError as error:
            raise InputError(one_line(error)) from error
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
        query = _query_of(query_bundle)
        nodes = _checked(nodes)
        if not nodes:
            return []
        documents = self._to_documents(nodes)
        reranker = self.reranker
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
            ranking = reranker.rerank(
                query,
                documents,
                top_n=top_n,
                spans=self.relevant_spans,
                **asking(self.instruction),
            )
            reranked = self._from_ranking(ranking, nodes)
            event.on_end(payload={EventPayload.NODES: reranked})
        dispatcher.event(ReRankEndEvent(nodes=reranked))
        return reranked

    def _to_documents(self, nodes: Sequence[NodeWithScore]) -> list[Document]:
        documents = []
        for index, retrieved in enumerate(nodes):
            with naming(f"nodes[{index}]"):
                text = _content(retrieved.node, self.metadata_mode)
                documents.append(Document(text, retrieved.node.node_id, score=retrieved.score))
        return documents

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
                added["relevant_spans"] = _spans_of(hit, node, self.metadata_mode)
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


def _query_of(query_bundle: Any) -> str:
    if not isinstance(query_bundle, QueryBundle):
        raise InputError(
            f"query_bundle is a {class_name(query_bundle)}; give a QueryBundle, or query_str=."
        )
    check_text("query", query_bundle.query_str)
    return query_bundle.query_str


def _checked(nodes: Any) -> list[NodeWithScore]:
    retrieved = as_list(nodes, "nodes", "NodeWithScore")
    for index, node in enumerate(retrieved):
        if not isinstance(node, NodeWithScore) or not isinstance(node.node, BaseNode):
            raise InputError(
                f"nodes[{index}] is a {class_name(node)}; give a NodeWithScore, such as "
                "NodeWithScore(node=node)."
            )
    return retrieved


def _content(node: BaseNode, mode: MetadataMode) -> str:
    """Return what is read of a node: nothing, where it has metadata alone."""
    if not node.get_content(metadata_mode=MetadataMode.NONE).strip():
        return ""
    try:
        return node.get_content(metadata_mode=mode)
    except (KeyError, IndexError, ValueError) as error:
        # str.format met a field in one of the node's templates that has no value.
        raise InputError(
            f"its templates cannot be filled in ({type(error).__name__}: {short_repr(str(error))});"
            " use {content} and {metadata_str} in the one, {key} and {value} in the other."
        ) from error


def _spans_of(hit: ScoredDocument, node: BaseNode, mode: MetadataMode) -> list[dict[str, float]]:
    """Map spans to the node's own text, which may stand among metadata in the text that was read.

    Returns:
        The spans; none where the node's class alters its text, so that the two do not correspond.
    """
    text = _own_text(node)
    shift = _shift(text, hit.document.text, node, mode) if hit.spans else None
    if shift is None:
        return []
    spans = []
    for start, end, score in hit.spans:
        start = max(0, start - shift)
        words = text[start : max(0, end - shift)]
        start += len(words) - len(words.lstrip())
        if words.strip():
            spans.append(TextSpan(start, start + len(words.strip()), score)._asdict())
    return spans


def _own_text(node: BaseNode) -> str:
    text = getattr(node, "text", None)
    return text if isinstance(text, str) else node.get_content(metadata_mode=MetadataMode.NONE)


def _shift(text: str, read: str, node: BaseNode, mode: MetadataMode) -> int | None:
    """Return where a node's text begins in what was read; ``None`` if it cannot be told.

    Below 0 where white space in front of it was stripped.
    """
    core = text.strip()
    before = len(text) - len(text.lstrip())
    start = read.find(core)
    if start != read.rfind(core):
        start = _marked_start(read, node, mode)
        # White space at the edges of the whole is stripped.
        if read[start : start + before] == text[:before]:
            start += before
    return start - before if read[start:].startswith(core) and start >= 0 else None


def _marked_start(read: str, node: BaseNode, mode: MetadataMode) -> int:
    """Find a text that occurs several times by putting another one in its place, in a copy.

    Returns:
        Its start; -1 where the node's class does not let it be replaced.
    """
    marker = "\ue000"  # for private use, so that it is hardly ever in a text
    while marker in read:
        marker += "\ue000"
    with suppress(Exception):  # of a class that expects more of its text
        copied = node.model_copy()
        copied.set_content(marker)
        return copied.get_content(metadata_mode=mode).find(marker)
    return -1


def _with_metadata(node: BaseNode, added: Mapping[str, Any]) -> BaseNode:
    """Copy a node with more metadata, which neither embedders nor LLMs read."""
    hidden = {
        name: list(dict.fromkeys([*getattr(node, name), *added]))
        for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
    }
    return node.model_copy(update={"metadata": {**node.metadata, **added}, **hidden})
