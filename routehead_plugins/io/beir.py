"""Test collections as BEIR folders; errors name the file and the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from routehead_plugins.data import Document, check_count
from routehead_plugins.errors import CollectionError
from routehead_plugins.files import StrPath, show, show_path
from routehead_plugins.io.text_files import (
    first_key,
    json_id,
    json_records,
    json_text,
    read_lines,
    reject_repeated,
)
from routehead_plugins.io.topics import looks_like_trec, trec_topics
from routehead_plugins.io.trec import Qrels, Run, read_qrels, read_run

Topics: TypeAlias = dict[str, str]
"""Query id -> text of the query."""

BUNDLED = Path(__file__).parents[1] / "assets" / "bundled"
"""The collection that comes with the package, for demonstrations."""

CORPUS_FILE = "corpus.jsonl"
TOPICS_FILE = "queries.jsonl"
QRELS_FILE = "qrels/test.tsv"
RUN_FILE = "run.bm25.trec"

_ID_KEYS = ("_id", "id")
_TOPIC_IDS = ("_id", "qid", "query_id", "id")
_TEXT_KEYS = ("text", "contents")


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments that belong together.

    Attributes:
        name: Name of the folder.
        path: Path of the folder.
        corpus: Documents by id.
        topics: Query texts by id.
        qrels: Judgments; may name documents that the corpus lacks.
        run: Candidates to re-rank, best first; None when the folder has none.
    """

    name: str
    path: Path
    corpus: Mapping[str, Document]
    topics: Topics
    qrels: Qrels
    run: Run | None = None

    def candidates(self, query_id: str, depth: int) -> list[Document]:
        """Return the documents to re-rank for one query, best first, with their scores.

        Args:
            query_id: Id of a query; a query that the run lacks has no candidates.
            depth: Maximum number of documents.

        Raises:
            InputError: The depth is below one.
            CollectionError: There is no run, no such query, or no such document.
        """
        check_count("depth", depth)
        if self.run is None:
            raise CollectionError(
                f"{show_path(self.path)} has no {RUN_FILE}; expected a run with the candidates; "
                "run BM25 first."
            )
        if query_id not in self.topics:
            raise CollectionError(
                f"query {show(query_id)} is not in {show_path(self.path / TOPICS_FILE)}; "
                "expected one of its ids; check the query id."
            )
        hits = list(self.run.get(query_id, {}).items())[:depth]
        for doc_id, _ in hits:
            if doc_id not in self.corpus:
                raise CollectionError(
                    f"query {show(query_id)}: the run names document {show(doc_id)}, which "
                    f"{show_path(self.path / CORPUS_FILE)} lacks; expected a run over this corpus; "
                    "use the run and the corpus of one index."
                )
        return [replace(self.corpus[doc_id], score=score) for doc_id, score in hits]


def load_collection(path: StrPath) -> Collection:
    """Load a BEIR folder.

    Args:
        path: Folder with ``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv`` and, where
            there are candidates to re-rank, ``run.bm25.trec``.

    Raises:
        CollectionError: The folder or a file is missing or malformed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CollectionError(
            f"{show_path(path)} is not a folder; expected a BEIR folder with {CORPUS_FILE}, "
            f"{TOPICS_FILE} and {QRELS_FILE}; check the path."
        )
    run_path = folder / RUN_FILE
    corpus = read_corpus(folder / CORPUS_FILE)
    topics = read_topics(folder / TOPICS_FILE)
    qrels = read_qrels(folder / QRELS_FILE)
    run = read_run(run_path) if run_path.exists() else None
    judgments = show_path(folder / QRELS_FILE, 80)
    check_shared_ids("query", topics, TOPICS_FILE, qrels, judgments)
    judged = {doc_id: judgment for by_doc in qrels.values() for doc_id, judgment in by_doc.items()}
    check_shared_ids("document", corpus, CORPUS_FILE, judged, judgments)
    if run is not None:
        check_shared_ids("query", topics, TOPICS_FILE, run, show_path(run_path, 80))
    return Collection(folder.resolve().name, folder, corpus, topics, qrels, run)


def check_shared_ids(
    kind: str, known: Mapping[str, object], source: str, named: Mapping[str, object], namer: str
) -> None:
    """Check that two files do not use ids of two kinds, such as ``26`` and ``AR26``.

    One id in common suffices: files may hold more, or less, than each other.

    Args:
        kind: What the ids name: "query" or "document".
        known: Ids of the topics or the corpus.
        source: Name of their file, or "the topics", for the message.
        named: Ids in the judgments or the run; none is no error.
        namer: Name of their file, for the message.

    Raises:
        CollectionError: No id is in both; the message shows ids of both kinds.
    """
    if named and not any(name in known for name in named):
        ours, theirs = (
            ", ".join(show(name, 20) for name in islice(names, 2)) or "none"
            for names in (known, named)
        )
        raise CollectionError(
            f"no {kind} of {namer} is in {source}: the former has the ids {theirs}, the latter "
            f"{ours}; expected the same ids; rename those of one file."
        )


def titled_text(title: object, text: str) -> str:
    """Put the title, if it is a non-blank string, on a line of its own before the text."""
    return f"{title}\n{text}" if isinstance(title, str) and title.strip() else text


def read_corpus(path: StrPath) -> dict[str, Document]:
    """Read documents, in the file's order.

    The title is put before the text. Like all other keys, it is also in the metadata.

    Args:
        path: JSON lines with ``_id`` (or ``id``), ``text`` (or ``contents``) and maybe ``title``.

    Raises:
        CollectionError: The file is missing or malformed, or an id occurs twice.
    """
    corpus: dict[str, Document] = {}
    for location, document in _documents(path):
        reject_repeated(str(document.id), corpus, "document", location)
        corpus[str(document.id)] = document
    return corpus


def read_documents(path: StrPath) -> Iterator[Document]:
    """Read the documents of a corpus one after the other; see ``read_corpus``.

    Raises:
        CollectionError: The file is missing or malformed. Ids that occur twice are no error here.
    """
    return (document for _, document in _documents(path))


def check_corpus(path: StrPath) -> int:
    """Check a corpus as ``read_corpus`` does, with nothing but its ids in memory.

    Returns:
        The number of documents.

    Raises:
        CollectionError: See ``read_corpus``.
    """
    ids: dict[str, None] = {}
    for location, document in _documents(path):
        reject_repeated(str(document.id), ids, "document", location)
        ids[str(document.id)] = None
    return len(ids)


def _documents(path: StrPath) -> Iterator[tuple[str, Document]]:
    """Yield the location and the content of each line of a corpus."""
    expected = "one JSON object per line with '_id', 'text' and maybe 'title'"
    for location, record in json_records(path, expected):
        doc_id = json_id(record, _ID_KEYS, location)
        text = json_text(record, _TEXT_KEYS, location, blank=True)
        metadata = {key: value for key, value in record.items() if (key, value) != ("title", "")}
        del metadata[first_key(record, _ID_KEYS)], metadata[first_key(record, _TEXT_KEYS)]
        yield location, Document(titled_text(record.get("title"), text), doc_id, metadata)


def read_topics(path: StrPath) -> Topics:
    """Read queries, in the file's order.

    Args:
        path: JSON lines (``.jsonl``, ``.json``) with ``_id``, ``qid``, ``query_id`` or ``id``, and
            ``text`` or ``query``; TREC's blocks of tags (``.trec``, or a file that begins with a
            tag), see `trec_topics`; any other file has lines of id, tab, text.

    Raises:
        CollectionError: The file is missing or malformed, a text is blank, or an id occurs twice.
    """
    topics: Topics = {}
    for location, query_id, text in _topics(path):
        reject_repeated(query_id, topics, "query", location)
        topics[query_id] = text
    return topics


def read_instructions(path: StrPath) -> dict[str, str]:
    """Read the instructions that a topics file in JSON has for some of its queries.

    Args:
        path: A file as for ``read_topics``; files in other formats have none.

    Returns:
        Query id -> the text of its ``instruction``.

    Raises:
        CollectionError: The file is missing or malformed, or an instruction is no text.
    """
    if Path(path).suffix not in (".jsonl", ".json"):
        return {}
    expected = "one JSON object per line with '_id' and 'text'"
    return {
        json_id(record, _TOPIC_IDS, location): json_text(
            record, ("instruction",), location, blank=False
        )
        for location, record in json_records(path, expected)
        if record.get("instruction") is not None
    }


def _topics(path: StrPath) -> Iterator[tuple[str, str, str]]:
    """Yield the location, id and text of each query."""
    if Path(path).suffix in (".jsonl", ".json"):
        expected = "one JSON object per line with '_id' and 'text'"
        for location, record in json_records(path, expected):
            query_id = json_id(record, _TOPIC_IDS, location)
            yield location, query_id, json_text(record, ("text", "query"), location, blank=False)
        return
    is_trec = Path(path).suffix == ".trec"
    expected = "<top> blocks with <num> and <title>" if is_trec else "lines of query id, tab, text"
    lines = list(read_lines(path, expected))
    if is_trec or looks_like_trec(lines):
        yield from trec_topics(lines, path)
        return
    for location, line in lines:
        query_id, _, text = (part.strip() for part in line.partition("\t"))
        if not query_id or not text:
            raise CollectionError(
                f"{location}: {show(line)} is not a query; "
                "expected an id, a tab and a non-blank text; repair the line."
            )
        yield location, query_id, text
