"""Lines that are read, and what the errors say."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from text_files import Reader, check_malformed, file

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError
from routehead_plugins.io import text_files
from routehead_plugins.io.beir import read_corpus, read_topics
from routehead_plugins.io.trec import read_run

OBJECT = "expected one JSON object; repair the line."


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollectionError) as caught:
        read_run(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} cannot be read (Is a directory); "
        "expected the six columns 'qid Q0 docid rank score tag'; check the path."
    )


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    path = file(tmp_path, "c.jsonl", b'\xef\xbb\xbf\r\n{"_id":"1","text":"a"}\r\n\r\n \n')
    assert read_corpus(path) == {"1": Document("a", "1")}
    topics = file(tmp_path, "t.tsv", b"\xef\xbb\xbf1\tone\r\n\r\n2\ttwo\r\n")
    assert read_topics(topics) == {"1": "one", "2": "two"}
    run = file(tmp_path, "r", b"\xef\xbb\xbfq Q0 d 1 2 t\r\n")
    assert read_run(run) == {"q": {"d": 2.0}}


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    path = file(tmp_path, "c.jsonl", '{"_id":"1","text":"a\u2028b\x85c"}\n')
    assert read_corpus(path)["1"].text == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("reader", "name", "content", "line", "problem"),
    [
        (
            read_corpus,
            "c.jsonl",
            "{oops}",
            1,
            "'{oops}' is not JSON (Expecting property name enclosed in double quotes: "
            f"line 1 column 2 (char 1)); {OBJECT}",
        ),
        (
            read_corpus,
            "c.jsonl",
            "[1]",
            1,
            "[1] is not a JSON object; expected one per line; repair the line.",
        ),
        (
            read_corpus,
            "c.jsonl",
            b'{"_id":"1","text":"a"}\n{"_id":"2","text":"\xe9"}',
            2,
            "byte 0xe9 is not UTF-8; expected one JSON object per line with '_id', 'text' and "
            "maybe 'title'; save the file as UTF-8.",
        ),
    ],
)
def test_a_malformed_line_is_named_with_its_problem(
    tmp_path: Path, reader: Reader, name: str, content: str | bytes, line: int, problem: str
) -> None:
    check_malformed(reader, file(tmp_path, name, content), line, problem)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"_id": "1", "x": NaN}', "NaN is not a JSON number; null stands for a missing one"),
        ('{"x": [-Infinity]}', "-Infinity is not a JSON number; null stands for a missing one"),
        ('{"_id": "1", "x": 1e999}', "the number '1e999' is too large"),
        ('{"_id": 1%s}' % ("0" * 400), "a number has 401 digits; at most 308 are read"),
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        ('{"x": %s}' % ("[" * 10_000 + "]" * 10_000), "nested deeper than 100 levels"),
        ('{"x": %s}' % ('{"y":' * 101 + "1" + "}" * 101), "nested deeper than 100 levels"),
    ],
)
def test_what_cannot_be_written_again_is_refused_when_it_is_read(
    tmp_path: Path, line: str, problem: str
) -> None:
    path = file(tmp_path, "c.jsonl", '{"_id": "0", "text": "a"}\n' + line)
    with pytest.raises(CollectionError) as caught:
        read_corpus(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: '{{")
    assert f" is not JSON ({problem}); expected one JSON object; repair the line." in message
    assert len(message) < 300


def test_brackets_in_a_text_are_no_nesting(tmp_path: Path) -> None:
    text, nested = "[" * 500, "[" * 90 + "]" * 90
    path = file(tmp_path, "c.jsonl", f'{{"_id": "1", "text": "{text}", "x": {nested}}}')
    assert read_corpus(path)["1"].text == text


@pytest.mark.parametrize("escaped", ["q\\ud800", "q\\u0000"])
def test_an_id_that_no_run_can_hold_is_refused(tmp_path: Path, escaped: str) -> None:
    path = file(tmp_path, "c.jsonl", f'{{"_id": "{escaped}", "text": "a"}}')
    shown = escaped.replace("u0000", "x00")
    check_malformed(
        read_corpus,
        path,
        1,
        f"the id '{shown}' holds a null character or half of a surrogate pair, which no run can "
        "hold; rename it.",
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(b"1\tone\n", mtime=0), "the file is compressed by gzip"),
        ("1\tone\n".encode("utf-16"), "byte 0xff is not UTF-8"),
        ("1\tone\n".encode("utf-16-le"), "the line holds a null byte"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = file(tmp_path, "t.tsv", content)
    with pytest.raises(CollectionError) as caught:
        read_topics(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:1: {problem}")
    assert "; expected lines of query id, tab, text; " in message


def test_an_endless_line_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_BYTES", 2**20)
    with pytest.raises(CollectionError) as caught:
        read_run("/dev/zero")
    assert str(caught.value) == (
        "/dev/zero:1: the line is longer than 1 MiB; expected the six columns 'qid Q0 docid rank "
        "score tag'; check that this is the file you mean."
    )


def test_a_pipe_is_read_if_somebody_writes_to_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CollectionError, match="it is a pipe that nobody writes to"):
        read_topics(path)
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as stream:
        stream.write(b"1\tone\n")
    assert read_topics(f"/dev/fd/{read_end}") == {"1": "one"}
    os.close(read_end)


def test_messages_are_one_line_whatever_the_path(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200) / "a\nb.tsv"
    with pytest.raises(CollectionError) as caught:
        read_topics(path)
    message = str(caught.value)
    assert message.startswith("...xxx")
    assert "/a\\nb.tsv does not exist; expected lines of query id, tab, text" in message
    assert len(message) < 300
