"""Training queries without judgments: the LLM writes them from the user's own passages.

A passage and three examples of one style are shown, the LLM goes on with a query (as in InPars,
arXiv 2202.05144). What is no query, or copies its passage, or repeats another is left out; whoever
retrieves candidates also leaves out queries that do not find their own passage (``consistent``).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from routehead_plugins import __version__
from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import JSON, Collection, Journal, Qrels, make_folder

_BATCH = 16
_MAX_TOKENS = 32
_TEMPERATURE = 0.5
_PASSAGE_WORDS, _PASSAGE_LENGTH = 150, 1500  # words and characters; what is behind is not shown
_TURNS = 2  # queries of one passage; more of them are much alike
_SHORTEST_PASSAGE = 12  # words; less than that says too little to ask for
# Where words are not told apart by spaces, every character counts as one: Thai to Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Style:
    """One way of asking.

    Attributes:
        label: What the query is announced as.
        words: Fewest and most words of a query.
        examples: Passages with their queries.
    """

    label: str
    words: tuple[int, int]
    examples: tuple[tuple[str, str], ...]

    @property
    def prefix(self) -> str:
        """The examples, to be followed by a passage."""
        shown = (f"Passage: {text}\n{self.label}: {query}" for text, query in self.examples)
        return "\n\n".join(shown) + "\n\n"

    def prompt(self, passage: str) -> str:
        """A passage whose query is to be written."""
        return f"Passage: {' '.join(passage.split())}\n{self.label}:"


# The same passages in every style: what differs is what is asked for.
_PASSAGES = (
    "Cast iron pans are seasoned by rubbing them with a thin layer of oil and heating them until "
    "the oil turns into a hard film. The film keeps food from sticking and the iron from rusting; "
    "soap and long soaking wear it off.",
    "We followed 312 patients with mild hypertension for two years. Those who walked for thirty "
    "minutes a day lowered their systolic pressure by 6 mmHg on average, while no change was seen "
    "in the control group.",
    "The lighthouse at the river's mouth was built in 1867, after two ships had run aground in one "
    "winter. Its keeper lived in the tower until the lamp was converted to electricity in 1931.",
)
STYLES = (
    Style(
        "Question",
        (4, 32),
        tuple(
            zip(
                _PASSAGES,
                (
                    "how do you keep food from sticking to a cast iron pan?",
                    "does daily walking lower blood pressure in mild hypertension?",
                    "why was the lighthouse at the river's mouth built?",
                ),
                strict=True,
            )
        ),
    ),
    Style(
        "Search",
        (2, 12),
        tuple(
            zip(
                _PASSAGES,
                (
                    "seasoning cast iron cookware",
                    "effect of walking on hypertension patients",
                    "history of river lighthouse keepers",
                ),
                strict=True,
            )
        ),
    ),
    Style(
        "Claim",
        (4, 32),
        tuple(
            zip(
                _PASSAGES,
                (
                    "Soap damages the seasoning of iron pans.",
                    "Regular walking reduces systolic blood pressure.",
                    "Shipwrecks led to the building of the lighthouse.",
                ),
                strict=True,
            )
        ),
    ),
)


@dataclass(frozen=True)
class _Attempt:
    """One query to be written."""

    number: int
    style: Style
    passage: Document


def synthesize_queries(
    collection: Collection,
    llm: FrozenLM,
    count: int,
    folder: str | Path,
    *,
    seed: int = 0,
    styles: Sequence[Style] = STYLES,
    advance: Callable[[], None] = lambda: None,
) -> Collection:
    """Write queries from passages of a collection, each judged relevant to its own passage alone.

    A call that was stopped goes on there when it is made again; the same seed and count give the
    same queries, unless calls with other counts used the same folder in between.

    Args:
        collection: Only its corpus is used.
        llm: The frozen LLM, with all its layers.
        count: How many queries to write; fewer are left when those that are none have been left
            out. Every passage has its turn before any has a second one, none has a
            third.
        folder: Where finished queries are kept.
        seed: Draws passages and words.
        styles: Ways of asking, taking turns.
        advance: Called for every query that was written.

    Returns:
        The same corpus with the written queries and their judgments, without candidates.

    Raises:
        InputError: The count is below 1, there are no styles, no passage is long enough to be asked
            for, or the folder cannot be made.
        UnsupportedModelError: The LLM was loaded without its last layers.
    """
    attempts = _attempts(collection, count, seed, styles)
    state: dict[str, JSON] = {
        "model": llm.name,
        "dtype": str(llm.dtype),
        "seed": seed,
        "version": __version__,
    }
    digest = _digest(sorted(state.items()))
    texts: list[str] = []
    path = make_folder(folder, "queries") / f"queries-{collection.name}-{digest}"
    with Journal(path, state) as journal:
        for start in range(0, len(attempts), _BATCH * len(styles)):
            group = attempts[start : start + _BATCH * len(styles)]
            written: dict[int, str] = {}
            for style in styles:
                batch = [attempt for attempt in group if attempt.style is style]
                written |= _written(batch, llm, journal, seed)
            for attempt in group:
                texts.append(written[attempt.number])
                advance()
    return _collected(collection, attempts, texts, styles)


def consistent(collection: Collection, hits: int) -> Collection:
    """Leave out queries that do not find the passage they were written from (round trip).

    Args:
        collection: From ``synthesize``, with candidates.
        hits: Among how many candidates the passage must be.
    """
    kept = [
        query_id
        for query_id in collection.topics
        if {document.id for document in collection.candidates(query_id, hits)}
        & collection.qrels[query_id].keys()
    ]
    return _only(collection, kept)


def acceptable(query: str, passage: str, words: tuple[int, int] = (2, 32)) -> bool:
    """Whether a text is a query for a passage, and not a copy of a part of it.

    Args:
        query: What the LLM wrote.
        passage: What it was shown.
        words: Fewest and most words.
    """
    asked = _words(query)
    if not words[0] <= len(asked) <= words[1] or len(set(asked)) < (len(asked) + 1) // 2:
        return False
    # Five words or fewer, as a name is, may well stand in the passage as they are.
    return len(asked) <= 5 or f" {' '.join(asked)} " not in f" {' '.join(_words(passage))} "


def _attempts(
    collection: Collection, count: int, seed: int, styles: Sequence[Style]
) -> list[_Attempt]:
    if count < 1:
        raise InputError(f"{count} queries are none to learn from; give 1 or more.")
    if not styles:
        raise InputError("there are no styles to ask in; give at least one, or leave them out.")
    passages = [
        document
        for document in collection.corpus.values()
        if len(_words(document.text)) >= _SHORTEST_PASSAGE
    ]
    if not passages:
        raise InputError(
            f"no document of {collection.name!r} has {_SHORTEST_PASSAGE} words or more; "
            "give a corpus of passages."
        )
    random.Random(f"{seed} {collection.name}").shuffle(passages)
    attempts = []
    for number in range(min(count, _TURNS * len(passages))):
        turn, place = divmod(number, len(passages))
        # Neighbours differ in style, and so do the turns of a passage.
        style = styles[(place + turn) % len(styles)]
        attempts.append(_Attempt(number, style, passages[place]))
    return attempts


def _written(
    batch: Sequence[_Attempt], llm: FrozenLM, journal: Journal, seed: int
) -> dict[int, str]:
    """What the LLM writes for attempts of one style, or wrote before."""
    keys = [
        _digest([attempt.number, attempt.style.prefix, attempt.passage.text]) for attempt in batch
    ]
    missing = [attempt for attempt, key in zip(batch, keys, strict=True) if key not in journal.done]
    if missing:
        # All of the batch anew: what is drawn for one depends on which others stand beside it.
        texts = llm.write(
            batch[0].style.prefix,
            [attempt.style.prompt(_cut(attempt.passage.text)) for attempt in batch],
            max_tokens=_MAX_TOKENS,
            temperature=_TEMPERATURE,
            seed=int(_digest([seed, *keys]), 16),
        )
        for key, text in zip(keys, texts, strict=True):
            journal.append(key, text)
    return {
        attempt.number: str(journal.done[key]) for attempt, key in zip(batch, keys, strict=True)
    }


def _collected(
    collection: Collection,
    attempts: Sequence[_Attempt],
    texts: Sequence[str],
    styles: Sequence[Style],
) -> Collection:
    topics: dict[str, str] = {}
    qrels: Qrels = {}
    seen = {query.casefold() for style in styles for _, query in style.examples}
    for attempt, text in zip(attempts, texts, strict=True):
        if text.casefold() in seen or not acceptable(
            text, attempt.passage.text, attempt.style.words
        ):
            continue
        seen.add(text.casefold())
        query_id = f"{collection.name}-{attempt.number}"
        topics[query_id] = text
        qrels[query_id] = {str(attempt.passage.id): 1}
    return replace(collection, topics=topics, qrels=qrels, run=None)


def _only(collection: Collection, query_ids: Sequence[str]) -> Collection:
    return replace(
        collection,
        topics={query_id: collection.topics[query_id] for query_id in query_ids},
        qrels={query_id: collection.qrels[query_id] for query_id in query_ids},
    )


def _cut(passage: str) -> str:
    return " ".join(passage.split()[:_PASSAGE_WORDS])[:_PASSAGE_LENGTH]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
