"""Head sets: what is written comes back, and what is wrong is named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins import Head, HeadSet, Recipe
from routehead_plugins.errors import HeadError, InputError
from routehead_plugins.heads import AGGREGATIONS

HEADS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), unique=True)
NAMES = st.none() | st.text()


@st.composite
def head_sets(draw: st.DrawFn) -> HeadSet:
    heads = draw(HEADS.filter(bool))
    scores = st.lists(st.floats(allow_nan=False), min_size=len(heads), max_size=len(heads))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    weights = st.lists(finite, min_size=len(heads), max_size=len(heads))
    return HeadSet(
        heads,
        model=draw(NAMES),
        layout=draw(NAMES),
        method=draw(NAMES),
        scores=draw(st.none() | scores),
        source=draw(NAMES),
        data=draw(NAMES),
        recipe=Recipe(
            weights=draw(st.none() | weights),
            aggregation=draw(st.none() | st.sampled_from(AGGREGATIONS)),
            first_stage_weight=draw(st.none() | st.floats(0, 1e300)),
        ),
    )


@given(HEADS.filter(bool))
@settings(deadline=None)
def test_a_set_parses_to_what_it_was_written_from(heads: list[tuple[int, int]]) -> None:
    written = ",".join(f"{layer}-{index}" for layer, index in heads)
    parsed = HeadSet.parse(written)
    assert list(parsed) == heads
    assert str(parsed) == written
    assert parsed == HeadSet(heads)
    assert HeadSet.looks_like(written)


@given(head_sets())
@settings(deadline=None)
def test_a_saved_set_loads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, heads: HeadSet
) -> None:
    path = tmp_path_factory.getbasetemp() / "heads-saved.json"
    heads.save(path)
    loaded = HeadSet.load(str(path))
    assert loaded == heads
    assert hash(loaded) == hash(heads)


def test_a_file_holds_what_the_documentation_says(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    heads = HeadSet([(13, 18), (13, 1)], model="m", layout="sequential", scores=[0.08, 0.07])
    replace(heads, source="a paper", data="some questions").save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "format": "routehead-heads",
        "version": 1,
        "model": "m",
        "layout": "sequential",
        "source": "a paper",
        "data": "some questions",
        "heads": ["13-18", "13-1"],
        "scores": [0.08, 0.07],
    }


def test_a_file_holds_weights_and_how_to_use_them(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    heads = HeadSet(
        [(13, 18), (13, 1)],
        recipe=Recipe(weights=[1, -0.5], aggregation="log", first_stage_weight=0),
    )
    heads.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "format": "routehead-heads",
        "version": 1,
        "heads": ["13-18", "13-1"],
        "weights": [1.0, -0.5],
        "aggregation": "log",
        "first_stage_weight": 0.0,
    }
    loaded = HeadSet.load(path)
    assert loaded.recipe == Recipe(weights=(1.0, -0.5), aggregation="log", first_stage_weight=0.0)


def test_a_file_without_weights_loads_without_them(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    HeadSet([(1, 2)], scores=[0.5]).save(path)
    loaded = HeadSet.load(path)
    assert loaded.recipe == Recipe()


def test_a_file_needs_no_more_than_format_version_and_heads(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text('{"format": "routehead-heads", "version": 1, "heads": ["1-2"], "note": "x"}')
    assert HeadSet.load(path) == HeadSet([(1, 2)])


def test_white_space_around_heads_is_allowed() -> None:
    assert HeadSet.parse(" 13-18 ,\t13-1\n") == HeadSet([(13, 18), (13, 1)])


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("13-18,13_1", "13_1"),
        ("", ""),
        ("1-2,", ""),
        ("1-2, x y ", "x y"),
        ("-1-2", "-1-2"),
        ("1-2-3", "1-2-3"),
        ("1 - 2", "1 - 2"),
    ],
)
def test_the_item_that_is_no_head_is_quoted(text: str, item: str) -> None:
    with pytest.raises(HeadError) as error:
        HeadSet.parse(text)
    assert str(error.value) == f"{item!r} is not a head; write layer-head, such as 13-18,13-1."
    assert not HeadSet.looks_like(text)


@given(st.text(alphabet="0123456789-, x\u00b2\u0661"))
@settings(deadline=None)
def test_text_either_parses_or_is_refused_with_a_head_error(text: str) -> None:
    try:
        parsed = HeadSet.parse(text)
    except HeadError:
        return
    assert HeadSet.parse(str(parsed)) == parsed
    assert HeadSet.looks_like(text)


def test_a_number_too_long_for_python_is_refused_with_a_head_error() -> None:
    with pytest.raises(HeadError):
        HeadSet.parse(f"{'9' * 5000}-1")


@pytest.mark.parametrize(
    ("heads", "scores", "message"),
    [
        ([(1, 2), (0, 0), (1, 2)], None, "head 1-2 is given twice; name each head once."),
        ([(0, -1)], None, "head (0, -1) is negative; layers and heads count from 0."),
        ([(0, 1)], [0.5, 0.4], "2 scores for 1 heads; give one score per head."),
    ],
)
def test_sets_that_make_no_sense_are_refused(
    heads: list[tuple[int, int]], scores: list[float] | None, message: str
) -> None:
    with pytest.raises(HeadError) as error:
        HeadSet(heads, scores=scores)
    assert str(error.value) == message
    assert isinstance(error.value, InputError)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": [0.5]}, "1 weights for 2 heads; give one weight per head."),
        ({"weights": []}, "0 weights for 2 heads; give one weight per head."),
        (
            {"weights": [0.5, math.nan]},
            "the weight of head 3-4 is nan; give a finite number.",
        ),
        (
            {"weights": [-math.inf, 1]},
            "the weight of head 1-2 is -inf; give a finite number.",
        ),
        ({"weights": [1, "x"]}, "weights=[1, 'x'] is not a list of numbers; give one per head."),
        ({"weights": 0.5}, "weights=0.5 is not a list of numbers; give one per head."),
        (
            {"aggregation": "median"},
            "aggregation='median' does not exist; choose one of mean, standardised, log.",
        ),
        (
            {"aggregation": ["log"]},
            "aggregation=['log'] does not exist; choose one of mean, standardised, log.",
        ),
        (
            {"first_stage_weight": -0.1},
            "first_stage_weight=-0.1 must be a finite number, 0 or more; or leave it out.",
        ),
        (
            {"first_stage_weight": math.inf},
            "first_stage_weight=inf must be a finite number, 0 or more; or leave it out.",
        ),
        (
            {"first_stage_weight": "much"},
            "first_stage_weight='much' must be a finite number, 0 or more; or leave it out.",
        ),
    ],
    ids=str,
)
def test_weights_that_make_no_sense_are_refused(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(HeadError) as error:
        HeadSet([(1, 2), (3, 4)], recipe=Recipe(**wrong))
    assert str(error.value) == message
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(HEADER | {"heads": ["1-2", "3-4"]} | wrong), encoding="utf-8")
    with pytest.raises(HeadError) as error:
        HeadSet.load(path)
    assert str(error.value) == f"{str(path)!r} is not a valid head-set file: {message}"


ONE: Any = [(0, 1)]
WRONG: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (HeadSet, {"heads": [(0, "x")]}, "[(0, 'x')] is not a list of heads; give (layer, head) pa"),
    (HeadSet, {"heads": [(0, "1")]}, "is not a list of heads"),
    (HeadSet, {"heads": [(0, 1.5)]}, "[(0, 1.5)] is not a list of heads"),
    (HeadSet, {"heads": [(0, True)]}, "[(0, True)] is not a list of heads"),
    (HeadSet, {"heads": ["12"]}, "['12'] is not a list of heads"),
    (HeadSet, {"heads": {(0, 1): 0.5}}, "{(0, 1): 0.5} is not a list of heads"),
    (HeadSet, {"heads": {(0, 1)}}, "{(0, 1)} is not a list of heads"),
    (HeadSet, {"heads": None}, "None is not a list of heads"),
    (HeadSet, {"heads": ONE * 999 + [(1, 2, 3)]}, "is not a list of heads"),
    (HeadSet, {"heads": [(0, 10**5000)]}, "is in no LLM; give smaller numbers."),
    (HeadSet, {"heads": [(0, -(10**5000))]}, "is negative; layers and heads count from 0."),
    (HeadSet, {"heads": ONE, "model": ["x"]}, "model=['x'] is a list; give a text or None."),
    (HeadSet, {"heads": ONE, "layout": 3}, "layout=3 is a int; give a text or None."),
    (HeadSet, {"heads": ONE, "scores": "12"}, "scores='12' is not a list of numbers"),
    (HeadSet, {"heads": ONE, "scores": [10**400]}, "is not a list of numbers"),
    (HeadSet, {"heads": ONE, "recipe": {}}, "recipe is a dict; give a Recipe."),
    (Recipe, {"weights": "12"}, "weights='12' is not a list of numbers"),
    (Recipe, {"weights": {0: 1.0}}, "weights={0: 1.0} is not a list of numbers"),
    (Recipe, {"weights": [True]}, "weights=[True] is not a list of numbers"),
    (Recipe, {"weights": ["0.5"]}, "weights=['0.5'] is not a list of numbers"),
    (Recipe, {"weights": [10**400]}, "is not a list of numbers"),
    (Recipe, {"first_stage_weight": True}, "first_stage_weight=True must be a finite number"),
    (Recipe, {"first_stage_weight": 10**400}, "must be a finite number, 0 or more"),
    (Recipe, {"first_stage_weight": [1]}, "first_stage_weight=[1] must be a finite number"),
    (HeadSet.parse, {"text": 5}, "5 is a int; write 13-18,13-1."),
    (HeadSet.parse, {"text": "x" * 9999}, "is not a head; write layer-head"),
]


@pytest.mark.parametrize(("make", "arguments", "words"), WRONG, ids=range(len(WRONG)))
def test_values_of_wrong_types_are_refused_in_one_short_line(
    make: Callable[..., object], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(HeadError) as error:
        make(**arguments)
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    pairs: Any = np.array([[1, 2], [0, 3]])
    scores: Any = np.array([0.5, 0.25], dtype=np.float32)
    recipe: dict[str, Any] = {
        "weights": torch.tensor([2.0, -1.0]),
        "first_stage_weight": np.float32(1),
    }
    heads = HeadSet(pairs, scores=scores, recipe=Recipe(**recipe))
    assert heads == HeadSet(
        [(1, 2), (0, 3)],
        scores=[0.5, 0.25],
        recipe=Recipe(weights=[2.0, -1.0], first_stage_weight=1.0),
    )
    assert {type(number) for head in heads for number in head} == {int}


def test_head_sets_need_no_torch() -> None:
    script = "import sys, routehead_plugins.heads\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


HEADER = {"format": "routehead-heads", "version": 1}
NO_HEADS = 'lists no heads; expected "heads": ["13-18", ...].'
NO_FORMAT = 'is not a head-set file; expected "format": "routehead-heads".'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"heads": ["1-2"]}, NO_FORMAT),
        ({"format": "other"}, NO_FORMAT),
        (
            HEADER | {"version": 2, "heads": ["1-2"]},
            "has version 2; this release reads version 1: upgrade routehead-plugins.",
        ),
        (HEADER, NO_HEADS),
        (HEADER | {"heads": []}, NO_HEADS),
        (HEADER | {"heads": "1-2"}, NO_HEADS),
        (HEADER | {"heads": [[1, 2]]}, NO_HEADS),
    ],
)
def test_a_file_that_is_no_head_set_is_named(
    tmp_path: Path, content: object, complaint: str
) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(HeadError) as error:
        HeadSet.load(path)
    assert str(error.value) == f"{str(path)!r} {complaint}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": ["1_2"]},
        {"heads": ["1-2", "1-2"]},
        {"heads": ["1-2"], "scores": [1, 2]},
        {"heads": ["1-2"], "scores": ["high"]},
        {"heads": ["1-2"], "scores": 0.5},
    ],
    ids=str,
)
def test_a_file_with_a_wrong_value_is_refused_by_name(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(HEADER | wrong), encoding="utf-8")
    with pytest.raises(HeadError) as error:
        HeadSet.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff\xfe\xff", None], ids=["json", "list", "utf-8", "missing"]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HeadError) as error:
        HeadSet.load(path)
    assert str(error.value).startswith(f"{path} ")
    assert "; expected a head-set file; " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        '"heads": ["1-2"], "model": ["x"]',
        '"heads": ["1-2"], "data": {"a": 1}',
        '"heads": ["1-2"], "weights": [1%s]' % ("0" * 400),
        '"heads": ["1-2"], "weights": [true]',
        '"heads": ["1-2"], "weights": [NaN]',
        '"heads": ["1-2"], "first_stage_weight": %s' % ("[" * 5000 + "]" * 5000),
        '"heads": ["1-2"], "aggregation": "%s"' % ("x" * 5000),
        '"heads": ["%s"]' % ("1-2" * 5000),
        '"heads": ["1-2", "1-2"], "version": 2',
    ],
    ids=lambda content: content[:40],
)
def test_a_message_about_a_file_is_short_whatever_it_holds(tmp_path: Path, content: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(f'{{"format": "routehead-heads", "version": 1, {content}}}')
    with pytest.raises(HeadError) as error:
        HeadSet.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 300


def test_a_method_without_a_figure_for_a_head_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    HeadSet([(1, 2), (3, 4)], scores=[math.nan, math.inf]).save(path)
    scores = HeadSet.load(path).scores
    assert scores is not None
    assert math.isnan(scores[0])
    assert scores[1] == math.inf


def test_a_file_is_replaced_whole_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heads.json"
    HeadSet([(1, 2)]).save(path)
    path.chmod(0o640)
    HeadSet([(3, 4)]).save(path)
    assert path.stat().st_mode & 0o777 == 0o640

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        HeadSet([(5, 6)]).save(path)
    assert HeadSet.load(path) == HeadSet([(3, 4)])
    assert list(tmp_path.iterdir()) == [path]


@given(HEADS)
@settings(deadline=None)
def test_layers_are_grouped_and_indices_lead_back(heads: list[tuple[int, int]]) -> None:
    chosen = HeadSet(heads)
    grouped = [(layer, index) for layer, indices in chosen.by_layer.items() for index in indices]
    assert grouped == sorted(heads)
    assert [grouped[index] for index in chosen.indices_by_layer] == heads
    assert chosen.last_layer == max((layer for layer, _ in heads), default=-1)


def test_a_set_is_a_sequence_of_heads() -> None:
    heads = HeadSet([(3, 1), (0, 2)])
    assert len(heads) == 2
    assert (heads[0], heads[1:]) == (Head(3, 1), (Head(0, 2),))
    assert [type(head) for head in heads] == [Head, Head]
    assert (3, 1) in heads
    assert (1, 3) not in heads
    assert not HeadSet(())


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"scores": [0.1]},
        {"layout": "parallel"},
        {"source": "x"},
        {"data": "x"},
        {"recipe": Recipe(weights=[0.1])},
        {"recipe": Recipe(aggregation="log")},
        {"recipe": Recipe(first_stage_weight=0.0)},
    ],
)
def test_sets_that_differ_in_their_records_are_not_equal(changed: dict[str, Any]) -> None:
    assert HeadSet([(0, 0)]) != HeadSet([(0, 0)], **changed)


AVAILABLE = HeadSet([(layer, index) for layer in range(1, 4) for index in range(2)])


def test_heads_that_the_model_has_are_accepted() -> None:
    HeadSet.parse("3-1,1-0").check_within(AVAILABLE, "tiny")
    AVAILABLE.check_within(AVAILABLE, "tiny")


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("3-1,4-0", "4-0"),
        ("0-0", "0-0"),
        ("1-2,9-9,1-0", "1-2, 9-9"),
        ("9-0,9-1,9-2,9-3,9-4,9-5", "9-0, 9-1, 9-2, 9-3, 9-4"),
    ],
)
def test_heads_that_the_model_does_not_have_are_named(written: str, named: str) -> None:
    with pytest.raises(HeadError) as error:
        HeadSet.parse(written).check_within(AVAILABLE, "tiny")
    assert str(error.value) == (
        f"'tiny' has no head {named}; it has layers 1 to 3 with 2 heads each, counted from 0."
    )


def test_an_empty_set_cannot_be_read() -> None:
    with pytest.raises(HeadError) as error:
        HeadSet(()).check_within(AVAILABLE, "tiny")
    assert str(error.value) == "the head set is empty; name at least one head, such as 13-18."
