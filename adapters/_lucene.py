"""Index a corpus with Lucene, load topics, and retrieve candidates with BM25."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from routehead_plugins.data import (
    Document,
    as_number,
    check_count,
    check_flag,
    check_items,
    check_text,
    encodable,
)
from routehead_plugins.errors import CollectionError, InputError, class_name, short_repr
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
from ._texts import NO_CONTENTS, stored_document

_BATCH = 10_000


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
        InputError: ``threads`` is below 1, a document has no id, or an argument has a wrong type.
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    threads = check_count("threads", threads)
    target = as_path("index_dir", index_dir)
    _check_target(target, overwrite=check_flag("overwrite", overwrite))
    if isinstance(corpus, str | os.PathLike):
        records = _file_records(Path(corpus))
    else:
        records = _document_records(check_items(corpus, "corpus", "Documents"))
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


def open_index(index_dir: str | Path) -> Any:
    """Open a Lucene index on disk.

    Args:
        index_dir: Folder of the index.

    Returns:
        A ``LuceneSearcher``.

    Raises:
        CollectionError: The folder holds no Lucene index.
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    folder = as_path("index_dir", index_dir)
    if not is_index(folder):
        raise CollectionError(
            f"index_dir={str(folder)!r} holds no Lucene index; expected a folder made by "
            "build_index or Pyserini; check the path, or build it."
        )
    return _jvm.load("pyserini.search.lucene").LuceneSearcher(str(folder))


def stored_documents(index_dir: str | Path) -> tuple[int, Iterator[Document]]:
    """Read the documents of a Lucene index one after the other.

    Args:
        index_dir: Folder of an index that stores texts.

    Returns:
        Their number, and the documents.

    Raises:
        CollectionError: The folder holds no Lucene index.
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    searcher = open_index(index_dir)
    stored = (searcher.doc(number) for number in range(searcher.num_docs))
    documents = (stored_document(str(doc.docid()), doc, None) for doc in stored if doc is not None)
    return int(searcher.num_docs), documents


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
        InputError: A number is below 1, or a query is not a text.
    """
    hits, threads = check_count("hits", hits), check_count("threads", threads)
    queries = texts_by_id(topics)
    # Java takes no halves of surrogate pairs, neither in queries nor in ids.
    texts = [encodable(query) for query in queries.values()]
    if hasattr(searcher, "batch_search"):
        numbers = [str(number) for number in range(len(texts))]
        answers = searcher.batch_search(texts, numbers, hits, threads)
        results = [answers.get(number, ()) for number in numbers]
    else:
        results = [search(searcher, text, hits) for text in texts]
    run: Run = {}
    for qid, hits_of_query in zip(queries, results, strict=True):
        scores: dict[str, float] = {}
        for docid, score in scored_ids(hits_of_query):
            # A repeated id keeps its first, and so its best, score.
            scores.setdefault(docid, score)
        run[qid] = scores
    return run


def search(searcher: Any, query: str, count: int) -> Any:
    """Search for one query; halves of surrogate pairs, which Java does not take, are replaced."""
    if not callable(getattr(searcher, "search", None)):
        raise InputError(
            f"searcher is a {class_name(searcher)}; give an object with search(query, k), such as "
            "a LuceneSearcher."
        )
    check_text("query", query, blank=True)
    return searcher.search(encodable(query), count)


def scored_ids(hits: Any) -> Iterator[tuple[str, float]]:
    """Yield the id and the score of each of a searcher's hits."""
    for index, hit in enumerate(hits):
        if not hasattr(hit, "docid") or not hasattr(hit, "score"):
            raise InputError(
                f"hits[{index}] is a {class_name(hit)}; give objects with docid and score."
            )
        yield str(hit.docid), as_score(hit.docid, hit.score)


def as_score(docid: object, score: object) -> float:
    """Convert a first-stage score to a float; the id is for the message."""
    number = as_number(score)
    if number is None:
        raise InputError(
            f"the score of document {short_repr(docid)} is {short_repr(score)}; give a number."
        )
    return number


def texts_by_id(topics: Mapping[Any, str]) -> Topics:
    """Check topics, and convert their ids, which may be whole numbers, to texts."""
    if not isinstance(topics, Mapping):
        raise InputError(
            f"topics is a {class_name(topics)}; give a mapping from ids to queries, as "
            "load_topics returns it."
        )
    queries: Topics = {}
    for qid, query in topics.items():
        check_text(f"topics[{short_repr(qid)}]", query, blank=True)
        if str(qid) in queries:
            raise InputError(f"two topics have the id {short_repr(str(qid))}; rename one.")
        queries[str(qid)] = query
    return queries


def as_path(name: str, path: Any) -> Path:
    """Convert the path of a file or folder; its argument's name is for the message."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{name}={short_repr(path)} is a {class_name(path)}; give a path.")
    return Path(path)


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
    path = as_path("path_or_name", path_or_name)
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
        if not isinstance(document, Document):
            raise InputError(
                f"corpus[{index}] is a {class_name(document)}; give a routehead_plugins.Document, "
                "or the path of a corpus."
            )
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
        # The text is stored without its title as well, so that it reads as in the corpus.
        contents = titled_text(record.get("title"), text)
        yield {"id": docid, **others, "text": text, "contents": contents}


def _add_records(indexer: Any, records: Iterator[dict[str, Any]]) -> None:
    """Pass the records to Lucene in batches; check ids and that none is refused."""
    seen: set[str] = set()
    while batch := list(islice(records, _BATCH)):
        for record in batch:
            _check_id(record["id"], seen)
            seen.add(record["id"])
            for name in ("text", "contents"):
                record[name] = encodable(record[name])
            if not record["contents"].strip():
                record["contents"] = NO_CONTENTS
        # Pyserini's add_batch_raw does not return the number of documents that were taken.
        taken = indexer.object.addRawDocuments([json.dumps(record) for record in batch])
        if taken != len(batch):
            first, last = (short_repr(batch[index]["id"]) for index in (0, -1))
            raise CollectionError(
                f"Lucene took {taken} of the {len(batch)} documents from {first} to {last}; "
                "expected all; look there for ids of unusual length."
            )
    if not seen:
        raise CollectionError("the corpus has no document; expected one or more; check the file.")


def _check_id(docid: str, seen: Collection[str]) -> None:
    """Check that an id is new, and one that Java takes."""
    if docid in seen:
        raise CollectionError(
            f"document {short_repr(docid)} occurs twice in the corpus; "
            "expected each id once; remove or rename one."
        )
    if encodable(docid) != docid:
        raise CollectionError(
            f"the id {short_repr(docid)} has half of a surrogate pair, which no index can store; "
            "rename the document."
        )


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
    # Anserini downloads for Pyserini 1, and Python itself for Pyserini 2.
    except (_jvm.load("jnius").JavaException, OSError) as error:
        raise CollectionError(
            f"topics {name!r} could not be downloaded; Pyserini fetches them from GitHub; "
            "check the network, or give a .tsv, .jsonl or .trec file."
        ) from error


def _titles(topics: Mapping[Any, Mapping[str, str]]) -> Topics:
    return {str(qid): str(fields["title"]) for qid, fields in topics.items()}
