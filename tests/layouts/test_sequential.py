"""The sequential layout: order, spans, windows, limits, and advice that can be followed."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import Pieces
from routehead_plugins.data import Span
from routehead_plugins.errors import InputError, PromptTooLongError, RouteHeadError
from routehead_plugins.layouts import (
    ParallelLayout,
    ReadOptions,
    SequentialLayout,
    get_layout,
)
from routehead_plugins.layouts.names import LAYOUTS
from routehead_plugins.layouts.sequential import check_fits, longest_cut
from routehead_plugins.scoring import LongTexts, TokenAttention

LIMIT = 400
QUERY = "which wolf ran?"
TEXTS = ["the best one, and the longest of the three", "second", "the third"]
HEADS = HeadSet.parse("1-2,0-1,1-0")


def tiny_llm(limit: int) -> FrozenLM:
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.max_position_embeddings = limit
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return FrozenLM(model, families.tiny_tokenizer(), name="tiny")


LLM = tiny_llm(LIMIT)


def pieces_of(texts: Sequence[str], cut: int | None = None, query: str = QUERY) -> Pieces:
    return LLM.encoder.pieces(query, texts, numbered=True, max_doc_tokens=cut)


# One byte is one token: what is left of the limit for the text of one document.
ROOM = LIMIT - pieces_of(["x"]).size + 1


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any], Pieces]]:
    """Every call of the encoder, and what it built."""
    calls = []
    build = LLM.encoder.pieces

    def recorded(*arguments: Any, **options: Any) -> Pieces:
        pieces = build(*arguments, **options)
        calls.append((arguments, options, pieces))
        return pieces

    monkeypatch.setattr(LLM.encoder, "pieces", recorded)
    return calls


def test_the_best_candidate_is_placed_last_and_labels_count_from_the_top(
    built: list[tuple[tuple[Any, ...], dict[str, Any], Pieces]],
) -> None:
    SequentialLayout().read(LLM, QUERY, TEXTS, HEADS, ReadOptions(max_doc_tokens=9))
    ((arguments, options, _),) = built
    assert arguments == (QUERY, ["the third", "second", TEXTS[0]])
    assert options == {"numbered": True, "max_doc_tokens": 9, "instruction": None}


def test_spans_hold_the_texts_in_the_order_given(
    built: list[tuple[tuple[Any, ...], dict[str, Any], Pieces]],
) -> None:
    found = SequentialLayout().read(LLM, QUERY, TEXTS, HEADS, ReadOptions())
    pieces = built[0][2]
    prefix = list(pieces.prefix)
    for document in pieces.documents:
        prefix += document.ids
    tokenizer = families.tiny_tokenizer()
    assert [tokenizer.decode(prefix[start:end]) for start, end in found.spans] == TEXTS
    assert all(isinstance(span, Span) for span in found.spans)
    assert found.query.shape == (len(HEADS), len(prefix))
    assert found.null is not None
    assert found.null.shape == found.query.shape
    assert not torch.equal(found.null, found.query)


def test_the_query_without_content_is_read_only_when_asked_for() -> None:
    layout = SequentialLayout()
    with_null = layout.read(LLM, QUERY, TEXTS, HEADS, ReadOptions())
    without = layout.read(LLM, QUERY, TEXTS, HEADS, ReadOptions(calibrate=False))
    assert without.null is None
    assert without.spans == with_null.spans
    torch.testing.assert_close(without.query, with_null.query, atol=1e-6, rtol=0)


def test_the_texts_given_are_left_as_they_were() -> None:
    texts = list(TEXTS)
    SequentialLayout().read(LLM, QUERY, texts, HEADS, ReadOptions(max_doc_tokens=3))
    assert texts == TEXTS


@pytest.mark.parametrize("name", [None, "sequential"])
def test_the_layout_is_the_sequential_one_by_default(name: str | None) -> None:
    assert get_layout(name) == SequentialLayout()
    assert get_layout(name).name == "sequential"


def test_a_layout_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError) as error:
        get_layout("spiral")
    assert (
        str(error.value) == "layout='spiral' is unknown; give one of: sequential, parallel, late."
    )
    assert [get_layout(name).name for name in LAYOUTS] == list(LAYOUTS)


def test_a_prompt_may_be_as_long_as_the_limit_and_no_longer() -> None:
    check_fits(pieces_of(["x" * ROOM]), LLM)
    with pytest.raises(PromptTooLongError):
        check_fits(pieces_of(["x" * (ROOM + 1)]), LLM)


def test_the_longer_of_the_two_tails_must_fit() -> None:
    check_fits(pieces_of(["x" * (ROOM + len(QUERY) - 3)], query="N/A"), LLM)
    with pytest.raises(PromptTooLongError):
        check_fits(pieces_of(["x" * (ROOM + len(QUERY) - 2)], query="N"), LLM)


def test_an_llm_that_names_no_limit_takes_any_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "max_tokens", None)
    check_fits(pieces_of(["x" * 9999]), LLM)


def test_a_prompt_that_is_too_long_is_refused_with_its_numbers() -> None:
    # 29 tokens open the prompt, the tail has 97 for the instruction, 15 for the query and 3;
    # each document brings a label of 3 and a separator of 2 besides its text.
    with pytest.raises(PromptTooLongError) as error:
        check_fits(pieces_of(["x" * 1000, "y" * 20, "z" * 500]), LLM)
    assert str(error.value) == (
        "the prompt has 1,679 tokens with 3 documents, but 'tiny' takes 400; "
        "set max_doc_tokens=110 or less, or give fewer documents."
    )
    assert (error.value.tokens, error.value.limit) == (1679, 400)
    assert isinstance(error.value, RouteHeadError)


@pytest.mark.parametrize(
    ("query", "texts", "tokens", "advice"),
    [
        ("q" * 500, ["x", "y"], 641, "give a shorter query or fewer documents"),
        (QUERY, ["x"] * 60, 555, "set window=36 or layout='parallel', or give fewer documents"),
    ],
    ids=["query", "list"],
)
def test_where_no_cut_helps_none_is_advised(
    query: str, texts: list[str], tokens: int, advice: str
) -> None:
    with pytest.raises(PromptTooLongError) as error:
        check_fits(pieces_of(texts, query=query), LLM)
    assert str(error.value) == (
        f"the prompt has {tokens} tokens with {len(texts)} documents, but 'tiny' takes 400; "
        f"{advice}."
    )


@given(st.lists(st.integers(1, 200), min_size=4, max_size=12))
@settings(deadline=None)
def test_the_advised_window_fits_wherever_it_stands(sizes: list[int]) -> None:
    texts = ["x" * size for size in sizes]
    try:
        check_fits(pieces_of(texts), LLM)
    except PromptTooLongError as error:
        advised = re.search(r"set window=(\d+)", str(error))
        if advised is not None:
            window = SequentialLayout(window=int(advised[1]))
            for start, end in window._windows(len(texts)):
                check_fits(pieces_of(texts[start:end]), LLM)


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_are_full_and_leave_no_document_out(
    documents: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.integers(1, window))
    ranges = list(SequentialLayout(window, stride)._windows(documents))
    assert {place for start, end in ranges for place in range(start, end)} == set(range(documents))
    assert {end - start for start, end in ranges} == {min(window, documents)}
    steps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(ranges)]
    assert all(0 < step <= (stride or max(1, window // 2)) for step in steps)


def test_a_document_in_two_windows_gets_the_mean_of_both() -> None:
    texts = [*TEXTS, "number four", "five"]
    layout = SequentialLayout(window=3, stride=2)
    found = layout.read(LLM, QUERY, texts, HEADS, ReadOptions())
    expected: list[list[torch.Tensor]] = [[] for _ in texts]
    for start in (0, 2):
        one = SequentialLayout().read(LLM, QUERY, texts[start : start + 3], HEADS, ReadOptions())
        assert one.null is not None
        for place, span in enumerate(one.spans, start):
            both = torch.stack([one.query, one.null])
            expected[place].append(both[..., span.start : span.end])
    assert [len(parts) for parts in expected] == [1, 1, 2, 1, 1]
    assert found.null is not None
    for parts, span in zip(expected, found.spans, strict=True):
        actual = torch.stack([found.query, found.null])[..., span.start : span.end]
        torch.testing.assert_close(actual, sum(parts) / len(parts), atol=1e-7, rtol=0)
    assert found.query.shape[-1] == sum(span.size for span in found.spans)


def test_a_window_as_wide_as_the_list_changes_nothing() -> None:
    wide = SequentialLayout(window=3).read(LLM, QUERY, TEXTS, HEADS, ReadOptions())
    plain = SequentialLayout().read(LLM, QUERY, TEXTS, HEADS, ReadOptions())
    assert wide.spans == plain.spans
    assert torch.equal(wide.query, plain.query)


STRICT = LongTexts(on_too_long="error")


def test_windows_take_lists_that_do_not_fit_at_once() -> None:
    texts = ["x" * size for size in range(20, 80, 4)]
    with pytest.raises(PromptTooLongError, match="set window=3 or layout='parallel'"):
        HeadRoutedAttentionReranker(LLM, long_texts=STRICT).rerank(QUERY, texts)
    windowed = HeadRoutedAttentionReranker(LLM, layout=SequentialLayout(window=3))
    assert sorted(hit.index for hit in windowed.rerank(QUERY, texts)) == list(range(15))
    assert windowed.signals(QUERY, texts, HEADS).shape == (3, 15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0 is not a count; give a whole number, 1 or more."),
        ({"window": 2.5}, "window=2.5 is not a count; give a whole number, 1 or more."),
        ({"window": "3"}, "window='3' is not a count; give a whole number, 1 or more."),
        ({"window": True}, "window=True is not a count; give a whole number, 1 or more."),
        ({"stride": 3}, "stride=3 has no window to move; give window= as well."),
        ({"window": 4, "stride": 5}, "stride=5 leaves documents out; give 1 to 4, the window."),
        (
            {"window": 4, "stride": 0},
            "stride=0 is not a count; give a whole number, 1 or more.",
        ),
        (
            {"window": 4, "stride": "2"},
            "stride='2' is not a count; give a whole number, 1 or more.",
        ),
        (
            {"name": "parallel", "window": 4},
            "window=4 is for the sequential layout; "
            "the parallel one takes any number of documents: leave it out.",
        ),
    ],
)
def test_windows_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        get_layout(**({"name": "sequential"} | settings))
    assert str(error.value) == message


def test_the_same_list_of_documents_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, ran = SequentialLayout(), []
    prefill = LLM.prefill

    def counted(sequences: Any, **options: Any) -> Any:
        ran.append(len(sequences[0]))
        return prefill(sequences, **options)

    monkeypatch.setattr(LLM, "prefill", counted)
    first = layout.read(LLM, QUERY, TEXTS, HEADS, ReadOptions())
    layout.read(LLM, "another query", TEXTS, HEADS, ReadOptions())
    again = layout.read(LLM, QUERY, TEXTS, HEADS, ReadOptions())
    assert len(ran) == 1
    assert torch.equal(first.query, again.query)
    layout.read(LLM, QUERY, TEXTS[:2], HEADS, ReadOptions())
    layout.read(LLM, QUERY, TEXTS, HeadSet.parse("3-0"), ReadOptions())  # deeper
    assert len(ran) == 3


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8).map(sorted), st.integers(-20, 300))
@settings(deadline=None, max_examples=300)
def test_the_advised_cut_is_the_largest_that_fits(lengths: list[int], room: int) -> None:
    fitting = [
        cut
        for cut in range(lengths[-1] + 1)
        if sum(min(length, cut) for length in lengths) <= max(0, room)
    ]
    assert longest_cut(lengths, room) == fitting[-1]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=9))
@settings(deadline=None)
def test_advice_can_be_followed_and_one_token_more_is_too_much(sizes: list[int]) -> None:
    texts = ["x" * size for size in sizes]
    try:
        check_fits(pieces_of(texts), LLM)
    except PromptTooLongError as error:
        advised = re.search(r"set max_doc_tokens=(\d+) or less", str(error))
        assert advised is not None
        cut = int(advised[1])
        check_fits(pieces_of(texts, cut), LLM)
        with pytest.raises(PromptTooLongError):
            check_fits(pieces_of(texts, cut + 1), LLM)
    else:
        assert sum(sizes) + 5 * len(sizes) + 144 <= LIMIT


def test_a_reranker_refuses_takes_the_advice_and_then_ranks() -> None:
    texts = ["x" * 300, "y" * 40, "z" * 300]
    with pytest.raises(PromptTooLongError, match="set max_doc_tokens=100 or less"):
        HeadRoutedAttentionReranker(LLM, long_texts=STRICT).rerank(QUERY, texts)
    strict = HeadRoutedAttentionReranker(LLM, max_doc_tokens=101, long_texts=STRICT)
    with pytest.raises(PromptTooLongError, match="set max_doc_tokens=100 or less"):
        strict.rerank(QUERY, texts)
    ranking = HeadRoutedAttentionReranker(LLM, max_doc_tokens=100).rerank(QUERY, texts)
    assert sorted(hit.index for hit in ranking) == [0, 1, 2]


def test_what_is_cut_off_is_not_read() -> None:
    reranker = HeadRoutedAttentionReranker(LLM, max_doc_tokens=4)
    long = reranker.signals(QUERY, ["abcdefgh", "ijklmnop"], HEADS)
    cut = reranker.signals(QUERY, ["abcd", "ijkl"], HEADS)
    assert torch.equal(long, cut)
    whole = HeadRoutedAttentionReranker(LLM).signals(QUERY, ["abcdefgh", "ijklmnop"], HEADS)
    assert not torch.allclose(long, whole)


@pytest.mark.parametrize("layout", [SequentialLayout(), ParallelLayout()], ids=lambda x: x.name)
def test_with_an_instruction_two_queries_without_content_share_the_calibration(
    layout: SequentialLayout | ParallelLayout,
) -> None:
    def read(**options: Any) -> TokenAttention:
        return layout.read(LLM, QUERY, TEXTS, HEADS, ReadOptions(**options))

    told, untold = read(instruction="only grey wolves"), read()
    bare = read(instruction="only grey wolves", null_share=0.0)
    assert told.null is not None
    assert untold.null is not None
    assert bare.null is not None
    # Without content and without the instruction there is no difference to the plain prompt.
    torch.testing.assert_close(bare.null, untold.null, atol=1e-7, rtol=0)
    assert (told.null - bare.null).abs().max() > 1e-4
    assert (told.query - untold.query).abs().max() > 1e-4
    mixed = read(instruction="only grey wolves", null_share=0.25)
    torch.testing.assert_close(mixed.null, 0.25 * told.null + 0.75 * bare.null, atol=1e-7, rtol=0)
    torch.testing.assert_close(mixed.query, told.query, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "layout",
    [SequentialLayout(), SequentialLayout(window=2), ParallelLayout()],
    ids=["sequential", "windows", "parallel"],
)
def test_token_ids_are_those_of_the_texts_in_the_order_given(
    layout: SequentialLayout | ParallelLayout,
) -> None:
    found = layout.read(LLM, QUERY, TEXTS, HEADS, ReadOptions(max_doc_tokens=10))
    tokenizer = families.tiny_tokenizer()
    assert [tokenizer.decode(list(ids)) for ids in found.document_ids] == [
        text[:10] for text in TEXTS
    ]
    assert tokenizer.decode(list(found.query_ids)) == QUERY
    assert [span.size for span in found.spans] == [len(ids) for ids in found.document_ids]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"null_share=1\.5 must be a number from 0 to 1\."):
        ReadOptions(null_share=1.5)
    with pytest.raises(InputError, match="instruction=' ' is blank"):
        ReadOptions(instruction=" ")
