"""Where the texts of retrieved documents come from, and what is said when they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from routehead_plugins.adapters._texts import TextSource
from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError


class Stored:
    """What Pyserini's searchers return for an id."""

    def __init__(self, raw: str | None, contents: str | None = None) -> None:
        self._raw = raw
        self._contents = contents

    def raw(self) -> str | None:
        return self._raw

    def contents(self) -> str | None:
        return self._contents


class Index:
    """A searcher, as far as texts go."""

    def __init__(self, **stored: Stored) -> None:
        self.stored: Mapping[str, Stored] = stored

    def doc(self, docid: str) -> Stored | None:
        return self.stored.get(docid)


class BatchIndex(Index):
    """A searcher that finds many documents at once."""

    def __init__(self, **stored: Stored) -> None:
        super().__init__(**stored)
        self.asked: list[tuple[list[str], int]] = []

    def batch_doc(self, docids: list[str], threads: int) -> dict[str, Stored]:
        self.asked.append((docids, threads))
        return {docid: self.stored[docid] for docid in docids if docid in self.stored}


class DenseSearcher:
    """A searcher without texts."""


def read(raw: str | None, **arguments: Any) -> Document:
    """Look up the one document of an index."""
    document: Document
    [document] = TextSource(Index(d=Stored(raw)), **arguments).documents([("d", 1.5)])
    return document


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("no JSON at all", "no JSON at all"),
        ("42", "42"),  # JSON, yet no object
        ('["a"]', '["a"]'),
        ({"id": "d", "contents": "body"}, "body"),  # MS MARCO v1
        ({"docid": "d", "title": "T", "segment": "body", "url": "u"}, "T\nbody"),  # v2.1
        ({"pid": "d", "passage": "body"}, "body"),  # v2
        ({"_id": "d", "title": "T", "text": "body", "contents": "T\nbody"}, "T\nbody"),  # BEIR
        ({"text": "first", "segment": "second"}, "first"),
        ({"text": " ", "contents": "second"}, "second"),
        ({"text": "", "contents": ""}, ""),
        ({"title": "", "text": "body"}, "body"),
        ({"title": None, "text": "body"}, "body"),
        ({"title": "T", "contents": "T\nbody"}, "T\nbody"),  # already folded in
        ({"title": "T", "text": "T body"}, "T\nT body"),
        ({"title": "T", "text": "T\nbody"}, "T\nT\nbody"),  # a text that begins with its title
        ({"title": "T", "text": "T\nbody", "contents": "T\nT\nbody"}, "T\nT\nbody"),
        ({"title": "T", "text": "", "contents": "T\n"}, "T\n"),
        ({"text": "", "contents": "\u00a0", "body": "of another kind"}, ""),  # no contents
        ({"text": ["not", "a", "text"], "body": "body"}, "body"),
    ],
)
def test_stored_documents_of_every_kind_give_their_text(raw: Any, text: str) -> None:
    stored = raw if isinstance(raw, str) else json.dumps(raw)
    assert read(stored).text == text


def test_other_fields_become_metadata() -> None:
    raw = {"_id": "d", "title": "T", "text": "body", "contents": "T\nbody", "url": "u", "n": 3}
    assert read(json.dumps(raw)) == Document(
        "T\nbody", "d", metadata={"title": "T", "url": "u", "n": 3}, score=1.5
    )


def test_the_text_field_can_be_named() -> None:
    raw = json.dumps({"text": "no", "abstract": "yes"})
    assert read(raw, text_fields=["abstract"]).text == "yes"


def test_a_stored_document_without_a_text_field_says_what_it_has() -> None:
    with pytest.raises(CollectionError) as error:
        read('{"id": "d", "abstract": "x"}')
    assert str(error.value) == (
        "document 'd' has no text in 'text', 'segment', 'contents', 'content', 'body', 'passage', "
        "only 'id', 'abstract'; name the field that holds it with text_fields=."
    )


def test_stored_contents_stand_in_for_a_missing_raw() -> None:
    source = TextSource(Index(d=Stored(None, "contents")))
    assert source.documents([("d", 1.0)]) == [Document("contents", "d", score=1.0)]


def test_an_index_without_texts_is_told_to_store_them() -> None:
    with pytest.raises(CollectionError) as error:
        read(None)
    assert str(error.value) == (
        "the index stores no text for document 'd'; expected an index made with -storeRaw; "
        "index again with -storeRaw (build_index does), or pass corpus=."
    )


@pytest.mark.parametrize("searcher", [Index(), BatchIndex(), DenseSearcher()])
def test_a_document_that_is_nowhere_is_named(searcher: Any) -> None:
    source = TextSource(searcher, corpus={"z": Document("z")})
    with pytest.raises(CollectionError) as error:
        source.documents([("z", 2.0), ("nowhere", 1.0)])
    assert str(error.value) == (
        "document 'nowhere' is neither in the index nor in the corpus; expected the text of every "
        "candidate; search the index that the run came from, or pass corpus=."
    )


def test_the_corpus_is_asked_before_the_index_and_left_as_it_is() -> None:
    corpus = {"a": Document("mine", metadata={"n": 1})}
    source = TextSource(Index(a=Stored("theirs"), b=Stored("too")), corpus)
    assert source.documents([("b", 2.0), ("a", 1.0)]) == [
        Document("too", "b", score=2.0),
        Document("mine", "a", metadata={"n": 1}, score=1.0),
    ]
    assert corpus == {"a": Document("mine", metadata={"n": 1})}


def test_a_dense_searcher_without_a_corpus_is_refused() -> None:
    with pytest.raises(InputError) as error:
        TextSource(DenseSearcher())
    assert str(error.value) == (
        "a DenseSearcher stores no texts; expected a searcher with doc(docid); "
        "pass corpus= with the documents by id."
    )


def test_all_texts_are_looked_up_at_once_where_the_searcher_can() -> None:
    index = BatchIndex(a=Stored("x"), b=Stored("y"))
    documents = TextSource(index).documents([("b", 3.0), ("a", 2.0), ("b", 1.0)])
    assert [(document.id, document.score) for document in documents] == [
        ("b", 3.0),
        ("a", 2.0),
        ("b", 1.0),
    ]
    assert index.asked == [(["a", "b"], 1)]


@pytest.mark.parametrize("fields", ["text", [], [5]])
def test_text_fields_must_be_names(fields: Any) -> None:
    with pytest.raises(InputError) as error:
        TextSource(Index(), text_fields=fields)
    assert str(error.value) == (
        f"text_fields={fields!r} names no field; expected a sequence of names; "
        "give one such as ('text', 'segment')."
    )


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ([Document("a", "d")], "corpus is a list; give a mapping from ids to Documents"),
        ("corpus.jsonl", "corpus is a str; give a mapping from ids to Documents"),
        ({"d": None}, "corpus['d'] is a NoneType; give a routehead_plugins.Document or a str."),
        ({"d": {"text": "a"}}, "corpus['d'] is a dict; give a routehead_plugins.Document or a str"),
    ],
)
def test_a_corpus_of_a_wrong_type_is_named(corpus: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        TextSource(Index(), corpus).documents([("d", 1.0)])
    assert words in str(error.value)
    assert len(str(error.value)) < 300


def test_a_corpus_may_hold_texts() -> None:
    corpus: Any = {"d": "a text"}
    assert TextSource(DenseSearcher(), corpus).documents([("d", 1.0)]) == [
        Document("a text", "d", score=1.0)
    ]


def test_a_message_about_many_fields_or_a_long_id_is_short() -> None:
    stored = Stored(json.dumps({f"field {i}" * 9: "x" for i in range(999)}))
    with pytest.raises(CollectionError) as error:
        TextSource(Index(**{"d" * 999: stored})).documents([("d" * 999, 1.0)])
    assert len(str(error.value)) < 300
