"""Training queries without an LLM: phrases of the user's own passages, for a teacher to judge.

After the inverse cloze task (arXiv 1906.00300), where a sentence is the query and its passage the
answer. Here, what answers a phrase is for the teacher to say: a phrase has no judgments.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from routehead_plugins.data import check_count
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection

QUESTION_SHARE = 0.4
"""Share of the phrases that become questions."""

QUESTIONS = (
    *("what is", "what are", "how does", "how do", "why did", "why is", "when was", "who was"),
    *("where is", "what causes", "how many", "which", "does", "can", "is it true that"),
    *("effect of", "history of", "difference between", "definition of", "what happened to"),
)
"""Words before a phrase that make it look like a question, or like a search."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_SHORTEST = 4  # words of a passage or sentence
_LONGEST_SENTENCE, _LONGEST_QUESTION = 28, 9  # words
_PHRASE, _KEYWORDS = (3, 10), (2, 5)  # fewest and most words
# Upper limits of a random number, by which a sentence or a phrase is drawn, else keywords.
_SENTENCES, _PHRASES = 0.35, 0.7
_PUNCTUATION = ".,;:!?()[]\"'"


def phrase_queries(collection: Collection, count: int, *, seed: int = 0) -> Collection:
    """Draw sentences, phrases and keywords of passages as queries, some of them as questions.

    The same seed and count give the same queries.

    Args:
        collection: A collection; only its corpus is used.
        count: Number of queries to draw; fewer are returned where some are equal. Every passage is
            used before any is used once more.
        seed: Random seed.

    Returns:
        The same corpus with the new queries, without judgments and candidates.

    Raises:
        InputError: The count is below 1, or no passage is long enough.
    """
    check_count("count", count)
    texts = [doc.text for doc in collection.corpus.values() if len(doc.text.split()) >= _SHORTEST]
    if not texts:
        raise InputError(
            f"no document of {collection.name!r} has {_SHORTEST} words or more; give a corpus of "
            "passages."
        )
    chance = random.Random(f"phrases {seed} {collection.name}")
    chance.shuffle(texts)
    rarity = _rarity(texts)
    drawn = (_draw(texts[number % len(texts)], rarity, chance) for number in range(count))
    topics = {
        f"{collection.name}-phrase-{number}": query
        for number, query in enumerate(dict.fromkeys(drawn))
        if query
    }
    return replace(collection, topics=topics, qrels={}, run=None)


def _rarity(texts: list[str]) -> dict[str, float]:
    """Map words to the logarithm of the inverse share of texts that have them."""
    counts = Counter(word for text in texts for word in {_bare(word) for word in text.split()})
    return {word: math.log(len(texts) / count) for word, count in counts.items()}


def _draw(text: str, rarity: Mapping[str, float], chance: random.Random) -> str:
    """Draw a query from a passage."""
    kind = chance.random()
    sentences = [s for s in _SENTENCE.split(text) if len(s.split()) >= _SHORTEST] or [text]
    words = chance.choice(sentences).split()
    if kind < _SENTENCES:
        query = words[:_LONGEST_SENTENCE]
    elif kind < _PHRASES:
        size = min(len(words), chance.randint(*_PHRASE))
        start = chance.randint(0, len(words) - size)
        query = words[start : start + size]
    else:
        query = _keywords(text, rarity, chance)
    if chance.random() >= QUESTION_SHARE:
        return " ".join(query).strip()
    asked = f"{chance.choice(QUESTIONS)} {' '.join(query[:_LONGEST_QUESTION])}"
    return asked.rstrip(_PUNCTUATION) + chance.choice(["", "?"])


def _keywords(text: str, rarity: Mapping[str, float], chance: random.Random) -> list[str]:
    """Draw words in the order of the text, rare ones more often."""
    words = [word for word in dict.fromkeys(map(_bare, text.split())) if word]
    weights = {word: rarity.get(word, 0.0) * chance.random() for word in words}
    chosen = sorted(words, key=lambda word: -weights[word])[: chance.randint(*_KEYWORDS)]
    return sorted(chosen, key=words.index)


def _bare(word: str) -> str:
    return word.strip(_PUNCTUATION).casefold()
