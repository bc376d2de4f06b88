"""`routehead train`, from folders of texts to a router that re-ranks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet, __version__
from routehead_plugins.backbone import QueryLikelihood
from routehead_plugins.cli import train as command
from routehead_plugins.cli import training_data
from routehead_plugins.cli.train import TrainArguments, summary, train_router
from routehead_plugins.errors import CollectionError, InputError, RouteHeadError
from routehead_plugins.io import Collection, Run, write_run
from routehead_plugins.layouts import ParallelLayout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import HeadRouter, NeighbourRouter, QuerySpace, Router
from routehead_plugins.signals import QuerySignals, SignalSet, mix_teacher
from routehead_plugins.signals.store import SignalStore
from routehead_plugins.training import correction, fit_router, router_card

THINGS = ["wolf", "rain", "stone", "river", "snow", "hill", "moss", "owl"]
FILES = ["README.md", "config.json", "model.safetensors"]
Train = Callable[..., Router]
# Pseudo-labels by fixed options instead of those that hold on other documents.
FIXED = {"candidates": 5, "max_heads": 3, "utility": "ndcg"}


def passage(thing: str) -> str:
    return f"Many people far and wide tell old stories about the {thing} and what became of it."


def write_folder(
    folder: Path, things: Sequence[str], *, judged: bool = True, relevant: int = 1
) -> Path:
    """A passage for each thing; where they are judged, a query for each finds its passage third.

    With more than one relevant passage, those that follow it are relevant as well.
    """
    folder.mkdir()
    rows = [{"_id": f"d{n}", "text": passage(thing)} for n, thing in enumerate(things)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if not judged:
        return folder
    rows = [{"_id": f"q{n}", "text": f"{thing} stories"} for n, thing in enumerate(things)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "qrels").mkdir()
    pairs = [(n, (n + more) % len(things)) for n in range(len(things)) for more in range(relevant)]
    judgments = "".join(f"q{query}\td{passage}\t1\n" for query, passage in pairs)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgments)
    count = len(things)
    run = {
        f"q{n}": {f"d{(n + away) % count}": 9.0 - rank for rank, away in enumerate((2, 1, 0, 3))}
        for n in range(count)
    }
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("judged") / "words", THINGS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bare") / "texts", THINGS, judged=False)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "_STEPS", 20)


@pytest.fixture
def train(model: str, tmp_path: Path) -> Train:
    def call(*collections: Path, output: str = "router", **options: Any) -> Router:
        given: dict[str, Any] = {
            "output": tmp_path / output,
            "signals": tmp_path / "signals",
            "hits": 4,
        }
        llm = RerankerOptions(model, dtype="float32", layout="parallel", max_doc_tokens=60)
        llm = replace(llm, **options.pop("llm", {}))
        return train_router(TrainArguments(list(collections), **given | options), llm)

    return call


def thing_of(text: str) -> str:
    return next(thing for thing in THINGS if f" {thing} " in f" {text} ")


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The LLM writes sensible queries, but for those of owls; the passages that it was shown."""
    shown: list[str] = []

    def write(_: FrozenLM, prefix: str, prompts: Sequence[str], **__: Any) -> list[str]:
        label = re.findall(r"^(\w+):", prefix, re.MULTILINE)[-1]
        shown.extend(prompts)
        things = map(thing_of, prompts)
        return [
            f"which {label} of {thing} stories is told{' of wolf and wolf' * (thing == 'owl')}"
            for thing in things
        ]

    monkeypatch.setattr(FrozenLM, "write", write)
    return shown


@pytest.fixture
def retrieving(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """BM25 without a JVM, which never finds any owl; the queries that it was asked."""
    asked: list[str] = []

    def retrieve(collection: Collection, topics: Mapping[str, str], hits: int) -> Collection:
        if collection.run is not None:
            return collection
        asked.extend(topics.values())
        count = len(THINGS)
        run: Run = {}
        for query_id, query in topics.items():
            place = THINGS.index(thing_of(query))
            order = [place + away for away in (1, 0, 2, 3)] if place < count - 1 else range(4)
            run[query_id] = {f"d{n % count}": 9.0 - rank for rank, n in enumerate(order)}
        return replace(
            collection, run={key: dict(list(v.items())[:hits]) for key, v in run.items()}
        )

    monkeypatch.setattr(training_data, "with_candidates", retrieve)
    monkeypatch.setattr(command, "check_bm25", lambda: None)
    return asked


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[SignalSet]:
    """What routers are fitted on."""
    recorded: list[SignalSet] = []

    def record(signals: SignalSet, *arguments: Any) -> Router:
        recorded.append(signals)
        return fit_router(signals, *arguments)

    monkeypatch.setattr("routehead_plugins.training.fit_router", record)
    return recorded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# from judgments


def test_judged_queries_make_a_router_that_reranks(
    train: Train, model: str, words: Path, tmp_path: Path
) -> None:
    router = train(words)
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == FILES
    loaded = Router.from_pretrained(tmp_path / "router")
    assert isinstance(loaded, HeadRouter)
    assert torch.equal(loaded.bias, router.bias)
    assert (loaded.heads.model, loaded.layout, loaded.max_doc_tokens) == (model, "parallel", 60)
    assert loaded.space.layer == 3
    assert loaded.description == router.description
    assert loaded.description is not None
    assert loaded.description["parts"] == [{"name": "words", "kind": "judged", "queries": 8}]
    assert (loaded.description["queries"], loaded.description["held_out_queries"]) == (8, 2)
    assert loaded.description["seed"] == 0
    reranker = HeadRoutedAttentionReranker.from_pretrained(
        model, router=tmp_path / "router", dtype="float32"
    )
    assert reranker.layout == ParallelLayout()
    ranking = reranker.rerank("wolf stories", [passage(thing) for thing in THINGS])
    assert ranking.heads == loaded.select("wolf stories", reranker.llm)
    assert sorted(hit.index for hit in ranking) == list(range(8))


def test_two_collections_are_learned_from_together(
    train: Train, words: Path, tmp_path: Path, fitted: list[SignalSet]
) -> None:
    more = write_folder(tmp_path / "more", THINGS[:5])
    router = train(words, more, queries=6)
    assert router.description is not None
    assert router.description["parts"] == [
        {"name": "words", "kind": "judged", "queries": 6},
        {"name": "more", "kind": "judged", "queries": 5},
    ]
    assert [len(query.docids) for query in fitted[0].queries] == [4] * 11
    assert fitted[0].data == ("words", "more")


@pytest.mark.parametrize("objective", ["labels", "neighbours"])
def test_options_reach_the_fit(train: Train, words: Path, objective: str) -> None:
    router = train(
        words,
        objective=objective,
        max_layer=1,
        seed=7,
        llm={"layout": "sequential", "max_doc_tokens": None},
        **FIXED,
    )
    assert isinstance(router, HeadRouter | NeighbourRouter)
    assert (router.reading, router.max_heads, router.layout) == ("gates", 3, "sequential")
    assert len(router.heads) <= 5
    assert {head.layer for head in router.heads} <= {0, 1}
    assert router.space.layer == 1
    assert router.max_doc_tokens is None
    assert router.description is not None
    assert (router.description["objective"], router.description["seed"]) == (objective, 7)


@pytest.mark.parametrize("objective", ["labels", "neighbours"])
def test_labels_are_chosen_and_their_reliability_is_said(
    train: Train, tmp_path: Path, objective: str
) -> None:
    several = write_folder(tmp_path / "several", THINGS, relevant=2)
    options = {**FIXED, "objective": objective}
    fixed, chosen = (train(several, **options | {"utility": name}) for name in ("ndcg", None))
    for router in (fixed, chosen):
        assert router.description is not None
        labels = router.description["labels"]
        assert {"utility", "shrinkage", "found", "kept", "static", "chance"} <= labels.keys()
        assert labels["queries"] > 0
    assert fixed.description is not None
    assert fixed.description["labels"]["utility"] == "ndcg"
    card = (tmp_path / "router" / "README.md").read_text()
    assert re.search(r"\n- labels: \w+, shrinkage \S+; nDCG@10 of \d queries: [01]\.\d{4} ", card)


def test_of_queries_with_one_relevant_document_no_reliability_is_said(
    train: Train, words: Path, tmp_path: Path
) -> None:
    router = train(words, objective="labels")
    assert router.description is not None
    assert router.description["labels"] == {"utility": "ndcg", "shrinkage": 0.0, "groups": None}
    card = (tmp_path / "router" / "README.md").read_text()
    assert "- labels: ndcg, shrinkage 0.0; their reliability could not be measured\n" in card


def test_queries_are_embedded_after_the_layer_that_is_asked_for(train: Train, words: Path) -> None:
    assert train(words, layer=2).space.layer == 2
    assert train(words, layer=4, max_layer=3).space.layer == 3


def test_in_the_late_layout_the_pass_that_reads_a_query_embeds_it(
    train: Train, words: Path, model: str
) -> None:
    router = train(words, llm={"layout": "late"})
    assert (router.layout, router.space.source) == ("late", "tail")
    llm = FrozenLM.from_pretrained(model, dtype="float32")
    ranking = HeadRoutedAttentionReranker(llm, router).rerank("which wolf?", ["a wolf", "an owl"])
    assert len(ranking) == 2


def test_queries_are_embedded_as_is_asked_for(
    train: Train, words: Path, tmp_path: Path, model: str
) -> None:
    mean, last = (train(words, pooling=pooling) for pooling in ("mean", "last"))
    assert (mean.space.pooling, last.space.pooling) == ("mean", "last")
    assert not torch.equal(mean.space.mean, last.space.mean)
    loaded = Router.from_pretrained(tmp_path / "router")
    assert loaded.space.pooling == "last"
    llm = FrozenLM.from_pretrained(model, dtype="float32")
    embeddings = loaded.embed(["wolf stories"], llm)
    assert torch.equal(embeddings, llm.embed(["wolf stories"], layer=3, pooling="last"))
    assert str(refused(train, words, pooling="median")) == (
        "pooling='median' does not exist; choose one of mean, last."
    )


@pytest.mark.parametrize("finished", [1, 4, 7])
def test_a_resumed_training_gives_the_same_bytes(
    train: Train, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    train(words, output="whole", signals=tmp_path / "others", llm={"document_cache": "1GB"})
    put = SignalStore.put
    done: list[str] = []

    def stop(self: SignalStore, key: str, signals: QuerySignals) -> None:
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(key)
        put(self, key, signals)

    with monkeypatch.context() as patch:
        patch.setattr(SignalStore, "put", stop)
        with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
            train(words, output="resumed", llm={"document_cache": "1GB"})
    train(words, output="resumed", llm={"document_cache": "1GB"})
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_files_that_are_no_routers_are_not_overwritten(
    train: Train, words: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / name).write_text('{"model_type": "llama"}')
    assert str(refused(train, words)) == (
        f"--output={tmp_path / 'router'} has a {name} that is no router's, and would be "
        "overwritten; name another folder."
    )


# from texts alone


@pytest.mark.usefixtures("writing")
def test_a_corpus_alone_is_enough(
    train: Train, texts: Path, retrieving: list[str], fitted: list[SignalSet]
) -> None:
    router = train(texts, synthesize=10)
    assert len(retrieving) == 10
    owls = sum("owl" in query for query in retrieving)
    assert owls in (1, 2)
    assert router.description is not None
    kept = 10 - owls  # BM25 does not find their passage
    assert router.description["parts"] == [
        {"name": "texts", "kind": "synthesized", "queries": kept}
    ]
    assert len(fitted[0].queries) == kept
    for query in fitted[0].queries:
        place = THINGS.index(thing_of(query.query))
        found = dict(zip(query.docids, query.gains.tolist(), strict=True))
        assert found == {f"d{(place + n) % 8}": float(n == 0) for n in (1, 0, 2, 3)}


@pytest.mark.usefixtures("retrieving")
def test_another_seed_shows_other_passages(train: Train, texts: Path, writing: list[str]) -> None:
    for seed in (0, 1):
        train(texts, synthesize=5, seed=seed)
    assert len(writing) == 10
    assert {thing_of(shown) for shown in writing[:5]} != {thing_of(shown) for shown in writing[5:]}


@pytest.mark.usefixtures("writing", "retrieving")
def test_judged_and_written_queries_go_together(train: Train, words: Path) -> None:
    both = train(words, synthesize=3)
    assert both.description is not None
    assert [part["kind"] for part in both.description["parts"]] == ["judged", "synthesized"]
    written = train(words, synthesize=6, judged=False)
    assert written.description is not None
    assert [part["kind"] for part in written.description["parts"]] == ["synthesized"]


@pytest.mark.usefixtures("writing")
def test_bm25_finds_what_was_written(train: Train, texts: Path, fitted: list[SignalSet]) -> None:
    router = train(texts, synthesize=8)
    assert router.description is not None
    assert router.description["parts"] == [{"name": "texts", "kind": "synthesized", "queries": 8}]
    for query in fitted[0].queries:
        assert query.docids[0] == f"d{THINGS.index(thing_of(query.query))}"
        place = int("owl" in query.query)
        assert query.gains.tolist() == [float(n == place) for n in range(4)]
        assert query.first_stage[place] > query.first_stage[place + 1]


# with a teacher


def test_a_teacher_has_its_share(
    train: Train, model: str, words: Path, fitted: list[SignalSet]
) -> None:
    for share in (0.0, 0.4):
        train(words, teacher=share)
    plain, mixed = fitted
    scorer = QueryLikelihood(FrozenLM.from_pretrained(model, dtype="float32"), max_doc_tokens=60)
    likelihoods = {
        query.query_id: torch.tensor(
            scorer.score(query.query, [passage(THINGS[int(docid[1:])]) for docid in query.docids])
        )
        for query in plain.queries
    }
    expected = mix_teacher(plain, likelihoods, 0.4)
    for query, right in zip(mixed.queries, expected.queries, strict=True):
        torch.testing.assert_close(query.gains, right.gains, atol=1e-5, rtol=0)
    assert {gain for query in plain.queries for gain in query.gains.tolist()} == {0.0, 1.0}


def test_a_teacher_also_judges_what_nobody_judged(
    train: Train, tmp_path: Path, fitted: list[SignalSet]
) -> None:
    folder = write_folder(tmp_path / "useless", THINGS)
    judgments = "".join(f"q{n}\td{n}\t0\n" for n in range(8))
    (folder / "qrels" / "test.tsv").write_text(judgments)
    with pytest.raises(InputError, match="none of the 8 queries of useless has both relevant and"):
        train(folder)
    router = train(folder, teacher=0.5)
    assert all(query.has_contrast for query in fitted[-1].queries)
    assert router.description is not None
    assert router.description["queries"] == 8


# again, and after a stop


def counted(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> dict[str, int]:
    """Count what is computed; the computation of so many signals is the last one."""
    calls = {"signals": 0, "likelihoods": 0}
    put, score = SignalStore.put, QueryLikelihood.score

    def keep(self: SignalStore, key: str, signals: QuerySignals) -> None:
        if calls["signals"] == stop:
            raise KeyboardInterrupt
        calls["signals"] += 1
        put(self, key, signals)

    def tell(self: QueryLikelihood, *arguments: Any) -> list[float]:
        calls["likelihoods"] += 1
        return score(self, *arguments)

    monkeypatch.setattr(SignalStore, "put", keep)
    monkeypatch.setattr(QueryLikelihood, "score", tell)
    return calls


@pytest.mark.usefixtures("retrieving")
def test_a_job_that_was_stopped_computes_what_is_missing_and_ends_the_same(
    train: Train, words: Path, tmp_path: Path, writing: list[str]
) -> None:
    job: dict[str, Any] = {"synthesize": 4, "teacher": 0.5}
    train(words, output="whole", signals=tmp_path / "other", **job)
    whole = len(writing)
    assert whole == 4
    with pytest.MonkeyPatch.context() as patch:
        first = counted(patch, stop=10)
        with pytest.raises(KeyboardInterrupt):
            train(words, **job)
    assert not (tmp_path / "router").exists()
    with pytest.MonkeyPatch.context() as patch:
        second = counted(patch)
        train(words, **job)
    kept = len(Router.from_pretrained(tmp_path / "router").space.anchors)
    assert (first["signals"], second["signals"]) == (10, kept - 10)
    assert (first["likelihoods"], second["likelihoods"]) == (8, kept - 8)
    assert len(writing) == 2 * whole
    assert contents(tmp_path / "router") == contents(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        third = counted(patch)
        train(words, **job)
    assert third == {"signals": 0, "likelihoods": 0}


def test_the_seed_decides_and_nothing_else(train: Train, words: Path, tmp_path: Path) -> None:
    train(words, output="one", queries=6, signals=tmp_path / "a")
    train(words, output="two", queries=6, signals=tmp_path / "b")
    train(words, output="three", queries=6, signals=tmp_path / "b", seed=1)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["model.safetensors"] != three["model.safetensors"]


# what is said of it


def test_the_card_says_what_was_done(
    train: Train, model: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["/opt/bin/routehead", "train", "--collection", str(words), "--output", "../../router"]
    more = [f"--signals={tmp_path}/kept/", "--model=org/llm", "--teacher=0.5", "~/x", "--no-judged"]
    monkeypatch.setattr(sys, "argv", given + more)
    router = train(words)
    card = (tmp_path / "router" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: routehead-plugins\n")
    for line in (
        f"# Head router for {Path(model).name}",
        f'    "{Path(model).name}", router="path/of/this/folder"',
        "| words | judged | 8 |",
        f"with routehead-plugins {__version__}:",
        "routehead train --collection words --output router --signals=kept --model=org/llm "
        "--teacher=0.5 x --no-judged",
        "- layout: parallel; documents were cut at 60 tokens",
        "- objective: listwise; heads are read as weights, signals standardised",
        f"- weight of the retrieval score: {router.heads.recipe.first_stage_weight}",
        "It chooses the same heads for every query, fitted on the kinds of queries above: no",
    ):
        assert f"\n{line}\n" in card
    assert "- queries are embedded after layer" not in card
    assert str(Path(model).parent) not in card
    assert router.description is not None
    figures = router.description["held_out_ndcg@10"]
    assert list(figures) == ["static", "10.0", "3.0", "1.0", "0.3"]
    assert "nDCG@10 on the 2 queries held out" in card
    for name, figure in figures.items():
        assert f"\n| {name} | {figure} |\n" in card
    chosen = router.description["strength"]
    assert (f"\nChosen: {chosen}.\n" in card) is (chosen is not None)
    assert ("\nNone was clearly better than" in card) is (chosen is None)


def make_router(heads: HeadSet, description: Mapping[str, Any]) -> HeadRouter:
    return HeadRouter(
        heads=heads,
        space=QuerySpace.fit(torch.eye(3), 1),
        bias=torch.tensor([0.5, 0.0, -1.0][: len(heads)]),
        projection=torch.zeros(1, 2),
        embeddings=torch.zeros(len(heads), 1),
        description=description,
    )


def test_the_card_of_a_router_that_routes_says_what_it_falls_back_to() -> None:
    heads = HeadSet([(0, 1)], model="tiny", layout="parallel")
    router = make_router(heads, {"objective": "listwise", "queries": 3, "strength": 0.5})
    router = replace(router, projection=torch.ones(1, 2), embeddings=torch.ones(1, 1))
    card = router_card(router, [], "routehead train")
    assert "\n- queries are embedded after layer 1, mean\n" in card
    assert "For others it falls back to static weights," in card
    assert "the same heads for every query" not in card


def test_a_card_without_figures_does_not_speak_of_measuring() -> None:
    heads = HeadSet([(0, 1)], model="tiny", layout="parallel")
    router = make_router(heads, {"objective": "listwise", "queries": 3, "strength": 0.5})
    card = router_card(router, [], "routehead train")
    assert "## Limits" in card
    assert "## Measured" not in card
    assert "held out" not in card


def test_a_line_sums_up_what_came_out() -> None:
    heads = HeadSet([(0, 1), (0, 2), (0, 3)], model="tiny")
    assert summary(make_router(heads, {"strength": 0.3})) == (
        "heads router for tiny, 2 heads, strength 0.3"
    )
    assert summary(make_router(heads, {"strength": None})) == (
        "heads router for tiny, 2 heads, static: no correction was clearly better"
    )


# what is refused


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No LLM can be loaded."""
    monkeypatch.setattr(FrozenLM, "from_pretrained", None)


def refused(train: Train, *collections: Path, **options: Any) -> RouteHeadError:
    with pytest.raises(RouteHeadError) as error:
        train(*collections, **options)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": 1.5}, "--teacher=1.5 must be from 0 to 1."),
        ({"teacher": -0.1}, "--teacher=-0.1 must be from 0 to 1."),
        ({"queries": 0}, "--queries=0 must be 1 or more."),
        ({"max_layer": -1}, "--max-layer=-1 must be 0 or more."),
        ({"synthesize": 0}, "--synthesize=0 must be 1 or more."),
        ({"hits": 0}, "--hits=0 must be 1 or more."),
        (
            {"judged": False},
            "without judgments there is nothing to learn from; give --synthesize, such as 500.",
        ),
        (
            {"objective": "magic"},
            "objective='magic' does not exist; choose one of listwise, labels, neighbours.",
        ),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_options_out_of_range_are_refused(
    train: Train, words: Path, options: dict[str, Any], message: str
) -> None:
    error = refused(train, words, **options)
    assert isinstance(error, InputError)
    assert str(error) == message


@pytest.mark.usefixtures("unloaded")
def test_a_collection_is_needed(train: Train) -> None:
    error = refused(train)
    assert isinstance(error, InputError)
    assert str(error) == "--collection is missing; give a BEIR folder."


@pytest.mark.parametrize(
    ("name", "wanted"), [("output", "for the router"), ("signals", "for signals")]
)
@pytest.mark.usefixtures("unloaded")
def test_a_file_is_no_folder(
    train: Train, words: Path, tmp_path: Path, name: str, wanted: str
) -> None:
    (tmp_path / "file").write_text("kept")
    options: dict[str, Any] = {"output": "router", name: tmp_path / "file"}
    error = refused(train, words, **options)
    assert isinstance(error, InputError)
    assert str(error) == f"{tmp_path / 'file'} is a file; name a folder {wanted}."
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.usefixtures("unloaded")
def test_a_corpus_alone_is_refused_where_no_queries_are_to_be_written(
    train: Train, texts: Path
) -> None:
    error = refused(train, texts)
    assert isinstance(error, CollectionError)
    assert str(error).startswith(f"{texts / 'queries.jsonl'} ")


@pytest.mark.usefixtures("unloaded")
def test_queries_without_judgments_are_refused(train: Train, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "unjudged", THINGS)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    assert str(refused(train, folder)) == (
        f"{folder / 'qrels' / 'test.tsv'} judges none of the queries of queries.jsonl; give "
        "judgments of some, or --synthesize, such as 500."
    )
    (folder / "qrels" / "test.tsv").unlink()
    assert str(refused(train, folder)).startswith(f"{folder / 'qrels' / 'test.tsv'} ")


@pytest.mark.usefixtures("unloaded")
def test_a_folder_without_texts_is_refused(train: Train, tmp_path: Path) -> None:
    for options in ({}, {"synthesize": 5}):
        assert str(tmp_path / "none") in str(refused(train, tmp_path / "none", **options))


@pytest.mark.usefixtures("unloaded")
def test_a_setting_of_the_other_layout_is_refused(train: Train, words: Path) -> None:
    error = refused(train, words, llm={"window": 3})
    assert str(error).startswith("window=3 is for the sequential layout;")


def test_layers_that_are_not_there_are_refused_before_anything_is_computed(
    train: Train, model: str, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParallelLayout, "read", None)
    assert str(refused(train, words, layer=5)) == (
        f"layer=5 is not a layer of {model!r}; give 0 to 4."
    )


def test_texts_that_are_no_queries_are_refused(
    train: Train, model: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenLM, "write", lambda _, __, prompts, **___: ["?"] * len(prompts))
    monkeypatch.setattr(training_data, "with_candidates", None)
    error = refused(train, texts, synthesize=5)
    assert isinstance(error, CollectionError)
    assert str(error) == (
        f"{texts}: none of 5 texts by {model!r} can be used as a query; give a larger LLM, or "
        "longer passages."
    )
