"""Topics in TREC's format: blocks of tags, with or without ends, or XML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from routehead_plugins.errors import CollectionError
from routehead_plugins.files import StrPath, show, show_path
from routehead_plugins.io.text_files import is_writable_name

_BLOCK = re.compile(r"<top>|<topic\b(?P<attributes>[^<>]*)>", re.IGNORECASE)
_NUMBER = re.compile(r"""\bnumber\s*=\s*["'](?P<id>[^"'<>]*)""", re.IGNORECASE)
_NUM = re.compile(r"<num>\s*(?:number\b\s*:?)?\s*(?P<id>[^<]*)", re.IGNORECASE)
_TITLE = re.compile(r"<(?P<name>title|query)>\s*(?:topic\s*:)?(?P<rest>.*)", re.I | re.S)
# Few files close their fields: one ends where the next tag begins a line, or where one of TREC's
# own tags stands. Other tags belong to the text.
_END = re.compile(
    r"^\s*<|</(?:title|query|top|topic|num)>|<(?:title|query|num|desc|narr|dom|smry|con|fac|def|"
    r"description|narrative|summary|question|querytime|querytweettime|top|topic)\b",
    re.IGNORECASE | re.MULTILINE,
)


def looks_like_trec(lines: Sequence[tuple[str, str]]) -> bool:
    """Tell whether a file of topics, as `read_lines` reads it, has tags instead of columns."""
    return bool(lines) and lines[0][1].lstrip().startswith("<") and "\t" not in lines[0][1]


def trec_topics(lines: Sequence[tuple[str, str]], path: StrPath) -> Iterator[tuple[str, str, str]]:
    """Yield the location, id and title of each topic; ids are those of the file, never altered.

    The id is what stands in ``<num>`` after ``Number:``, or the attribute ``number`` of
    ``<topic>``; the title is that of ``<title>``, or else of ``<query>``, with single spaces.

    Args:
        lines: Locations and lines that are not blank, as `read_lines` reads them.
        path: Path of their file, for the error.

    Raises:
        CollectionError: There is no topic, or one has no id, an id of several words or no title.
    """
    text = "\n".join(line for _, line in lines)
    blocks = list(_BLOCK.finditer(text))
    if not blocks:
        raise CollectionError(
            f"{show_path(path)} has no topics that can be read; expected <top> blocks with <num> "
            "and <title>; repair it, or give a .tsv or .jsonl file."
        )
    ends = [block.start() for block in blocks[1:]] + [len(text)]
    number, counted = 0, 0
    for block, end in zip(blocks, ends, strict=True):
        number += text.count("\n", counted, block.start())
        counted = block.start()
        location, body = lines[number][0], text[block.end() : end]
        attributes = block["attributes"]
        id_match = _NUMBER.search(attributes or "") or _NUM.search(body)
        topic_id = id_match["id"].strip() if id_match else ""
        if len(topic_id.split()) != 1 or not is_writable_name(topic_id):
            raise CollectionError(
                f"{location}: the id of the topic is {show(topic_id)}; expected one word in <num>, "
                'or in <topic number="...">; repair the topic.'
            )
        title = _title(body)
        if not title:
            raise CollectionError(
                f"{location}: topic {show(topic_id)} has no title; expected text in <title>; "
                "add it, or give a .tsv or .jsonl file."
            )
        yield location, topic_id, title if attributes is None else html.unescape(title)


def _title(body: str) -> str:
    match = _TITLE.search(body)
    if match is None:
        return ""
    rest = match["rest"].lstrip()
    end = _END.search(rest)
    return " ".join(rest[: end.start() if end else len(rest)].split())
