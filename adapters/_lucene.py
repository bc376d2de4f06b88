"""What comes before re-ranking: index a corpus with Lucene, load topics, retrieve with BM25."""

from __future__ import annotations

import json
import reprlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from routehead_plugins.data import Document
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
# Anserini refuses a document without contents. To Lucene this is still no word at all, and to
# Python it is still blank; so a blank document can be looked up like every other.
_NO_CONTENTS = "\u00a0"
_TREC_READER = "io.anserini.search.topicreader.TrecTopicReader"


def build_index(
    corpus: str | Path | Iterable[Document],
    index_dir: str | Path,
    *,
    threads: int = 1,
    overwrite: bool = False,
) -> Path:
    """Index a corpus with Lucene, texts included, as Pyserini's BEIR "flat" indexes are.

    The index is built beside ``index_dir`` and moved there when complete. More than one thread
    makes the order of documents, and so of ties, vary from run to run.

    Args:
        corpus: A JSONL file with ``_id`` (or ``id``), ``text`` (or ``contents``) and maybe
            ``title``; a BEIR folder that holds ``corpus.jsonl``; or documents, of which id and
            text are kept.
        index_dir: Folder to create.
        threads: Indexing threads.
        overwrite: Replace an index that is already there.

    Returns:
        The folder of the index.

    Raises:
        CollectionError: The corpus is missing, malformed, empty or repeats an id, or
            ``index_dir`` is taken.
        InputError: ``threads`` is less than one, or a document has no id.
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    check_count("threads", threads)
    target = Path(index_dir)
    _check_target(target, overwrite=overwrite)
    records = _corpus_records(corpus)
    indexer_class = _jvm.load("pyserini.index.lucene").LuceneIndexer
    target.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        built = workshop / "new"
        indexer = indexer_class(args=["-index", str(built), "-storeRaw"], threads=threads)
        try:
            _add_records(indexer, records)
        finally:
            indexer.close()
        if target.exists():
            target.rename(workshop / "old")
        built.rename(target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return target


def is_index(folder: Path) -> bool:
    """Tell whether a folder holds a complete Lucene index."""
    return any(folder.glob("segments_*"))


def bm25_run(searcher: Any, topics: Mapping[Any, str], hits: int = 100, threads: int = 1) -> Run:
    """Search for every topic, for all at once where the searcher can.

    Args:
        searcher: A Pyserini searcher; BM25 if it is a ``LuceneSearcher`` left as it is.
        topics: Queries by id; the ids may be integers.
        hits: Most documents per query.
        threads: Searching threads.

    Returns:
        Scores by document id by query id, best first, in the topics' order. A query that finds
        nothing keeps its place, empty.

    Raises:
        InputError: A number is less than one.
    """
    check_count("hits", hits)
    check_count("threads", threads)
    queries = {str(qid): query for qid, query in topics.items()}
    if hasattr(searcher, "batch_search"):
        found = searcher.batch_search(list(queries.values()), list(queries), hits, threads)
    else:
        found = {qid: searcher.search(query, hits) for qid, query in queries.items()}
    run: Run = {}
    for qid in queries:
        scores: dict[str, float] = {}
        for hit in found.get(qid, ()):
            # A repeated id keeps its first, and so its best, score.
            scores.setdefault(str(hit.docid), float(hit.score))
        run[qid] = scores
    return run


def load_topics(path_or_name: str | Path) -> Topics:
    """Read topics from a file, or load those that Pyserini knows by name.

    Args:
        path_or_name: A .tsv or .jsonl file, a .trec file of ``<top>`` blocks, or a name such as
            ``dl19-passage``, which Pyserini downloads.

    Returns:
        Queries by id.

    Raises:
        CollectionError: There is no such file and no such name, the file is malformed, or the
            download failed.
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    path = Path(path_or_name)
    if path.suffix == ".trec" and path.is_file():
        return _trec_topics(path)
    if path.is_file() or path.suffix in {".tsv", ".jsonl", ".json", ".trec"}:
        return read_topics(path)
    return _named_topics(str(path_or_name))


def check_count(name: str, value: int) -> None:
    """Refuse a count below one.

    Raises:
        InputError: It is.
    """
    if value < 1:
        raise InputError(f"{name}={value} leaves nothing to do; give 1 or more.")


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse to write over an index, and ever to touch a folder that is something else."""
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not is_index(target)):
        raise CollectionError(
            f"index_dir={str(target)!r} exists and is no Lucene index; "
            "expected a new or empty folder; choose another."
        )
    if is_index(target) and not overwrite:
        raise CollectionError(
            f"index_dir={str(target)!r} already holds a Lucene index; expected a new folder; "
            "open it with HeadRoutedStage.from_index, or pass overwrite=True to replace it."
        )


def _corpus_records(corpus: str | Path | Iterable[Document]) -> Iterator[dict[str, Any]]:
    """Turn a corpus of either kind into JSON records with ``id`` and ``contents``."""
    if not isinstance(corpus, str | Path):
        return _document_records(corpus)
    path = Path(corpus)
    return _file_records(path / CORPUS_FILE if path.is_dir() else path)


def _document_records(documents: Iterable[Document]) -> Iterator[dict[str, Any]]:
    for index, document in enumerate(documents):
        if document.id is None:
            raise InputError(
                f"documents[{index}] has no id; Lucene finds documents by id; "
                "give each Document an id=."
            )
        yield {"id": document.id, "contents": document.text, "text": document.text}


def _file_records(path: Path) -> Iterator[dict[str, Any]]:
    expected = "one JSON object per line with '_id', 'text' and maybe 'title'"
    for line, record in json_records(path, expected):
        docid = json_id(record, ("_id", "id"), path, line)
        text = json_text(record, ("text", "contents"), path, line, blank=True)
        kept = {name: value for name, value in record.items() if name not in {"_id", "id"}}
        yield {"id": docid, **kept, "contents": titled_text(record.get("title"), text)}


def _add_records(indexer: Any, records: Iterator[dict[str, Any]]) -> None:
    """Hand the records to Lucene in batches, minding ids and refusals."""
    seen: set[str] = set()
    while batch := list(islice(records, _BATCH)):
        for record in batch:
            if record["id"] in seen:
                raise CollectionError(
                    f"document {_quoted(record)} occurs twice in the corpus; "
                    "expected each id once; remove or rename one."
                )
            seen.add(record["id"])
            if not record["contents"].strip():
                record["contents"] = _NO_CONTENTS
        # The wrapper's add_batch_raw loses the count of documents that were taken.
        taken = indexer.object.addRawDocuments([json.dumps(record) for record in batch])
        if taken != len(batch):
            raise CollectionError(
                f"Lucene took {taken} of the {len(batch)} documents from {_quoted(batch[0])} to "
                f"{_quoted(batch[-1])}; expected all; look there for ids of unusual length."
            )
    if not seen:
        raise CollectionError("the corpus has no document; expected one or more; check the file.")


def _quoted(record: Mapping[str, Any]) -> str:
    return reprlib.repr(record["id"])


def _trec_topics(path: Path) -> Topics:
    """Read the titles of a file of ``<top>`` blocks."""
    get_topics = _jvm.load("pyserini.search").get_topics_with_reader
    try:
        topics = get_topics(_TREC_READER, str(path))
    except ValueError:
        topics = {}
    if not topics:
        raise CollectionError(
            f"{path} has no topics that can be read; expected <top> blocks with <num> and "
            "<title>; repair it, or give a .tsv or .jsonl file."
        )
    return _titles(topics)


def _named_topics(name: str) -> Topics:
    """Load the topics that Pyserini knows by this name."""
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
