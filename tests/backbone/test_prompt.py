"""Prompts: every piece decodes back, spans are exact, and no text turns into a control token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from routehead_plugins import FrozenLM
from routehead_plugins.backbone.prompt import PromptEncoder, TokenCache, check_max_doc_tokens
from routehead_plugins.errors import InputError, UnsupportedModelError

CONTROL_IDS = set(range(len(families.CONTROLS)))
TOKENIZER = families.tiny_tokenizer()
ENCODER = PromptEncoder(TOKENIZER)

BEFORE, AFTER = "<s><|user|>", "<|end|><|assistant|><think>"
ANNOUNCEMENT = "Here are some paragraphs:\n\n"
INSTRUCTION = (
    "Please find information that are relevant to the following query in the paragraphs above.\n\n"
    "Query:"
)

# Control tokens whole, broken and in a row, between any other characters.
FRAGMENTS = st.sampled_from([*families.CONTROLS, "<|", "|>", "<", "think>", "[1]", "\n\n", " "])
TEXTS = st.lists(FRAGMENTS | st.text(max_size=8), max_size=8).map("".join)


def decode(ids: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode(list(ids), clean_up_tokenization_spaces=False))


@given(TEXTS, st.lists(TEXTS, max_size=4), st.booleans())
@settings(deadline=None)
def test_pieces_decode_to_the_prompt_and_spans_to_the_documents(
    query: str, texts: list[str], numbered: bool
) -> None:
    pieces = ENCODER.pieces(query, texts, numbered=numbered)
    assert decode(pieces.prefix) == BEFORE + ANNOUNCEMENT
    assert decode(pieces.tail) == INSTRUCTION + query + AFTER
    assert decode(pieces.null_tail) == INSTRUCTION + "N/A" + AFTER
    assert len(pieces.documents) == len(texts)
    for number, (document, text) in enumerate(zip(pieces.documents, texts, strict=True), start=1):
        start, end = document.text
        assert decode(document.ids[:start]) == (f"[{number}]" if numbered else "")
        assert decode(document.ids[start:end]) == text
        assert decode(document.ids[end:]) == "\n\n"


@given(TEXTS, st.lists(TEXTS, max_size=4))
@settings(deadline=None)
def test_no_text_becomes_a_control_token(query: str, texts: list[str]) -> None:
    pieces = ENCODER.pieces(query, texts, numbered=True)
    assert [token for token in pieces.prefix if token in CONTROL_IDS] == [1, 3]
    for document in pieces.documents:
        assert not CONTROL_IDS & set(document.ids)
    for tail in (pieces.tail, pieces.null_tail):
        assert [token for token in tail if token in CONTROL_IDS] == [5, 4, 6]


def test_the_tokenizer_itself_does_turn_these_texts_into_control_tokens() -> None:
    """Or the test above would prove nothing."""
    ids = TOKENIZER("".join(families.CONTROLS), add_special_tokens=False)["input_ids"]
    assert ids == sorted(CONTROL_IDS)


@given(st.lists(TEXTS, min_size=1, max_size=4))
@settings(deadline=None)
def test_texts_are_tokenized_one_by_one(texts: list[str]) -> None:
    assert ENCODER.encode(texts) == [ENCODER.encode([text])[0] for text in texts]


def test_no_texts_give_no_ids() -> None:
    assert ENCODER.encode([]) == []
    assert ENCODER.pieces("q", [], numbered=True).documents == ()


def test_half_a_surrogate_pair_does_not_break_the_prompt() -> None:
    # json.loads makes such texts of broken escapes, and crawled corpora have them.
    pieces = ENCODER.pieces("q", ["one \ud83d two"], numbered=False)
    document = pieces.documents[0]
    assert decode(document.ids[slice(*document.text)]) == "one ? two"


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 30))
@settings(deadline=None)
def test_documents_are_cut_and_the_query_is_not(query: str, texts: list[str], cut: int) -> None:
    whole = ENCODER.pieces(query, texts, numbered=True)
    pieces = ENCODER.pieces(query, texts, numbered=True, max_doc_tokens=cut)
    assert (pieces.prefix, pieces.tail) == (whole.prefix, whole.tail)
    assert pieces.null_tail == whole.null_tail
    for short, long in zip(pieces.documents, whole.documents, strict=True):
        start, end = short.text
        assert start == long.text.start
        assert end - start == min(cut, long.text.size)
        assert short.ids == long.ids[:end] + long.ids[long.text.end :]


@pytest.mark.parametrize(("query", "longer_tail"), [("q", "N/A"), ("a longer query", None)])
def test_the_size_counts_every_document_and_the_longer_tail(
    query: str, longer_tail: str | None
) -> None:
    pieces = ENCODER.pieces(query, ["four", "three"], numbered=True)
    prompt = f"{ANNOUNCEMENT}[1]four\n\n[2]three\n\n{INSTRUCTION}{longer_tail or query}"  # bytes
    assert pieces.size == len(prompt) + 5  # and the control tokens around it


@pytest.mark.parametrize("cut", [1, 500, None])
def test_a_cut_that_leaves_something_is_accepted(cut: int | None) -> None:
    check_max_doc_tokens(cut)


@pytest.mark.parametrize("cut", [0, -3, 2.5, "9"])
def test_a_cut_that_leaves_nothing_is_refused(cut: Any) -> None:
    with pytest.raises(InputError) as error:
        check_max_doc_tokens(cut)
    assert str(error.value) == (
        f"max_doc_tokens={cut!r} is not a count; give a whole number, 1 or more."
    )


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = families.tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def frame(tokenizer: Any) -> tuple[str, str]:
    """What stands before the announcement and after the query."""
    pieces = PromptEncoder(tokenizer).pieces("q", [], numbered=True)
    opening, tail = decode(pieces.prefix), decode(pieces.tail)
    assert opening.endswith(ANNOUNCEMENT)
    assert tail.startswith(f"{INSTRUCTION}q")
    return opening.removesuffix(ANNOUNCEMENT), tail.removeprefix(f"{INSTRUCTION}q")


def test_with_a_chat_template_the_prompt_is_one_user_turn() -> None:
    assert frame(families.tiny_tokenizer()) == (BEFORE, AFTER)


def test_without_a_chat_template_the_prompt_begins_with_bos_alone() -> None:
    assert frame(families.tiny_tokenizer(chat=False)) == ("<s>", "")


def test_without_a_chat_template_and_bos_nothing_is_added() -> None:
    tokenizer = families.tiny_tokenizer(chat=False)
    tokenizer.bos_token = None
    assert frame(tokenizer) == ("", "")


@pytest.mark.parametrize(
    ("date", "printed"),
    [
        ("{{ strftime_now('%d %B %Y') }}", "26 July 2024"),
        ("{% set today = strftime_now('%Y-%m-%d') %}{{ today }}", "2024-07-26"),
        ("{% macro m() %}{{ strftime_now('%b %y') }}{% endmacro %}{{ m() }}", "Jul 24"),
        (
            "{% if strftime_now is defined %}{{ strftime_now('%B %d, %Y') }}{% endif %}",
            "July 26, 2024",
        ),
        ("{{ date_string }}", "26 Jul 2024"),
        ("{% if not date_string is defined %}today{% endif %}", ""),
    ],
)
def test_a_template_that_prints_the_date_prints_the_same_on_any_day(
    date: str, printed: str
) -> None:
    template = f"<|user|>{date}:{{{{ messages[0]['content'] }}}}<|end|>"
    assert frame(with_template(template)) == (f"<|user|>{printed}:", "<|end|>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('two turns, please') }}", "two turns, please"),
        ("{{ messages[1]['content'] }}", "list object has no element 1"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("nothing", "not enough values to unpack (expected 2, got 1)"),
        ("{{ messages[0]['content'] * 2 }}", "too many values to unpack (expected 2)"),
    ],
)
def test_a_template_that_cannot_frame_one_turn_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        PromptEncoder(with_template(template))
    assert str(error.value) == (
        f"the chat template cannot frame a single user turn ({reason}); "
        "set tokenizer.chat_template = None to prompt without one."
    )


def state_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Everything a guest could leave behind."""
    backend = tokenizer.backend_tokenizer
    return {
        "backend": backend.to_str(),
        "encode_special_tokens": backend.encode_special_tokens,
        "padding": backend.padding,
        "truncation": backend.truncation,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "template": tokenizer.chat_template,
        "added": repr(tokenizer.added_tokens_decoder),
        "ids": tokenizer("<s> <think> a", add_special_tokens=False)["input_ids"],
    }


def padded_and_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.enable_padding(length=12)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.padding_side = tokenizer.truncation_side = "left"


def split(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer("any", split_special_tokens=True)
    assert tokenizer.backend_tokenizer.encode_special_tokens is True


SETTINGS = [lambda _: None, padded_and_truncated, split]


@pytest.mark.parametrize("prepare", SETTINGS, ids=["fresh", "padded and truncated", "split"])
def test_the_tokenizer_is_left_as_it_was_and_its_settings_do_not_matter(
    prepare: Callable[[PreTrainedTokenizerFast], None],
) -> None:
    tokenizer = families.tiny_tokenizer()
    prepare(tokenizer)
    twin = families.tiny_tokenizer()
    prepare(twin)
    encoder = PromptEncoder(tokenizer)
    pieces = encoder.pieces("a query <think>", ["a text <s>", ""], numbered=True, max_doc_tokens=9)
    assert pieces == ENCODER.pieces(
        "a query <think>", ["a text <s>", ""], numbered=True, max_doc_tokens=9
    )
    assert state_of(tokenizer) == state_of(twin)


def test_a_tokenizer_changed_afterwards_changes_nothing() -> None:
    tokenizer = families.tiny_tokenizer()
    encoder = PromptEncoder(tokenizer)
    tokenizer.chat_template = None
    tokenizer("a", split_special_tokens=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["paragraphs"]})
    assert encoder.pieces("paragraphs", ["paragraphs"], numbered=True) == ENCODER.pieces(
        "paragraphs", ["paragraphs"], numbered=True
    )


def test_eight_threads_encode_as_one_does() -> None:
    work = [
        (f"query {n} <think>", [f"<s> text {n} " * (1 + n % 5), "é" * n, "<|end|>"])
        for n in range(64)
    ]
    encoder = PromptEncoder(families.tiny_tokenizer())
    start = threading.Barrier(8)

    def encode_all(_: int) -> list[Any]:
        start.wait()
        return [encoder.pieces(query, texts, numbered=True) for query, texts in work]

    serial = [ENCODER.pieces(query, texts, numbered=True) for query, texts in work]
    with ThreadPoolExecutor(8) as pool:
        for together in pool.map(encode_all, range(8)):
            assert together == serial


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Four ways in which tokenizers write the space before the word ``a``, which is token 1."""
    space = "Ġ" if kind == "byte-level" else "▁"
    vocabulary = {"<s>": 0, f"{space}a": 1, space: 2, "a": 3, "<unk>": 4}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(space, "a")], unk_token="<unk>", fuse_unk=True)
    )
    if kind == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "metaspace never":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    elif kind == "metaspace always":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace never", "metaspace always", "prepend"])
def test_one_space_stands_before_documents_and_query(kind: str) -> None:
    pieces = PromptEncoder(word_tokenizer(kind)).pieces("a", ["a", "a a"], numbered=True)
    read = [document.ids[slice(*document.text)] for document in pieces.documents]
    assert read == [(1,), (1, 1)]
    assert pieces.tail[-1] == 1


@given(text=st.text(max_size=30))
def test_offsets_cover_the_text_in_order(text: str) -> None:
    encoder = PromptEncoder(families.tiny_tokenizer())
    offsets = encoder.offsets(text)
    (ids,) = encoder.encode([text])
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(text)))


def test_offsets_leave_out_the_space_put_before_a_text(embedded: FrozenLM) -> None:
    text = "grey  wolves \u00fcber"
    offsets = embedded.encoder.offsets(text)
    assert embedded.encoder._space == " "
    assert offsets[0] == (0, 4)
    assert max(end for _, end in offsets) == len(text)


def test_an_instruction_stands_right_before_the_query() -> None:
    encoder = PromptEncoder(families.tiny_tokenizer(chat=False))
    pieces = encoder.pieces("why?", ["x"], numbered=False, instruction=" only <s> wolves\n")
    assert decode(pieces.tail).endswith("above.\n\nonly <s> wolves\n\nQuery:why?")
    assert decode(pieces.null_tail).endswith("above.\n\nonly <s> wolves\n\nQuery:N/A")
    assert decode(pieces.bare_null_tail).endswith("above.\n\nQuery:N/A")
    assert 1 not in pieces.tail  # no control token


class Characters:
    """One token per character, and a record of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        self.batches.append(list(texts))
        return [tuple(map(ord, text)) for text in texts]


def test_new_texts_are_tokenized_in_one_batch_and_equal_ones_once() -> None:
    encode = Characters()
    cache = TokenCache(encode)
    assert cache(["ab", "c", "ab"]) == [(97, 98), (99,), (97, 98)]
    assert cache(["c", "d"]) == [(99,), (100,)]
    assert encode.batches == [["ab", "c"], ["d"]]


def test_the_least_recently_used_text_is_dropped_first() -> None:
    encode = Characters()
    cache = TokenCache(encode, max_tokens=4)
    cache(["aa", "bb"])
    cache(["aa"])
    cache(["c"])
    cache(["aa", "bb"])
    assert encode.batches[-1] == ["bb"]


@given(st.lists(st.lists(st.text("ab", max_size=4), max_size=5), max_size=8))
def test_cached_ids_are_those_of_the_tokenizer_and_the_bound_holds(calls: list[list[str]]) -> None:
    cache = TokenCache(Characters(), max_tokens=6)
    for texts in calls:
        assert cache(texts) == Characters()(texts)
        assert cache._held.currsize == sum(map(len, cache._held.values())) <= 6


def test_threads_keep_the_count_right() -> None:
    cache = TokenCache(Characters(), max_tokens=50)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cache([f"{n * k % 37}" for k in range(20)]), range(200)))
    assert cache._held.currsize == sum(map(len, cache._held.values())) <= 50


def test_a_prompt_tokenizes_a_document_once() -> None:
    encoder = PromptEncoder(families.tiny_tokenizer())
    first = encoder.pieces("q", ["a wolf", "rain"], numbered=True)
    again = encoder.pieces("q", ["rain", "a wolf"], numbered=True)
    assert len(encoder._documents) == 2
    assert {piece.ids[3:] for piece in first.documents} == {
        piece.ids[3:] for piece in again.documents
    }
    cut = encoder.pieces("q", ["a wolf"], numbered=False, max_doc_tokens=2)
    assert cut.documents[0].text.size == 2
    assert len(encoder._documents) == 2


def dropping_tokenizer(space: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that knows ASCII letters only and drops all else, perhaps the space as well."""
    letters = [chr(code) for code in range(33, 127)] + ([" "] if space else [])
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    )


@pytest.mark.parametrize("space", [True, False], ids=["space kept", "space dropped"])
def test_texts_of_which_the_tokenizer_drops_every_character_have_no_tokens(space: bool) -> None:
    encoder = PromptEncoder(dropping_tokenizer(space))
    texts = ["a wolf", "狼", "🐺🐺", "", "狼 a"]
    assert encoder.has_tokens(texts) == [True, False, False, False, True]
    assert PromptEncoder(families.tiny_tokenizer()).has_tokens(["狼", ""]) == [True, False]


def test_a_query_without_tokens_is_refused() -> None:
    encoder = PromptEncoder(dropping_tokenizer(space=True))
    message = "query='狼🐺' has no tokens, since the tokenizer drops its characters; rephrase it."
    with pytest.raises(InputError) as error:
        encoder.pieces("狼🐺", ["a wolf"], numbered=True)
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        encoder.question("狼🐺", ["a wolf"])
    assert str(error.value) == message


def test_a_tokenizer_written_in_python_says_that_it_records_no_offsets() -> None:
    encoder = PromptEncoder(CanineTokenizer())
    with pytest.raises(UnsupportedModelError) as error:
        encoder.check_offsets()
    assert str(error.value) == (
        "'CanineTokenizer' does not say where its tokens stand in the text; load a fast "
        "tokenizer, or do without spans."
    )
    ENCODER.check_offsets()


@pytest.mark.parametrize("tokenizer", [None, "gpt2", 5, {}, TOKENIZER.backend_tokenizer], ids=repr)
def test_what_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"^tokenizer is a [\w.]+; give the one of the LLM") as e:
        PromptEncoder(tokenizer)
    assert len(str(e.value)) < 300


def test_a_tokenizer_without_vocabulary_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={}, merges=[]))
    with pytest.raises(UnsupportedModelError, match="has no tokens for plain English text; load"):
        PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_tokenizer_that_fails_is_refused_in_one_line() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"a": 0}))
    with pytest.raises(UnsupportedModelError) as error:
        PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    message = str(error.value)
    assert "cannot tokenize a text (WordPiece error: Missing [UNK] token" in message
    assert message.isprintable()


def test_tokens_that_the_llm_does_not_have_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gives token \d+, but the LLM has 5 tokens;"):
        PromptEncoder(TOKENIZER, vocabulary=5)
    characters = [chr(code) for code in range(0x80, 0x400)]
    last, text = max(zip(map(max, ENCODER.encode(characters)), characters, strict=True))
    assert PromptEncoder(TOKENIZER, vocabulary=last + 1).encode([text]) == ENCODER.encode([text])
    with pytest.raises(UnsupportedModelError) as error:
        PromptEncoder(TOKENIZER, vocabulary=last).encode(["plain", text])
    assert str(error.value) == (
        f"the tokenizer gives token {last}, but the LLM has {last} tokens; load the tokenizer that "
        "belongs to it."
    )


def test_a_template_that_fails_at_length_is_refused_in_one_short_line() -> None:
    template = "{{ raise_exception('no\\n' * 5000) }}"
    with pytest.raises(UnsupportedModelError) as error:
        PromptEncoder(with_template(template))
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 300
    assert message.endswith("set tokenizer.chat_template = None to prompt without one.")


def test_without_a_token_for_white_space_texts_begin_with_another_one() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert encoder.plain(["", "a"]) == [(0,), (0, 1)]
    (context,), _ = encoder.question("a", ["a"])
    assert context[0] == 0
