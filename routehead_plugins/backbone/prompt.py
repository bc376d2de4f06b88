"""Turn a query and documents into token ids, and record the span of every document.

A prompt consists of pieces, each tokenized on its own; a layout decides how they are joined:

* ``prefix``: the chat template up to the user's turn, and the announcement of the documents;
* one piece per document: a label, the text, a separator;
* ``tail``: the instruction, the query, and the chat template up to the assistant's turn;
* ``null_tail``: the same for a query without content, for calibration.

Text of documents and queries can never become a control token: ``<|im_end|>`` in a passage is plain
text.
"""

from __future__ import annotations

import copy
import reprlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cachetools import LRUCache
from tokenizers import AddedToken

from routehead_plugins.data import Span, check_count, encodable
from routehead_plugins.errors import InputError, UnsupportedModelError, class_name
from routehead_plugins.files import reason

# The wording of ICR (arXiv 2410.02642), which QRHead and CoRe took over: documents first, query
# last, since under a causal mask only what comes last can look back at every document.
ANNOUNCEMENT = "Here are some paragraphs:\n\n"
LABEL = "[{number}]"
SEPARATOR = "\n\n"
INSTRUCTION = (
    "Please find information that are relevant to the following query in the paragraphs above.\n\n"
)
MARKER = "Query:"
NULL_QUERY = "N/A"
# Query likelihood: the text before the query.
QUESTION = "Document:{text}\n\nQuery:"

# Marks the prompt in the rendered chat template.
_PROMPT_MARK = "Place of the Prompt"
# Some templates print the date; scores must not depend on the day.
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
# transformers passes no functions to a template; therefore the clock is replaced inside it.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}','{_TODAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}"
)


@dataclass(frozen=True)
class DocumentPiece:
    """Tokens of one document.

    Attributes:
        ids: Label, text and separator.
        text: Span of the text in ``ids``; labels and separators are not scored.
        kept: Where only some tokens of the text are read, their indices among all of them.
        is_cut: Whether the text was longer than fits the LLM's context.
    """

    ids: tuple[int, ...]
    text: Span
    kept: tuple[int, ...] | None = None
    is_cut: bool = False

    def cut(self, size: int) -> DocumentPiece:
        """Cut the text after some tokens; label and separator stay.

        Args:
            size: Number of tokens to keep; a shorter text stays whole, and at least one token.
        """
        if self.text.size <= size:
            return self
        end = self.text.start + max(1, size)
        ids = self.ids[:end] + self.ids[self.text.end :]
        return replace(self, ids=ids, text=Span(self.text.start, end), is_cut=True)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a prompt, before a layout joins them.

    Attributes:
        prefix: Token ids before the documents; see the top of this module.
        documents: The documents, in the order of the prompt.
        tail: Token ids after the documents, with the query.
        null_tail: The same for the null query, "N/A".
        bare_null_tail: The tail of the null query without the caller's instruction.
        query: Token ids of the query alone, as far as it is in the tail.
        after_query: Number of tokens of the tail behind the query.
        query_is_cut: Whether the query was longer.
    """

    prefix: tuple[int, ...]
    documents: tuple[DocumentPiece, ...]
    tail: tuple[int, ...]
    null_tail: tuple[int, ...]
    bare_null_tail: tuple[int, ...] = ()
    query: tuple[int, ...] = ()
    after_query: int = 0
    query_is_cut: bool = False

    def cut_query(self, excess: int) -> Pieces:
        """Cut the end of the query, so that the tail is shorter by some tokens.

        Args:
            excess: Number of tokens to leave out; at least the first token of the query stays.
        """
        excess = min(excess, len(self.query) - 1)
        if excess <= 0:
            return self
        end = len(self.tail) - self.after_query
        tail = self.tail[: end - excess] + self.tail[end:]
        return replace(self, tail=tail, query=self.query[:-excess], query_is_cut=True)

    @property
    def opening(self) -> tuple[int, ...]:
        """Former name of ``prefix``, for code outside this project."""
        return self.prefix

    @property
    def tail_size(self) -> int:
        """Number of tokens of the longest tail."""
        return max(len(self.tail), len(self.null_tail))

    @property
    def size(self) -> int:
        """Number of tokens of the sequence with every document and the longest tail."""
        documents = sum(len(document.ids) for document in self.documents)
        return len(self.prefix) + documents + self.tail_size


class PromptEncoder:
    """Encoder of prompts, with its own copy of the tokenizer, so that threads can share it.

    Attributes:
        control_ids: Ids of the control tokens; no piece of text contains one.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None) -> None:
        """Prepare the fixed pieces.

        Args:
            tokenizer: A tokenizer of transformers; copied, so that it stays as it is.
            vocabulary: Number of tokens that the LLM has embeddings for; ``None`` if unknown.

        Raises:
            InputError: It is not a tokenizer.
            UnsupportedModelError: Its chat template cannot take a single user turn, it has no
                tokens for plain text, or some that the LLM does not have.
        """
        _check_tokenizer(tokenizer)
        self._vocabulary = vocabulary
        controls = copy.deepcopy(tokenizer)
        self._before, self._after = self._encode(controls, _chat_frame(tokenizer), plain=False)
        # This copy never produces control tokens: the setting is one per tokenizer, not one per
        # call, and so must not alternate between threads.
        self._tokenizer = _without_control_tokens(tokenizer)
        self.control_ids = frozenset(self._tokenizer.all_special_ids)
        self._documents = TokenCache(self.encode)
        bare, spaced = self.encode(["a", " a"])
        # Many tokenizers add the space before the first word of a text themselves.
        self._space = "" if len(spaced) > len(bare) else " "
        self._empty = {(), self.encode([self._space])[0]}
        self._announcement = self.encode([ANNOUNCEMENT])[0]
        self._separator = self.encode([SEPARATOR])[0]
        self._instruction = self.encode([INSTRUCTION + MARKER])[0]
        # Some tokenizers drop white space, and with it the separator.
        self._first = self._separator[:1] or self._announcement[:1]
        if not self._announcement or not self._instruction:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__!r} has no tokens for plain English text; "
                "load the tokenizer that belongs to the LLM."
            )

    @property
    def prefix(self) -> tuple[int, ...]:
        """Token ids before the documents, in every prompt that ``pieces`` builds."""
        return self._before + self._announcement

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokenize plain texts, each on its own, without control tokens.

        Raises:
            UnsupportedModelError: The tokenizer fails, or its tokens are not the LLM's.
        """
        return self._encode(self._tokenizer, texts)

    def _encode(
        self, tokenizer: Any, texts: Sequence[str], *, plain: bool = True
    ) -> list[tuple[int, ...]]:
        if not texts:
            return []
        batch = [encodable(text) for text in texts]
        try:
            encoded = tokenizer(
                batch, add_special_tokens=False, split_special_tokens=plain, verbose=False
            )
            return [self._known(ids) for ids in encoded["input_ids"]]
        except (UnsupportedModelError, MemoryError):
            raise
        except Exception as error:  # of many types, depending on the tokenizer
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__!r} cannot tokenize a text ({reason(error)}); "
                "load the tokenizer that belongs to the LLM."
            ) from error

    def _known(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Check that the LLM has these tokens; a GPU that looks up others is lost to the process.

        Raises:
            UnsupportedModelError: It lacks one.
        """
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise UnsupportedModelError(
                f"the tokenizer gives token {max(ids)}, but the LLM has {self._vocabulary:,} "
                "tokens; load the tokenizer that belongs to it."
            )
        return tuple(ids)

    def plain(self, texts: Sequence[str], max_tokens: int | None = None) -> list[tuple[int, ...]]:
        """Tokenize texts without a prompt, each after the same first token.

        Args:
            texts: Texts to tokenize.
            max_tokens: Longer texts are cut here; the first token does not count.
        """
        encoded = self.encode([self._space + text if text else "" for text in texts])
        return [self._first + ids[:max_tokens] for ids in encoded]

    def has_tokens(self, texts: Sequence[str]) -> list[bool]:
        """Tell which texts have tokens to read: a tokenizer may drop all characters of a text.

        Args:
            texts: Documents, as given to ``pieces``, which finds their tokens in its cache.
        """
        encoded = self._documents([self._space + text for text in texts])
        return [
            # Where characters were dropped, nothing but white space may be left.
            ids not in self._empty and (any(map(str.isalnum, text)) or not self._is_blank(ids))
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _is_blank(self, ids: Sequence[int]) -> bool:
        return not self.decode(ids).strip()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens into text, without control tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Map each token of a document's text to its characters.

        Args:
            text: The document's text, as given to ``pieces``.

        Returns:
            Half-open ranges of characters, one per token, before any cut.

        Raises:
            UnsupportedModelError: The tokenizer does not record offsets.
        """
        try:
            encoded = self._tokenizer(
                encodable(self._space + text),
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            # Python tokenizers raise in some releases of transformers, and omit the key in others.
            offsets = encoded["offset_mapping"]
        except (NotImplementedError, KeyError) as error:
            raise UnsupportedModelError(
                f"{type(self._tokenizer).__name__!r} does not say where its tokens stand in the "
                "text; load a fast tokenizer, or do without spans."
            ) from error
        shift = len(self._space)
        return [(max(0, a - shift), max(0, b - shift)) for a, b in offsets]

    def check_offsets(self) -> None:
        """Check that the tokenizer records offsets, before the LLM is run for spans.

        Raises:
            UnsupportedModelError: It does not.
        """
        self.offsets("a")

    def pieces(
        self,
        query: str,
        texts: Sequence[str],
        *,
        numbered: bool,
        max_doc_tokens: int | None = None,
        instruction: str | None = None,
    ) -> Pieces:
        """Build the pieces of one prompt.

        Args:
            query: The query.
            texts: The documents, in the order of the prompt.
            numbered: Whether labels number the documents, ``[1]``, ``[2]``, ...
            max_doc_tokens: Longer documents are cut here; the query never is.
            instruction: Text right before the query that says which documents are relevant.

        Raises:
            InputError: The tokenizer drops all characters of the query.
        """
        return Pieces(
            prefix=self.prefix,
            documents=tuple(
                self.documents(texts, numbered=numbered, max_doc_tokens=max_doc_tokens)
            ),
            tail=self._tail(query, instruction),
            null_tail=self._tail(NULL_QUERY, instruction),
            bare_null_tail=self._tail(NULL_QUERY),
            query=self._query_ids(query),
            after_query=len(self._after),
        )

    def documents(
        self, texts: Sequence[str], *, numbered: bool = False, max_doc_tokens: int | None = None
    ) -> list[DocumentPiece]:
        """Build the pieces of documents, as ``pieces`` does."""
        encoded = self._documents([self._space + text for text in texts])
        numbers = range(1, len(texts) + 1)
        labels = self.encode([LABEL.format(number=n) if numbered else "" for n in numbers])
        documents = []
        for label, ids in zip(labels, encoded, strict=True):
            text = ids[:max_doc_tokens]
            span = Span(len(label), len(label) + len(text))
            documents.append(DocumentPiece(label + text + self._separator, span))
        return documents

    def question(
        self, query: str, texts: Sequence[str], max_doc_tokens: int | None = None
    ) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """Build prompts that ask for a question that a document answers.

        Args:
            query: The question.
            texts: The documents.
            max_doc_tokens: Longer documents are cut here.

        Returns:
            Token ids before the question, one sequence per document, and those of the question.

        Raises:
            InputError: The tokenizer drops all characters of the question.
        """
        before, after = self.encode(QUESTION.split("{text}"))
        encoded = self._documents([self._space + text for text in texts])
        contexts = [self._first + before + ids[:max_doc_tokens] + after for ids in encoded]
        return contexts, self._query_ids(query)

    def _query_ids(self, query: str) -> tuple[int, ...]:
        (ids,) = self.encode([self._space + query])
        if query.strip() and ids in self._empty:
            raise InputError(
                f"query={reprlib.repr(query)} has no tokens, since the tokenizer drops its "
                "characters; rephrase it."
            )
        return ids

    def _tail(self, query: str, instruction: str | None = None) -> tuple[int, ...]:
        task = self._instruction
        if instruction is not None:
            (task,) = self.encode([f"{INSTRUCTION}{instruction.strip()}{SEPARATOR}{MARKER}"])
        return task + self.encode([self._space + query])[0] + self._after


class TokenCache:
    """Token ids of texts, the least recently used dropped first. Thread-safe."""

    def __init__(
        self, encode: Callable[[Sequence[str]], list[tuple[int, ...]]], max_tokens: int = 1_000_000
    ) -> None:
        """Create an empty cache; a million tokens, the default limit, take some 40 MB."""
        self._encode = encode
        self._held: LRUCache[str, tuple[int, ...]] = LRUCache(max_tokens, getsizeof=len)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokenize texts; new ones are tokenized in one batch."""
        with self._lock:
            known = {text: self._held[text] for text in texts if text in self._held}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known |= zip(new, self._encode(new), strict=True)
        with self._lock:
            for text in new:
                if len(known[text]) <= self._held.maxsize:
                    self._held[text] = known[text]
        return [known[text] for text in texts]


def check_max_doc_tokens(value: object) -> int | None:
    """Check the length at which documents are cut; ``None`` stands for no cut.

    Returns:
        The length.

    Raises:
        InputError: The value is not a whole number, 1 or more.
    """
    return None if value is None else check_count("max_doc_tokens", value)


def _chat_frame(tokenizer: Any) -> tuple[str, str]:
    """Return the text before and after a user's prompt; without a template, BOS and nothing."""
    if getattr(tokenizer, "chat_template", None) is None:
        return (tokenizer.bos_token or ""), ""
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PROMPT_MARK}],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),
            date_string=_TODAY.strftime("%d %b %Y"),
        )
        before, after = text.split(_PROMPT_MARK)
    except Exception as error:
        raise UnsupportedModelError(
            f"the chat template cannot frame a single user turn ({reason(error)}); "
            "set tokenizer.chat_template = None to prompt without one."
        ) from error
    return before, after


def _check_tokenizer(tokenizer: object) -> None:
    if callable(tokenizer) and hasattr(tokenizer, "all_special_ids"):
        return
    raise InputError(
        f"tokenizer is a {class_name(tokenizer)}; give the one of the LLM, such as "
        "AutoTokenizer.from_pretrained(...)."
    )


def _without_control_tokens(tokenizer: Any) -> Any:
    """Copy a tokenizer so that every control token is plain text to it.

    Special tokens are plain text under ``split_special_tokens``. Some families also use added
    tokens that are not marked special (``<think>``): those in the chat template are marked here.
    """
    copied = copy.deepcopy(tokenizer)
    template = getattr(tokenizer, "chat_template", None) or ""
    controls = [
        token.content
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        if not token.special and token.content.strip() and token.content in str(template)
    ]
    backend = getattr(copied, "backend_tokenizer", None)
    if controls and backend is not None:
        backend.add_special_tokens([AddedToken(content, special=True) for content in controls])
    return copied
