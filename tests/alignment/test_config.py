"""Settings and examples: what is allowed, and how refusals read."""

from __future__ import annotations

import json
import random
from typing import Any

import families
import pytest

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.alignment import AlignmentConfig, AlignmentExample, LossWeights
from routehead_plugins.errors import HeadError, InputError


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is not a count"),
        ({"patience": 0}, "patience=0 is not a count"),
        ({"scale": 0}, "scale=0 trains nothing"),
        ({"temperature": 0}, "temperature=0 trains nothing"),
        ({"hard_share": 1.5}, "hard_share=1.5 must be a number from 0 to 1"),
        ({"held_out": 1}, "held_out=1 must be a number from 0 to 0.9"),
        ({"layout": "sequential"}, "layout='sequential' does not exist; choose one of late"),
        ({"signal": "mass"}, "signal='mass' does not exist; choose one of log, calibrated"),
        ({"head_weights": "any"}, "head_weights='any' does not exist; choose one of softmax"),
        ({"schedule": "flat"}, "schedule='flat' does not exist; choose one of cosine, linear"),
        ({"layers": (5, 3)}, r"layers=\(5, 3\) is not a range"),
        ({"layers": 5}, "layers=5 is not a range"),
        ({"projections": "q_proj"}, "projections is one string"),
        ({"max_doc_tokens": 0}, "max_doc_tokens=0"),
        ({"checkpoints": "yes"}, "checkpoints='yes'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AlignmentConfig(**options)


def test_losses_that_leave_nothing_to_learn_are_refused() -> None:
    with pytest.raises(InputError, match="leave nothing to learn"):
        LossWeights(distillation=0, preference=0, spread=1)
    with pytest.raises(InputError, match="spread=-1 must be a finite number, 0 or more"):
        LossWeights(spread=-1)


def test_heads_are_those_of_the_layers_or_those_that_are_named(llm: FrozenLM) -> None:
    assert str(AlignmentConfig(layers=(1, 1)).chosen_heads(llm)) == "1-0,1-1,1-2,1-3"
    named = HeadSet.parse("2-1,0-3")
    assert AlignmentConfig(heads=named).chosen_heads(llm) == named
    with pytest.raises(HeadError, match="'tiny', which has layers 0 to 3"):
        AlignmentConfig(layers=(2, 9)).chosen_heads(llm)
    with pytest.raises(HeadError, match="has no head 9-9"):
        AlignmentConfig(heads=HeadSet.parse("9-9")).chosen_heads(llm)


def test_settings_can_be_written_as_json() -> None:
    for heads in (None, HeadSet.parse("2-1,0-3")):
        written = json.loads(json.dumps(AlignmentConfig(heads=heads).settings()))
        assert written["heads"] == (None if heads is None else "2-1,0-3")
        assert written["losses"]["distillation"] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((" ", ["a", "b"], [1, 0]), "query"),
        (("q", ["a"], [1]), "documents has 1 texts; give at least two"),
        (("q", ["a", " "], [1, 0]), r"documents\[1\]"),
        (("q", ["a", "b"], [1]), "grades has 1 finite numbers for 2 documents"),
        (("q", ["a", "b"], None, [1, float("inf")]), "teacher has 1 finite numbers"),
        (("q", ["a", "b"]), "neither grades nor teacher scores"),
    ],
)
def test_examples_that_make_no_sense_are_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AlignmentExample(*values)


def test_a_sample_keeps_labels_beside_their_documents_and_the_best_graded_one() -> None:
    texts = [f"text {number}" for number in range(9)]
    example = AlignmentExample("q", texts, [0] * 8 + [2], range(9))
    samples = [example.sample(4, random.Random(seed)) for seed in range(20)]
    for sample in samples:
        assert len(sample.documents) == 4
        assert "text 8" in sample.documents
        assert sample.teacher is not None
        assert [f"text {int(score)}" for score in sample.teacher] == list(sample.documents)
    assert len({sample.documents for sample in samples}) > 5
    assert example.sample(9, random.Random(0)) == example
