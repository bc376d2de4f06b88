"""The contract with LlamaIndex, against the installed llama-index-core."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index_instrumentation import root_dispatcher
from llama_index_instrumentation.events.span import SpanDropEvent
from presets import PresetLayout
from pydantic import Field

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet, data
from routehead_plugins.adapters._lazy import OPTION_NAMES
from routehead_plugins.adapters.llama_index import HeadRoutedRerank, _spans_of
from routehead_plugins.backbone import attention
from routehead_plugins.data import ScoredDocument, TextSpan
from routehead_plugins.errors import InputError, MissingExtraError, ModelLoadError
from routehead_plugins.options import RerankerOptions
from routehead_plugins.reranker import BLANK_SCORE
from routehead_plugins.selection import FixedHeads

QUERY = "which wolf ran?"
TEXTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river", "snow on the roof"]
FIELDS: dict[str, Any] = {
    "model": "some/model",
    "top_n": 3,
    "heads": "1-2,0-3",
    "router": "some/router",
    "device": "cpu",
    "dtype": "float32",
    "layout": "sequential",
    "document_cache": "2GB",
    "window": 20,
    "stride": 10,
    "max_doc_tokens": 100,
    "first_stage_weight": 0.5,
    "drop_query_copies": True,
    "documents": "some/index",
    "refine": 5,
    "adapter": "some/adapter",
    "long_documents": "chunk",
    "chunk_tokens": 64,
    "chunk_stride": 32,
    "chunk_aggregation": "first",
    "on_too_long": "error",
    "local_files_only": True,
    "revision": "older",
    "token": None,
    "cache_dir": "some/cache",
    "trust_remote_code": True,
    "model_kwargs": {"use_safetensors": True},
    "keep_retrieval_score": True,
    "metadata_mode": MetadataMode.LLM,
    "score_threshold": 0.1,
    "relevant_spans": True,
    "instruction": "Only facts count.",
}


class Events(BaseEventHandler):
    """Keeps the events of the instrumentation."""

    seen: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        self.seen.append(event)

    def of_rerank(self) -> list[Any]:
        kinds = ReRankStartEvent | ReRankEndEvent | SpanDropEvent
        return [event for event in self.seen if isinstance(event, kinds)]


class Callbacks(BaseCallbackHandler):
    """Keeps the payloads of legacy re-ranking events."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def _keep(self, moment: str, kind: CBEventType, payload: dict[str, Any] | None) -> None:
        if kind == CBEventType.RERANKING:
            self.seen.append((moment, payload or {}))

    def on_event_start(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> str:
        self._keep("start", event_type, payload)
        return ""

    def on_event_end(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> None:
        self._keep("end", event_type, payload)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, *_: Any, **__: Any) -> None: ...


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def reranker(llm: FrozenLM) -> HeadRoutedAttentionReranker:
    return HeadRoutedAttentionReranker(llm)


@pytest.fixture(scope="module")
def preset(llm: FrozenLM) -> HeadRoutedAttentionReranker:
    return HeadRoutedAttentionReranker(llm, layout=PresetLayout())


@pytest.fixture
def events() -> Iterator[Events]:
    handler = Events()
    root_dispatcher.add_event_handler(handler)
    yield handler
    root_dispatcher.event_handlers.remove(handler)


@pytest.fixture
def callbacks() -> Callbacks:
    return Callbacks()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, preset: HeadRoutedAttentionReranker) -> list[Any]:
    """Record what is loaded instead of loading it."""
    loaded: list[Any] = []

    def from_options(options: RerankerOptions) -> HeadRoutedAttentionReranker:
        time.sleep(0.05)  # long enough for a second thread to come by
        loaded.append(options)
        return preset

    monkeypatch.setattr(HeadRoutedAttentionReranker, "from_options", from_options)
    return loaded


def nodes_of(texts: Sequence[str] = TEXTS) -> list[NodeWithScore]:
    """Nodes n0, n1, ... with falling retrieval scores."""
    return [
        NodeWithScore(
            node=TextNode(id_=f"n{i}", text=text, metadata={"page": str(i), "tags": ["x", [i]]}),
            score=1.0 - i / 10,
        )
        for i, text in enumerate(texts)
    ]


def bare_nodes(*texts: str) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(id_=f"n{i}", text=t)) for i, t in enumerate(texts)]


def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.node.node_id for node in nodes]


def scores(nodes: Sequence[NodeWithScore]) -> list[Any]:
    return [node.score for node in nodes]


def snapshot(nodes: Sequence[NodeWithScore]) -> str:
    return repr([node.to_dict() for node in nodes])


# The class and its fields


def test_it_is_a_node_postprocessor() -> None:
    assert "BaseNodePostprocessor" in [parent.__name__ for parent in HeadRoutedRerank.__mro__]
    assert HeadRoutedRerank.class_name() == "HeadRoutedRerank"


def test_fields_survive_every_round_trip() -> None:
    rerank = HeadRoutedRerank(**FIELDS)
    data = rerank.to_dict()
    written = {name: value for name, value in FIELDS.items() if name != "token"}
    assert data == written | {"class_name": "HeadRoutedRerank"}
    assert HeadRoutedRerank.from_dict(data).to_dict() == data
    assert HeadRoutedRerank.from_json(rerank.to_json()).to_dict() == data
    assert pickle.loads(pickle.dumps(rerank)).to_dict() == data
    assert copy.deepcopy(rerank).to_dict() == data
    assert rerank.model_copy().to_dict() == data


def test_every_argument_is_a_field_of_the_same_name() -> None:
    arguments = set(inspect.signature(HeadRoutedRerank.__init__).parameters)
    own = set(HeadRoutedRerank.model_fields) - set(OPTION_NAMES)
    assert arguments - {"self", "reranker", "options"} == own | {"model"}
    assert set(FIELDS) == set(HeadRoutedRerank.model_fields) - {"callback_manager"}


def test_a_typo_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^unexpected argument 'topn'; the options of .* model, "):
        HeadRoutedRerank(topn=3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (HeadSet.parse("1-2,0-3"), "1-2,0-3"),
        ([(1, 2), (0, 3)], "1-2,0-3"),
        (Path("some/heads.json"), str(Path("some/heads.json"))),
        ("layers:1-2", "layers:1-2"),
        (None, None),
    ],
)
def test_heads_are_written_as_text(given: Any, text: str | None) -> None:
    rerank = HeadRoutedRerank(heads=given)
    assert rerank.to_dict()["heads"] == text
    assert HeadRoutedRerank.from_json(rerank.to_json()).heads == text


def test_a_head_set_is_kept_whole_and_its_layout_is_written() -> None:
    heads = HeadSet([(1, 2)], layout="sequential", method="qr", scores=[0.5])
    rerank = HeadRoutedRerank(heads=heads)
    assert rerank.heads is heads
    assert HeadRoutedRerank.from_json(rerank.to_json()).layout == "sequential"
    assert pickle.loads(pickle.dumps(rerank)).heads == heads


def test_torch_objects_and_paths_are_written_as_text(tmp_path: Path) -> None:
    rerank = HeadRoutedRerank(
        tmp_path, router=tmp_path, device=torch.device("cuda", 1), dtype=torch.bfloat16
    )
    data = HeadRoutedRerank.from_json(rerank.to_json()).to_dict()
    assert data["model"] == data["router"] == str(tmp_path)
    assert (data["device"], data["dtype"]) == ("cuda:1", "bfloat16")


@pytest.mark.parametrize("top_n", [0, -1])
def test_a_top_n_that_returns_nothing_is_refused(top_n: int) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedRerank(top_n=top_n)
    expected = f"top_n={top_n} returns nothing; give 1 or more, or None for all."
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_n": "many"}, "top_n='many' cannot be used: Input should be a valid integer"),
        ({"metadata_mode": "some"}, "metadata_mode='some' cannot be used: Input should be 'all'"),
        ({"score_threshold": math.nan}, "score_threshold=nan cannot be used: Input should be a f"),
        ({"heads": 7}, "heads=7 cannot be used: Input should be"),
    ],
)
def test_a_wrong_value_is_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedRerank(**wrong)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# Ranking


def test_the_ranking_is_that_of_the_core(reranker: HeadRoutedAttentionReranker) -> None:
    reranked = HeadRoutedRerank(reranker=reranker, metadata_mode="none").postprocess_nodes(
        nodes_of(), query_str=QUERY
    )
    expected = reranker.rerank(QUERY, TEXTS)
    assert ids(reranked) == [f"n{hit.index}" for hit in expected]
    assert scores(reranked) == [hit.score for hit in expected]
    assert {type(score) for score in scores(reranked)} == {float}


def test_a_query_can_be_a_text_or_a_bundle(reranker: HeadRoutedAttentionReranker) -> None:
    rerank = HeadRoutedRerank(reranker=reranker)
    by_text = rerank.postprocess_nodes(nodes_of(), query_str=QUERY)
    assert rerank.postprocess_nodes(nodes_of(), query_bundle=QueryBundle(QUERY)) == by_text


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_the_metadata_mode_says_what_is_read(
    reranker: HeadRoutedAttentionReranker, mode: MetadataMode
) -> None:
    nodes = nodes_of()
    for node in nodes:
        node.node.excluded_embed_metadata_keys = ["tags"]
        node.node.excluded_llm_metadata_keys = ["page"]
    reranked = HeadRoutedRerank(reranker=reranker, metadata_mode=mode).postprocess_nodes(
        nodes, query_str=QUERY
    )
    read = [node.node.get_content(metadata_mode=mode) for node in nodes]
    assert ids(reranked) == [f"n{hit.index}" for hit in reranker.rerank(QUERY, read)]


def test_top_n_cuts_the_ranking(preset: HeadRoutedAttentionReranker) -> None:
    nodes = bare_nodes("0.1", "0.3", "0.2")
    for top_n, expected in ((1, ["n1"]), (2, ["n1", "n2"]), (9, ["n1", "n2", "n0"])):
        rerank = HeadRoutedRerank(top_n=top_n, reranker=preset)
        assert ids(rerank.postprocess_nodes(nodes, query_str=QUERY)) == expected


def test_ties_keep_the_order_of_the_retriever(preset: HeadRoutedAttentionReranker) -> None:
    rerank = HeadRoutedRerank(reranker=preset)
    nodes = bare_nodes("0.2", "0.5", "0.2", "0.5", "0.2")
    assert ids(rerank.postprocess_nodes(nodes, query_str=QUERY)) == ["n1", "n3", "n0", "n2", "n4"]


def test_scores_below_the_threshold_are_left_out(preset: HeadRoutedAttentionReranker) -> None:
    nodes = bare_nodes("0.25", "0.75", "0.5")
    for threshold, expected in ((0.5, ["n1", "n2"]), (0.0, ["n1", "n2", "n0"]), (0.8, [])):
        rerank = HeadRoutedRerank(score_threshold=threshold, reranker=preset)
        assert ids(rerank.postprocess_nodes(nodes, query_str=QUERY)) == expected


def test_a_thousand_nodes_for_one_result(preset: HeadRoutedAttentionReranker) -> None:
    nodes = bare_nodes(*(f"text {(i * 7) % 1000 / 1000}" for i in range(1000)))
    (best,) = HeadRoutedRerank(top_n=1, reranker=preset).postprocess_nodes(nodes, query_str=QUERY)
    assert best.node.get_content() == "text 0.999"


def test_nothing_in_nothing_out(preset: HeadRoutedAttentionReranker) -> None:
    assert HeadRoutedRerank(reranker=preset).postprocess_nodes([], query_str=QUERY) == []


@pytest.mark.parametrize("nodes", [[], bare_nodes("0.1")], ids=["no nodes", "a node"])
def test_a_missing_query_is_the_conventional_error(
    preset: HeadRoutedAttentionReranker, nodes: list[NodeWithScore]
) -> None:
    rerank = HeadRoutedRerank(reranker=preset)
    with pytest.raises(ValueError, match=r"^Missing query bundle in extra info\.$"):
        rerank.postprocess_nodes(nodes)
    with pytest.raises(ValueError, match=r"^Missing query bundle in extra info\.$"):
        asyncio.run(rerank.apostprocess_nodes(nodes))


def test_two_queries_are_an_error_of_the_framework(preset: HeadRoutedAttentionReranker) -> None:
    with pytest.raises(ValueError, match="Cannot specify both query_str and query_bundle"):
        HeadRoutedRerank(reranker=preset).postprocess_nodes(
            bare_nodes("0.1"), query_bundle=QueryBundle(QUERY), query_str=QUERY
        )


def test_a_blank_query_is_refused(preset: HeadRoutedAttentionReranker) -> None:
    with pytest.raises(InputError, match="blank"):
        HeadRoutedRerank(reranker=preset).postprocess_nodes(bare_nodes("0.1"), query_str=" ")


def test_nodes_without_text_rank_last(reranker: HeadRoutedAttentionReranker) -> None:
    nodes = [
        NodeWithScore(node=ImageNode(id_="image", image_url="http://localhost/a.png")),
        NodeWithScore(node=Node(id_="empty")),
        NodeWithScore(node=TextNode(id_="text", text="a wolf")),
        NodeWithScore(node=IndexNode(id_="index", text="rain", index_id="elsewhere")),
        NodeWithScore(node=Document(id_="document", text="seven stones")),
    ]
    reranked = HeadRoutedRerank(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert set(ids(reranked)[:3]) == {"text", "index", "document"}
    assert ids(reranked)[3:] == ["image", "empty"]
    assert scores(reranked)[3:] == [BLANK_SCORE] * 2
    assert [type(node.node) for node in reranked[3:]] == [ImageNode, Node]


def test_only_nodes_without_text_keep_their_order(reranker: HeadRoutedAttentionReranker) -> None:
    nodes = [NodeWithScore(node=ImageNode(id_=f"n{i}"), score=None) for i in range(3)]
    reranked = HeadRoutedRerank(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert ids(reranked) == ["n0", "n1", "n2"]


# Retrieval scores


def test_retrieval_scores_reach_the_reranker(llm: FrozenLM) -> None:
    fused = HeadRoutedAttentionReranker(llm, layout=PresetLayout(), first_stage_weight=100.0)
    nodes = bare_nodes("0.1", "0.3", "0.2")
    for node, score in zip(nodes, [0.5, 0.4, 0.6], strict=True):
        node.score = score
    reranked = HeadRoutedRerank(reranker=fused).postprocess_nodes(nodes, query_str=QUERY)
    assert ids(reranked) == ["n2", "n0", "n1"]


def test_documents_carry_the_id_and_the_score_of_their_node(
    preset: HeadRoutedAttentionReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    rank = preset.rerank

    def watched(query: str, documents: Any, top_n: int | None = None, **_: Any) -> Any:
        seen.extend(documents)
        return rank(query, documents, top_n)

    monkeypatch.setattr(preset, "rerank", watched)
    nodes = bare_nodes("0.1", "0.3")
    nodes[1].score = 0.5
    HeadRoutedRerank(reranker=preset).postprocess_nodes(nodes, query_str=QUERY)
    assert [(d.text, d.id, d.score) for d in seen] == [("0.1", "n0", None), ("0.3", "n1", 0.5)]


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, np.float32(0.3)])
@pytest.mark.parametrize("keep", [True, False])
def test_odd_retrieval_scores_are_tolerated(llm: FrozenLM, odd: Any, keep: bool) -> None:
    fused = HeadRoutedAttentionReranker(llm, layout=PresetLayout(), first_stage_weight=0.1)
    nodes = bare_nodes("0.1", "0.3", "0.2")
    nodes[0].score, nodes[2].score = 0.5, odd
    rerank = HeadRoutedRerank(reranker=fused, keep_retrieval_score=keep)
    reranked = rerank.postprocess_nodes(nodes, query_str=QUERY)
    assert ids(reranked) == ["n1", "n2", "n0"]
    assert all(math.isfinite(score) for score in scores(reranked))
    assert all(node.to_json() for node in reranked)


def test_the_retrieval_score_is_kept_on_request_and_read_by_nobody(
    preset: HeadRoutedAttentionReranker,
) -> None:
    nodes = bare_nodes("0.1", "0.3")
    nodes[0].score, nodes[1].score = 0.75, 0.5
    nodes[1].node.metadata["page"] = "7"
    before = snapshot(nodes)
    rerank = HeadRoutedRerank(reranker=preset, keep_retrieval_score=True)
    best, worst = rerank.postprocess_nodes(nodes, query_str=QUERY)
    assert best.node.metadata == {"page": "7", "retrieval_score": 0.5}
    assert worst.node.metadata == {"retrieval_score": 0.75}
    assert best.node.get_content(metadata_mode=MetadataMode.EMBED) == "page: 7\n\n0.3"
    assert best.node.get_content(metadata_mode=MetadataMode.LLM) == "page: 7\n\n0.3"
    assert best.node is not nodes[1].node
    assert best.node.node_id == "n1"
    assert snapshot(nodes) == before
    # A second stage replaces the score and names the key once.
    again = rerank.postprocess_nodes([best], query_str=QUERY)[0]
    assert again.node.metadata["retrieval_score"] == best.score
    assert again.node.excluded_llm_metadata_keys == ["retrieval_score"]


# Manners


@pytest.mark.parametrize("keep", [True, False])
def test_inputs_are_left_as_they_are(reranker: HeadRoutedAttentionReranker, keep: bool) -> None:
    nodes = nodes_of()
    before, order = snapshot(nodes), list(nodes)
    bundle = QueryBundle(QUERY, custom_embedding_strs=["other"])
    reranked = HeadRoutedRerank(reranker=reranker, keep_retrieval_score=keep).postprocess_nodes(
        nodes, query_bundle=bundle
    )
    assert snapshot(nodes) == before
    assert [id(node) for node in nodes] == [id(node) for node in order]
    assert bundle == QueryBundle(QUERY, custom_embedding_strs=["other"])
    assert not {id(node) for node in reranked} & {id(node) for node in nodes}


def test_nodes_are_handed_on_themselves(reranker: HeadRoutedAttentionReranker) -> None:
    nodes = nodes_of()
    by_id = {node.node.node_id: node.node for node in nodes}
    reranked = HeadRoutedRerank(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert len(reranked) == len(nodes)
    assert all(hit.node is by_id[hit.node.node_id] for hit in reranked)
    assert all(hit.node.metadata["page"] == hit.node.node_id[1:] for hit in reranked)


def test_nodes_with_the_same_id_are_not_confused(preset: HeadRoutedAttentionReranker) -> None:
    nodes = [NodeWithScore(node=TextNode(id_="same", text=text)) for text in ("0.1", "0.3")]
    reranked = HeadRoutedRerank(reranker=preset).postprocess_nodes(nodes, query_str=QUERY)
    assert [hit.node for hit in reranked] == [nodes[1].node, nodes[0].node]


def test_sixteen_concurrent_calls_equal_serial_ones(
    reranker: HeadRoutedAttentionReranker, events: Events
) -> None:
    rerank = HeadRoutedRerank(reranker=reranker)
    queries = [f"{QUERY} {number}" for number in range(16)]
    serial = [rerank.postprocess_nodes(nodes_of(), query_str=query) for query in queries]
    assert len(events.of_rerank()) == 32

    async def together() -> list[list[NodeWithScore]]:
        calls = [rerank.apostprocess_nodes(nodes_of(), query_str=query) for query in queries]
        return list(await asyncio.gather(*calls))

    with ThreadPoolExecutor(16) as pool:
        threaded = list(
            pool.map(lambda query: rerank.postprocess_nodes(nodes_of(), query_str=query), queries)
        )
    for results in (asyncio.run(together()), threaded):
        for one, other in zip(results, serial, strict=True):
            assert ids(one) == ids(other)
            assert scores(one) == pytest.approx(scores(other), abs=1e-6)
    assert len(events.of_rerank()) == 96


def test_the_event_loop_is_not_held_up(loads: list[Any]) -> None:
    async def ticks_meanwhile() -> int:
        call = asyncio.create_task(
            HeadRoutedRerank().apostprocess_nodes(bare_nodes("0.1"), query_str=QUERY)
        )
        ticks = 0
        while not call.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert ids(call.result()) == ["n0"]
        return ticks

    assert asyncio.run(ticks_meanwhile()) >= 3  # loading takes ten of them
    assert len(loads) == 1


# Events


def test_both_event_systems_tell_of_start_and_end(
    preset: HeadRoutedAttentionReranker, events: Events, callbacks: Callbacks
) -> None:
    manager = CallbackManager([callbacks])
    nodes = bare_nodes("0.1", "0.3", "0.2")
    for top_n, expected in ((None, 3), (2, 2)):
        events.seen.clear()
        callbacks.seen.clear()
        rerank = HeadRoutedRerank(top_n=top_n, reranker=preset, callback_manager=manager)
        reranked = rerank.postprocess_nodes(nodes, query_str=QUERY)
        start, end = events.of_rerank()
        assert isinstance(start, ReRankStartEvent)
        assert isinstance(end, ReRankEndEvent)
        assert (start.query, start.nodes) == (QueryBundle(QUERY), nodes)
        assert (start.top_n, start.model_name) == (expected, "tiny")
        assert end.nodes == reranked
        assert [moment for moment, _ in callbacks.seen] == ["start", "end"]
        assert callbacks.seen[0][1] == {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: "tiny",
            EventPayload.QUERY_STR: QUERY,
            EventPayload.TOP_K: expected,
        }
        assert callbacks.seen[1][1] == {EventPayload.NODES: reranked}


def test_events_are_told_in_the_async_path_too(
    preset: HeadRoutedAttentionReranker, events: Events, callbacks: Callbacks
) -> None:
    rerank = HeadRoutedRerank(reranker=preset, callback_manager=CallbackManager([callbacks]))
    asyncio.run(rerank.apostprocess_nodes(bare_nodes("0.1"), query_str=QUERY))
    assert [type(e) for e in events.of_rerank()] == [ReRankStartEvent, ReRankEndEvent]
    assert [moment for moment, _ in callbacks.seen] == ["start", "end"]


def test_no_event_is_told_when_nothing_is_done(
    preset: HeadRoutedAttentionReranker, events: Events, callbacks: Callbacks
) -> None:
    rerank = HeadRoutedRerank(reranker=preset, callback_manager=CallbackManager([callbacks]))
    rerank.postprocess_nodes([], query_str=QUERY)
    with pytest.raises(ValueError, match="Missing query bundle"):
        rerank.postprocess_nodes(bare_nodes("0.1"))
    started = [e for e in events.seen if isinstance(e, ReRankStartEvent | ReRankEndEvent)]
    assert started == []
    assert callbacks.seen == []


def test_no_event_is_told_when_the_model_cannot_be_loaded(
    events: Events, callbacks: Callbacks, tmp_path: Path
) -> None:
    rerank = HeadRoutedRerank(tmp_path / "no.gguf", callback_manager=CallbackManager([callbacks]))
    with pytest.raises(ModelLoadError, match="does not exist"):
        rerank.postprocess_nodes(nodes_of(), query_str=QUERY)
    assert [type(event) for event in events.of_rerank()] == [SpanDropEvent]
    assert callbacks.seen == []


def test_an_error_in_the_model_ends_the_events_and_spoils_nothing(
    reranker: HeadRoutedAttentionReranker, events: Events, callbacks: Callbacks
) -> None:
    rerank = HeadRoutedRerank(reranker=reranker, callback_manager=CallbackManager([callbacks]))
    nodes = nodes_of()
    before = snapshot(nodes)
    expected = rerank.postprocess_nodes(nodes, query_str=QUERY)
    events.seen.clear()
    callbacks.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_softmax", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rerank.postprocess_nodes(nodes, query_str=QUERY)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(rerank.apostprocess_nodes(nodes, query_str=QUERY))
    assert [type(e) for e in events.of_rerank()] == [ReRankStartEvent, SpanDropEvent] * 2
    assert [moment for moment, _ in callbacks.seen] == ["start", "end"] * 2
    for moment, payload in callbacks.seen:
        raised = payload.get(EventPayload.EXCEPTION)
        assert isinstance(raised, ZeroDivisionError) == (moment == "end")
    assert snapshot(nodes) == before
    assert rerank.postprocess_nodes(nodes, query_str=QUERY) == expected


# Loading


def test_the_llm_is_loaded_once_by_eight_threads(loads: list[Any]) -> None:
    rerank = HeadRoutedRerank(**FIELDS | {"score_threshold": None})
    assert loads == []
    ready = threading.Barrier(8)

    def call(_: int) -> list[NodeWithScore]:
        ready.wait()
        return list(rerank.postprocess_nodes(bare_nodes("0.1", "0.2"), query_str=QUERY))

    with ThreadPoolExecutor(8) as pool:
        assert all(ids(result) == ["n1", "n0"] for result in pool.map(call, range(8)))
    assert loads == [RerankerOptions(**{name: FIELDS[name] for name in OPTION_NAMES})]


def test_defaults_are_left_to_the_loader(loads: list[Any]) -> None:
    HeadRoutedRerank().postprocess_nodes(bare_nodes("0.1"), query_str=QUERY)
    assert loads == [RerankerOptions()]


def test_nothing_is_loaded_before_it_is_needed(loads: list[Any]) -> None:
    rerank = HeadRoutedRerank()
    rerank.postprocess_nodes([], query_str=QUERY)
    rerank.to_json()
    pickle.dumps(rerank)
    copy.deepcopy(rerank)
    assert loads == []


def test_a_failed_load_is_tried_again(
    loads: list[Any], monkeypatch: pytest.MonkeyPatch, preset: HeadRoutedAttentionReranker
) -> None:
    rerank = HeadRoutedRerank()
    with monkeypatch.context() as patch:
        patch.setattr(HeadRoutedAttentionReranker, "from_options", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rerank.postprocess_nodes(bare_nodes("0.1"), query_str=QUERY)
    assert rerank.reranker is preset
    assert len(loads) == 1


def test_a_model_folder_is_loaded_as_the_core_loads_it(tmp_path: Path, llm: FrozenLM) -> None:
    families.tiny_model("llama").save_pretrained(tmp_path)
    families.tiny_tokenizer().save_pretrained(tmp_path)
    rerank = HeadRoutedRerank(
        tmp_path, heads=[(1, 2)], dtype=torch.float32, device="cpu", metadata_mode="none"
    )
    reranked = rerank.postprocess_nodes(nodes_of(), query_str=QUERY)
    core = HeadRoutedAttentionReranker(llm, FixedHeads(HeadSet([(1, 2)])))
    expected = core.rerank(QUERY, TEXTS)
    assert ids(reranked) == [f"n{hit.index}" for hit in expected]
    assert scores(reranked) == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_a_pickle_holds_no_weights_and_loads_again(
    reranker: HeadRoutedAttentionReranker,
    loads: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("the weights were pickled on the way")

    monkeypatch.setattr(HeadRoutedAttentionReranker, "__reduce_ex__", refuse)
    rerank = HeadRoutedRerank(top_n=1, reranker=reranker)
    with caplog.at_level(logging.WARNING):
        pickled = pickle.dumps(rerank)
    assert caplog.records == []
    assert len(pickled) < 2000
    assert rerank.reranker is reranker  # still there for the one that was pickled
    restored = pickle.loads(pickled)
    assert loads == []
    nodes = bare_nodes("0.1", "0.3")
    assert ids(restored.postprocess_nodes(nodes, query_str=QUERY)) == ["n1"]
    assert loads == [RerankerOptions("tiny")]


def test_copies_share_the_llm(reranker: HeadRoutedAttentionReranker) -> None:
    rerank = HeadRoutedRerank(reranker=reranker)
    copies = [copy.copy(rerank), copy.deepcopy(rerank), rerank.model_copy(update={"top_n": 1})]
    copies += copy.deepcopy([rerank, rerank])
    assert all(other.reranker is reranker for other in copies)
    assert len(copies[2].postprocess_nodes(nodes_of(), query_str=QUERY)) == 1
    assert rerank.top_n is None
    assert copies[3] is copies[4]


def test_a_ready_reranker_can_be_given_to_a_serialised_form(
    preset: HeadRoutedAttentionReranker, loads: list[Any]
) -> None:
    data = HeadRoutedRerank(top_n=2).to_dict()
    restored = HeadRoutedRerank.from_dict(data, reranker=preset)
    assert (restored.top_n, restored.reranker) == (2, preset)
    assert loads == []


# Real pipelines


def test_a_query_engine_answers_from_reranked_nodes(
    reranker: HeadRoutedAttentionReranker, events: Events
) -> None:
    nodes = [TextNode(id_=f"n{i}", text=text) for i, text in enumerate(TEXTS)]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    engine = RetrieverQueryEngine.from_args(
        index.as_retriever(similarity_top_k=4),
        llm=MockLLM(),
        node_postprocessors=[HeadRoutedRerank(top_n=2, reranker=reranker)],
    )
    expected = [f"n{hit.index}" for hit in reranker.rerank(QUERY, TEXTS, top_n=2)]
    for response in (engine.query(QUERY), asyncio.run(engine.aquery(QUERY))):
        assert ids(response.source_nodes) == expected
        assert all(node.get_content() in str(response) for node in response.source_nodes)
    assert [type(e) for e in events.of_rerank()] == [ReRankStartEvent, ReRankEndEvent] * 2


def test_it_chains_with_other_postprocessors(preset: HeadRoutedAttentionReranker) -> None:
    index = VectorStoreIndex(
        [TextNode(id_=f"n{i}", text=f"{i / 10}") for i in range(6)],
        embed_model=MockEmbedding(embed_dim=4),
    )
    engine = index.as_query_engine(
        similarity_top_k=6,
        llm=MockLLM(),
        node_postprocessors=[
            HeadRoutedRerank(reranker=preset, keep_retrieval_score=True),
            SimilarityPostprocessor(similarity_cutoff=0.25),
        ],
    )
    response = engine.query(QUERY)
    assert ids(response.source_nodes) == ["n5", "n4", "n3"]
    assert response.source_nodes[0].node.metadata["retrieval_score"] == pytest.approx(1.0)


# Installation


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )


def test_importing_and_configuring_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from routehead_plugins.adapters.llama_index import HeadRoutedRerank as H; "
        "H(heads='1-2').to_json(); print({'torch', 'transformers'} & sys.modules.keys())"
    )
    finished = run_python(code, tmp_path)
    assert (finished.stdout, finished.stderr) == ("set()\n", "")


def test_a_missing_framework_is_a_pip_line(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(name, *_):\n"
        "        if name.startswith('llama_index'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden)\n"
        "from routehead_plugins.errors import MissingExtraError\n"
        "try:\n    import routehead_plugins.adapters.llama_index\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    finished = run_python(code, tmp_path)
    expected = (
        "package 'llama_index' is not installed; "
        'run: pip install "routehead-plugins[llama-index]"\n'
    )
    assert (finished.stdout, finished.stderr) == (expected, "")
    assert issubclass(MissingExtraError, ImportError)


def test_relevant_spans_stand_in_the_nodes_own_text(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    node = TextNode(text="a grey wolf ran over the hill", metadata={"page": "seven"})
    rerank = HeadRoutedRerank(reranker=reranker, relevant_spans=True)
    (reranked,) = rerank.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
    spans = reranked.node.metadata["relevant_spans"]
    assert spans
    for span in spans:
        words = node.text[span["start"] : span["end"]]
        assert words == words.strip() != ""
    assert "relevant_spans" not in node.metadata
    assert "relevant_spans" not in reranked.node.get_content(metadata_mode=MetadataMode.LLM)


def test_spans_in_the_metadata_are_cut_off() -> None:
    node = TextNode(text="a wolf ran", metadata={"page": "seven"})
    read = data.Document(node.get_content(metadata_mode=MetadataMode.ALL))
    assert read.text == "page: seven\n\na wolf ran"
    spans = (TextSpan(0, 5, 0.9), TextSpan(6, 14, 0.5), TextSpan(15, 19, 0.2))
    assert _spans_of(ScoredDocument(0, 1.0, read, spans), node, MetadataMode.ALL) == [
        {"start": 0, "end": 1, "score": 0.5},
        {"start": 2, "end": 6, "score": 0.2},
    ]


class Shouting(TextNode):
    """A node whose class changes what is read of its text."""

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        content = super().get_content(metadata_mode)
        return content if metadata_mode == MetadataMode.NONE else content.upper()


class Dated(TextNode):
    """A node whose class puts words around its text, in every mode."""

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        return f"Dated 1844. {super().get_content(metadata_mode)}"


WORDS = st.sampled_from(
    ["wolf", "ran", "page", "seven", "1844", "\U0001f43a", ".", "{x}", "\ue000"]
)
SPACES = st.sampled_from(["", " ", "\n", "\u00a0\n", " \t "])
TEMPLATES = st.sampled_from(
    [
        "{metadata_str}\n\n{content}",
        "{content}\n\n{metadata_str}",
        "  {content} ({metadata_str})\n",
        "wolf {metadata_str} wolf {content} wolf",
        "{content}",
        "{content} | {content}",
    ]
)


@st.composite
def node_texts(draw: st.DrawFn) -> str:
    words = draw(st.lists(WORDS, min_size=1, max_size=6))
    return draw(SPACES) + draw(SPACES).join(words) + draw(SPACES)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([TextNode, IndexNode, Document, Node, Dated]),
    node_texts(),
    st.dictionaries(WORDS, node_texts(), max_size=3),
    TEMPLATES,
    st.sampled_from(["{key}: {value}", "{value}", "wolf"]),
    SPACES,
    st.sampled_from(list(MetadataMode)),
    st.data(),
)
def test_spans_point_at_the_words_that_were_read(
    kind: Any,
    text: str,
    metadata: dict[str, str],
    template: str,
    metadata_template: str,
    separator: str,
    mode: MetadataMode,
    drawn: st.DataObject,
) -> None:
    more: dict[str, Any] = {"index_id": "elsewhere"} if kind is IndexNode else {}
    if kind is Node:
        more["text_resource"] = MediaResource(text=text)
    else:
        more["text"] = text
    node = kind(
        metadata=metadata,
        text_template=template,
        metadata_template=metadata_template,
        metadata_separator=separator,
        **more,
    )
    before = node.to_dict()
    read, own = node.get_content(metadata_mode=mode), text
    start = drawn.draw(st.integers(0, len(read) - 1))
    span = TextSpan(start, drawn.draw(st.integers(start + 1, len(read))), 0.5)
    mapped = _spans_of(ScoredDocument(0, 1.0, data.Document(read), (span,)), node, mode)
    for found in mapped:
        words = own[int(found["start"]) : int(found["end"])]
        assert words == words.strip() != ""
        assert words in read[span.start : span.end]
    # The whole of what was read is the whole text, but for white space at its edges.
    whole = (TextSpan(0, len(read), 1.0),)
    (all_of_it,) = _spans_of(ScoredDocument(0, 1.0, data.Document(read), whole), node, mode)
    assert own[int(all_of_it["start"]) : int(all_of_it["end"])].strip() == own.strip()
    assert node.to_dict() == before


def test_no_span_is_better_than_a_wrong_one() -> None:
    kind: Any = Shouting  # whose metadata mypy takes for extra_info
    node = kind(text="a wolf", metadata={"page": "seven"})
    read = data.Document(node.get_content(metadata_mode=MetadataMode.ALL))
    hit = ScoredDocument(0, 1.0, read, (TextSpan(0, 4, 0.5),))
    assert _spans_of(hit, node, MetadataMode.ALL) == []


@pytest.mark.parametrize("edge", ["\n", "  ", "\t\u00a0"])
@pytest.mark.parametrize("metadata", [{}, {"page": "seven"}, {"copy": "a grey wolf ran far"}])
def test_white_space_around_a_text_moves_no_span(
    reranker: HeadRoutedAttentionReranker, edge: str, metadata: dict[str, Any]
) -> None:
    rerank = HeadRoutedRerank(reranker=reranker, relevant_spans=True)
    text, marked = "a grey wolf ran far over the hill", []
    for before, after in (("", ""), ("", edge), (edge, ""), (edge, edge)):
        node = TextNode(text=before + text + after, metadata=metadata)
        (hit,) = rerank.postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)
        spans = hit.node.metadata["relevant_spans"]
        assert spans
        marked.append([node.text[span["start"] : span["end"]] for span in spans])
    # With metadata in front, white space at the end is stripped: the LLM reads the same.
    assert not metadata or marked[1] == marked[0]
    assert all(words == words.strip() for each in marked for words in each)


# What is wrong is named


def test_nodes_with_metadata_alone_rank_last(reranker: HeadRoutedAttentionReranker) -> None:
    metadata = {"caption": QUERY, "file_path": "wolf.png"}
    nodes = [
        NodeWithScore(
            node=ImageNode(id_="image", image_url="http://localhost/a", metadata=metadata)
        ),
        NodeWithScore(node=Node(id_="empty", extra_info=metadata)),
        NodeWithScore(node=TextNode(id_="blank", text=" \n", metadata=metadata)),
        NodeWithScore(node=ImageNode(id_="text", text="a wolf", metadata=metadata)),
    ]
    reranked = HeadRoutedRerank(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert ids(reranked) == ["text", "image", "empty", "blank"]
    assert scores(reranked)[1:] == [BLANK_SCORE] * 3


WRONG_NODES: list[tuple[Any, str]] = [
    (None, "nodes is a NoneType; give a list of NodeWithScore."),
    ("a wolf", "nodes is one string; give a list of NodeWithScore."),
    ({"n0": bare_nodes("0.1")[0]}, "nodes is a dict; give its values as a list."),
    ([*bare_nodes("0.1"), TextNode(text="0.2")], "TextNode; give a NodeWithScore, such as"),
    (["a wolf"], "nodes[0] is a str; give a NodeWithScore"),
    ([None], "nodes[0] is a NoneType; give a NodeWithScore"),
    ([NodeWithScore.model_construct(node=None, score=0.5)], "nodes[0] is a "),
    (
        [*bare_nodes("0.1"), NodeWithScore.model_construct(node=TextNode(text="x"), score="high")],
        "nodes[1]: score='high' must be a number that a float can hold, or None.",
    ),
    (
        [NodeWithScore(node=TextNode(text="x", metadata={"a": 1}, text_template="{body}"))],
        "nodes[0]: its templates cannot be filled in (KeyError: ",
    ),
    (
        [NodeWithScore(node=TextNode(text="x", metadata={"a": 1}, metadata_template="{"))],
        "nodes[0]: its templates cannot be filled in (ValueError: ",
    ),
]


@pytest.mark.parametrize(("nodes", "words"), WRONG_NODES, ids=range(len(WRONG_NODES)))
def test_wrong_nodes_are_named_before_anything_is_loaded(
    loads: list[Any], nodes: Any, words: str
) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedRerank().postprocess_nodes(nodes, query_str=QUERY)
    check_message(error, words)
    assert loads == []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"query_str": b"wolf"}, "query=b'wolf' is a bytes; give a text."),
        ({"query_bundle": "wolf"}, "query_bundle is a str; give a QueryBundle, or query_str=."),
        ({"query_bundle": QueryBundle(query_str=5)}, "query=5 is a int; give a text."),  # type: ignore[arg-type]
        ({"query_str": "\n"}, "query='\\n' is blank; give a text."),
    ],
)
def test_a_wrong_query_is_named_before_anything_is_loaded(
    loads: list[Any], query: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedRerank().postprocess_nodes(bare_nodes("0.1"), **query)
    check_message(error, words)
    assert loads == []


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"reranker": "embedded"}, "reranker is a str; give a HeadRoutedAttentionReranker, or"),
        ({"top_n": True}, "top_n=True is not a count"),
        ({"top_n": 1.5}, "top_n=1.5 cannot be used: Input should be a valid integer"),
        ({"window": 0}, "window=0 is not a count; give a whole number, 1 or more."),
        ({"first_stage_weight": -1}, "first_stage_weight=-1.0 must be a finite number, 0 or more."),
        ({"first_stage_weight": "x"}, "first_stage_weight='x' cannot be used: Input should be a"),
        ({"local_files_only": "maybe"}, "local_files_only='maybe' cannot be used: Input should"),
        ({"score_threshold": "x" * 999}, "cannot be used: Input should be a valid number"),
    ],
    ids=range(8),
)
def test_a_wrong_field_is_one_short_line(field: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedRerank(**field)
    check_message(error, words)


def check_message(error: pytest.ExceptionInfo[InputError], words: str) -> None:
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


@pytest.mark.parametrize("scores", [[1e300, 1e20, -1e30], [3e20, 2e20, 1e20], [-4.0, -5.0, -1e30]])
def test_retrieval_scores_of_any_size_count(llm: FrozenLM, scores: list[float]) -> None:
    fused = HeadRoutedAttentionReranker(llm, layout=PresetLayout(), first_stage_weight=100.0)
    nodes = bare_nodes("0.1", "0.2", "0.3")
    for node, score in zip(nodes, scores, strict=True):
        node.score = score
    reranked = HeadRoutedRerank(reranker=fused).postprocess_nodes(nodes, query_str=QUERY)
    assert (ids(reranked)[0] == "n0") == (scores[0] > 1)
    assert (ids(reranked)[2] == "n2") == (scores[0] < 1e300)
