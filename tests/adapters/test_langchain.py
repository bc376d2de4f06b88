"""The compressor in the real LangChain, around a tiny LLM and around fakes."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import families
import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.callbacks import CallbackManagerForRetrieverRun as RunManager
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from transformers import AutoModelForCausalLM

import routehead_plugins
from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, data
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.data import Ranking, ScoredDocument
from routehead_plugins.errors import InputError
from routehead_plugins.options import RerankerOptions
from routehead_plugins.scoring import LongTexts
from routehead_plugins.selection import as_selector

NO_HEADS: Any = None
QUERY = "which wolf ran?"
TEXTS = ["rain", "a wolf ran over the hill", "", "seven grey stones by a river", "a wolf"]


class FakeReranker:
    """Longer texts are more relevant; ties keep the order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[data.Document], int | None]] = []

    def rerank(
        self,
        query: str,
        documents: Sequence[data.Document],
        top_n: int | None = None,
        *,
        spans: bool = False,
    ) -> Ranking:
        self.calls.append((query, list(documents), top_n))
        quoted = (data.TextSpan(0, 4, 0.5),) if spans else ()
        scored = [ScoredDocument(i, float(len(d.text)), d, quoted) for i, d in enumerate(documents)]
        ranked = sorted(scored, key=lambda hit: -hit.score)
        return Ranking(query, tuple(ranked[:top_n]), NO_HEADS)


class FailingReranker(FakeReranker):
    """Fails at the first call, works from then on."""

    def rerank(self, *args: Any, **kwargs: Any) -> Ranking:
        ranking = super().rerank(*args, **kwargs)
        if len(self.calls) == 1:
            raise ZeroDivisionError("inside the model")
        return ranking


class FixedRetriever(BaseRetriever):
    """Finds the same documents for every query."""

    documents: list[Document]

    def _get_relevant_documents(
        self,
        query: str,  # noqa: ARG002
        *,
        run_manager: RunManager,  # noqa: ARG002
    ) -> list[Document]:
        return self.documents


class Recorder(BaseCallbackHandler):
    """Writes down the runs of chains and of retrievers."""

    def __init__(self) -> None:
        self.names: dict[UUID, str] = {}
        self.parents: dict[UUID, UUID | None] = {}
        self.events: list[tuple[str, str]] = []
        self.outputs: dict[str, Any] = {}

    def _started(self, run_id: UUID, parent_run_id: UUID | None, name: str) -> None:
        self.names[run_id] = name
        self.parents[run_id] = parent_run_id
        self.events.append(("start", name))

    def on_chain_start(self, *_: Any, run_id: UUID, **more: Any) -> None:
        self._started(run_id, more.get("parent_run_id"), more["name"])

    def on_retriever_start(self, *_: Any, run_id: UUID, **more: Any) -> None:
        self._started(run_id, more.get("parent_run_id"), more["name"])

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        self.outputs[self.names[run_id]] = outputs
        self.events.append(("end", self.names[run_id]))

    def on_retriever_end(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self.events.append(("end", self.names[run_id]))

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        self.events.append((type(error).__name__, self.names[run_id]))

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        self.events.append((type(error).__name__, self.names[run_id]))

    def parent(self, name: str) -> str | None:
        (run_id,) = [run_id for run_id, named in self.names.items() if named == name]
        parent = self.parents[run_id]
        return None if parent is None else self.names[parent]


@pytest.fixture(scope="module")
def tiny() -> HeadRoutedAttentionReranker:
    return HeadRoutedAttentionReranker(
        FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer())
    )


@pytest.fixture
def fake() -> FakeReranker:
    return FakeReranker()


@pytest.fixture
def documents() -> list[Document]:
    return [
        Document(text, id=f"d{number}", metadata={"page": number, "nested": {"tags": [number]}})
        for number, text in enumerate(TEXTS)
    ]


def texts(documents: Sequence[Document]) -> list[str]:
    return [document.page_content for document in documents]


def compress(compressor: Any, documents: Any, query: Any = QUERY, **more: Any) -> list[Document]:
    return list(compressor.compress_documents(documents, query, **more))


def acompress(compressor: Any, documents: Any, query: Any = QUERY, **more: Any) -> list[Document]:
    return list(asyncio.run(compressor.acompress_documents(documents, query, **more)))


BOTH_WAYS = pytest.mark.parametrize("run", [compress, acompress])


@BOTH_WAYS
def test_copies_keep_ids_and_metadata_and_carry_the_score(
    tiny: HeadRoutedAttentionReranker, documents: list[Document], run: Callable[..., list[Document]]
) -> None:
    ranking = tiny.rerank(QUERY, TEXTS)
    assert run(HeadRoutedCompressor(reranker=tiny, top_n=None), documents) == [
        Document(
            TEXTS[hit.index],
            id=f"d{hit.index}",
            metadata={
                "page": hit.index,
                "nested": {"tags": [hit.index]},
                "relevance_score": hit.score,
            },
        )
        for hit in ranking
    ]


def test_scores_are_python_floats(
    tiny: HeadRoutedAttentionReranker, documents: list[Document]
) -> None:
    compressor = HeadRoutedCompressor(reranker=tiny)
    scores = [document.metadata["relevance_score"] for document in compress(compressor, documents)]
    scores += [result["relevance_score"] for result in compressor.rerank(documents, QUERY)]
    assert {type(score) for score in scores} == {float}


def test_a_score_from_before_is_replaced(fake: FakeReranker) -> None:
    compressed = compress(
        HeadRoutedCompressor(reranker=fake), [Document("xx", metadata={"relevance_score": 9})]
    )
    assert compressed[0].metadata == {"relevance_score": 2.0}


def test_documents_of_a_subclass_stay_of_it(fake: FakeReranker) -> None:
    class Page(Document):
        number: int = 0

    compressed = compress(HeadRoutedCompressor(reranker=fake), [Page(page_content="x", number=7)])
    assert compressed == [Page(page_content="x", number=7, metadata={"relevance_score": 1.0})]


@BOTH_WAYS
@pytest.mark.parametrize("reranker", [FakeReranker, FailingReranker])
def test_documents_given_are_left_as_they_are(
    documents: list[Document],
    run: Callable[..., list[Document]],
    reranker: Callable[[], FakeReranker],
) -> None:
    before, compressor = copy.deepcopy(documents), HeadRoutedCompressor(reranker=reranker())
    if reranker is FailingReranker:
        with pytest.raises(ZeroDivisionError):
            run(compressor, documents)
    else:
        for document in run(compressor, documents):
            document.metadata["page"] = "changed"
    assert documents == before


def test_one_document_given_twice_is_returned_twice(fake: FakeReranker) -> None:
    document = Document("x", id="d")
    compressed = compress(HeadRoutedCompressor(reranker=fake), [document, document])
    assert [copied.id for copied in compressed] == ["d", "d"]
    assert compressed[0] is not compressed[1]


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (2, {}, 2),
        (2, {"top_n": -1}, 2),
        (2, {"top_n": 3}, 3),
        (2, {"top_n": None}, 5),
        (None, {}, 5),
        (9, {}, 5),  # more than there are
    ],
)
def test_top_n(
    fake: FakeReranker,
    documents: list[Document],
    own: int | None,
    given: dict[str, Any],
    expected: int,
) -> None:
    compressor = HeadRoutedCompressor(reranker=fake, top_n=own)
    assert len(compressor.rerank(documents, QUERY, **given)) == expected
    assert len(compress(compressor, documents)) == min(own or 5, 5)


def test_top_n_is_three_by_default(fake: FakeReranker, documents: list[Document]) -> None:
    assert len(compress(HeadRoutedCompressor(reranker=fake), documents)) == 3


@pytest.mark.parametrize("top_n", [0, -2])
def test_a_top_n_that_returns_nothing_is_refused_in_one_line(
    fake: FakeReranker, documents: list[Document], top_n: int
) -> None:
    message = f"top_n={top_n} returns nothing; give 1 or more, or None for all."
    compressor = HeadRoutedCompressor(reranker=fake)
    with pytest.raises(InputError) as at_once:
        HeadRoutedCompressor(top_n=top_n)
    with pytest.raises(InputError) as in_a_call:
        compressor.rerank(documents, QUERY, top_n=top_n)
    compressor.top_n = top_n
    with pytest.raises(InputError) as later:
        compress(compressor, documents)
    assert [str(error.value) for error in (at_once, in_a_call, later)] == [message] * 3


def test_rerank_returns_indices_best_first(fake: FakeReranker) -> None:
    mixture = ["x", Document("xxx"), "xx"]
    assert HeadRoutedCompressor(reranker=fake).rerank(mixture, QUERY) == [
        {"index": 1, "relevance_score": 3.0},
        {"index": 2, "relevance_score": 2.0},
        {"index": 0, "relevance_score": 1.0},
    ]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(None, ["xxx", "xx", "x"]), (2.0, ["xxx", "xx"]), (2.5, ["xxx"]), (9, []), (-1, None)],
)
def test_documents_below_the_threshold_are_left_out(
    fake: FakeReranker, threshold: float | None, expected: list[str] | None
) -> None:
    compressor = HeadRoutedCompressor(reranker=fake, score_threshold=threshold)
    compressed = compress(compressor, [Document("x"), Document("xx"), Document("xxx")])
    assert texts(compressed) == (["xxx", "xx", "x"] if expected is None else expected)
    assert len(compressor.rerank(["x", "xx", "xxx"], QUERY)) == len(compressed)


def test_ties_keep_the_order(tiny: HeadRoutedAttentionReranker, fake: FakeReranker) -> None:
    same = [Document("x", id=str(number)) for number in range(9)]
    blank = [Document(" ", id=str(number)) for number in range(9)]
    for reranker, tied in ((fake, same), (tiny, blank)):
        compressed = compress(HeadRoutedCompressor(reranker=reranker, top_n=None), tied)
        assert [document.id for document in compressed] == list("012345678")


def test_blank_documents_rank_last(
    tiny: HeadRoutedAttentionReranker, documents: list[Document]
) -> None:
    compressed = compress(
        HeadRoutedCompressor(reranker=tiny, top_n=None), [Document(" "), *documents]
    )
    assert texts(compressed)[-2:] == [" ", ""]


def test_a_thousand_documents_with_top_n_one() -> None:
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.max_position_embeddings = 32768
    llm = FrozenLM(AutoModelForCausalLM.from_config(config), families.tiny_tokenizer())
    reranker = HeadRoutedAttentionReranker(llm, as_selector("0-1"))
    compressor = HeadRoutedCompressor(reranker=reranker, top_n=1)
    many = [Document(f"wolf {number}", id=str(number)) for number in range(1000)]
    best = compressor.rerank(many, QUERY, top_n=None)
    assert [document.id for document in compress(compressor, many)] == [str(best[0]["index"])]
    assert sorted(result["index"] for result in best) == list(range(1000))


@BOTH_WAYS
def test_no_documents_need_no_model(run: Callable[..., list[Document]]) -> None:
    compressor = HeadRoutedCompressor(model="no such model", local_files_only=True)
    assert run(compressor, []) == []
    assert compressor.rerank([], QUERY) == []


@BOTH_WAYS
@pytest.mark.parametrize(
    ("documents", "query", "message"),
    [
        (["x"], "", "query='' is blank; give a text."),
        (["x"], " \n", "query=' \\n' is blank; give a text."),
        ([], " ", "query=' ' is blank; give a text."),
        (["x"], None, "query=None is a NoneType; give a text."),
        (None, "q", "documents is a NoneType; give a list of LangChain Documents or texts."),
        ("one", "q", "documents is one string; give a list of LangChain Documents or texts."),
        (["x", {"text": "y"}], "q", "documents[1] is a dict; give a LangChain Document or a str."),
    ],
)
def test_bad_input_is_named_in_one_line(
    fake: FakeReranker,
    run: Callable[..., list[Document]],
    documents: Any,
    query: Any,
    message: str,
) -> None:
    with pytest.raises(InputError) as error:
        run(HeadRoutedCompressor(reranker=fake), documents, query)
    assert str(error.value) == message
    assert fake.calls == []


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedCompressor(top_k=3)
    assert str(error.value) == "top_k=3 cannot be used: Extra inputs are not permitted."


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"top_n": True}, "top_n=True is not a count"),
        ({"top_n": "many"}, "top_n='many' cannot be used: Input should be a valid integer"),
        ({"stride": 0, "window": 2}, "stride=0 is not a count; give a whole number, 1 or more."),
        ({"first_stage_weight": float("nan")}, "first_stage_weight=nan must be a finite number"),
        ({"relevant_spans": None}, "relevant_spans=None cannot be used: Input should be a valid"),
        ({"score_key": 5}, "score_key=5 cannot be used: Input should be a valid string"),
        ({"heads": 7}, "heads=7 cannot be used: Input should be"),
    ],
    ids=range(7),
)
def test_a_wrong_field_is_one_short_line(field: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedCompressor(**field)
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


def test_a_reranker_that_is_none_is_refused_when_it_is_needed() -> None:
    compressor = HeadRoutedCompressor(reranker="embedded")
    with pytest.raises(InputError, match=r"^reranker is a str; give a HeadRoutedAttentionReranker"):
        compress(compressor, ["x"])


def test_documents_may_come_from_a_generator(fake: FakeReranker, documents: list[Document]) -> None:
    compressor = HeadRoutedCompressor(reranker=fake)
    assert compress(compressor, iter(documents)) == compress(compressor, documents)


@pytest.mark.parametrize("scores", [[1e300, 1e20, -1e30], [3e20, 1e20, 2e20], [1e30, 4.0, 5.0]])
def test_retrieval_scores_of_any_size_count(
    tiny: HeadRoutedAttentionReranker, scores: list[float]
) -> None:
    fusing = HeadRoutedAttentionReranker(tiny.llm, first_stage_weight=100.0)
    retrieved = [Document(f"wolf {score}", metadata={"score": score}) for score in scores]
    compressor = HeadRoutedCompressor(reranker=fusing, score_key="score")
    assert texts(compress(compressor, retrieved))[0] == f"wolf {scores[0]}"


def test_a_threshold_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedCompressor(score_threshold=float("nan"))
    assert str(error.value) == (
        "score_threshold=nan is not a number; give one, or None for no limit."
    )


def test_arguments_to_load_a_reranker_do_not_go_with_a_ready_one(fake: FakeReranker) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedCompressor(reranker=fake, heads="all", first_stage_weight=1.0)
    assert str(error.value).startswith("heads, first_stage_weight cannot change a ready reranker;")
    ready = HeadRoutedCompressor(reranker=fake)
    assert HeadRoutedCompressor(**dict(ready)) == ready


@pytest.mark.parametrize(
    ("metadata", "score"),
    [
        ({"similarity": 2}, 2.0),
        ({"similarity": np.float32(0.5)}, 0.5),
        ({"similarity": "high"}, None),
        ({"similarity": True}, None),
        ({"similarity": 10**400}, None),
        ({"similarity": None}, None),
        ({}, None),
    ],
)
def test_the_retrievers_score_is_handed_on(
    fake: FakeReranker, metadata: dict[str, Any], score: float | None
) -> None:
    document = Document("x", id="d", metadata=metadata)
    compress(HeadRoutedCompressor(reranker=fake, score_key="similarity", top_n=2), [document])
    assert fake.calls == [(QUERY, [data.Document("x", "d", metadata, score)], 2)]
    assert type(fake.calls[0][1][0].score) is type(score)


def test_the_retrievers_score_counts_where_it_is_given_weight(
    tiny: HeadRoutedAttentionReranker,
) -> None:
    fusing = HeadRoutedAttentionReranker(tiny.llm, first_stage_weight=100.0)
    retrieved = [Document("wolf " * n, metadata={"score": float(-n)}) for n in (3, 1, 2)]
    compressor = HeadRoutedCompressor(reranker=fusing, score_key="score")
    assert texts(compress(compressor, retrieved)) == ["wolf ", "wolf wolf ", "wolf wolf wolf "]


@BOTH_WAYS
def test_compression_is_a_run_of_its_own(
    fake: FakeReranker, documents: list[Document], run: Callable[..., list[Document]]
) -> None:
    recorder = Recorder()
    compressed = run(HeadRoutedCompressor(reranker=fake), documents, callbacks=[recorder])
    assert recorder.events == [("start", "HeadRoutedCompressor"), ("end", "HeadRoutedCompressor")]
    assert recorder.outputs["HeadRoutedCompressor"] == compressed


def test_asynchronous_callbacks_are_awaited(fake: FakeReranker, documents: list[Document]) -> None:
    class Awaited(AsyncCallbackHandler):
        ended = False

        async def on_chain_end(self, outputs: Any, **_: Any) -> None:
            await asyncio.sleep(0)
            self.ended = len(outputs) == 3

    handler = Awaited()
    acompress(HeadRoutedCompressor(reranker=fake), documents, callbacks=[handler])
    assert handler.ended


@BOTH_WAYS
def test_an_error_inside_the_model_is_told_of_and_the_next_call_works(
    documents: list[Document], run: Callable[..., list[Document]]
) -> None:
    recorder, compressor = Recorder(), HeadRoutedCompressor(reranker=FailingReranker())
    with pytest.raises(ZeroDivisionError, match="inside the model"):
        run(compressor, documents, callbacks=[recorder])
    assert recorder.events[1:] == [("ZeroDivisionError", "HeadRoutedCompressor")]
    assert len(run(compressor, documents, callbacks=[recorder])) == 3
    assert recorder.events[3:] == [("end", "HeadRoutedCompressor")]


def test_an_error_of_the_core_comes_through_with_its_type(
    tiny: HeadRoutedAttentionReranker,
) -> None:
    strict = HeadRoutedAttentionReranker(tiny.llm, long_texts=LongTexts(on_too_long="error"))
    compressor = HeadRoutedCompressor(reranker=strict)
    with pytest.raises(routehead_plugins.errors.PromptTooLongError) as error:
        compress(compressor, [Document("x" * 5000)])
    assert error.value.limit == 4096
    assert len(compress(compressor, [Document("x")])) == 1


def invoke(runnable: Any, query: Any, **config: Any) -> Any:
    return runnable.invoke(query, config=config)


def ainvoke(runnable: Any, query: Any, **config: Any) -> Any:
    return asyncio.run(runnable.ainvoke(query, config=config))


INVOKED_BOTH_WAYS = pytest.mark.parametrize("run", [invoke, ainvoke])


@INVOKED_BOTH_WAYS
def test_in_a_contextual_compression_retriever(
    tiny: HeadRoutedAttentionReranker, documents: list[Document], run: Callable[..., Any]
) -> None:
    compressor, recorder = HeadRoutedCompressor(reranker=tiny), Recorder()
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=FixedRetriever(documents=documents)
    )
    assert run(retriever, QUERY, callbacks=[recorder]) == compress(compressor, documents)
    assert recorder.parent("HeadRoutedCompressor") == "ContextualCompressionRetriever"
    assert recorder.events == [
        ("start", "ContextualCompressionRetriever"),
        ("start", "FixedRetriever"),
        ("end", "FixedRetriever"),
        ("start", "HeadRoutedCompressor"),
        ("end", "HeadRoutedCompressor"),
        ("end", "ContextualCompressionRetriever"),
    ]


@INVOKED_BOTH_WAYS
def test_an_error_in_a_contextual_compression_retriever(
    documents: list[Document], run: Callable[..., Any]
) -> None:
    compressor, recorder = HeadRoutedCompressor(reranker=FailingReranker()), Recorder()
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=FixedRetriever(documents=documents)
    )
    with pytest.raises(ZeroDivisionError):
        run(retriever, QUERY, callbacks=[recorder])
    assert recorder.events[-2:] == [
        ("ZeroDivisionError", "HeadRoutedCompressor"),
        ("ZeroDivisionError", "ContextualCompressionRetriever"),
    ]


@BOTH_WAYS
def test_in_a_pipeline_of_compressors(
    fake: FakeReranker, documents: list[Document], run: Callable[..., list[Document]]
) -> None:
    recorder = Recorder()
    pipeline = DocumentCompressorPipeline(
        transformers=[
            HeadRoutedCompressor(reranker=fake, top_n=4),
            HeadRoutedCompressor(reranker=fake, top_n=1),
        ]
    )
    compressed = run(pipeline, documents, callbacks=[recorder])
    assert texts(compressed) == ["seven grey stones by a river"]
    assert [len(given) for _, given, _ in fake.calls] == [5, 4]
    assert recorder.events.count(("end", "HeadRoutedCompressor")) == 2


@INVOKED_BOTH_WAYS
def test_as_runnable_chains_retriever_and_compressor(
    fake: FakeReranker, documents: list[Document], run: Callable[..., Any]
) -> None:
    compressor, recorder = HeadRoutedCompressor(reranker=fake, top_n=2), Recorder()
    chain = compressor.as_runnable(FixedRetriever(documents=documents)) | texts
    assert run(chain, QUERY, callbacks=[recorder], run_name="answers") == [
        "seven grey stones by a river",
        "a wolf ran over the hill",
    ]
    assert recorder.parent("HeadRoutedCompressor") == "answers"
    assert ("end", "FixedRetriever") in recorder.events


def test_as_runnable_takes_batches_and_draws_its_graph(
    fake: FakeReranker, documents: list[Document]
) -> None:
    chain = HeadRoutedCompressor(reranker=fake, top_n=1).as_runnable(lambda _: documents)
    assert [len(compressed) for compressed in chain.batch(["one", "two"])] == [1, 1]
    assert "HeadRoutedCompressor" in chain.get_graph().draw_mermaid()


@INVOKED_BOTH_WAYS
def test_as_runnable_takes_queries_only(fake: FakeReranker, run: Callable[..., Any]) -> None:
    chain = HeadRoutedCompressor(reranker=fake).as_runnable(lambda _: [Document("x")])
    with pytest.raises(InputError, match="is a dict; give a text"):
        run(chain, {"question": "q"})


@INVOKED_BOTH_WAYS
def test_in_a_lambda_the_run_is_traced_below_it(
    fake: FakeReranker, documents: list[Document], run: Callable[..., Any]
) -> None:
    compressor, recorder = HeadRoutedCompressor(reranker=fake, top_n=1), Recorder()
    retrieval: Any = RunnableParallel(documents=lambda _: documents, query=RunnablePassthrough())
    chain = retrieval | RunnableLambda(
        lambda x: compressor.compress_documents(x["documents"], x["query"]), name="rerank"
    )
    assert texts(run(chain, QUERY, callbacks=[recorder])) == ["seven grey stones by a river"]
    assert recorder.parent("HeadRoutedCompressor") == "rerank"


def test_sixteen_concurrent_calls_equal_serial_ones(
    tiny: HeadRoutedAttentionReranker, documents: list[Document]
) -> None:
    compressor = HeadRoutedCompressor(reranker=tiny, top_n=None)
    queries = [f"{QUERY} {number}" for number in range(16)]
    serial = [compress(compressor, documents, query) for query in queries]

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(compressor.acompress_documents(documents, query) for query in queries)
        )

    for compressed, expected in zip(asyncio.run(together()), serial, strict=True):
        assert [document.id for document in compressed] == [document.id for document in expected]
        assert [document.metadata["relevance_score"] for document in compressed] == pytest.approx(
            [document.metadata["relevance_score"] for document in expected], abs=1e-6
        )


def test_the_event_loop_stays_free(documents: list[Document]) -> None:
    released = threading.Event()

    class Waiting(FakeReranker):
        def rerank(self, *args: Any, **kwargs: Any) -> Ranking:
            assert released.wait(10)
            return super().rerank(*args, **kwargs)

    async def release_meanwhile() -> int:
        compressor = HeadRoutedCompressor(reranker=Waiting())
        pending = asyncio.create_task(compressor.acompress_documents(documents, QUERY))
        await asyncio.sleep(0)
        released.set()
        return len(await pending)

    assert asyncio.run(release_meanwhile()) == 3


class FakeLoader:
    """Stands in for the class that loads; loading takes a moment."""

    def __init__(self, failures: int = 0) -> None:
        self.loads: list[RerankerOptions] = []
        self.failures = failures

    def from_options(self, options: RerankerOptions) -> FakeReranker:
        self.loads.append(options)
        time.sleep(0.05)
        if len(self.loads) <= self.failures:
            raise OSError("the disk is gone")
        return FakeReranker()


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> FakeLoader:
    loader = FakeLoader()
    monkeypatch.setattr(routehead_plugins, "HeadRoutedAttentionReranker", loader, raising=False)
    return loader


def test_the_model_is_loaded_once_under_eight_threads(loader: FakeLoader) -> None:
    compressor = HeadRoutedCompressor(model="m", heads="0-1", first_stage_weight=0.5)
    assert loader.loads == []
    with ThreadPoolExecutor(8) as pool:
        compressed = list(pool.map(lambda _: compress(compressor, [Document("x")]), range(8)))
    assert texts([document for documents in compressed for document in documents]) == ["x"] * 8
    assert loader.loads == [RerankerOptions("m", heads="0-1", first_stage_weight=0.5)]


def test_a_field_of_none_takes_the_default_of_the_option(loader: FakeLoader) -> None:
    compress(HeadRoutedCompressor(dtype=None), [Document("x")])
    assert loader.loads == [RerankerOptions()]


def test_loading_that_failed_is_tried_again(loader: FakeLoader) -> None:
    loader.failures = 1
    compressor = HeadRoutedCompressor()
    with pytest.raises(OSError, match="the disk is gone"):
        compress(compressor, [Document("x")])
    assert len(compress(compressor, [Document("x")])) == 1


def test_copies_share_the_model_unless_they_name_another(loader: FakeLoader) -> None:
    compressor = HeadRoutedCompressor(model="m")
    compress(compressor, [Document("x")])
    for same in (compressor.model_copy(update={"top_n": 1}), copy.deepcopy(compressor)):
        compress(same, [Document("x")])
    assert len(loader.loads) == 1
    compress(compressor.model_copy(update={"heads": "0-1"}), [Document("x")])
    compress(compressor, [Document("x")])
    assert [options.heads for options in loader.loads] == [None, "0-1"]


def test_pickles_leave_the_model_behind(loader: FakeLoader) -> None:
    compressor = HeadRoutedCompressor(model="m", top_n=1, score_threshold=0.5)
    unused = pickle.dumps(compressor)
    compress(compressor, [Document("x")])
    assert pickle.dumps(compressor) == unused
    restored = pickle.loads(unused)
    assert restored.model_dump() == compressor.model_dump()
    assert compress(restored, [Document("x"), Document("xx")])[0].page_content == "xx"
    assert len(loader.loads) == 2


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def test_the_module_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from routehead_plugins.adapters.langchain import HeadRoutedCompressor as C\n"
        "C(model='m').rerank([], 'q')\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert run_python(code) == "[]\n"


def test_without_langchain_the_error_holds_the_pip_line() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'langchain_core': raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "try: import routehead_plugins.adapters.langchain\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    assert run_python(code) == (
        "MissingExtraError package 'langchain_core' is not installed; "
        'run: pip install "routehead-plugins[langchain]"\n'
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_relevant_spans_are_given_on_request(wanted: bool) -> None:
    compressor = HeadRoutedCompressor(reranker=FakeReranker(), relevant_spans=wanted)
    (document,) = compressor.compress_documents([Document("wolf ran")], QUERY)
    (result,) = compressor.rerank(["wolf ran"], QUERY)
    expected = [{"start": 0, "end": 4, "score": 0.5}] if wanted else None
    assert document.metadata.get("relevant_spans") == expected
    assert result.get("relevant_spans") == expected
