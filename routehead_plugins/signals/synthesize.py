"""Training queries without judgments: the LLM writes them from the user's own passages.

The LLM continues a prompt of three examples and a passage with a query, as in InPars (arXiv
2202.05144). Texts that are not queries, copy their passage or repeat another query are dropped.
``consistent`` then drops queries whose passage is not among their own retrieved candidates.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import Document, check_count
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection, Journal, Qrels, StrPath, make_folder
from routehead_plugins.signals.store import llm_settings, sha256

_BATCH = 16
_MAX_TOKENS = 32
_TEMPERATURE = 0.5
_PASSAGE_WORDS, _PASSAGE_LENGTH = 150, 1500  # words and characters that are shown of a passage
_QUERIES_PER_PASSAGE = 2  # further ones would be much alike
_SHORTEST_PASSAGE = 12  # words; shorter passages say too little to ask about
# In scripts without spaces every character counts as a word: Thai to Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Style:
    """A kind of query, with examples for the prompt."""

    label: str  # announces the query in the prompt
    words: tuple[int, int]  # fewest and most words of a query
    examples: tuple[tuple[str, str], ...]  # passages and their queries

    @property
    def prefix(self) -> str:
        """The examples, as they precede every passage in the prompt."""
        shown = (f"Passage: {text}\n{self.label}: {query}" for text, query in self.examples)
        return "\n\n".join(shown) + "\n\n"

    def prompt(self, passage: str) -> str:
        """Return the part of the prompt with a passage, to be continued by its query."""
        shown = " ".join(passage.split()[:_PASSAGE_WORDS])[:_PASSAGE_LENGTH].rstrip()
        return f"Passage: {shown}\n{self.label}:"


# All styles show the same passages, so that only the kind of query differs.
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


def _style(label: str, words: tuple[int, int], *queries: str) -> Style:
    return Style(label, words, tuple(zip(_PASSAGES, queries, strict=True)))


STYLES = (
    _style(
        "Question",
        (4, 32),
        "how do you keep food from sticking to a cast iron pan?",
        "does daily walking lower blood pressure in mild hypertension?",
        "why was the lighthouse at the river's mouth built?",
    ),
    _style(
        "Search",
        (2, 12),
        "seasoning cast iron cookware",
        "effect of walking on hypertension patients",
        "history of river lighthouse keepers",
    ),
    _style(
        "Claim",
        (4, 32),
        "Soap damages the seasoning of iron pans.",
        "Regular walking reduces systolic blood pressure.",
        "Shipwrecks led to the building of the lighthouse.",
    ),
)


@dataclass(frozen=True)
class _Attempt:
    """A query to be written, in one style, from one passage."""

    number: int
    style: Style
    passage: Document


def synthesize_queries(
    collection: Collection,
    llm: FrozenLM,
    count: int,
    folder: StrPath,
    *,
    seed: int = 0,
    styles: Sequence[Style] = STYLES,
    advance: Callable[[], None] = lambda: None,
) -> Collection:
    """Write queries from passages of a collection, each judged relevant to its own passage alone.

    The same seed and count give the same queries, unless calls with other counts used the same
    folder in between.

    Args:
        collection: A collection; only its corpus is used.
        llm: The frozen LLM, with all its layers.
        count: Number of queries to write. Fewer are returned, since unusable texts are dropped.
            Every passage is used once before any is used a second time; none is used a third time.
        folder: Folder of finished queries, from which an interrupted run resumes.
        seed: Random seed of the passages and of the sampled words.
        styles: Kinds of queries, used in rotation.
        advance: Callback after every query.

    Returns:
        The same corpus with the new queries and their judgments, without candidates.

    Raises:
        InputError: The count is below 1, there are no styles, no passage is long enough, or the
            folder cannot be created.
        UnsupportedModelError: The LLM was loaded without its last layers.
    """
    attempts = _attempts(collection, count, seed, styles)
    settings = llm_settings(llm, seed=seed)
    name = f"queries-{collection.name}-{_digest(sorted(settings.items()))}"
    texts: dict[int, str] = {}
    with Journal(make_folder(folder, "queries") / name, settings) as journal:
        for start in range(0, len(attempts), _BATCH * len(styles)):
            group = attempts[start : start + _BATCH * len(styles)]
            for style in styles:
                batch = [attempt for attempt in group if attempt.style is style]
                texts |= _write(batch, llm, journal, seed)
            for _ in group:
                advance()
    topics: dict[str, str] = {}
    qrels: Qrels = {}
    seen = {query.casefold() for style in styles for _, query in style.examples}
    for attempt in attempts:
        text, passage = texts[attempt.number], attempt.passage
        if text.casefold() not in seen and acceptable(text, passage.text, attempt.style.words):
            seen.add(text.casefold())
            query_id = f"{collection.name}-{attempt.number}"
            topics[query_id] = text
            qrels[query_id] = {str(passage.id): 1}
    return replace(collection, topics=topics, qrels=qrels, run=None)


def consistent(collection: Collection, hits: int) -> Collection:
    """Keep the queries whose own passage is among their candidates (round-trip consistency).

    Args:
        collection: The result of ``synthesize_queries``, with candidates.
        hits: Number of candidates among which the passage must be.
    """
    topics = {
        query_id: query
        for query_id, query in collection.topics.items()
        if {document.id for document in collection.candidates(query_id, hits)}
        & collection.qrels[query_id].keys()
    }
    qrels = {query_id: collection.qrels[query_id] for query_id in topics}
    return replace(collection, topics=topics, qrels=qrels)


def acceptable(query: str, passage: str, words: tuple[int, int] = (2, 32)) -> bool:
    """Tell whether a text can serve as a query for a passage.

    The text must have at least ``words[0]`` and at most ``words[1]`` words, at least half of them
    distinct, and must not be a copy of a part of the passage.
    """
    query_words = _words(query)
    count, different = len(query_words), len(set(query_words))
    if not words[0] <= count <= words[1] or different < (count + 1) // 2:
        return False
    # Five words or fewer, such as a name, may well occur in the passage.
    copied = f" {' '.join(query_words)} " in f" {' '.join(_words(passage))} "
    return count <= 5 or not copied


def _attempts(
    collection: Collection, count: int, seed: int, styles: Sequence[Style]
) -> list[_Attempt]:
    """Choose the passage and the style of each query."""
    check_count("count", count)
    if not styles:
        raise InputError("styles is empty; give at least one style, or leave the argument out.")
    corpus = collection.corpus.values()
    passages = [doc for doc in corpus if len(_words(doc.text)) >= _SHORTEST_PASSAGE]
    if not passages:
        raise InputError(
            f"no document of {collection.name!r} has {_SHORTEST_PASSAGE} words or more; "
            "give a corpus of passages."
        )
    random.Random(f"{seed} {collection.name}").shuffle(passages)
    attempts = []
    for number in range(min(count, _QUERIES_PER_PASSAGE * len(passages))):
        repetition, index = divmod(number, len(passages))
        # Neighbouring queries differ in style, and so do the two queries of one passage.
        style = styles[(index + repetition) % len(styles)]
        attempts.append(_Attempt(number, style, passages[index]))
    return attempts


def _write(batch: Sequence[_Attempt], llm: FrozenLM, journal: Journal, seed: int) -> dict[int, str]:
    """Write the queries of one style, or look them up; return number -> text."""
    keys = [_digest([query.number, query.style.prefix, query.passage.text]) for query in batch]
    # The whole batch is written if one is missing: samples depend on the rest of the batch.
    if any(key not in journal.done for key in keys):
        texts = llm.write(
            batch[0].style.prefix,
            [query.style.prompt(query.passage.text) for query in batch],
            max_tokens=_MAX_TOKENS,
            temperature=_TEMPERATURE,
            seed=int(_digest([seed, *keys]), 16),
        )
        for key, text in zip(keys, texts, strict=True):
            journal.append(key, text)
    return {query.number: str(journal.done[key]) for query, key in zip(batch, keys, strict=True)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _digest(content: object) -> str:
    return sha256(repr(content), 12)
