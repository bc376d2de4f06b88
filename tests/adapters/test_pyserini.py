"""The stage around fakes, whose every figure is known."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest

import routehead_plugins
from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.adapters.pyserini import (
    HeadRoutedStage,
    Hit,
    bm25_run,
    build_index,
    load_topics,
)
from routehead_plugins.data import Document, Ranking, ScoredDocument
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import read_run, write_run
from routehead_plugins.options import RerankerOptions

NO_HEADS: Any = None


class FakeReranker:
    """Longer texts are more relevant; ties keep the order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Document]]] = []

    def rerank(
        self, query: str, documents: Sequence[Document], top_n: int | None = None
    ) -> Ranking:
        self.calls.append((query, list(documents)))
        scored = [ScoredDocument(i, float(len(d.text)), d) for i, d in enumerate(documents)]
        ranked = sorted(scored, key=lambda hit: -hit.score)
        return Ranking(query, tuple(ranked[:top_n]), NO_HEADS)


class FakeStored:
    def __init__(self, raw: str) -> None:
        self._raw = raw

    def raw(self) -> str:
        return self._raw


class FakeSearcher:
    """Finds everything it holds, in order, with scores 10, 9, 8 and so on."""

    def __init__(self, **texts: str) -> None:
        self.stored = {docid: FakeStored(text) for docid, text in texts.items()}

    def search(self, query: str, k: int = 10) -> list[SimpleNamespace]:
        docids = list(self.stored)[:k] if query else []
        return [SimpleNamespace(docid=d, score=10.0 - i) for i, d in enumerate(docids)]

    def doc(self, docid: str) -> FakeStored | None:
        return self.stored.get(docid)


class DenseSearcher:
    """Stores no texts, and has ids that are not strings."""

    def search(self, query: str, k: int = 10) -> list[SimpleNamespace]:
        return [SimpleNamespace(docid=i, score=1.0 / (i + 1)) for i in range(min(k, len(query)))]


@pytest.fixture
def searcher() -> FakeSearcher:
    return FakeSearcher(a="x", b="xx", c="xxx", d="xxxx")


@pytest.fixture
def reranker() -> FakeReranker:
    return FakeReranker()


def summary(hits: Sequence[Hit]) -> list[tuple[str, float]]:
    return [(hit.docid, hit.score) for hit in hits]


def test_search_returns_the_best_with_both_scores_and_both_ranks(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    stage = HeadRoutedStage(searcher, reranker, hits=3)
    assert stage.search("q", k=2) == [
        Hit("c", 3.0, 1, 8.0, 3, Document("xxx", "c", score=8.0)),
        Hit("b", 2.0, 2, 9.0, 2, Document("xx", "b", score=9.0)),
    ]


def test_results_asked_for_beyond_the_candidates_follow_in_first_stage_order(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    stage = HeadRoutedStage(searcher, reranker, hits=2)
    hits = stage.search("q", k=10)
    assert summary(hits) == [("b", 2.0), ("a", 1.0), ("c", 0.0), ("d", -1.0)]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert [document.id for document in reranker.calls[0][1]] == ["a", "b"]


def test_top_n_limits_every_kind_of_result(searcher: FakeSearcher, reranker: FakeReranker) -> None:
    stage = HeadRoutedStage(searcher, reranker, top_n=1)
    run = {"1": {"a": 3.0, "b": 2.0}}
    assert summary(stage.search("q")) == [("d", 4.0)]
    assert summary(stage.rerank_hits("q", searcher.search("q", 2))) == [("b", 2.0)]
    assert [summary(hits) for _, hits in stage.rerank_run(run, {"1": "q"})] == [[("b", 2.0)]]


def test_candidates_carry_the_first_stage_score(searcher: FakeSearcher) -> None:
    assert HeadRoutedStage(searcher, FakeReranker(), hits=2).retrieve("q") == [
        Document("x", "a", score=10.0),
        Document("xx", "b", score=9.0),
    ]


def test_a_query_that_finds_nothing_gives_no_hits_and_asks_no_reranker(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    assert HeadRoutedStage(searcher, reranker).search("") == []
    assert reranker.calls == []


def test_a_dense_searcher_works_with_a_corpus() -> None:
    corpus = {"0": Document("short"), "1": Document("longer")}
    stage = HeadRoutedStage(DenseSearcher(), FakeReranker(), corpus=corpus)
    assert summary(stage.search("qq")) == [("1", 6.0), ("0", 5.0)]


def test_the_querys_own_document_is_dropped_on_request(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    stage = HeadRoutedStage(searcher, reranker, hits=2, remove_query=True)
    run = {"d": {"d": 3.0, "a": 2.0, "b": 1.0}}
    assert [d.id for d in stage.retrieve("q", query_id="a")] == ["b", "c"]
    assert [d.id for d in stage.retrieve("q")] == ["a", "b"]
    assert [h.docid for h in stage.rerank_hits("q", searcher.search("q"), query_id="d")] == [
        "c",
        "b",
        "a",
    ]
    assert [summary(hits) for _, hits in stage.rerank_run(run, {"d": "q"})] == [
        [("b", 2.0), ("a", 1.0)]
    ]


def test_hits_of_any_searcher_are_reranked_and_left_as_they_are(reranker: FakeReranker) -> None:
    hits = [SimpleNamespace(docid=7, score=2), SimpleNamespace(docid=8, score=1)]
    stage = HeadRoutedStage(
        DenseSearcher(), reranker, corpus={"7": Document("x"), "8": Document("xx")}
    )
    assert stage.rerank_hits("q", iter(hits)) == [
        Hit("8", 2.0, 1, 1.0, 2, Document("xx", "8", score=1.0)),
        Hit("7", 1.0, 2, 2.0, 1, Document("x", "7", score=2.0)),
    ]
    assert [vars(hit) for hit in hits] == [{"docid": 7, "score": 2}, {"docid": 8, "score": 1}]


def test_a_run_is_reranked_to_a_depth_and_its_tail_kept(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    stage = HeadRoutedStage(searcher, reranker)
    run = {"1": {"c": 1.0, "a": 4.0, "b": 3.0, "d": 2.0}, "2": {}}
    topics = {"1": "one", "2": "two", "3": "three"}
    results = dict(stage.rerank_run(run, topics, depth=2))
    assert list(results) == ["1", "2"]
    assert summary(results["1"]) == [("b", 2.0), ("a", 1.0), ("d", 0.0), ("c", -1.0)]
    assert [hit.retrieval_rank for hit in results["1"]] == [2, 1, 3, 4]
    assert [hit.retrieval_score for hit in results["1"]] == [3.0, 4.0, 2.0, 1.0]
    assert results["2"] == []
    assert [query for query, _ in reranker.calls] == ["one"]


def test_the_tail_of_a_run_can_be_dropped(searcher: FakeSearcher, reranker: FakeReranker) -> None:
    stage = HeadRoutedStage(searcher, reranker, hits=2)
    run = {"1": {"a": 4.0, "b": 3.0, "unknown": 2.0}}
    [(_, hits)] = stage.rerank_run(run, {"1": "q"}, keep_tail=False)
    assert summary(hits) == [("b", 2.0), ("a", 1.0)]


def test_ties_of_a_run_keep_its_order(reranker: FakeReranker) -> None:
    stage = HeadRoutedStage(FakeSearcher(b="x", a="y", c="z"), reranker)
    [(_, hits)] = stage.rerank_run({"1": {"b": 1.0, "a": 1.0, "c": 2.0}}, {"1": "q"})
    assert [hit.docid for hit in hits] == ["c", "b", "a"]


def test_integer_ids_of_runs_and_topics_become_strings(reranker: FakeReranker) -> None:
    stage = HeadRoutedStage(DenseSearcher(), reranker, corpus={"5": Document("x")})
    [(qid, hits)] = stage.rerank_run({1: {5: 1}}, {1: "q"})
    assert (qid, summary(hits)) == ("1", [("5", 1.0)])


def test_a_run_is_reranked_one_query_at_a_time(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    told = []
    results = HeadRoutedStage(searcher, reranker).rerank_run(
        {"1": {"a": 1.0}, "2": {"b": 1.0}},
        {"1": "one", "2": "two"},
        on_query=lambda qid, hits: told.append((qid, summary(hits))),
    )
    assert reranker.calls == []
    next(results)
    assert told == [("1", [("a", 1.0)])]
    assert [query for query, _ in reranker.calls] == ["one"]


def test_a_query_without_a_topic_is_told_before_any_work(
    searcher: FakeSearcher, reranker: FakeReranker
) -> None:
    run = {"1": {"a": 1.0}, "9": {"a": 1.0}}
    with pytest.raises(CollectionError) as error:
        HeadRoutedStage(searcher, reranker).rerank_run(run, {"1": "q"})
    assert str(error.value) == (
        "query '9' of the run is not in the topics; expected a topic for each query of the run; "
        "give the topics that the run was made with."
    )


def test_a_written_run_is_evaluated_in_the_order_of_the_hits(
    searcher: FakeSearcher, reranker: FakeReranker, tmp_path: Path
) -> None:
    run = {"1": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}
    hits = dict(HeadRoutedStage(searcher, reranker).rerank_run(run, {"1": "q"}, depth=2))
    write_run(tmp_path / "run.trec", {qid: summary(ranked) for qid, ranked in hits.items()}, "test")
    scores = read_run(tmp_path / "run.trec")["1"]
    assert sorted(scores, key=lambda docid: -scores[docid]) == ["b", "a", "c", "d"]


def test_a_reranker_is_loaded_once_and_only_when_needed(
    searcher: FakeSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def from_options(options: RerankerOptions) -> FakeReranker:
        time.sleep(0.05)
        loaded.append(options)
        return FakeReranker()

    fake = SimpleNamespace(from_options=from_options)
    monkeypatch.setitem(vars(routehead_plugins), "HeadRoutedAttentionReranker", fake)
    stage = HeadRoutedStage(searcher, model="embedded", heads="all")
    stage.retrieve("q")
    assert loaded == []
    threads = [threading.Thread(target=stage.search, args=("q",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [RerankerOptions("embedded", heads="all")]


def test_an_unknown_argument_is_named_with_those_that_exist(searcher: FakeSearcher) -> None:
    with pytest.raises(TypeError) as error:
        HeadRoutedStage(searcher, modle="embedded")
    assert str(error.value).startswith(
        "unexpected argument 'modle'; the options of the re-ranker are model, heads, "
    )


def test_a_ready_reranker_takes_no_arguments_to_load_one(searcher: FakeSearcher) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedStage(searcher, FakeReranker(), model="embedded")
    assert str(error.value) == (
        "model cannot change a ready reranker; expected either reranker= or the arguments to load "
        "one; drop one of the two."
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hits", lambda stage: HeadRoutedStage(stage.searcher, hits=0)),
        ("k", lambda stage: stage.search("q", k=0)),
        ("depth", lambda stage: stage.rerank_run({}, {}, depth=0)),
        ("hits", lambda stage: bm25_run(stage.searcher, {}, hits=0)),
        ("threads", lambda stage: bm25_run(stage.searcher, {}, threads=0)),
        ("threads", lambda _: build_index([], "nowhere", threads=0)),
    ],
)
def test_counts_below_one_are_refused(
    searcher: FakeSearcher, name: str, call: Callable[[Any], object]
) -> None:
    stage = HeadRoutedStage(searcher, FakeReranker())
    with pytest.raises(InputError) as error:
        call(stage)
    assert str(error.value) == f"{name}=0 is not a count; give a whole number, 1 or more."


Q = {"1": "q"}
WRONG: list[tuple[Callable[[Any], object], str]] = [
    (lambda s: HeadRoutedStage(s.searcher, hits="3"), "hits='3' is not a count"),
    (lambda s: HeadRoutedStage(s.searcher, top_n="2"), "top_n='2' is not a count"),
    (lambda s: HeadRoutedStage(s.searcher, remove_query=None), "remove_query=None must be True"),
    (lambda s: HeadRoutedStage(s.searcher, window=0), "window=0 is not a count"),
    (lambda s: HeadRoutedStage(s.searcher, text_fields=5), "text_fields is a int; give a list of"),
    (lambda s: HeadRoutedStage(s.searcher, "embedded").search("q"), "reranker is a str; give a"),
    (lambda _: HeadRoutedStage(None, corpus={}).search("q"), "searcher is a NoneType; give an"),
    (lambda s: s.search(None), "query=None is a NoneType; give a text."),
    (lambda s: s.retrieve(b"q"), "query=b'q' is a bytes; give a text."),
    (lambda s: s.search("q", k=True), "k=True is not a count"),
    (lambda s: s.rerank_hits("q", None), "hits is a NoneType; give a list of objects with docid"),
    (lambda s: s.rerank_hits("q", ["a"]), "hits[0] is a str; give objects with docid and score."),
    (lambda s: s.rerank_hits(" ", []), "query=' ' is blank; give a text."),
    (
        lambda s: s.rerank_hits("q", [SimpleNamespace(docid="a", score="x")]),
        "the score of document 'a' is 'x'; give a number.",
    ),
    (lambda s: s.documents({"a": 1.0}), "scored is a dict; give its values as a list."),
    (lambda s: s.documents(["ab"]), "scored[0] is a str; give a pair of id and score."),
    (lambda s: s.documents([("a", None)]), "the score of document 'a' is None; give a number."),
    (lambda s: s.rerank_documents("q", "text"), "documents is one string; give a list of texts"),
    (lambda s: s.rerank_documents("q", [None]), "documents[0] is a NoneType; give a str or a"),
    (lambda s: s.rerank_documents(5, ["a"]), "query=5 is a int; give a text."),
    (lambda s: s.rerank_documents("q", ["a"], 0), "depth=0 is not a count"),
    (lambda s: s.rerank_documents("q", ["a"], -1), "depth=-1 is not a count"),
    (lambda s: s.rerank_run(None, Q), "run is a NoneType; give a mapping from query ids"),
    (lambda s: s.rerank_run({"1": ["a"]}, Q), "run['1'] is a list; give a mapping from document"),
    (lambda s: s.rerank_run({"1": {"a": "x"}}, Q), "the score of document 'a' is 'x'; give a num"),
    (lambda s: s.rerank_run({"1": {}, 1: {}}, Q), "two queries of the run have the id '1'."),
    (lambda s: s.rerank_run({}, ["q"]), "topics is a list; give a mapping from ids to queries"),
    (lambda s: s.rerank_run({}, {"1": None}), "topics['1']=None is a NoneType; give a text."),
    (lambda s: s.rerank_run({"1": {"a": 1}}, {"1": " "}), "topics['1']=' ' is blank; give a text"),
    (lambda s: s.rerank_run({}, {1: "a", "1": "b"}), "two topics have the id '1'; rename one."),
    (lambda s: s.rerank_run({}, {}, keep_tail=1), "keep_tail=1 must be True or False."),
    (lambda s: bm25_run(s.searcher, "q"), "topics is a str; give a mapping from ids to queries"),
    (lambda s: bm25_run(s.searcher, {7: 5}), "topics[7]=5 is a int; give a text."),
    (lambda _: bm25_run(None, Q), "searcher is a NoneType; give an object with search(query, k)"),
    (lambda _: load_topics(5), "path_or_name=5 is a int; give a path."),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument_is_named_in_one_short_line(
    searcher: FakeSearcher, call: Callable[[Any], object], words: str
) -> None:
    with pytest.raises(InputError) as error:
        call(HeadRoutedStage(searcher, FakeReranker()))
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


def test_numbers_of_numpy_reach_the_searcher_as_pythons() -> None:
    asked: list[Any] = []

    def answer(query: str, k: int) -> list[Any]:
        asked.append((query, k))
        return []

    searcher = SimpleNamespace(search=answer, doc=None)
    three, four, two = np.array([3, 4, 2])
    HeadRoutedStage(searcher, FakeReranker(), hits=three).search("q", k=two)
    bm25_run(searcher, {"1": "half an emoji \ud83d"}, hits=four)
    assert asked == [("q", 3), ("half an emoji ?", 4)]
    assert {type(k) for _, k in asked} == {int}


def test_scores_of_any_size_keep_the_order_of_the_tail(searcher: FakeSearcher) -> None:
    class Huge(FakeReranker):
        def rerank(self, query: str, documents: Sequence[Document], top_n: Any = None) -> Ranking:
            ranking = super().rerank(query, documents, top_n)
            hits = [replace(hit, score=hit.score * 1e30) for hit in ranking]
            return Ranking(query, tuple(hits), NO_HEADS)

    scores = {"a": 1e300, "b": 1e20, "c": 1.0, "d": -1e30}
    [(_, hits)] = HeadRoutedStage(searcher, Huge()).rerank_run({"1": scores}, Q, depth=2)
    assert [hit.docid for hit in hits] == ["b", "a", "c", "d"]
    assert [hit.retrieval_score for hit in hits] == [1e20, 1e300, 1.0, -1e30]
    assert hits[1].score > hits[2].score > hits[3].score


def test_a_score_that_is_no_number_ranks_last_in_the_first_stage(searcher: FakeSearcher) -> None:
    run = {"1": {"a": math.nan, "b": 1.0, "c": math.inf}}
    [(_, hits)] = HeadRoutedStage(searcher, FakeReranker()).rerank_run(run, Q)
    assert {hit.docid: hit.retrieval_rank for hit in hits} == {"c": 1, "b": 2, "a": 3}


def test_retrieval_scores_of_any_size_count(searcher: FakeSearcher) -> None:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer())
    fusing = HeadRoutedAttentionReranker(llm, first_stage_weight=100.0)
    for best in (1e20, 1e300):
        scores = {"a": 0.0, "b": best, "c": best / 2, "d": -best}
        [(_, hits)] = HeadRoutedStage(searcher, fusing).rerank_run({"1": scores}, Q)
        assert [hit.docid for hit in hits] == ["b", "c", "a", "d"]


def test_a_top_n_that_returns_nothing_is_refused(searcher: FakeSearcher) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedStage(searcher, top_n=0)
    assert str(error.value) == "top_n=0 returns nothing; give 1 or more, or None for all."


def test_a_run_is_made_with_a_searcher_that_knows_no_batches(searcher: FakeSearcher) -> None:
    assert bm25_run(searcher, {1: "q", "x": ""}, hits=2) == {"1": {"a": 10.0, "b": 9.0}, "x": {}}


def test_a_document_found_twice_keeps_its_first_score() -> None:
    twice = [SimpleNamespace(docid=3, score=2), SimpleNamespace(docid=3, score=1)]
    searcher = SimpleNamespace(batch_search=lambda _queries, qids, _k, _threads: {qids[0]: twice})
    assert bm25_run(searcher, {1: "q", 2: "r"}) == {"1": {"3": 2.0}, "2": {}}


def test_topics_are_read_from_local_files(tmp_path: Path) -> None:
    (tmp_path / "topics.tsv").write_text("1\ta query\n")
    (tmp_path / "topics.jsonl").write_text('{"_id": "x", "text": "another"}\n')
    assert load_topics(tmp_path / "topics.tsv") == {"1": "a query"}
    assert load_topics(str(tmp_path / "topics.jsonl")) == {"x": "another"}
    with pytest.raises(CollectionError, match=r"absent\.tsv does not exist"):
        load_topics(tmp_path / "absent.tsv")


def test_importing_the_adapter_loads_neither_torch_nor_java() -> None:
    code = (
        "import sys, routehead_plugins.adapters.pyserini\n"
        "heavy = {'torch', 'transformers', 'jnius', 'jnius_config', 'pyserini', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
