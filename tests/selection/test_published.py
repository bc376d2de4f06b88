"""Published head sets: every file is sound, and names are forgiving."""

from __future__ import annotations

from pathlib import Path

import pytest

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.errors import HeadError
from routehead_plugins.selection import published
from routehead_plugins.selection.names import as_selector
from routehead_plugins.selection.published import looks_published, published_heads, published_names

# Hub id -> layers, query heads per layer.
SHAPES = {
    "Qwen/Qwen2.5-7B-Instruct": (28, 28),
    "Qwen/Qwen3-8B": (36, 32),
    "Qwen/Qwen3-Embedding-8B": (36, 32),
    "ibm-granite/granite-3.2-8b-instruct": (40, 32),
    "meta-llama/Llama-3.1-70B-Instruct": (80, 64),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 32),
    "meta-llama/Llama-3.2-1B-Instruct": (16, 32),
    "meta-llama/Llama-3.2-3B-Instruct": (28, 24),
    "microsoft/phi-4": (40, 40),
    "mistralai/Mistral-7B-Instruct-v0.2": (32, 32),
}

# Our own sets for the embedded LLM are named after its role, not its name.
OWN = [name for name in published_names() if ":embedded/" in name]
NAMES = [name for name in published_names() if name not in OWN]


@pytest.mark.parametrize("name", NAMES)
def test_every_set_holds_heads_that_its_model_has(name: str) -> None:
    heads = published_heads(name)
    layers, width = SHAPES[heads.model or ""]
    every = [(layer, index) for layer in range(layers) for index in range(width)]
    heads.check_within(HeadSet(every), name)
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize("name", NAMES)
def test_every_set_records_its_method_model_and_source(name: str) -> None:
    heads = published_heads(name)
    method, _, model = name.partition(":")
    assert heads.method == method
    assert (heads.model or "").rpartition("/")[2] == model.partition("/")[0]
    assert heads.layout == "sequential"
    for record in (heads.source, heads.data):
        assert record
        assert record.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_as_long_as_it_was_published(name: str) -> None:
    heads = published_heads(name)
    if heads.method == "core":
        assert len(heads) == 8
    else:
        assert len(heads) == (32 if "70B" in name else 16)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("core:")])
def test_the_scores_of_core_heads_fall(name: str) -> None:
    scores = published_heads(name).scores
    assert scores is not None
    assert list(scores) == sorted(scores, reverse=True)
    assert min(scores) > 0.02  # what chance gives, with one relevant passage in fifty
    assert max(scores) < 1


CORE_LLAMA = "13-18,13-1,14-13,13-21,14-31,13-13,8-11,14-20"
QR_LLAMA = (
    "14-22,13-16,14-28,14-31,16-19,14-1,16-26,17-24,14-0,13-0,16-25,13-12,13-1,13-10,17-27,20-14"
)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("core:Llama-3.1-8B-Instruct", CORE_LLAMA),
        ("core:Mistral-7B-Instruct-v0.2", "15-21,15-1,16-12,15-7,9-26,12-11,12-7,18-0"),
        ("core:granite-3.2-8b-instruct", "19-1,17-20,19-19,34-28,17-25,17-7,19-4,19-31"),
        ("core:phi-4", "17-1,23-1,19-5,19-29,19-34,19-0,18-6,19-7"),
        ("qr:Llama-3.1-8B-Instruct", QR_LLAMA),
    ],
)
def test_the_heads_are_those_that_were_published(name: str, heads: str) -> None:
    assert str(published_heads(name)) == heads


def test_core_on_nq_finds_what_qr_finds_on_longmemeval_rather_than_on_nq() -> None:
    core, qr, memory = (
        set(published_heads(name))
        for name in (
            "core:Llama-3.1-8B-Instruct",
            "qr:Llama-3.1-8B-Instruct",
            "qr:Llama-3.1-8B-Instruct/longmemeval",
        )
    )
    assert (len(core & memory), len(core & qr)) == (7, 2)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("QR:LLAMA-3.1-8b-instruct", "qr:Llama-3.1-8B-Instruct"),
        (" qr:Llama-3.1-8B-Instruct ", "qr:Llama-3.1-8B-Instruct"),
        ("qr:meta-llama/Llama-3.1-8B-Instruct", "qr:Llama-3.1-8B-Instruct"),
        ("qr:Llama-3.1-8B", "qr:Llama-3.1-8B-Instruct"),
        ("qr:meta-llama/llama-3.1-8b", "qr:Llama-3.1-8B-Instruct"),
        ("qr:llama-3.1-8b/LongMemEval", "qr:Llama-3.1-8B-Instruct/longmemeval"),
        ("qr:meta-llama/Llama-3.1-8B/longmemeval", "qr:Llama-3.1-8B-Instruct/longmemeval"),
        ("core:Phi-4", "core:phi-4"),
        ("core:microsoft/Phi-4", "core:phi-4"),
        ("core:Granite-3.2-8B-Instruct", "core:granite-3.2-8b-instruct"),
        ("core:mistral-7b-v0.2", "core:Mistral-7B-Instruct-v0.2"),
    ],
)
def test_names_are_forgiving(spelling: str, name: str) -> None:
    assert name in published_names()
    assert published_heads(spelling) == published_heads(name)


def test_sets_of_one_model_on_other_data_are_different_sets() -> None:
    usual, other = (published_heads(f"qr:Llama-3.2-3B-Instruct{v}") for v in ("", "/longmemeval"))
    assert usual.model == other.model
    assert usual.data != other.data
    assert usual.heads != other.heads


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("qr:Llama-3.1-8B-Instrct", "qr:Llama-3.1-8B-Instruct"),
        ("core:phi4", "core:phi-4"),
        ("Llama-3.1-8B-Instruct", "core:Llama-3.1-8B-Instruct"),
        ("qr:meta-llama/Llama-3.1-8B-Instruct/longmem", "qr:Llama-3.1-8B-Instruct/longmemeval"),
    ],
)
def test_an_unknown_name_gets_one_line_with_near_names(name: str, meant: str) -> None:
    with pytest.raises(HeadError) as error:
        published_heads(name)
    before, _, after = str(error.value).partition("? There are ")
    assert before.startswith(f"{name!r} is not a published head set; did you mean ")
    assert meant in before
    assert after == f"{', '.join(published_names())}."
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["zz:\n", "qr:", ""])
def test_an_unknown_name_far_from_all_gets_the_list_of_names(name: str) -> None:
    with pytest.raises(HeadError) as error:
        published_heads(name)
    there_are = ", ".join(published_names())
    assert str(error.value) == f"{name!r} is not a published head set; there are {there_are}."


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("qr:anything", True),
        ("CoRe:phi-4", True),
        ("qr", False),
        ("layers:1-2", False),
        ("heads/qr:file.json", False),
        (r"C:\heads.json", False),
        (":phi-4", False),
    ],
)
def test_a_name_is_told_from_a_path_by_its_method(text: str, meant: bool) -> None:
    assert looks_published(text) is meant


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of head sets instead of ours."""
    monkeypatch.setattr(published, "_FOLDER", tmp_path)
    return tmp_path


def test_a_file_that_is_added_gets_a_name(elsewhere: Path) -> None:
    (elsewhere / "own").mkdir()
    (elsewhere / "own" / "note.txt").write_text("no set")
    (elsewhere / "stray.json").write_text("no method")
    HeadSet([(1, 2)]).save(elsewhere / "own" / "embedded.json")
    assert published_names() == ("own:embedded",)
    assert looks_published("own:embedded")
    assert published_heads("Own:Embedded") == HeadSet([(1, 2)])


def test_a_model_is_not_taken_for_its_instruct_variant_where_both_have_a_set(
    elsewhere: Path,
) -> None:
    (elsewhere / "own").mkdir()
    HeadSet([(0, 0)]).save(elsewhere / "own" / "X-1B.json")
    HeadSet([(1, 1)]).save(elsewhere / "own" / "X-1B-Instruct.json")
    assert published_heads("own:x-1b") == HeadSet([(0, 0)])
    assert published_heads("own:x-1b-instruct") == HeadSet([(1, 1)])


def test_the_embedded_llm_has_a_set_by_every_method_in_both_older_layouts() -> None:
    methods = ("core", "discriminability", "ndcg", "qr", "weights")
    layouts = ("parallel", "sequential")
    names = [f"{method}:embedded/{layout}" for method in methods for layout in layouts]
    assert sorted([*names, "ndcg:embedded/late"]) == OWN


@pytest.mark.parametrize("name", OWN)
def test_every_set_of_our_own_says_how_it_was_made(name: str) -> None:
    heads = published_heads(name)
    method, _, layout = name.replace("embedded/", "").partition(":")
    assert (heads.layout, heads.model) == (layout, "embedded")
    assert heads.method is not None
    assert heads.method.partition("(")[0] == method
    heads.check_within(HeadSet([(layer, head) for layer in range(30) for head in range(9)]), name)
    assert heads.source is not None
    assert heads.source.startswith("routehead detect --collection dl21")
    assert f"--layout {layout} --method {method}" in heads.source
    if method == "weights":
        assert heads.recipe.weights is not None
        assert heads.recipe.first_stage_weight is not None
    else:
        assert len(heads) == 8


@pytest.mark.parametrize("layout", ["parallel", "sequential", "late"])
def test_a_set_of_our_own_is_read_by_the_embedded_llm(embedded: FrozenLM, layout: str) -> None:
    reranker = HeadRoutedAttentionReranker(embedded, as_selector(f"ndcg:embedded/{layout}"))
    assert reranker.layout.name == layout
    ranking = reranker.rerank("Who painted it?", ["Paris is a city.", "Leonardo painted it."])
    assert ranking.heads == published_heads(f"ndcg:embedded/{layout}")
