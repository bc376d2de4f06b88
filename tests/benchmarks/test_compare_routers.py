"""The report on routers: who is trained on what, every row of it, and that it goes on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tables import query_signals, table

from benchmarks.heads import collect
from benchmarks.heads.collect import Collector, ComparisonOptions
from benchmarks.routers import ablations, compare, data, methods, report
from benchmarks.routers.data import Corpora, Examples, Sample
from benchmarks.routers.methods import Fit, Trainer
from routehead_plugins import FrozenLM
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.evaluation import significance
from routehead_plugins.io import Collection, Run, write_run
from routehead_plugins.scoring import fuse
from routehead_plugins.training import (
    STRENGTHS,
    FitOptions,
    LabelOptions,
    corrected,
    correction,
    detect,
    each_ndcg,
    fit,
    fit_router,
    fit_weights,
    offline_scores,
    routed_scores,
    static_base,
)

THINGS = ["wolf", "rain", "stone", "river", "snow", "hill", "moss", "owl"]
ROUTED = ["routed-listwise", "routed-labels", "neighbours"]
LEARNED = [
    *("weights", "routed-listwise", "routed-listwise-forced"),
    *("labels", "routed-labels", "routed-labels-forced"),
    *("neighbours-static", "neighbours", "neighbours-forced"),
]
UNSEEN = ["bm25", "all", "all+bm25", "ndcg-8+bm25", *LEARNED, "likelihood", "likelihood+bm25"]
QUESTIONS = {"unseen": UNSEEN, "own, judged": ["bm25", *LEARNED]}
QUESTIONS["own, synthesized"] = QUESTIONS["own, judged"]


@dataclass(frozen=True)
class Setting:
    """Two collections, a tiny LLM, and what a whole report on them left behind."""

    folders: list[Path]
    options: dict[str, Any]
    printed: str

    @property
    def results(self) -> Any:
        return json.loads((self.options["output"] / "router-parallel.json").read_text())


def passage(thing: str, country: str) -> str:
    return f"Many people far and wide tell old stories about the {thing} of {country} and its end."


def write_folder(folder: Path) -> Path:
    """A passage for each thing; a judged query for each finds its passage third."""
    (folder / "qrels").mkdir(parents=True)
    count, country = len(THINGS), folder.name
    rows = [{"_id": f"d{n}", "text": passage(thing, country)} for n, thing in enumerate(THINGS)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": f"q{n}", "text": f"{thing} in {country}"} for n, thing in enumerate(THINGS)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = [f"q{n}\td{(n + far) % count}\t{2 - far}\n" for n in range(count) for far in (0, 1)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    run = {
        f"q{n}": {f"d{(n + far) % count}": 9.0 - rank for rank, far in enumerate((2, 1, 0, 3, 4))}
        for n in range(count)
    }
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


def thing_of(text: str) -> str:
    return next(thing for thing in THINGS if f" {thing} " in f" {text} ")


def write(_: FrozenLM, prefix: str, prompts: Sequence[str], **__: Any) -> list[str]:
    """What the LLM would write if it were not tiny."""
    label = re.findall(r"^(\w+):", prefix, re.MULTILINE)[-1]
    return [f"which {label} of {thing_of(prompt)} stories is told" for prompt in prompts]


def retrieve(collection: Collection, topics: Mapping[str, str], hits: int) -> Collection:
    """The passage that a query is about comes second."""
    run: Run = {}
    for query_id, text in topics.items():
        index, count = THINGS.index(thing_of(text)), len(THINGS)
        run[query_id] = {
            f"d{(index + far) % count}": 5.0 - rank
            for rank, far in enumerate((1, 0, 2, 3, 4)[:hits])
        }
    return replace(collection, run=run)


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenLM, "write", write)
        patch.setattr(collect, "with_candidates", retrieve)
        patch.setattr(data, "FOLDS", 3)
        patch.setattr(correction, "_STEPS", 4)
        patch.setattr(significance, "_BATCH", 100)
        patch.setattr(significance, "RESAMPLES", 100)
        # Choosing a penalty takes its time where few queries can be told apart by anything.
        patch.setattr(fit, "choose_l1", lambda *_, **__: 0.02)
        yield


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("router")
    families.tiny_model("llama").save_pretrained(root / "tiny")
    families.tiny_tokenizer().save_pretrained(root / "tiny")
    folders = [write_folder(root / name) for name in ("here", "there")]
    options: dict[str, Any] = {
        "queries": 6,
        "hits": 5,
        "synthesize": 16,
        "seeds": 2,
        "model": str(root / "tiny"),
        "dtype": "float32",
        "signals": root / "signals",
        "output": root / "results",
    }
    return Setting(folders, options, reported(folders, options | {"cost": True}))


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    return call


def reported(folders: list[Path], options: dict[str, Any]) -> str:
    """Make a report, and give what is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compare.main(compare.Options(collections=folders, **options))
    return printed.getvalue()


def test_every_question_has_its_rows_on_every_query(setting: Setting) -> None:
    for question, rows in QUESTIONS.items():
        outcome = setting.results[question]
        assert list(outcome["collections"]) == ["here", "there"]
        for collection in outcome["collections"].values():
            assert list(collection["rows"]) == rows
            for figures in collection["rows"].values():
                assert len(figures["per_query"]) == len(collection["queries"])
                mean = math.fsum(figures["per_query"]) / len(collection["queries"])
                assert figures["mean"] == pytest.approx(mean, abs=1e-6)
    judged, synthesized = (setting.results[f"own, {kind}"] for kind in ("judged", "synthesized"))
    assert judged["measure"] == setting.results["unseen"]["measure"] == "nDCG@10"
    assert len(judged["collections"]["here"]["queries"]) == 6
    assert synthesized["measure"] == "RR"
    assert set(synthesized["collections"]["here"]["rows"]["bm25"]["per_query"]) == {0.5}


def test_seeds_are_averaged_where_anything_is_drawn(setting: Setting) -> None:
    rows = setting.results["own, judged"]["collections"]["here"]["rows"]
    for row in ("routed-listwise-forced", "routed-labels-forced"):
        assert len(rows[row]["seeds"]) == 2
        assert rows[row]["mean"] == pytest.approx(statistics.fmean(rows[row]["seeds"]))
        assert rows[row]["spread"] == pytest.approx(statistics.stdev(rows[row]["seeds"]))
    for row in ("bm25", "weights", "labels", "neighbours", "neighbours-forced"):
        assert not {"seeds", "spread"} & rows[row].keys()


def test_chosen_strengths_are_told_split_by_split(setting: Setting) -> None:
    for question, splits in (("own, judged", 1), ("own, synthesized", 3)):
        rows = setting.results[question]["collections"]["there"]["rows"]
        for row in rows:
            assert ("strengths" in rows[row]) == (row in ROUTED)
        assert [len(each) for each in rows["routed-listwise"]["strengths"]] == [2] * splits
        assert [len(each) for each in rows["neighbours"]["strengths"]] == [1] * splits
        allowed = {*STRENGTHS["listwise"], None}
        assert {s for each in rows["routed-listwise"]["strengths"] for s in each} <= allowed


def test_routers_are_compared_where_they_must_rise_above(setting: Setting) -> None:
    for question in QUESTIONS:
        outcome = setting.results[question]
        others = {"all", "likelihood+bm25"} if question == "unseen" else set()
        baselines = {"bm25", "weights"} | others
        wanted = {(b, row) for b in baselines for row in LEARNED if row != b}
        for routed, static in (("routed-labels", "labels"), ("neighbours", "neighbours-static")):
            wanted |= {(static, routed), (static, f"{routed}-forced")}
        for where in (
            *outcome["collections"].values(),
            outcome["micro-average"],
            outcome["macro-average"],
        ):
            assert {(c["baseline"], c["method"]) for c in where["comparisons"]} == wanted
            assert all({"low", "high", "p", "p_holm"} <= one.keys() for one in where["comparisons"])


def test_all_together_are_averaged_over_queries_and_over_collections(setting: Setting) -> None:
    for question in QUESTIONS:
        outcome = setting.results[question]
        for row, mean in outcome["macro-average"]["means"].items():
            rows = [content["rows"][row] for content in outcome["collections"].values()]
            assert mean == pytest.approx(statistics.fmean(figures["mean"] for figures in rows))
            values = [value for figures in rows for value in figures["per_query"]]
            assert outcome["micro-average"]["means"][row] == pytest.approx(
                statistics.fmean(values), abs=1e-6
            )
        queries = sum(len(content["queries"]) for content in outcome["collections"].values())
        assert {content["queries"] for content in outcome["micro-average"]["comparisons"]} == {
            queries
        }


def test_every_change_of_the_training_is_tried(setting: Setting) -> None:
    content = setting.results["ablations"]
    assert content["notes"] == []
    tried = {
        (variant["question"], variant["objective"], variant["change"])
        for variant in content["variants"]
    }
    everywhere = [
        ("listwise", ["", "strength 10", "strength 3", "strength 0.3", "rank 2", "rank 32"]),
        ("listwise", ["coordinates 8", "coordinates 64", "layer 2", "max_layer 1"]),
        ("labels", ["", "strength 1", "strength 0.3", "strength 0", "no bias", "K 16", "K 64"]),
        ("labels", ["P 4", "P 16", "shrinkage 0.5", "correlation", "correlation, shrinkage 0.5"]),
        ("labels", ["margin", "margin, shrinkage 0.5", "groups 8"]),
    ]
    expected = {
        (question, objective, change)
        for question in ("unseen", "own, synthesized")
        for objective, named in everywhere
        for change in named
    }
    data = ["judged only", "synthesized only", "judged, teacher 0.3"]
    assert tried == expected | {("unseen", "listwise", change) for change in data}
    assert len(tried) == len(content["variants"])
    assert set(content["labels"]) == set(ablations.denoised())
    assert all(variant["queries"] > 0 for variant in content["labels"].values())


def test_changes_are_measured_beside_their_own_static_bias(setting: Setting) -> None:
    results = setting.results
    variants = {
        (v["question"], v["objective"], v["change"]): v for v in results["ablations"]["variants"]
    }
    for question in ("unseen", "own, synthesized"):
        for objective, static in (("listwise", "weights"), ("labels", "labels")):
            plain = variants[question, objective, ""]
            means = results[question]["macro-average"]["means"]
            assert plain["static"] == pytest.approx(means[static])
            for name, rows in plain["collections"].items():
                main = results[question]["collections"][name]["rows"]
                routed = main[f"routed-{objective}-forced"]
                assert rows["routed"]["mean"] == pytest.approx(routed["seeds"][0])
                assert rows["static"]["per_query"] == pytest.approx(
                    main[static]["per_query"], abs=1e-4
                )
            assert plain["comparison"]["method"] == "routed"
            # Neither rank nor strength has a say in the bias, whose values are given once.
            again = variants[question, objective, "strength 0.3"]["collections"]["here"]["static"]
            assert again == {"mean": plain["collections"]["here"]["static"]["mean"]}


def test_results_say_how_they_came_about_and_not_where_anything_lies(setting: Setting) -> None:
    content = setting.results
    assert content["command"] == (
        "python -m benchmarks.routers.compare here there --queries=6 --hits=5 "
        "--max-doc-tokens=120 --model=tiny --dtype=float32 --seed=0 --synthesize=16 "
        "--layout=parallel --seeds=2 --cost"
    )
    assert content["settings"]["collections"] == ["here", "there"]
    assert content["settings"]["embedding_layers"] == [2, 3]
    assert {"torch", "routehead-plugins"} <= content["versions"].keys()
    assert content["date"]
    assert [file.name for file in setting.options["output"].iterdir()] == ["router-parallel.json"]
    assert str(setting.options["output"].parent) not in json.dumps(content)


def test_tables_are_printed_narrow_enough_to_read(setting: Setting) -> None:
    lines = setting.printed.splitlines()
    assert [line for line in lines if line.startswith("#")][:4] == [
        "### unseen: nDCG@10",
        "### own, judged: nDCG@10",
        "### own, synthesized: RR",
        "### Ablations: means of collections, differences over all queries",
    ]
    assert [line for line in lines if len(line) > 100] == []
    for question in QUESTIONS:
        outcome = setting.results[question]
        for row, mean in outcome["macro-average"]["means"].items():
            figures = [content["rows"][row]["mean"] for content in outcome["collections"].values()]
            cells = " | ".join(f"{figure:.4f}" for figure in (*figures, mean))
            assert f"| {row} | {cells} |" in setting.printed


def test_the_cost_of_routing_is_timed_when_it_is_asked_for(setting: Setting) -> None:
    cost = setting.results["cost"]
    timed = {"select", "cold", "warm", "static_cold", "static_warm", "likelihood"}
    assert set(cost["milliseconds"]) == timed
    assert all(each > 0 for each in cost["milliseconds"].values())
    assert (cost["queries"], cost["documents"]) == (5, 5)
    assert "re-rank, warm cache" in setting.printed


def test_what_was_computed_is_not_computed_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routehead_plugins.signals.collect._compute", None)
    for name in ("embed", "write", "log_likelihoods"):
        monkeypatch.setattr(FrozenLM, name, None)
    for name in ("corrected", "static_base", "static_l1"):
        monkeypatch.setattr(methods, name, None)
    reported(setting.folders, setting.options | {"output": tmp_path})
    again = json.loads((tmp_path / "router-parallel.json").read_text())
    for part in (*QUESTIONS, "ablations"):
        assert again[part] == setting.results[part]
    assert "cost" not in again


def test_a_run_that_was_stopped_goes_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    trained, options = corrected, {**setting.options, "skip_ablations": True, "seeds": 1}
    options |= {"signals": tmp_path / "signals", "output": tmp_path / "results"}

    def stopping(*arguments: Any) -> Any:
        fits.append(arguments)
        if len(fits) == 30:
            raise KeyboardInterrupt
        return trained(*arguments)

    monkeypatch.setattr(methods, "corrected", stopping)
    with pytest.raises(KeyboardInterrupt):
        reported(setting.folders[:1], options)
    monkeypatch.setattr(methods, "corrected", counted(trained, fits))
    reported(setting.folders[:1], options)
    stopped = len(fits)
    fits.clear()
    reported(setting.folders[:1], options | {"signals": tmp_path / "others"})
    # What was under way when it stopped is begun anew: here the choice of one strength.
    assert len(fits) < stopped <= len(fits) + 6
    content = json.loads((tmp_path / "results" / "router-parallel.json").read_text())
    assert "ablations" not in content
    rows, expected = (
        results["own, synthesized"]["collections"]["here"]["rows"]
        for results in (content, setting.results)
    )
    assert rows["weights"] == expected["weights"]
    forced = "routed-listwise-forced"
    assert rows[forced]["mean"] == pytest.approx(expected[forced]["seeds"][0])


def test_signals_are_those_of_the_comparison(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routehead_plugins.signals.collect._compute", None)
    monkeypatch.setattr(FrozenLM, "log_likelihoods", None)
    names = ("queries", "hits", "signals", "model", "dtype")
    options = {name: setting.options[name] for name in names}
    collector = Collector(ComparisonOptions(collections=setting.folders, **options))
    collection = collector.load(setting.folders[0])
    assert len(collector.signals(collection, "parallel").queries) == 6
    assert len(collector.likelihoods(collection)) == 6


def test_one_collection_is_its_own_and_none_is_unseen(setting: Setting, tmp_path: Path) -> None:
    options = setting.options | {"output": tmp_path, "skip_ablations": True}
    reported(setting.folders[:1], options)
    content = json.loads((tmp_path / "router-parallel.json").read_text())
    assert QUESTIONS.keys() & content.keys() == {"own, judged", "own, synthesized"}


def test_without_synthesized_queries_only_the_unseen_are_asked_for(
    setting: Setting, tmp_path: Path
) -> None:
    reported(setting.folders, setting.options | {"output": tmp_path, "synthesize": None})
    content = json.loads((tmp_path / "router-parallel.json").read_text())
    assert QUESTIONS.keys() & content.keys() == {"unseen"}
    assert {variant["question"] for variant in content["ablations"]["variants"]} == {"unseen"}
    assert "synthesized only" not in {
        variant["change"] for variant in content["ablations"]["variants"]
    }
    assert content["unseen"]["collections"]["here"]["training_queries"] == 6
    assert "--synthesize" not in content["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "sideways"}, "--layout=sideways does not exist; give one of sequential"),
        ({"seeds": 0}, "--seeds=0 must be 1 or more."),
        ({"synthesize": 0}, "--synthesize=0 must be 1 or more."),
        ({"hits": 0}, "--hits=0 must be 1 or more."),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(
    setting: Setting, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        compare.Options(collections=setting.folders, **setting.options | options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_collections_that_leave_nothing_to_train_on_are_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = setting.options
    with pytest.raises(InputError, match="leaves nothing to train on; give another collection"):
        compare.Options(collections=setting.folders[:1], **options | {"synthesize": None})
    with pytest.raises(InputError, match="two collections are called"):
        compare.Options(collections=[setting.folders[0]] * 2, **options)
    monkeypatch.setattr(FrozenLM, "write", lambda _, __, prompts, **___: ["no"] * len(prompts))
    with pytest.raises(CollectionError, match="none of 16 texts"):
        reported(setting.folders, options | {"signals": tmp_path})


# who is trained on what


def sample(name: str, kind: str, seed: int = 0, queries: int = 12) -> Sample:
    """Queries of two kinds that embeddings tell apart; one head answers each, others are noise."""
    generator = torch.Generator().manual_seed(seed)
    sampled, embeddings, qrels = [], [], {}
    for number in range(queries):
        gains = torch.zeros(8)
        gains[torch.randperm(8, generator=generator)[: 2 if kind == "judged" else 1]] = 1
        signal = torch.randn(9, 8, generator=generator)
        signal[(0, 4)[number % 2]] += 3 * gains
        query = query_signals(0.01 * signal, gains.tolist(), query_id=f"{name}-{kind}-{number}")
        averaged, mass = signal.mean(dim=0), (signal - 4).exp()
        first_stage = torch.randn(8, generator=generator)
        sampled.append(replace(query, mass=mass, averaged=averaged, first_stage=first_stage))
        embedding = 0.3 * torch.randn(4, generator=generator)
        embedding[0] += (-1, 1)[number % 2]
        embeddings.append(embedding)
        # Two queries in a row are written from the same passage.
        qrels[query.query_id] = {f"passage-{number // 2}": 1}
    heads = [(layer, index) for layer in range(3) for index in range(3)]
    signals = table(sampled, heads, [name])
    topics = {query.query_id: query.query for query in sampled}
    collection = Collection(name, Path(), {}, topics, qrels)
    likelihoods = {query: torch.randn(8, generator=generator) for query in topics}
    examples = data.Examples(signals, {2: torch.stack(embeddings)})
    return data.Sample(collection, kind, examples, likelihoods if kind == "judged" else {})


@pytest.fixture
def corpora() -> Corpora:
    return {
        name: {
            kind: sample(name, kind, 2 * number + (kind == "judged"))
            for kind in ("judged", "synthesized")
        }
        for number, name in enumerate("abc")
    }


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path / "cache")


def ids(examples: Examples) -> list[str]:
    return [query.query_id for query in examples.signals.queries]


def test_the_collection_that_is_tested_has_no_say(corpora: Corpora) -> None:
    tasks = data.unseen(corpora)
    assert list(tasks) == ["a", "b", "c"]
    for name, task in tasks.items():
        ((train, test),) = task.splits
        assert ids(test) == ids(corpora[name]["judged"].examples)
        assert set(train.signals.data) == set("abc") - {name}
        assert not [query for query in ids(train) if query.startswith(name)]
        assert len(ids(train)) == len(train.embeddings[2]) == 2 * 2 * 12
    judged = data.unseen(corpora, ("judged",))["b"].splits[0][0]
    assert ids(judged) == [
        *ids(corpora["a"]["judged"].examples),
        *ids(corpora["c"]["judged"].examples),
    ]


def test_a_teacher_changes_the_judgments_that_are_learned_from_alone(corpora: Corpora) -> None:
    ((train, test),) = data.unseen(corpora, ("judged",), 0.3)["a"].splits
    assert all(float(query.gains.sum()) == pytest.approx(1) for query in train.signals.queries)
    assert test is corpora["a"]["judged"].examples


def test_own_corpora_are_learned_from_without_judgments(corpora: Corpora) -> None:
    for name, task in data.own_judged(corpora).items():
        assert task.sample is corpora[name]["judged"]
        assert [(ids(train), ids(test)) for train, test in task.splits] == [
            (ids(corpora[name]["synthesized"].examples), ids(task.sample.examples))
        ]
    for name, task in data.own_synthesized(corpora).items():
        everyone = ids(corpora[name]["synthesized"].examples)
        assert sorted(q for _, test in task.splits for q in ids(test)) == sorted(everyone)
        assert len(task.splits) == 3
        for train, test in task.splits:
            assert sorted((*ids(train), *ids(test))) == sorted(everyone)
            passages = [
                {tuple(task.sample.collection.qrels[query]) for query in ids(part)}
                for part in (train, test)
            ]
            assert not passages[0] & passages[1]


def test_queries_of_one_passage_cannot_be_parted() -> None:
    few = sample("few", "synthesized", queries=2)
    with pytest.raises(InputError, match="all 2 queries synthesized for 'few' are of one passage"):
        data.folds_by_passage(few)


def test_examples_are_told_apart_by_all_they_hold() -> None:
    one = sample("a", "judged").examples
    assert one.digest == sample("a", "judged").examples.digest
    first, *others = one.signals.queries
    for changed in (
        replace(first, gains=1 - first.gains),
        replace(first, averaged=first.averaged + 1),
        replace(first, query="another"),
    ):
        other = replace(one, signals=one.signals.subset([changed, *others]))
        assert other.digest != one.digest
    assert replace(one, embeddings={2: one.embeddings[2] + 1}).digest != one.digest


# rows


@pytest.mark.parametrize("objective", ["listwise", "labels", "neighbours"])
def test_routers_are_those_that_training_gives(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.setattr(correction, "_STEPS", 100)
    train, test = (sample("a", "judged", seed, 100).examples for seed in (1, 2))
    labels = LabelOptions(candidates=6, max_heads=1, utility="margin")
    options = FitOptions(layer=2, objective=objective, coordinates=4, labels=labels)
    router = fit_router(train.signals, train.embeddings[2], options)
    strength = trainer.choice(options, train, 0)
    assert strength == (router.description or {})["strength"]
    assert strength is not None
    expected = routed_scores(router, test.signals.queries, test.embeddings[2], test.signals.heads)
    found = trainer.scores(Fit(options, strength), train, test)
    static = trainer.scores(Fit(options, None), train, test)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    queries = test.signals.queries
    assert float(each_ndcg(found, queries).mean()) > float(each_ndcg(static, queries).mean())


def test_seeds_change_where_learning_starts_and_nothing_else(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Any] = []
    monkeypatch.setattr(methods, "static_base", counted(static_base, bases))
    train, test = (sample("a", "judged", seed).examples for seed in (1, 2))
    options = FitOptions(layer=2, coordinates=4)
    first, second = (Fit(options, 0.3, start) for start in (0, 1))
    routers: list[Any] = [trainer.router(how, train) for how in (first, second)]
    assert torch.equal(routers[0].bias, routers[1].bias)
    assert not torch.equal(routers[0].projection, routers[1].projection)
    assert len(bases) == 1
    one, other = (torch.stack(trainer.scores(how, train, test)) for how in (first, second))
    assert not torch.equal(one, other)
    unbiased = trainer.router(replace(first, unbiased=True), train)
    assert not unbiased.bias.any()
    # Options that are ignored make no difference.
    again = replace(first, options=replace(options, seed=9, strengths=(7.0,)))
    assert torch.equal(torch.stack(trainer.scores(again, train, test)), one)
    assert len(bases) == 1


def test_what_is_kept_is_found_by_what_it_depends_on(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    monkeypatch.setattr(methods, "corrected", counted(corrected, fits))
    train, test = (sample("a", "judged", seed).examples for seed in (1, 2))
    how = Fit(FitOptions(layer=2, coordinates=4), 0.3)
    first = trainer.scores(how, train, test)
    (kept,) = [
        p
        for p in (tmp_path / "cache").iterdir()
        if json.loads(p.read_text()) == [s.tolist() for s in first]
    ]
    again = Trainer(tmp_path / "cache")
    assert all(map(torch.equal, again.scores(how, train, test), first))
    assert len(fits) == 1
    kept.write_text(kept.read_text()[:20])  # a power cut
    assert all(map(torch.equal, again.scores(how, train, test), first))
    assert len(fits) == 2
    for other in (replace(how, strength=1.0), replace(how, start=1), replace(how, unbiased=True)):
        again.scores(other, train, test)
    again.scores(how, train, train)
    again.scores(how, test, test)
    again.scores(replace(how, options=replace(how.options, rank=2)), train, test)
    assert len(fits) == 8


def test_plain_rows_are_fused_with_the_weight_that_training_queries_prefer(
    trainer: Trainer, corpora: Corpora
) -> None:
    task = data.unseen(corpora)["a"]
    rows = methods.unseen_rows(trainer, task, 2, 1, lambda: None)
    assert list(rows) == UNSEEN
    ((train, test),) = task.splits
    heads = detect(train.signals, "ndcg", 8)
    for row, score in (
        ("all+bm25", lambda query: query.averaged),
        ("ndcg-8+bm25", partial(offline_scores, heads=heads, available=train.signals.heads)),
    ):
        means = {}
        for weight in (0.25, 0.5, 1.0):
            fused = [fuse(score(q), q.first_stage, weight) for q in train.signals.queries]
            means[weight] = float(each_ndcg(fused, train.signals.queries).mean())
        best = max(means, key=lambda weight: means[weight])
        for query in test.signals.queries:
            found = rows[row].scores[0][query.query_id]
            torch.testing.assert_close(found, fuse(score(query), query.first_stage, best))
    first = test.signals.queries[0]
    likelihood = task.sample.likelihoods[first.query_id]
    found = rows["likelihood+bm25"].scores[0][first.query_id]
    torch.testing.assert_close(found, fuse(likelihood, first.first_stage, 0.5))


def test_static_weights_are_those_that_are_fitted_on_the_training_queries(
    trainer: Trainer, corpora: Corpora
) -> None:
    task = data.unseen(corpora)["a"]
    rows = methods.learned_rows(trainer, task, 2, 1, lambda: None)
    ((train, test),) = task.splits
    weights = fit_weights(train.signals, l1=0.02)
    for query in test.signals.queries:
        expected = offline_scores(query, weights, train.signals.heads)
        found = rows["weights"].scores[0][query.query_id]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_queries_without_scores_keep_their_order() -> None:
    asked = sample("a", "synthesized", queries=4)
    found = methods.RowScores([{query.query_id: None for query in asked.queries}])
    values = report.measure_seeds(asked, {"bm25": found}, 8)["bm25"].evaluation.per_query("RR")
    for query in asked.queries:
        assert values[query.query_id] == 1 / (1 + query.gains.tolist().index(1))


def test_what_cannot_be_measured_is_said(trainer: Trainer, corpora: Corpora) -> None:
    labels = LabelOptions(groups=500)
    options = FitOptions(layer=2, objective="labels", labels=labels)
    change = ablations.Change("groups 500", Fit(options, 0.1))
    variants, notes = ablations.ablate(
        trainer, corpora, [("own, synthesized", change)], 8, lambda: None
    )
    assert variants == []
    assert len(notes) == 1
    assert notes[0].startswith("own, synthesized, labels, groups 500: groups=500 cannot be made")
    assert f"Not measured: {notes[0]}" in report.ablations(variants, notes)


def test_labels_of_queries_that_cannot_be_halved_have_no_figures(trainer: Trainer) -> None:
    judged = replace(sample("a", "synthesized"), kind="judged")
    found = ablations.label_reliabilities(trainer, {"a": {"judged": judged}}, 2)
    assert found == {}
