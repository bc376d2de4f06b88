"""Lines that are read, files that are written, and what the errors say."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from text_files import Reader, check_malformed, file

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.files import atomic_write_text
from routehead_plugins.io.beir import read_corpus, read_topics
from routehead_plugins.io.trec import read_run, write_run

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


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = file(tmp_path, "out", "old")
    atomic_write_text(path, "new\r\nh\u00e9")
    assert path.read_bytes() == b"new\r\nh\xc3\xa9"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "out", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as caught:
        atomic_write_text(path, "new")
    assert str(caught.value) == (
        f"{path} cannot be written (No space left on device); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write_text(tmp_path / "out", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o644


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target, link = file(tmp_path, "target", "old"), tmp_path / "link"
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_directly() -> None:
    atomic_write_text("/dev/null", "x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("name", "reason"), [("no/out", "No such file or directory"), ("", "Is a directory")]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        atomic_write_text(tmp_path / name, "x")
    assert str(caught.value) == (
        f"{tmp_path / name} cannot be written ({reason}); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_run(tmp_path / "run", {"q": [("\ud83d", 1.0)]}, "t")
    assert str(caught.value) == (
        f"{tmp_path}/run cannot be written: character 5 of its text, '\\ud83d', is half of a "
        "surrogate pair; expected Unicode; replace it."
    )
