"""The speed benchmark runs and counts what it should; how long anything takes is not tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.errors import InputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Module = Callable[[str], Any]


@pytest.fixture
def subject(module: Module) -> Any:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    llm = FrozenLM(model, tokenizer, name="tiny")
    heads = HeadSet([(1, 0), (2, 3)])
    return module("subject").Subject(model, tokenizer, llm, heads, 20)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A folder that holds a tiny LLM."""
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_documents_are_distinct_and_have_the_length_asked_for(subject: Any, module: Module) -> None:
    # More than the collection has without beginning again.
    texts = module("workload").make_documents(subject.llm.encoder, 700, 150)
    pieces = subject.llm.encoder.pieces("", texts, numbered=False, max_doc_tokens=150)
    assert {piece.text.size for piece in pieces.documents} == {150}
    assert len({piece.ids for piece in pieces.documents}) == 700


def test_queries_are_near_the_median_length(subject: Any, module: Module) -> None:
    queries = module("workload").make_queries(subject.llm.encoder, 6)
    assert len(set(queries)) == 6
    lengths = [len(ids) for ids in subject.llm.encoder.encode(queries)]
    assert max(lengths) - min(lengths) <= 2


def test_the_handwritten_scores_are_those_of_icr(subject: Any, module: Module) -> None:
    make = module("methods").make_method
    texts = module("workload").make_documents(subject.llm.encoder, 4, subject.doc_tokens)
    by_hand = make("handwritten", subject, texts).run("What grows on trees?")
    icr = make("icr", subject, texts)
    icr.prepare("What grows on trees?")
    scores = icr.run("What grows on trees?")
    expected = [score * len(subject.llm.heads) for score in scores]
    assert by_hand == pytest.approx(expected, abs=1e-5)


def test_what_does_not_fit_is_read_in_the_windows_that_the_floor_counts(
    subject: Any, module: Module
) -> None:
    subject = replace(subject, doc_tokens=150)
    texts = module("workload").make_documents(subject.llm.encoder, 40, 150)
    window = subject.window(texts)
    assert window == 20
    ranges = list(module("subject").window_ranges(len(texts), window))
    assert ranges == list(module("methods").sequential_layout(subject, texts)._windows(len(texts)))
    assert len(subject.prompts("who", texts)) == len(ranges) == 3
    with pytest.raises(module("subject").UnavailableError, match="longer than the context"):
        module("methods").make_method("handwritten", subject, texts)


def test_matrices_that_do_not_fit_memory_are_not_begun(
    subject: Any, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module("baselines"), "available_bytes", lambda _: 1000)
    with pytest.raises(module("subject").UnavailableError, match="attention matrices take"):
        module("methods").make_method("handwritten", subject, ["a", "b"])


def test_batched_likelihood_is_that_of_single_documents(subject: Any, module: Module) -> None:
    texts = ["short", "a longer passage", "the longest passage of all"]
    method = module("methods").make_method("likelihood", subject, texts)
    method.trial("what?")
    together = method.run("what?")
    alone = []
    for text in texts:
        single = module("methods").make_method("likelihood", subject, [text])
        single.trial("what?")
        alone += single.run("what?")
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(together)) == 3


def test_listwise_windows_cover_all_documents_and_return_a_permutation(
    subject: Any, module: Module
) -> None:
    texts = module("workload").make_documents(subject.llm.encoder, 25, subject.doc_tokens)
    method = module("methods").make_method("listwise", subject, texts)
    assert method.notes["windows"] == 2
    assert sorted(method.run("what?")) == list(range(25))


def test_permutations_are_completed(module: Module) -> None:
    permutation = module("baselines").permutation
    assert permutation("[2] > [1] > [2] > [9] and so on", 4) == [1, 0, 2, 3]
    assert permutation("", 3) == [0, 1, 2]


def test_operations_are_counted_by_hand(subject: Any, module: Module) -> None:
    # Three layers: q and o 32x32, k and v 32x16, three times 32x48.
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    expected = 2 * weights * 10 + 3 * 2 * 32 * 10**2
    assert module("baselines").forward_flops(subject, [10]) == expected


def test_the_default_heads_lie_in_the_middle_third(module: Module) -> None:
    shapes, choose = module("subject").SHAPES, module("subject").choose_heads
    config = shapes["smollm2-135m"]
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    everything = [(layer, head) for layer in range(30) for head in range(9)]

    class Shape:
        name, num_layers, heads = "shape", 30, HeadSet(everything)

    heads = choose("spread", Shape())
    assert len(heads) == 16
    assert {head.layer for head in heads} <= set(range(10, 20))
    assert heads.last_layer == 19


def test_a_run_writes_every_round_and_goes_on_where_it_was(
    module: Module, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latency, output = module("latency"), tmp_path / "latency.json"

    def run(sizes: str) -> Any:
        latency.main(
            sizes=sizes,
            repeats=2,
            model=saved,
            device="cpu",
            dtype="float32",
            doc_tokens=20,
            memory=False,
            output=output,
        )
        return json.loads(output.read_text())

    first = run("2")
    both = run("2,3")
    assert both["sizes"]["2"] == first["sizes"]["2"]
    assert list(both["sizes"]) == ["2", "3"]
    for record in both["sizes"].values():
        assert record["skipped"] == {}
        assert {len(seconds) for seconds in record["rounds"].values()} == {2}
        assert set(latency.DEFAULT_METHODS.split(",")) < set(record["rounds"])
    assert {row["verdict"] for row in both["targets"]} == {"not measured: this size was not run"}
    assert "| likelihood / parallel-warm |" in capsys.readouterr().out
    assert output.with_suffix(".svg").read_text().count("<path") > 10


def test_dear_methods_are_timed_once_and_say_so(module: Module, saved: str) -> None:
    options = module("subject").SubjectOptions(saved, None, saved, "cpu", "float32", "spread", 20)
    subject = module("subject").load_subject(options)
    rounds = module("rounds")
    job = rounds.Job([2], ["ours"], repeats=3, budget=0.0, memory=False)
    record = rounds.measure(subject, options, job, ["one", "two"], lambda *_: None)
    assert len(record["rounds"]["ours"]) == 1
    assert "budget" in record["notes"]["ours"]["rounds"]


def test_targets_say_whether_they_are_met(module: Module) -> None:
    report = module("latency_report")
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


def test_peak_memory_is_measured_in_a_process_of_its_own(module: Module, saved: str) -> None:
    memory = module("memory")
    if not memory.can_measure(torch.device("cpu")):
        pytest.skip("this system does not tell peaks of memory")
    options = module("subject").SubjectOptions(saved, None, saved, "cpu", "float32", "spread", 150)
    # All matrices of 20 documents: 4 layers x 4 heads x 3,300 tokens squared, in float32.
    assert memory.extra_bytes(options, "handwritten", 20) > 16 * 3_300**2 * 4


def test_a_shape_that_does_not_exist_is_refused(module: Module) -> None:
    options = module("subject").SubjectOptions("", "huge", "bytes", "cpu", "float32", "spread", 9)
    with pytest.raises(InputError, match="--shape='huge' is unknown"):
        module("subject").load_subject(options)
