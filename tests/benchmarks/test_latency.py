"""The speed benchmark runs and counts what it should; how long anything takes is not tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from benchmarks.latency import (
    baselines,
    compare,
    index_scale,
    memory,
    methods,
    peak,
    report,
    rounds,
    workload,
)
from benchmarks.latency import subject as subjects
from benchmarks.latency.options import DEFAULT_METHODS, Options
from benchmarks.latency.shapes import SHAPES
from benchmarks.latency.subject import Method, Subject
from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.errors import InputError


@pytest.fixture
def subject() -> Subject:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    llm = FrozenLM(model, tokenizer, name="tiny")
    heads = HeadSet([(1, 0), (2, 3)])
    return Subject(model, tokenizer, llm, heads, 20)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A folder that holds a tiny LLM."""
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def small_options(model: str, **options: Any) -> Options:
    defaults = {"tokenizer": model, "device": "cpu", "dtype": "float32", "doc_tokens": 20}
    return Options(model=model, **{**defaults, **options})


def warm_up(method: Method) -> None:
    assert method.trial is not None
    method.trial("what?")


def test_documents_are_distinct_and_have_the_length_asked_for(subject: Subject) -> None:
    # More than the collection has without beginning again.
    texts = workload.make_documents(subject.llm.encoder, 700, 150)
    pieces = subject.llm.encoder.pieces("", texts, numbered=False, max_doc_tokens=150)
    assert {piece.text.size for piece in pieces.documents} == {150}
    assert len({piece.ids for piece in pieces.documents}) == 700


def test_queries_are_near_the_median_length(subject: Subject) -> None:
    queries = workload.make_queries(subject.llm.encoder, 6)
    assert len(set(queries)) == 6
    lengths = [len(ids) for ids in subject.llm.encoder.encode(queries)]
    assert max(lengths) - min(lengths) <= 2


def test_the_handwritten_scores_are_those_of_icr(subject: Subject) -> None:
    make = methods.make_method
    texts = workload.make_documents(subject.llm.encoder, 4, subject.doc_tokens)
    by_hand = make("handwritten", subject, texts).run("What grows on trees?")
    icr = make("icr", subject, texts)
    icr.prepare("What grows on trees?")
    scores = icr.run("What grows on trees?")
    expected = [score * len(subject.llm.heads) for score in scores]
    assert by_hand == pytest.approx(expected, abs=1e-5)


def test_documents_in_an_index_are_read_as_those_that_are_run(subject: Subject) -> None:
    texts = workload.make_documents(subject.llm.encoder, 4, subject.doc_tokens)
    scores = {}
    for name in ("late-cold", "late-warm", "late-index"):
        method = methods.make_method(name, subject, texts)
        if method.trial is not None:
            warm_up(method)
        method.prepare("What grows on trees?")
        scores[name] = method.run("What grows on trees?")
    assert scores["late-warm"] == pytest.approx(scores["late-cold"], abs=1e-6)
    assert scores["late-index"] == pytest.approx(scores["late-cold"], abs=2e-2)
    assert method.notes["index"]["bytes_per_document"] > 0


def test_the_least_for_a_query_is_a_forward_of_its_tail(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = methods.make_method("tail", subject, ["moss"])
    decoder = baselines.truncated_decoder(subject)
    shapes = []
    monkeypatch.setattr(
        type(decoder), "forward", lambda _, input_ids, **__: shapes.append(input_ids.shape)
    )
    method.prepare("What grows on trees?")
    method.run("What grows on trees?")
    (tail,) = {subject.pieces("What grows on trees?", []).tail}
    assert shapes == [(1, len(tail))]


def test_a_large_index_is_opened_and_searched(tmp_path: Path) -> None:
    index_scale.main(documents=1500, tokens=2, searched=30, searched_tokens=5, output=tmp_path)
    content = json.loads((tmp_path / "index-scale.json").read_text())
    assert content["settings"]["documents"] == 1500
    figures = content["opening"] | content["search"]
    assert len(figures) == 10
    assert all(isinstance(figure, float) for figure in figures.values())


def test_what_does_not_fit_is_read_in_the_windows_that_the_floor_counts(subject: Subject) -> None:
    subject = replace(subject, doc_tokens=150)
    texts = workload.make_documents(subject.llm.encoder, 40, 150)
    window = subject.window(texts)
    assert window == 20
    ranges = list(subjects.window_ranges(len(texts), window))
    layout: Any = methods.sequential_layout(subject, texts)
    assert ranges == list(layout._windows(len(texts)))
    assert len(subject.prompts("who", texts)) == len(ranges) == 3
    with pytest.raises(subjects.UnavailableError, match="longer than the context"):
        methods.make_method("handwritten", subject, texts)


def test_matrices_that_do_not_fit_memory_are_not_begun(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "available_bytes", lambda _: 1000)
    with pytest.raises(subjects.UnavailableError, match="attention matrices take"):
        methods.make_method("handwritten", subject, ["a", "b"])


def test_batched_likelihood_is_that_of_single_documents(subject: Subject) -> None:
    texts = ["short", "a longer passage", "the longest passage of all"]
    method = methods.make_method("likelihood", subject, texts)
    warm_up(method)
    together = method.run("what?")
    alone = []
    for text in texts:
        single = methods.make_method("likelihood", subject, [text])
        warm_up(single)
        alone += single.run("what?")
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(together)) == 3


def test_listwise_windows_cover_all_documents_and_return_a_permutation(subject: Subject) -> None:
    texts = workload.make_documents(subject.llm.encoder, 25, subject.doc_tokens)
    method = methods.make_method("listwise", subject, texts)
    assert method.notes["windows"] == 2
    assert sorted(method.run("what?")) == list(range(25))


def test_permutations_are_completed() -> None:
    permutation = baselines.permutation
    assert permutation("[2] > [1] > [2] > [9] and so on", 4) == [1, 0, 2, 3]
    assert permutation("", 3) == [0, 1, 2]


def test_operations_are_counted_by_hand(subject: Subject) -> None:
    # Three layers: q and o 32x32, k and v 32x16, three times 32x48.
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    expected = 2 * weights * 10 + 3 * 2 * 32 * 10**2
    assert baselines.forward_flops(subject, [10]) == expected


def test_the_default_heads_lie_in_the_middle_third() -> None:
    config = SHAPES["smollm2-135m"]
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    everything = [(layer, head) for layer in range(30) for head in range(9)]

    class Shape:
        name, num_layers, heads, adapter_label = "shape", 30, HeadSet(everything), None

    shape: Any = Shape()
    heads = subjects.choose_heads("spread", shape)
    assert len(heads) == 16
    assert {head.layer for head in heads} <= set(range(10, 20))
    assert heads.last_layer == 19


def test_a_run_writes_every_round_and_goes_on_where_it_was(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "latency.json"
    options = Options(
        repeats=2,
        model=saved,
        device="cpu",
        dtype="float32",
        doc_tokens=20,
        memory=False,
        output=output,
    )

    def run(sizes: str) -> Any:
        compare.main(replace(options, sizes=sizes))
        return json.loads(output.read_text())

    first = run("2")
    both = run("2,3")
    assert both["sizes"]["2"] == first["sizes"]["2"]
    assert list(both["sizes"]) == ["2", "3"]
    for record in both["sizes"].values():
        assert record["skipped"] == {}
        assert {len(seconds) for seconds in record["rounds"].values()} == {2}
        assert set(DEFAULT_METHODS.split(",")) < set(record["rounds"])
    assert {row["verdict"] for row in both["targets"]} == {"not measured: this size was not run"}
    assert "| likelihood / parallel-warm |" in capsys.readouterr().out
    assert output.with_suffix(".svg").read_text().count("<path") > 10


def test_dear_methods_are_timed_once_and_say_so(saved: str) -> None:
    options = small_options(saved, methods="ours", repeats=3, budget=0.0, memory=False)
    subject = subjects.load_subject(options)
    record = rounds.measure(subject, options, ["one", "two"], lambda *_: None)
    assert len(record["rounds"]["ours"]) == 1
    assert "budget" in record["notes"]["ours"]["rounds"]


def test_targets_say_whether_they_are_met() -> None:
    record: dict[str, Any] = {
        "rounds": {"ours": [1.0, 2.0, 4.0], "floor": [1.0, 1.9, 3.0]},
        "flops": {"seconds": 0.5},
        "memory": {"ours": 10, "handwritten": 30},
        "skipped": {"likelihood": "it is too dear"},
        "skipped_memory": {},
    }
    record |= report.summarise(record, ["ours", "floor", "likelihood"])
    rows = {(row["ratio"], row["documents"]): row for row in report.targets({"50": record})}
    row = rows["ours / floor", 50]
    assert row["measured"] == {"median": 2.0 / 1.9, "min": 1.0, "max": 4.0 / 3.0}
    assert row["verdict"] == "met"
    assert rows["memory: ours / handwritten", 50]["verdict"] == "not met"
    unmeasured = rows["likelihood / parallel-cold", 50]["verdict"]
    assert unmeasured == "not measured: likelihood: it is too dear"


def test_peak_memory_is_measured_in_a_process_of_its_own(saved: str) -> None:
    if not memory.can_measure(torch.device("cpu")):
        pytest.skip("this system does not tell peaks of memory")
    options = small_options(saved, doc_tokens=150)
    # All matrices of 20 documents: 4 layers x 4 heads x 3,300 tokens squared, in float32.
    assert peak.peak_in_process(options, "handwritten", 20) > 16 * 3_300**2 * 4


def test_a_shape_that_does_not_exist_is_refused() -> None:
    options = small_options("", shape="huge", tokenizer="bytes")
    with pytest.raises(InputError, match="--shape='huge' is unknown"):
        subjects.load_subject(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "10,few"}, "--sizes='10,few' is not a list of numbers"),
        ({"methods": "ours,tails"}, "method 'tails' is unknown"),
    ],
)
def test_sizes_and_methods_that_do_not_exist_are_refused(
    saved: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare.main(small_options(saved, output=tmp_path / "out.json", **options))
