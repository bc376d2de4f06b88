"""Queries from passages: the prompts, the texts that are dropped, and interrupted jobs."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins import Document, FrozenLM
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.signals.synthesize import (
    STYLES,
    Style,
    acceptable,
    consistent,
    synthesize_queries,
)

# The first use of a module may be slow.
UNHURRIED = settings(deadline=None)

TOPICS = ["bread", "rust", "wolves", "tides", "coffee", "glass", "moss"]
LABELS = [style.label for style in STYLES]


def passage(topic: str) -> str:
    return f"All that is known of {topic} was put\ninto a book by one man long ago."


def collection(size: int = 6, **texts: str) -> Collection:
    """As many passages, one for a topic, and other texts."""
    corpus = {topic[0]: passage(topic) for topic in TOPICS[:size]} | texts
    return Collection(
        name="tiny",
        path=Path("tiny"),
        corpus={key: Document(text, key) for key, text in corpus.items()},
        topics={"old": "what is old?"},
        qrels={"old": {"b": 1}},
        run={"old": {"b": 1.0}},
    )


@dataclass(frozen=True)
class Call:
    """What the LLM was asked for at once."""

    prefix: str
    prompts: tuple[str, ...]
    max_tokens: int
    temperature: float
    seed: int


def about(topic: str, label: str) -> str:
    return f"how did {topic} meet a {label}"


@dataclass
class Fake:
    """An LLM that notes what it is asked for, and fails at the chosen call."""

    reply: Callable[[str, str], str] = about
    name: str = "fake"
    dtype: torch.dtype = torch.float32
    adapter: None = None
    failing: int | None = None
    calls: list[Call] = field(default_factory=list)

    def write(
        self,
        prefix: str,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        if len(self.calls) == self.failing:
            raise KeyboardInterrupt
        self.calls.append(Call(prefix, tuple(prompts), max_tokens, temperature, seed))
        return [self.reply(*pair) for pair in map(subject, prompts)]


def subject(prompt: str) -> tuple[str, str]:
    """Topic and label of a prompt."""
    match = re.search(r"known of (\w+) was.*\n(\w+):$", prompt)
    assert match is not None
    return match[1], match[2]


def asked(llm: Fake) -> Counter[tuple[str, str]]:
    return Counter(subject(prompt) for call in llm.calls for prompt in call.prompts)


def synthesize(
    folder: Path,
    llm: Fake | None = None,
    count: int = 6,
    texts: Collection | None = None,
    *,
    seed: int = 0,
    styles: Sequence[Style] = STYLES,
    advance: Callable[[], None] = lambda: None,
) -> Collection:
    source = texts or collection()
    fake = cast(FrozenLM, llm or Fake())
    return synthesize_queries(
        source, fake, count, folder, seed=seed, styles=styles, advance=advance
    )


def journal(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_file_name_the_keys_and_the_seeds_never_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Users have queries under these names; other names would write all of them again.
    monkeypatch.setattr("routehead_plugins.signals.store.__version__", "0.1.0")
    llm = Fake()
    synthesize(tmp_path, llm, 4, seed=5)
    assert journal(tmp_path).name == "queries-tiny-5b7cd262a3f8.partial.jsonl"
    lines = [json.loads(line) for line in journal(tmp_path).read_text().splitlines()[1:]]
    assert [line[:2] for line in lines] == [
        ["665d68eedac8", "how did wolves meet a Question"],
        ["e59e2bc09c72", "how did bread meet a Question"],
        ["1fbc16758ac2", "how did rust meet a Search"],
        ["f0a615937148", "how did coffee meet a Claim"],
    ]
    assert [call.seed for call in llm.calls] == [164895701820665, 265342001651046, 200777658978001]


WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), unique=True, min_size=1, max_size=40)
SHOWN = "Yeast gives off gas, while it eats the sugar of the dough; so bread rises."


@pytest.mark.parametrize(
    ("query", "accepted"),
    [
        ("why does bread rise?", True),
        ("bread", False),  # one word
        ("bread dough", True),
        ("", False),
        ("?!", False),
        ("bread bread", True),  # half of the words are different ones
        ("bread bread bread", False),
        ("why why does does bread bread", True),
        ("why why does does bread bread bread", False),
        ("it eats the sugar of", True),  # five words
        ("it eats the sugar of the", False),
        ("YEAST gives off (gas) while it eats", False),
        ("east gives off gas while it eats", True),  # begins within a word
        ("gas while yeast eats the sugar of", True),
        (" ".join(f"w{n}" for n in range(32)), True),
        (" ".join(f"w{n}" for n in range(33)), False),
    ],
)
def test_queries_are_distinguished_from_other_texts(query: str, accepted: bool) -> None:
    assert acceptable(query, SHOWN) is accepted


@pytest.mark.parametrize(
    ("query", "accepted"),
    [
        ("面", False),
        ("面包", True),
        ("面包为什么会发酵\uff1f", True),
        ("酵母吃掉面团里的糖", False),  # stands there
        ("酵母吃掉面", True),  # five
        ("酵母吃掉面团", False),
        ("面" * 8, False),
        ("パンはなぜ膨らむ", True),
        ("ขนมปังฟูเพราะอะไร", True),
    ],
)
def test_characters_count_as_words_where_nothing_parts_words(query: str, accepted: bool) -> None:
    assert acceptable(query, "酵母吃掉面团里的糖\uff0c放出气体\uff0c面包就发起来了。") is accepted


def test_passages_without_spaces_are_used_and_cut(tmp_path: Path) -> None:
    passage = Document("酵母吃掉面团里的糖" * 1000, id="long")
    llm = Mock(
        spec=FrozenLM,
        adapter=None,
        dtype=torch.float32,
        write=Mock(return_value=["面包为什么会发酵"]),
    )
    llm.name = "fake"
    corpus = Collection("bread", tmp_path, {"long": passage}, {}, {})
    result = synthesize_queries(corpus, llm, 1, tmp_path)
    assert list(result.topics.values()) == ["面包为什么会发酵"]
    ((_, (prompt,)),) = (call.args for call in llm.write.call_args_list)
    assert prompt.count("酵母") == 167  # of 9 characters each


def test_styles_are_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        synthesize(tmp_path, Fake(about), styles=[])
    assert str(error.value) == (
        "styles is empty; give at least one style, or leave the argument out."
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"queries cannot be kept in .*; name another folder"):
        synthesize(tmp_path / "file", Fake(about))


@UNHURRIED
@given(WORDS, st.integers(1, 20), st.integers(0, 20))
def test_queries_of_words_of_their_own_are_judged_by_length_alone(
    words: list[str], fewest: int, more: int
) -> None:
    bounds = (fewest, fewest + more)
    expected = fewest <= len(words) <= fewest + more
    assert acceptable(" ".join(words), "xx yy zz", bounds) is expected


@UNHURRIED
@given(WORDS, st.data())
def test_six_words_in_a_row_or_more_are_a_copy(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - 1))
    part = words[start : data.draw(st.integers(start + 1, len(words)))]
    assert acceptable(" ".join(part), " ".join(words), (1, 40)) is (len(part) <= 5)
    # Another order of as many words is no copy.
    turned = [*part[1:], part[0]]
    assert acceptable(" ".join(turned), " ".join(words), (1, 40))


@UNHURRIED
@given(WORDS, st.integers(2, 5))
def test_words_said_over_and_over_are_no_query(words: list[str], times: int) -> None:
    bounds = (1, 200)
    assert acceptable(" ".join(words * times), "xx", bounds) is (times == 2)


@UNHURRIED
@given(WORDS, st.sampled_from([", ", "  ", "\n", "? ", " - "]))
def test_case_and_punctuation_do_not_count(words: list[str], between: str) -> None:
    query, text = " ".join(words[:9]), " ".join(words)
    assert acceptable(between.join(words[:9]).upper() + "?", text) is acceptable(query, text)
    assert acceptable(query, between.join(words).title()) is acceptable(query, text)


@pytest.mark.parametrize("style", STYLES, ids=LABELS)
def test_the_examples_are_acceptable_queries(style: Style) -> None:
    for text, query in style.examples:
        assert acceptable(query, text, style.words)
    assert len({query for _, query in style.examples}) == 3
    assert [text for text, _ in style.examples] == [text for text, _ in STYLES[0].examples]


def test_a_style_shows_its_examples_and_then_a_passage() -> None:
    style = Style("Claim", (2, 9), (("Iron rusts.", "rust is bad"), ("It rains.", "rain falls")))
    assert style.prefix == (
        "Passage: Iron rusts.\nClaim: rust is bad\n\nPassage: It rains.\nClaim: rain falls\n\n"
    )
    assert style.prompt(" Bread\n rises.\t") == "Passage: Bread rises.\nClaim:"


def test_every_query_is_judged_relevant_to_its_own_passage(tmp_path: Path) -> None:
    result = synthesize(tmp_path)
    assert list(result.topics) == [f"tiny-{number}" for number in range(6)]
    for (query_id, query), style in zip(result.topics.items(), STYLES * 2, strict=True):
        ((docid, grade),) = result.qrels[query_id].items()
        topic = query.split()[2]
        assert query == about(topic, style.label)
        assert (docid, grade) == (topic[0], 1)
    assert result.qrels.keys() == result.topics.keys()
    assert result.run is None


def test_the_given_collection_stays_as_it_is(tmp_path: Path) -> None:
    source = collection()
    before = copy.deepcopy(source)
    result = synthesize(tmp_path, texts=source)
    assert source == before
    assert (result.name, result.path, result.corpus) == ("tiny", Path("tiny"), before.corpus)
    assert "old" not in result.topics


@pytest.mark.parametrize("size", range(1, 8))
def test_every_passage_is_used_before_any_is_used_twice_and_none_is_used_thrice(
    tmp_path: Path, size: int
) -> None:
    turns = [
        query.split()[2]
        for query in synthesize(tmp_path, count=3 * size, texts=collection(size)).topics.values()
    ]
    assert sorted(turns[:size]) == sorted(TOPICS[:size])
    assert turns == turns[:size] * 2


@pytest.mark.parametrize("size", range(1, 8))
def test_the_queries_of_a_passage_are_in_different_styles(tmp_path: Path, size: int) -> None:
    llm = Fake()
    synthesize(tmp_path, llm, 2 * size, collection(size))
    assert set(asked(llm).values()) == {1}
    assert Counter(topic for topic, _ in asked(llm)) == dict.fromkeys(TOPICS[:size], 2)


def test_styles_rotate(tmp_path: Path) -> None:
    labels = [query.split()[-1] for query in synthesize(tmp_path, count=5).topics.values()]
    assert labels == [*LABELS, *LABELS[:2]]


def test_passages_that_are_too_short_are_not_used(tmp_path: Path) -> None:
    known = "All that is known of {} was put in a box"
    shortest, longer = known.format("moss"), known.format("dust") + " ago"
    texts = collection(2, blank=" \n", moss=shortest, dust=longer)
    assert len(shortest.split()) == 11
    llm = Fake()
    synthesize(tmp_path, llm, 3, texts)
    assert {topic for topic, _ in asked(llm)} == {"bread", "rust", "dust"}


def test_too_small_a_count_is_refused(tmp_path: Path) -> None:
    for count in (0, -3):
        with pytest.raises(InputError) as error:
            synthesize(tmp_path / "new", count=count)
        assert str(error.value) == f"count={count} is not a count; give a whole number, 1 or more."
    assert not (tmp_path / "new").exists()


def test_a_corpus_without_passages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        synthesize(tmp_path, texts=collection(0, a="Bread rises.", b=""))
    assert str(error.value) == (
        "no document of 'tiny' has 12 words or more; give a corpus of passages."
    )


def test_the_llm_is_shown_examples_and_the_beginning_of_a_passage(tmp_path: Path) -> None:
    words = ["All", "that", "is", "known", "of", "moss", "was"] + [f"w{n}" for n in range(200)]
    llm = Fake()
    synthesize(tmp_path, llm, 1, collection(0, moss="\n ".join(words)), styles=STYLES[1:])
    (call,) = llm.calls
    assert call.prefix == STYLES[1].prefix
    assert call.prompts == (f"Passage: {' '.join(words[:150])}\nSearch:",)
    assert (call.max_tokens, call.temperature) == (32, 0.5)


def test_queries_of_a_style_are_written_sixteen_at_once(tmp_path: Path) -> None:
    llm = Fake()
    many = collection(0, **{f"d{number}": passage(f"topic{number}") for number in range(100)})
    synthesize(tmp_path, llm, 2 * 48 + 4, many)
    assert [len(call.prompts) for call in llm.calls] == [16] * 6 + [2, 1, 1]
    prefixes = [style.prefix for style in STYLES]
    assert [call.prefix for call in llm.calls] == prefixes * 3
    # Batches are sampled independently.
    assert len({call.seed for call in llm.calls}) == 9


def test_the_same_seed_gives_the_same_prompts_and_another_one_does_not(tmp_path: Path) -> None:
    calls = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        llm = Fake()
        synthesize(tmp_path / folder / "inner", llm, seed=seed)
        calls.append(llm.calls)
    assert calls[0] == calls[1]
    assert [call.prompts for call in calls[0]] != [call.prompts for call in calls[2]]
    assert not {call.seed for call in calls[0]} & {call.seed for call in calls[2]}


def test_sampling_follows_the_seed_even_with_a_single_passage(tmp_path: Path) -> None:
    one, other = Fake(), Fake()
    synthesize(tmp_path, one, 1, collection(1), seed=0)
    synthesize(tmp_path, other, 1, collection(1), seed=1)
    assert one.calls[0].prompts == other.calls[0].prompts
    assert one.calls[0].seed != other.calls[0].seed


def test_advance_is_called_for_every_query(tmp_path: Path) -> None:
    seen: list[int] = []
    for job in (1, 2):  # the second reads everything from disk
        result = synthesize(tmp_path, Fake(lambda *_: "no"), 7, advance=lambda: seen.append(7))
        assert result.topics == {}
        assert len(seen) == 7 * job


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two: a job of 12 asks six times, in groups of three."""
    monkeypatch.setattr("routehead_plugins.signals.synthesize._BATCH", 2)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("stop", range(7))
def test_an_interrupted_job_resumes(tmp_path: Path, stop: int) -> None:
    whole = Fake()
    expected = synthesize(tmp_path / "whole", whole, 12)
    assert len(whole.calls) == 6
    first, second = Fake(failing=stop), Fake()
    if stop < 6:
        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path / "stopped", first, 12)
    else:
        synthesize(tmp_path / "stopped", first, 12)
    assert synthesize(tmp_path / "stopped", second, 12) == expected
    assert first.calls == whole.calls[:stop]
    assert second.calls == whole.calls[stop:]


@pytest.mark.usefixtures("pairs")
def test_an_exception_of_advance_loses_nothing(tmp_path: Path) -> None:
    def stop() -> None:
        raise RuntimeError("stopped")

    first, second = Fake(), Fake()
    with pytest.raises(RuntimeError, match=r"^stopped$"):
        synthesize(tmp_path, first, 12, advance=stop)
    synthesize(tmp_path, second, 12)
    assert (len(first.calls), len(second.calls)) == (3, 3)
    once = asked(first) + asked(second)
    assert (len(once), max(once.values())) == (12, 1)


@pytest.mark.usefixtures("pairs")
def test_an_incomplete_batch_is_written_again(tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    expected = synthesize(tmp_path, first, 12)
    lines = journal(tmp_path).read_bytes().splitlines(keepends=True)
    assert len(lines) == 13
    # Two batches and a half, the last line of which is incomplete.
    journal(tmp_path).write_bytes(b"".join(lines[:6]) + lines[6][:-9])
    assert synthesize(tmp_path, second, 12) == expected
    assert second.calls == first.calls[2:]


@pytest.mark.parametrize(
    ("llm", "seed"),
    [(Fake(name="other"), 0), (Fake(dtype=torch.bfloat16), 0), (Fake(), 1)],
    ids=["model", "dtype", "seed"],
)
def test_queries_with_other_settings_are_stored_apart(tmp_path: Path, llm: Fake, seed: int) -> None:
    synthesize(tmp_path)
    before = journal(tmp_path).read_bytes()
    synthesize(tmp_path, llm, seed=seed)
    assert len(llm.calls) == 3
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(names) == 2
    assert before in names.values()


def test_queries_are_written_again_when_a_passage_or_an_example_changes(tmp_path: Path) -> None:
    rare = Style("Question", (2, 9), (("It rains.", "rain falls"),))
    texts = collection(0, a=passage("rain"))
    changed = collection(0, a=passage("snow"))
    for given_texts, style, calls in (
        (texts, STYLES[0], 1),
        (texts, STYLES[0], 0),
        (changed, STYLES[0], 1),
        (changed, rare, 1),
        (texts, STYLES[0], 0),
    ):
        llm = Fake()
        result = synthesize(tmp_path, llm, 1, given_texts, styles=[style])
        assert len(llm.calls) == calls
        topic = "rain" if given_texts is texts else "snow"
        assert result.topics == {"tiny-0": about(topic, "Question")}


def test_a_repeated_query_is_dropped(tmp_path: Path) -> None:
    texts = {
        "Question": "Who WROTE it all",
        "Search": "who wrote IT all",
        "Claim": "it all was written",
    }
    result = synthesize(tmp_path, Fake(lambda _, label: texts[label]))
    assert result.topics == {"tiny-0": "Who WROTE it all", "tiny-2": "it all was written"}
    assert list(result.qrels) == ["tiny-0", "tiny-2"]


@pytest.mark.parametrize("style", STYLES, ids=LABELS)
def test_an_example_is_not_accepted_as_a_query(tmp_path: Path, style: Style) -> None:
    query = style.examples[1][1]
    fake = Fake(lambda topic, label: query.upper() if topic == "moss" else about(topic, label))
    result = synthesize(tmp_path, fake, 7, collection(7))
    assert len(result.topics) == 6
    assert "m" not in {docid for judged in result.qrels.values() for docid in judged}


def test_an_example_of_a_custom_style_is_not_accepted_as_a_query(tmp_path: Path) -> None:
    own = Style("Wish", (2, 9), (("Iron rusts.", "a pan without rust"),))
    fake = Fake(lambda topic, label: own.examples[0][1] if topic == "rust" else about(topic, label))
    result = synthesize(tmp_path, fake, styles=[own])
    assert list(result.topics.values()).count("a pan without rust") == 0
    assert len(result.topics) == 5


@pytest.mark.parametrize(
    "text",
    ["", "rust", "rust " * 9, "of rust was put into a book by one man"],
    ids=["blank", "short", "repeated", "copied"],
)
def test_unacceptable_texts_are_dropped(tmp_path: Path, text: str) -> None:
    result = synthesize(
        tmp_path, Fake(lambda topic, label: text if topic == "rust" else about(topic, label))
    )
    assert len(result.topics) == 5
    assert not any("rust" in query for query in result.topics.values())


def test_every_style_has_its_own_bounds(tmp_path: Path) -> None:
    two = synthesize(tmp_path / "2", Fake(lambda topic, label: f"{topic} {label}"))
    assert {query.split()[1] for query in two.topics.values()} == {"Search"}
    filling = " ".join(f"w{number}" for number in range(12))
    long = synthesize(tmp_path / "13", Fake(lambda topic, label: f"{label}{topic} {filling}"))
    assert len(long.topics) == 4
    assert not any(query.startswith("Search") for query in long.topics.values())


def test_only_queries_with_their_own_passage_among_the_candidates_are_consistent() -> None:
    whole = Collection(
        name="tiny",
        path=Path("tiny"),
        corpus={key: Document(passage(key), key) for key in "abc"},
        topics={"1": "first", "2": "second", "3": "third", "4": "lost"},
        qrels={"1": {"a": 1}, "2": {"b": 1}, "3": {"c": 1}, "4": {"a": 1}},
        run={
            "1": {"a": 3.0, "b": 2.0, "c": 1.0},
            "2": {"a": 3.0, "b": 2.0, "c": 1.0},
            "3": {"a": 3.0, "b": 2.0, "c": 1.0},
        },
    )
    before = copy.deepcopy(whole)
    for hits, expected in ((1, ["1"]), (2, ["1", "2"]), (3, ["1", "2", "3"])):
        result = consistent(whole, hits)
        assert list(result.topics) == list(result.qrels) == expected
        assert result.topics == {query_id: whole.topics[query_id] for query_id in expected}
        assert result.qrels == {query_id: whole.qrels[query_id] for query_id in expected}
        assert (result.corpus, result.run) == (whole.corpus, whole.run)
    assert whole == before


CORPUS = {
    "bread": "Bread rises because the yeast in the dough gives off gas while it eats sugar, and "
    "the gluten of the flour holds the bubbles.",
    "rust": "Steel rusts when water and air reach it; a coat of paint or a layer of zinc keeps "
    "both away for many years.",
    "coffee": "Coffee plants grow best in the shade of taller trees on warm mountain slopes, where "
    "the cherries ripen slowly.",
    "tides": "The tide comes in twice a day, since the moon pulls at the sea on the near side of "
    "the earth more than on the far side.",
    "tower": "The Eiffel Tower was finished in 1889, in time for the World's Fair in Paris, and "
    "was the tallest tower until 1930.",
    "title": "A title alone",
}


def test_the_embedded_llm_writes_queries_and_resumes_after_a_stop(
    embedded: FrozenLM, tmp_path: Path
) -> None:
    texts = Collection(
        name="house",
        path=Path("house"),
        corpus={key: Document(text, key) for key, text in CORPUS.items()},
        topics={},
        qrels={},
    )

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize_queries(texts, embedded, 6, tmp_path, advance=stop)
    before = journal(tmp_path).read_bytes()
    result = synthesize_queries(texts, embedded, 6, tmp_path)
    assert journal(tmp_path).read_bytes() == before
    assert before.count(b"\n") == 7
    assert 3 <= len(result.topics) <= 6
    assert result.topics.keys() == result.qrels.keys()
    sources = [docid for judged in result.qrels.values() for docid in judged]
    assert len(sources) == len(result.topics)
    assert set(sources) <= CORPUS.keys() - {"title"}
    shared = [
        bool(set(query.casefold().split()) & set(CORPUS[docid].casefold().split()))
        for query, docid in zip(result.topics.values(), sources, strict=True)
    ]
    assert all(shared)
    assert all(acceptable(query, "") and "\n" not in query for query in result.topics.values())


def test_the_embedded_llm_writes_the_same_queries_for_the_same_seed(
    embedded: FrozenLM, tmp_path: Path
) -> None:
    texts = Collection(
        name="house",
        path=Path("house"),
        corpus={key: Document(CORPUS[key], key) for key in ("rust", "tower")},
        topics={},
        qrels={},
    )
    one, other, third = (
        synthesize_queries(texts, embedded, 2, tmp_path / folder, styles=STYLES[1:2], seed=seed)
        for folder, seed in (("a", 0), ("b", 0), ("c", 7))
    )
    assert one == other
    assert list(one.topics.values()) != list(third.topics.values())
