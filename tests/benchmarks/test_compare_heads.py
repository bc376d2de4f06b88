"""The comparison of selectors: what is collected, who is tested on what, and every figure of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import families
import pytest
import torch
from tables import query_signals, signal_set, table
from torch import Tensor

from benchmarks.common import Cache
from benchmarks.heads import collect, compare, heatmap, methods, reliability, report
from benchmarks.heads.collect import Collector, ComparisonOptions
from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker, HeadSet, Recipe
from routehead_plugins.backbone import QueryLikelihood
from routehead_plugins.cli.runtime import sample_queries
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Evaluation, significance
from routehead_plugins.heads import Head
from routehead_plugins.io import Collection, load_collection, write_run
from routehead_plugins.scoring import fuse
from routehead_plugins.signals import SignalSet, ndcg
from routehead_plugins.training import fit_weights

WORDS = ["wolf", "rain", "stone", "river", "snow", "hill"]
T = TypeVar("T")
VARIANTS = ["sequential", "sequential-shuffled", "parallel"]


@dataclass(frozen=True)
class Setting:
    """Two collections, a tiny LLM, and what a whole comparison of them left behind."""

    folders: list[Path]
    options: dict[str, Any]
    printed: str

    def results(self, name: str) -> Any:
        return json.loads((self.options["output"] / f"compare-{name}.json").read_text())


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("compare")
    families.tiny_model("llama").save_pretrained(root / "tiny")
    families.tiny_tokenizer().save_pretrained(root / "tiny")
    folders = [write_collection(root / "here", 5, "here"), write_collection(root / "there", 6, "")]
    options: dict[str, Any] = {
        "hits": 5,
        "model": str(root / "tiny"),
        "dtype": "float32",
        "signals": root / "signals",
        "output": root / "results",
    }
    return Setting(folders, options, compared(folders, options))


def compared(folders: list[Path], options: dict[str, Any]) -> str:
    """Compare, and give what is printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        # Choosing a penalty takes its time where five queries can be told apart by anything.
        patch.setattr(methods, "fit_weights", partial(fit_weights, l1=0.05))
        patch.setattr(significance, "RESAMPLES", 1000)
        compare.main(compare.Options(collections=folders, **options))
    return printed.getvalue()


def present(value: T | None) -> T:
    assert value is not None
    return value


def write_collection(folder: Path, queries: int, suffix: str) -> Path:
    """Every query is a word; the document that has it is relevant, and the next one somewhat."""
    (folder / "qrels").mkdir(parents=True)
    count = len(WORDS)
    rows = [{"_id": f"d{n}", "text": f"there is a {w} {suffix}"} for n, w in enumerate(WORDS)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": f"q{n}", "text": f"{WORDS[n]} {suffix}?"} for n in range(queries)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = [
        f"q{n}\td{(n + away) % count}\t{2 - away}\n" for n in range(queries) for away in (0, 1)
    ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    run = {
        f"q{n}": {f"d{(n + away) % count}": 9.0 - rank for rank, away in enumerate((2, 1, 0, 3, 4))}
        for n in range(queries)
    }
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


def test_every_row_is_measured_on_every_query_and_tested_against_both_baselines(
    setting: Setting,
) -> None:
    content = setting.results("there")
    assert content["queries"] == [f"q{n}" for n in range(6)]
    assert list(content["variants"]) == VARIANTS
    for variant in content["variants"].values():
        rows = list(variant["methods"])
        plain = ["all", "layers", "ndcg", "qr", "core", "layers-detected", "discriminability"]
        learned = ["weights", "weights-log", "weights-pairs"]
        within = ["ndcg-within", "weights-within"]
        both = [f"{n}{f}" for n in (*plain, *learned, *within, "likelihood") for f in ("", "+bm25")]
        assert rows == ["bm25", *both]
        for figures in variant["methods"].values():
            for measure in ("nDCG@10", "RR@10"):
                assert len(figures["per_query"][measure]) == 6
                mean = math.fsum(figures["per_query"][measure]) / 6
                assert figures["means"][measure] == pytest.approx(mean, abs=1e-6)
        tested = {(c["baseline"], c["measure"], c["method"]) for c in variant["comparisons"]}
        assert tested == {
            (baseline, measure, row)
            for baseline in ("bm25", "all")
            for measure in ("nDCG@10", "RR@10")
            for row in rows
            if row != baseline
        }
        assert variant["reliability"]["queries"] == variant["oracle"]["queries"] == 6
        assert variant["oracle"]["heads"] == 16


def test_plain_rows_are_what_the_reranker_gives(setting: Setting) -> None:
    collection = load_collection(setting.folders[1])
    llm = FrozenLM.from_pretrained(setting.options["model"], dtype="float32")
    for variant, layout in (("sequential", "sequential"), ("parallel", "parallel")):
        methods = setting.results("there")["variants"][variant]["methods"]
        reranker = HeadRoutedAttentionReranker(llm, layout=layout, max_doc_tokens=120)
        likelihood = QueryLikelihood(llm, max_doc_tokens=120)
        for index, (query_id, query) in enumerate(collection.topics.items()):
            documents = collection.candidates(query_id, 5)
            first_stage = torch.tensor([document.score or 0.0 for document in documents])
            for row, scores in (
                ("bm25", first_stage),
                ("all", torch.tensor(reranker.score(query, documents))),
                ("likelihood", torch.tensor(likelihood.score(query, documents))),
            ):
                scores_by_row = {row: scores, f"{row}+bm25": fuse(scores, first_stage, 1.0)}
                for name in scores_by_row.keys() & methods.keys():
                    gains = [
                        float(collection.qrels[query_id].get(d.id or "", 0)) for d in documents
                    ]
                    judged = torch.tensor(gains)
                    expected = float(ndcg(scores_by_row[name][None], judged, judged))
                    measured = methods[name]["per_query"]["nDCG@10"][index]
                    assert measured == pytest.approx(expected, abs=1e-6), (variant, name)


def test_results_say_how_they_came_about_and_not_where_anything_lies(setting: Setting) -> None:
    content = setting.results("here")
    assert content["command"] == (
        "python -m benchmarks.heads.compare here there --queries=100 --hits=5 "
        "--max-doc-tokens=120 --model=tiny --dtype=float32 --seed=0"
    )
    assert content["settings"]["collections"] == ["here", "there"]
    assert {"torch", "routehead-plugins"} <= content["versions"].keys()
    assert content["date"]
    for file in setting.options["output"].iterdir():
        assert str(setting.options["output"].parent) not in file.read_text()
    heads = content["variants"]["parallel"]["heads"]
    assert heads["ndcg"]["count"] == 8
    assert "weights" not in heads["ndcg"]


def test_tables_hold_every_row_and_the_mean_of_the_collections(setting: Setting) -> None:
    whole = setting.results("macro")["variants"]["parallel"]
    for row, figures in whole["methods"].items():
        of_each = [
            setting.results(name)["variants"]["parallel"]["methods"][row]["means"]["nDCG@10"]
            for name in ("here", "there")
        ]
        mean = figures["means"]["nDCG@10"]
        assert mean == pytest.approx(sum(of_each) / 2)
        cells = [row, *(f"{figure:.4f}" for figure in (*of_each, mean))]
        assert f"\n| {' | '.join(cells)} |" in setting.printed
    assert all(not figures.get("per_query") for figures in whole["methods"].values())
    assert whole["reliability"]["queries"] == 11
    headings = [line for line in setting.printed.splitlines() if line.startswith("###")]
    assert len(headings) == 3 + 1 + 2 * 3
    assert "| all together | parallel | 11 |" in setting.printed


def test_heads_are_drawn_as_a_map(setting: Setting, tmp_path: Path) -> None:
    drawn = (setting.options["output"] / "heatmap-here.svg").read_text()
    layouts = setting.results("here")["single_heads"]
    assert list(layouts) == ["sequential", "parallel"]
    assert set(layouts["parallel"]["beside"]) == {"bm25", "all"}
    assert drawn.count("<path") > 2 * 16
    for words in (
        "here: every attention head alone",
        "parallel layout",
        "layer",
        "head",
        "nDCG@10",
    ):
        assert words in drawn
    assert heatmap.plot_heads("here", layouts, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn
    assert not heatmap.plot_heads("here", {}, tmp_path / "none.svg")


def test_a_map_has_a_column_per_layer_and_a_row_per_head() -> None:
    figures = {"0-0": 0.1, "0-1": 0.2, "2-1": 0.7, "2-0": 0.3}
    cells = heatmap.grid(figures)
    assert [[cell for cell in row if cell == cell] for row in cells] == [[0.1, 0.3], [0.2, 0.7]]
    assert [len(row) for row in cells] == [3, 3]
    assert str(heatmap.best_heads(figures, 2)) == "2-1,2-0"


def test_what_was_collected_is_not_collected_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routehead_plugins.signals.collect._compute", None)
    monkeypatch.setattr(FrozenLM, "log_likelihoods", None)
    monkeypatch.setattr(methods, "_choose", lambda *_: pytest.fail("chosen again"))
    compared(setting.folders, setting.options | {"output": tmp_path})
    again = json.loads((tmp_path / "compare-here.json").read_text())
    assert again["variants"] == setting.results("here")["variants"]


def test_a_single_collection_has_rows_from_within_and_no_mean(
    setting: Setting, tmp_path: Path
) -> None:
    compared(setting.folders[:1], setting.options | {"output": tmp_path})
    rows = json.loads((tmp_path / "compare-here.json").read_text())["variants"]["parallel"]
    assert {"all", "ndcg-within", "likelihood"} <= rows["methods"].keys()
    assert not {"ndcg", "weights"} & rows["methods"].keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "compare-here.json",
        "heatmap-here.svg",
    ]


def test_parts_are_collected_one_by_one_and_go_on_where_they_stopped(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = setting.options | {"signals": tmp_path / "signals", "output": tmp_path / "results"}

    def run(**more: Any) -> None:
        compare.main(compare.Options(collections=setting.folders, **options, **more))

    run(part=["here:parallel", "here:sequential-shuffled"])
    assert len(list((tmp_path / "signals").glob("*/*.safetensors"))) == 2 * 5
    score, asked = QueryLikelihood.score, []

    def stopping(self: QueryLikelihood, query: str, documents: Sequence[Document]) -> list[float]:
        asked.append(query)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(self, query, documents)

    monkeypatch.setattr(QueryLikelihood, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(part=["here:likelihood"])
    run(collect_only=True)
    assert len(asked) == 3 + 3 + 6  # two of five were done
    assert len(list((tmp_path / "signals").glob("*/*.safetensors"))) == 3 * (5 + 6)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("here:sideways", "--part='here:sideways' does not exist; give COLLECTION:PART"),
        ("parallel", "--part='parallel' does not exist"),
        ("nowhere:parallel", "one of here, there and one of sequential, sequential-shuffled"),
    ],
)
def test_parts_that_do_not_exist_are_refused(setting: Setting, part: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare.main(compare.Options(collections=setting.folders, part=[part], **setting.options))


def test_bad_numbers_and_the_same_collection_twice_are_refused(setting: Setting) -> None:
    with pytest.raises(InputError, match="two collections are called"):
        compare.Options(collections=[setting.folders[0]] * 2, **setting.options)
    with pytest.raises(InputError, match="--queries=0 must be 1 or more"):
        compare.Options(collections=setting.folders, queries=0, **setting.options)


@pytest.fixture
def collector(setting: Setting, tmp_path: Path) -> Collector:
    return Collector(
        ComparisonOptions(
            collections=setting.folders,
            queries=3,
            hits=4,
            signals=tmp_path / "signals",
            model=setting.options["model"],
            dtype="float32",
            seed=7,
        )
    )


def test_the_sample_is_the_one_that_detection_draws(setting: Setting, collector: Collector) -> None:
    sample = collector.load(setting.folders[1])
    whole = load_collection(setting.folders[1])
    assert list(sample.topics) == list(sample.qrels) == sample_queries(whole, 3, 7)
    assert len(sample.topics) == 3


def test_candidates_from_bm25_are_kept(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_collection(tmp_path / "bare", 6, "")
    (folder / "run.bm25.trec").unlink()
    calls = []

    def retrieve(collection: Collection, topics: dict[str, str], hits: int) -> Collection:
        calls.append(hits)
        return replace(collection, run={key: {"d1": 2.5, "d0": 1.0} for key in topics})

    monkeypatch.setattr(collect, "with_candidates", retrieve)
    first, second = collector.load(folder), collector.load(folder)
    assert calls == [4]
    assert first.run == second.run
    assert list(present(second.run)) == list(second.topics)
    assert [(d.id, d.score) for d in second.candidates(next(iter(second.topics)), 4)] == [
        ("d1", 2.5),
        ("d0", 1.0),
    ]


# who is tested on what


def planted(seed: int, name: str, head: tuple[int, int]) -> SignalSet:
    """A collection in which one head alone knows what is relevant."""
    return signal_set(seed, queries=12, planted=[head], noise=0.0, data=[name])


def test_the_tested_collection_has_no_say() -> None:
    signals = {
        "own": planted(1, "own", (0, 0)),
        "other": planted(2, "other", (3, 2)),
        "third": planted(3, "third", (3, 2)),
    }
    chosen = methods.choose("own", signals)
    assert chosen.notes == []
    for row in ("ndcg", "qr", "core", "discriminability"):
        assert present(chosen.transferred[row])[0] == (3, 2), row
    for row in ("weights", "weights-log+bm25", "weights-pairs"):
        learned = present(chosen.transferred[row])
        weights = dict(zip(learned, present(learned.recipe.weights), strict=True))
        assert max(weights, key=lambda head: weights[head]) == (3, 2)
        assert abs(weights.get(Head(0, 0), 0.0)) < 0.2 * weights[Head(3, 2)]
    for _, heads in chosen.within:
        assert present(heads["ndcg"])[0] == (0, 0)
    swapped = methods.choose("other", signals)
    assert present(swapped.transferred["ndcg"]).data == "own, third, 24 queries"


def test_nothing_is_chosen_on_what_it_is_tested_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, tuple[str, ...], set[str]]] = []

    def record(row: str, train: SignalSet, _: int) -> HeadSet:
        trained.append((row, train.data, {query.query_id for query in train.queries}))
        return HeadSet([(0, 0)])

    monkeypatch.setattr(methods, "_choose", record)
    signals = {name: replace(signal_set(queries=7), data=(name,)) for name in "abc"}
    advanced: list[int] = []
    chosen = methods.choose("b", signals, advance=lambda: advanced.append(1))
    transferred, within = trained[:11], trained[11:]
    assert all(data == ("a", "c") for _, data, _ in transferred)
    assert {row for row, _, _ in transferred} == set(chosen.transferred)
    everyone = {query.query_id for query in signals["b"].queries}
    assert len(chosen.within) == 5
    for fold, (held_out, heads) in enumerate(chosen.within):
        for _, data, ids in within[3 * fold : 3 * fold + 3]:
            assert data == ("b",)
            assert ids == everyone - held_out
        assert set(heads) == {"ndcg", "weights", "weights+bm25"}
    assert sorted(set().union(*(held for held, _ in chosen.within))) == sorted(everyone)
    assert len(trained) == len(advanced) == methods.steps(signals)


def test_heads_are_chosen_once_for_the_same_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(row: str, train: SignalSet, _: int) -> HeadSet:
        calls.append(row)
        return HeadSet(
            [(0, len(train.queries))], recipe=Recipe(weights=[0.1 + 0.2], aggregation="log")
        )

    monkeypatch.setattr(methods, "_choose", record)
    signals = {name: replace(signal_set(queries=7), data=(name,)) for name in "ab"}
    cache = Cache(tmp_path)
    first = methods.choose("a", signals, cache=cache)
    files = sorted(tmp_path.iterdir())
    assert len(calls) == len(files) == methods.steps(signals)
    assert methods.choose("a", signals, cache=cache) == first
    assert len(calls) == len(files)
    files[0].write_text(files[0].read_text()[:20])
    assert methods.choose("a", signals, cache=cache) == first
    assert len(calls) == len(files) + 1
    other = replace(signals["b"].queries[0], gains=1 - signals["b"].queries[0].gains)
    signals["b"] = signals["b"].subset([other, *signals["b"].queries[1:]])
    methods.choose("a", signals, cache=cache)
    assert len(calls) == len(files) + 1 + len(first.transferred)


def test_queries_of_the_same_text_share_a_fold() -> None:
    queries = list(signal_set(queries=6).queries)
    queries.append(replace(queries[0], query_id="again"))
    folds = list(methods.folds(queries, 0))
    assert sum("again" in part and "q0" in part for part in folds) == 1
    assert sum(map(len, folds)) == 7
    assert list(methods.folds(queries[:1], 0)) == []


def test_where_nothing_can_be_chosen_the_order_stays_and_is_said() -> None:
    queries = [query_signals([[0.1, 0.2]] * 9, [0, 0], query_id=f"q{n}") for n in range(3)]
    flat = table([replace(query, averaged=query.calibrated[0]) for query in queries])
    chosen = methods.choose("flat", {"flat": flat, "other": flat})
    assert chosen.transferred["ndcg"] is None
    assert any(note.startswith("ndcg on the other collections: none of") for note in chosen.notes)
    rows = methods.score_rows(flat, chosen, {f"q{n}": torch.zeros(2) for n in range(3)})
    assert rows["ndcg"] == rows["ndcg+bm25"] == rows["weights-within"] == rows["bm25"]


# rows


def test_scores_become_rankings_with_ties_in_order_and_blank_documents_last() -> None:
    texts = {"a": "one", "b": " ", "c": "three", "d": "four"}
    collection = Collection(
        "written",
        Path(),
        {key: Document(text, key) for key, text in texts.items()},
        {"q": "which?", "empty": "what?"},
        {"q": {"d": 1}, "empty": {"a": 1}},
        {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}},
    )
    query = replace(query_signals([[0.0] * 3], [0, 0, 1], query_id="q"), docids=("a", "c", "d"))
    evaluations = methods.measure_rows(
        collection,
        table([query]),
        {
            "bm25": {"q": None},
            "tied": {"q": torch.tensor([0.0, 0.0, 0.0])},
            "right": {"q": torch.tensor([-3.0, -2.0, -1.0])},
        },
        4,
    )
    reciprocal = {row: evaluation.per_query("RR@10") for row, evaluation in evaluations.items()}
    assert reciprocal["bm25"] == {"q": 1 / 4, "empty": 0.0}
    assert reciprocal["tied"] == {"q": pytest.approx(1 / 3), "empty": 0.0}
    assert reciprocal["right"] == {"q": 1.0, "empty": 0.0}


def test_the_middle_third_is_that_of_the_package() -> None:
    heads = HeadSet([(layer, 0) for layer in range(30)])
    assert [layer for layer, _ in methods.middle_third(heads)] == [*range(10, 20)]


def test_collections_count_the_same_however_many_queries_they_have() -> None:
    def evaluations(**methods: Sequence[float]) -> dict[str, Evaluation]:
        return {
            row: Evaluation({"nDCG@10": {f"q{n}": value for n, value in enumerate(values)}})
            for row, values in methods.items()
        }

    averages = report.macro_average(
        {"small": evaluations(a=[1.0], b=[0.5]), "large": evaluations(a=[0.2] * 3, b=[0.3] * 3)}
    )
    assert averages["a"].mean("nDCG@10") == pytest.approx((1.0 + 0.2) / 2)
    assert averages["b"].mean("nDCG@10") == pytest.approx((0.5 + 0.3) / 2)
    assert len(averages["a"].per_query("nDCG@10")) == 4


# reliability


def slow_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    mean_one, mean_other = sum(one) / len(one), sum(other) / len(other)
    covariance = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    deviations = [
        math.sqrt(sum((value - mean) ** 2 for value in values))
        for values, mean in ((one, mean_one), (other, mean_other))
    ]
    return covariance / (deviations[0] * deviations[1])


def halves_of(seed: int, queries: int = 6, heads: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    static = torch.randn(heads, generator=generator, dtype=torch.float64)
    specific = torch.randn(queries, heads, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, queries, heads, generator=generator, dtype=torch.float64)
    both = static + specific + noise
    return both[0], both[1]


@pytest.mark.parametrize("seed", range(3))
def test_reliabilities_equal_loops_over_everysample_queries(seed: int) -> None:
    first, second = halves_of(seed)
    counts = reliability.bootstrap_counts(6, 4, seed)
    assert counts[0].tolist() == [1] * 6
    assert counts.sum(dim=1).tolist() == [6] * 5
    static = reliability.static_reliability(first, second, counts)
    specific = reliability.specific_reliability(first, second, counts)
    for sample, count in enumerate(counts.tolist()):
        drawn = [query for query, times in enumerate(count) for _ in range(int(times))]
        means = [
            [sum(float(half[q, h]) for q in drawn) / len(drawn) for h in range(5)]
            for half in (first, second)
        ]
        assert float(static[sample]) == pytest.approx(slow_correlation(*means))
        left = [
            [float(half[q, h]) - mean[h] for q in drawn for h in range(5)]
            for half, mean in zip((first, second), means, strict=True)
        ]
        assert float(specific[sample]) == pytest.approx(slow_correlation(*left))


def test_nothing_correlates_with_nothing() -> None:
    counts = reliability.bootstrap_counts(3, 2, 0)
    same = torch.full((3, 4), 0.1, dtype=torch.float64)
    assert reliability.static_reliability(same, same, counts).tolist() == [0.0] * 3
    assert reliability.specific_reliability(same, same, counts).tolist() == [0.0] * 3


@pytest.mark.parametrize("gains", [[0, 0, 1, 1], [0, 1, 2, 0, 0, 0, 0], [2, 2, 2, 0, 1]])
def test_both_halves_have_documents_of_different_relevance(gains: list[int]) -> None:
    generator = random.Random(0)
    seen = set()
    for _ in range(20):
        first, second = present(reliability.halves(torch.tensor(gains), generator))
        assert sorted(first + second) == list(range(len(gains)))
        assert len(second) - len(first) in (0, 1)
        assert all(len({gains[index] for index in half}) > 1 for half in (first, second))
        seen.add(tuple(sorted(first)))
    assert len(seen) > 1


@pytest.mark.parametrize("gains", [[0, 0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 2], []])
def test_queries_with_one_relevant_document_cannot_be_halved(gains: list[int]) -> None:
    assert reliability.halves(torch.tensor(gains), random.Random(0)) is None
    queries = [query_signals([[0.5] * len(gains)], gains, query_id=f"q{n}") for n in range(3)]
    assert reliability.split_half(queries) is None


def test_utility_is_the_correlation_on_either_half() -> None:
    query = signal_set(queries=1, documents=(12, 12), grades=3).queries[0]
    utilities = present(reliability.half_utilities(query, 3, 5))
    generator = random.Random("5 q0")
    for split in range(3):
        for number, half in enumerate(present(reliability.halves(query.gains, generator))):
            gains = [float(query.gains[index]) for index in half]
            for head in range(12):
                signal = [float(query.calibrated[head, index]) for index in half]
                expected = slow_correlation(signal, gains)
                assert float(utilities[split, number, head]) == pytest.approx(expected, abs=1e-6)


def routed(queries: int, *, by_query: bool) -> SignalSet:
    """Half of the heads know what is relevant: the same for all queries, or others for each."""
    generator = torch.Generator().manual_seed(3)
    signals = []
    for number in range(queries):
        gains = torch.zeros(20)
        gains[:8] = 1.0
        order = torch.randperm(20, generator=generator) if by_query else torch.arange(20)
        knows = (order < 10).float()[:, None]
        signal = torch.randn(20, 20, generator=generator) + 2 * knows * gains
        signals.append(query_signals(signal, gains.tolist(), query_id=f"q{number}"))
    return table(signals)


def test_what_differs_by_query_is_told_from_what_does_not() -> None:
    static = present(reliability.split_half(routed(30, by_query=False).queries))
    assert static.queries == 30
    assert static.static.value > 0.95
    assert abs(static.specific.value) < 0.1
    specific = present(reliability.split_half(routed(30, by_query=True).queries))
    assert specific.specific.value > 0.5
    assert specific.specific.low < specific.specific.value < specific.specific.high


def test_easy_queries_alone_leave_nothing_to_route() -> None:
    generator = torch.Generator().manual_seed(4)
    queries = []
    for number in range(40):
        gains = torch.tensor([1.0] * 8 + [0.0] * 12)
        knows = 3.0 * (number % 2)  # all heads alike, for every other query
        signal = torch.randn(10, 20, generator=generator) + knows * gains
        queries.append(query_signals(signal, gains.tolist(), query_id=f"q{number}"))
    figures = present(reliability.split_half(queries))
    assert figures.specific.value > 0.5
    assert abs(figures.routable.value) < 0.15


def test_the_oracle_is_the_best_head_beside_the_best_random_ranking() -> None:
    signals = signal_set(queries=5, documents=(10, 14), grades=2)
    figures = present(reliability.oracle(signals.queries, draws=200))
    heads = [
        [float(ndcg(q.calibrated[h][None], q.gains, q.ideal_gains)) for h in range(12)]
        for q in signals.queries
    ]
    assert (figures.queries, figures.heads) == (5, 12)
    assert figures.best_head == pytest.approx(sum(map(max, heads)) / 5)
    assert figures.static_head == pytest.approx(
        max(sum(head) / 5 for head in zip(*heads, strict=True))
    )
    generator, best, single = random.Random(1), [], []
    for query in signals.queries:
        drawn = []
        for _ in range(2400):
            ranking = [float(rank) for rank in range(len(query.gains))]
            generator.shuffle(ranking)
            drawn.append(float(ndcg(torch.tensor([ranking]), query.gains, query.ideal_gains)))
        best += [max(drawn[start : start + 12]) for start in range(0, 2400, 12)]
        single += drawn
    assert figures.best_random == pytest.approx(sum(best) / len(best), abs=0.02)
    assert figures.random == pytest.approx(sum(single) / len(single), abs=0.02)
    assert figures.difference.value == pytest.approx(figures.best_head - figures.best_random)
    assert figures.difference.low <= figures.difference.value <= figures.difference.high
    assert reliability.oracle([]) is None


def test_heads_that_know_nothing_are_no_better_than_chance() -> None:
    figures = present(reliability.oracle(signal_set(queries=40, planted=[]).queries))
    assert figures.difference.low < 0 < figures.difference.high
    assert figures.best_head > figures.random + 0.2  # and yet look as if they were


def test_a_figure_is_shown_with_its_interval() -> None:
    assert str(reliability.Estimate(0.25, 0.2, 0.3)) == "0.250 [0.200, 0.300]"
