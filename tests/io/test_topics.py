"""TREC topics: ids as they stand in the file, and titles."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_files import check_malformed, file

from routehead_plugins.errors import CollectionError
from routehead_plugins.io.beir import read_topics

REST = "<desc> Description:\nwhy < how\n\n<narr> Narrative:\nNumber: 7 <title>\n</top>\n"


@pytest.mark.parametrize(
    "topic_id", ["301", "051", "12_3", "12-3", "GC07", "7.1", "2a", "B", "q\u00e91", "0", "1e3"]
)
def test_ids_are_those_of_the_file(tmp_path: Path, topic_id: str) -> None:
    for number in (
        f"<num> Number: {topic_id}",
        f"<num>Number:{topic_id} </num>",
        f"<NUM>{topic_id}",
    ):
        path = file(tmp_path, "t.trec", f"<top>\n{number}\n<title> why cats purr\n</top>\n")
        assert read_topics(path) == {topic_id: "why cats purr"}


@pytest.mark.parametrize(
    ("block", "title"),
    [
        ("<title> why  cats purr \n\n<desc> no\n", "why cats purr"),
        ("<title>\nwhy cats\n  purr\n\n<desc> no\n", "why cats purr"),
        ("<dom> Domain: pets\n<title> Topic: why cats purr\n<desc> no\n", "why cats purr"),
        ("<title>why cats purr</title><desc>no</desc>\n", "why cats purr"),
        ("<title> why cats purr <desc> no <narr> no\n", "why cats purr"),
        ("<desc> no\n<title> why cats purr\n", "why cats purr"),
        ("<query> why cats purr </query>\n<querytime> no </querytime>\n", "why cats purr"),
        ("<title> is 1 < 2 or <b>not</b>?\n<desc> no\n", "is 1 < 2 or <b>not</b>?"),
        ("<title> cats &amp; dogs\n<desc> no\n", "cats &amp; dogs"),
    ],
)
def test_titles_end_where_the_next_field_begins(tmp_path: Path, block: str, title: str) -> None:
    path = file(tmp_path, "t.trec", f"<top>\n<num> Number: 5\n{block}</top>\nno\n")
    assert read_topics(path) == {"5": title}


def test_topics_follow_each_other_with_and_without_ends(tmp_path: Path) -> None:
    blocks = f"<top>\n<num> Number: 31_1\n<title> one\n{REST}"
    blocks += "\n<top>\n<num> Number: 31_2\n<title> two\n<top><num>311<title>three</top>"
    expected = {"31_1": "one", "31_2": "two", "311": "three"}
    assert read_topics(file(tmp_path, "t.trec", blocks)) == expected
    # Without the suffix, a file is known by its first tag.
    assert read_topics(file(tmp_path, "topics.31-32", "\n" + blocks)) == expected


def test_xml_topics_are_read(tmp_path: Path) -> None:
    content = (
        '<?xml version="1.0"?>\n<topics task="x">\n<topic number="07" type="single">\n'
        "<query>cats &amp; dogs</query>\n<description>no</description>\n</topic>\n"
        "<topic type='faceted' number='CT2'><title>purr</title><query>no</query></topic>\n</topics>"
    )
    expected = {"07": "cats & dogs", "CT2": "purr"}
    assert read_topics(file(tmp_path, "t.xml", content)) == expected
    assert read_topics(file(tmp_path, "t.trec", content)) == expected


def test_lines_that_begin_with_a_tag_are_still_columns(tmp_path: Path) -> None:
    assert read_topics(file(tmp_path, "t.tsv", "<1>\twhy\n")) == {"<1>": "why"}


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (
            "\n<top>\n<title> x\n</top>\n",
            2,
            "the id of the topic is ''; expected one word in <num>, or in "
            '<topic number="...">; repair the topic.',
        ),
        (
            "<top>\n<num> 1\n<title> x\n</top>\n\n<top>\n<num> Number: 5 6\n<title> x\n</top>\n",
            6,
            "the id of the topic is '5 6'; expected one word in <num>, or in "
            '<topic number="...">; repair the topic.',
        ),
        (
            "<top>\n<num> Number: 5\n<title> \n<desc> no\n</top>\n",
            1,
            "topic '5' has no title; expected text in <title>; add it, or give a .tsv or .jsonl "
            "file.",
        ),
        (
            "<top>\n<num> Number: 5\n<title> a\n</top>\n<top>\n<num> Number: 5\n<title> b\n</top>",
            5,
            "query '5' occurs twice; expected each id once; remove one.",
        ),
    ],
)
def test_a_malformed_topic_is_named_with_its_problem(
    tmp_path: Path, content: str, line: int, problem: str
) -> None:
    check_malformed(read_topics, file(tmp_path, "t.trec", content), line, problem)


@pytest.mark.parametrize("content", ["", "301\twhy cats purr\n", "<topics>\n"])
def test_a_trec_file_without_topics_is_named(tmp_path: Path, content: str) -> None:
    path = file(tmp_path, "topics.trec", content)
    with pytest.raises(CollectionError) as caught:
        read_topics(path)
    assert str(caught.value) == (
        f"{path} has no topics that can be read; expected <top> blocks with <num> and <title>; "
        "repair it, or give a .tsv or .jsonl file."
    )
