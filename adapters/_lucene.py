"""Index a corpus with Lucene, load topics, and retrieve candidates with BM25."""

from __future__ import annotations

import json
import reprlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from routehead_plugins.data import Document, check_count
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import (
    CORPUS_FILE,
    Run,
    Topics,
    json_id,
    json_records,
    json_text,
    read_topics,
    titled_text,
)

from . import _jvm

_BATCH = 10_000
# Anserini refuses a document without contents. A no-break space is not a word to Lucene and blank
# to Python, so that blank documents can be looked up like all others.
_NO_CONTENTS = "\u00a0"


def build_index(
    corpus: str | Path | Iterable[Document],
    index_dir: str | Path,
    *,
    threads: int = 1,
    overwrite: bool = False,
) -> Path:
    """Index a corpus with Lucene, texts included, as Pyserini's BEIR "flat" indexes are.

    The index is built next to ``index_dir`` and moved there when complete. With more than one
    thread, the order of documents, and so of ties, varies from run to run.

    Args:
        corpus: A JSONL file with ``_id`` (or ``id``), ``text`` (or ``contents``) and optionally
            ``title``; a BEIR folder that holds ``corpus.jsonl``; or documents, whose id and text
            are indexed.
        index_dir: Folder to create.
        threads: Number of indexing threads.
        overwrite: Whether to replace an existing index.

    Returns:
        The folder of the index.

    Raises:
        CollectionError: The corpus is missing, malformed, empty or repeats an id, or
            ``index_dir`` exists.
        InputError: ``threads`` is below 1, or a document has no id.
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    check_count("threads", threads)
    target = Path(index_dir)
    _check_target(target, overwrite=overwrite)
    if isinstance(corpus, str | Path):
        records = _file_records(Path(corpus))
    else:
        records = _document_records(corpus)
    indexer_class = _jvm.load("pyserini.index.lucene").LuceneIndexer
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
    ) as temporary:
        built = Path(temporary, "new")
        arguments = ["-index", str(built), "-storeRaw"]
        with closing(indexer_class(args=arguments, threads=threads)) as indexer:
            _add_records(indexer, records)
        if target.exists():
            target.rename(Path(temporary, "old"))
        built.rename(target)
    return target


def is_index(folder: Path) -> bool:
    """Tell whether a folder holds a complete Lucene index."""
    return any(folder.glob("segments_*"))


def bm25_run(searcher: Any, topics: Mapping[Any, str], hits: int = 100, threads: int = 1) -> Run:
    """Search for every topic, in one batch if the searcher supports it.

    Args:
        searcher: A Pyserini searcher; a ``LuceneSearcher`` uses BM25 by default.
        topics: Queries by id; the ids may be integers.
        hits: Largest number of documents per query.
        threads: Number of searching threads.

    Returns:
        Query id -> document id -> score, best first, in the topics' order; empty for a query
        without results.

    Raises:
        InputError: A number is below 1.
    """
    check_count("hits", hits)
    check_count("threads", threads)
    queries = {str(qid): query for qid, query in topics.items()}
    if hasattr(searcher, "batch_search"):
        results = searcher.batch_search(list(queries.values()), list(queries), hits, threads)
    else:
        results = {qid: searcher.search(query, hits) for qid, query in queries.items()}
    run: Run = {}
    for qid in queries:
        scores: dict[str, float] = {}
        for hit in results.get(qid, ()):
            # A repeated id keeps its first, and so its best, score.
            scores.setdefault(str(hit.docid), float(hit.score))
        run[qid] = scores
    return run


def load_topics(path_or_name: str | Path) -> Topics:
    """Read topics from a file, or load one of Pyserini's sets of topics.

    Args:
        path_or_name: A file, see `read_topics`, or a name such as ``dl19-passage``, which
            Pyserini downloads. The ids of a file are never altered.

    Returns:
        Queries by id.

    Raises:
        CollectionError: No such file or name exists, the file is malformed, or the download
            failed.
        JavaError: A name was given, and no JDK that Lucene can run on was found.
        MissingExtraError: A name was given, and Pyserini is not installed.
    """
    path = Path(path_or_name)
    if path.is_file() or path.suffix in {".tsv", ".jsonl", ".json", ".trec"}:
        return read_topics(path)
    return _named_topics(str(path_or_name))


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Check that the target is new, empty, or an index that may be replaced."""
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not is_index(target)):
        raise CollectionError(
            f"index_dir={str(target)!r} exists and is not a Lucene index; "
            "expected a new or empty folder; choose another."
        )
    if is_index(target) and not overwrite:
        raise CollectionError(
            f"index_dir={str(target)!r} already holds a Lucene index; expected a new folder; "
            "open it with HeadRoutedStage.from_index, or pass overwrite=True to replace it."
        )


def _document_records(documents: Iterable[Document]) -> Iterator[dict[str, Any]]:
    """Turn documents into JSON records with ``id`` and ``contents``."""
    for index, document in enumerate(documents):
        if document.id is None:
            raise InputError(
                f"documents[{index}] has no id; Lucene finds documents by id; "
                "give each Document an id=."
            )
        yield {"id": document.id, "contents": document.text, "text": document.text}


def _file_records(path: Path) -> Iterator[dict[str, Any]]:
    """Turn a corpus file, or that of a folder, into JSON records with ``id`` and ``contents``."""
    path = path / CORPUS_FILE if path.is_dir() else path
    expected = "one JSON object per line with '_id', 'text' and maybe 'title'"
    for location, record in json_records(path, expected):
        docid = json_id(record, ("_id", "id"), location)
        text = json_text(record, ("text", "contents"), location, blank=True)
        others = {name: value for name, value in record.items() if name not in {"_id", "id"}}
        yield {"id": docid, **others, "contents": titled_text(record.get("title"), text)}


def _add_records(indexer: Any, records: Iterator[dict[str, Any]]) -> None:
    """Pass the records to Lucene in batches; check ids and that none is refused."""
    seen: set[str] = set()
    while batch := list(islice(records, _BATCH)):
        for record in batch:
            if record["id"] in seen:
                raise CollectionError(
                    f"document {reprlib.repr(record['id'])} occurs twice in the corpus; "
                    "expected each id once; remove or rename one."
                )
            seen.add(record["id"])
            if not record["contents"].strip():
                record["contents"] = _NO_CONTENTS
        # Pyserini's add_batch_raw does not return the number of documents that were taken.
        taken = indexer.object.addRawDocuments([json.dumps(record) for record in batch])
        if taken != len(batch):
            first, last = (reprlib.repr(batch[index]["id"]) for index in (0, -1))
            raise CollectionError(
                f"Lucene took {taken} of the {len(batch)} documents from {first} to {last}; "
                "expected all; look there for ids of unusual length."
            )
    if not seen:
        raise CollectionError("the corpus has no document; expected one or more; check the file.")


def _named_topics(name: str) -> Topics:
    """Load a set of topics by Pyserini's name for it."""
    get_topics = _jvm.load("pyserini.search").get_topics
    try:
        return _titles(get_topics(name))
    except ValueError as error:
        raise CollectionError(
            f"topics {name!r} are neither a file nor known to Pyserini; expected a .tsv, .jsonl or "
            ".trec file, or a name such as 'dl19-passage'; check the spelling."
        ) from error
    except _jvm.load("jnius").JavaException as error:
        raise CollectionError(
            f"topics {name!r} could not be downloaded; Pyserini fetches them from GitHub; "
            "check the network, or give a .tsv, .jsonl or .trec file."
        ) from error


def _titles(topics: Mapping[Any, Mapping[str, str]]) -> Topics:
    return {str(qid): str(fields["title"]) for qid, fields in topics.items()}
