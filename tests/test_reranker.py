"""The class users meet: rankings, bad input, threads."""

from __future__ import annotations

import asyncio
import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from presets import PresetLayout
from tokenizers import Regex, normalizers

from routehead_plugins import Document, FrozenLM, Head, HeadRoutedAttentionReranker, HeadSet, Recipe
from routehead_plugins.errors import (
    HeadError,
    InputError,
    PromptTooLongError,
    RouteHeadError,
    RouterMismatchError,
)
from routehead_plugins.layouts import ParallelLayout, SequentialLayout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.reranker import BLANK_SCORE
from routehead_plugins.scoring import LongTexts, Reweighting
from routehead_plugins.selection import AllHeads, FixedHeads, HeadRouter, QuerySpace, as_selector

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river"]


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def reranker(llm: FrozenLM) -> HeadRoutedAttentionReranker:
    return HeadRoutedAttentionReranker(llm)


def preset(llm: FrozenLM, **settings: Any) -> HeadRoutedAttentionReranker:
    return HeadRoutedAttentionReranker(llm, layout=PresetLayout(), **settings)


def test_a_ranking_is_sorted_and_names_index_score_and_document(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    ranking = reranker.rerank(QUERY, DOCUMENTS)
    scores = reranker.score(QUERY, DOCUMENTS)
    assert [hit.index for hit in ranking] == sorted(range(3), key=lambda index: -scores[index])
    assert [hit.score for hit in ranking] == sorted(scores, reverse=True)
    assert [hit.document.text for hit in ranking] == [DOCUMENTS[hit.index] for hit in ranking]
    assert ranking.query == QUERY
    assert ranking.heads == reranker.llm.heads


def test_the_score_is_the_calibrated_mean_over_heads_without_outliers(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    # Aggregated before outliers are looked for, unlike per-head signals: two roads to one sum
    # where no token is dropped.
    plain = HeadRoutedAttentionReranker(reranker.llm, drop_outliers=False)
    expected = plain.signals(QUERY, DOCUMENTS).mean(dim=0)
    torch.testing.assert_close(torch.tensor(plain.score(QUERY, DOCUMENTS)), expected)
    assert plain.score(QUERY, DOCUMENTS) != reranker.score(QUERY, DOCUMENTS)


def test_fewer_heads_give_other_scores_and_are_named(llm: FrozenLM) -> None:
    heads = HeadSet.parse("2-1,0-3")
    chosen = HeadRoutedAttentionReranker(llm, FixedHeads(heads))
    ranking = chosen.rerank(QUERY, DOCUMENTS)
    assert ranking.heads.heads == (Head(2, 1), Head(0, 3))
    assert chosen.score(QUERY, DOCUMENTS) != HeadRoutedAttentionReranker(llm).score(
        QUERY, DOCUMENTS
    )


def test_top_n_cuts_the_ranking_and_nothing_else(reranker: HeadRoutedAttentionReranker) -> None:
    whole = reranker.rerank(QUERY, DOCUMENTS)
    assert reranker.rerank(QUERY, DOCUMENTS, top_n=2).hits == whole.hits[:2]
    assert reranker.rerank(QUERY, DOCUMENTS, top_n=99).hits == whole.hits


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["0.1", "0.2", "0.3", " "]), max_size=12))
def test_ties_keep_the_order_of_the_candidates(llm: FrozenLM, texts: list[str]) -> None:
    ranking = preset(llm).rerank(QUERY, texts)
    expected = sorted(
        range(len(texts)),
        key=lambda index: -(float(texts[index]) if texts[index].strip() else BLANK_SCORE),
    )
    assert [hit.index for hit in ranking] == expected


def test_documents_keep_their_id_metadata_and_score(llm: FrozenLM) -> None:
    document = Document("0.5", id="d7", metadata={"page": 3}, score=12.3)
    (hit,) = preset(llm).rerank(QUERY, [document])
    assert hit.document is document


def test_inputs_are_left_as_they_are(reranker: HeadRoutedAttentionReranker) -> None:
    documents: list[str | Document] = [
        Document("a wolf", id="x", metadata={"tags": ["grey"]}, score=1.0),
        "rain",
        " ",
    ]
    before = copy.deepcopy(documents)
    reranker.rerank(QUERY, documents, top_n=1)
    assert documents == before


# What counts as bad input, and what becomes of it.


def test_no_documents_give_an_empty_ranking(reranker: HeadRoutedAttentionReranker) -> None:
    assert len(reranker.rerank(QUERY, [])) == 0
    assert reranker.score(QUERY, []) == []


def test_one_document_is_ranked_first_with_a_finite_score(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    (hit,) = reranker.rerank(QUERY, ["a wolf"])
    assert hit.index == 0
    assert -1 < hit.score < 1


def test_blank_documents_rank_last_and_do_not_touch_the_others(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    scores = reranker.score(QUERY, ["", DOCUMENTS[0], " \n\t", DOCUMENTS[1], "\u00a0"])
    assert [scores[1], scores[3]] == reranker.score(QUERY, DOCUMENTS[:2])
    assert [scores[0], scores[2], scores[4]] == [BLANK_SCORE] * 3
    assert reranker.score(QUERY, ["", " "]) == [BLANK_SCORE] * 2


# Zero-width characters, a byte order mark and control characters, which some tokenizers drop.
TOKENLESS = ["\u200b", "\ufeff\u200d", "\x00\x01 \x7f"]


@pytest.fixture(scope="module")
def dropping() -> FrozenLM:
    """An LLM whose tokenizer drops every character of the texts above."""
    tokenizer = families.tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Replace(Regex("[\u200b\ufeff\u200d\x00\x01\x7f]"), "")
    return FrozenLM(families.tiny_model("llama"), tokenizer, name="dropping")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"calibrate": False},
        {"layout": "parallel"},
        {"layout": SequentialLayout(window=2)},
        {"reweighting": Reweighting()},
        {"selector": FixedHeads(HeadSet([(0, 1)], recipe=Recipe(aggregation="log")))},
    ],
    ids=str,
)
def test_texts_without_a_token_rank_last_and_do_not_touch_the_others(
    dropping: FrozenLM, settings: dict[str, Any]
) -> None:
    reranker = HeadRoutedAttentionReranker(dropping, **settings)
    mixed = [TOKENLESS[0], DOCUMENTS[0], TOKENLESS[1], DOCUMENTS[1], TOKENLESS[2], DOCUMENTS[2]]
    scores = reranker.score(QUERY, mixed)
    assert scores[1::2] == reranker.score(QUERY, DOCUMENTS)
    assert len(set(scores[::2])) == 1
    assert scores[0] < min(scores[1::2])
    ranking = reranker.rerank(QUERY, mixed, spans=True)
    assert [hit.index for hit in ranking][3:] == [0, 2, 4]
    assert [hit.spans for hit in ranking][3:] == [()] * 3
    alone = reranker.rerank(QUERY, DOCUMENTS, spans=True)
    assert [hit.spans for hit in ranking][:3] == [hit.spans for hit in alone]
    assert [hit.index for hit in reranker.rerank_batch([(QUERY, mixed)])[0]][3:] == [0, 2, 4]
    only = reranker.rerank(QUERY, TOKENLESS, spans=True)
    assert [(hit.index, hit.score) for hit in only] == [(i, BLANK_SCORE) for i in range(3)]


def test_signals_of_a_text_without_a_token_are_refused(dropping: FrozenLM) -> None:
    reranker = HeadRoutedAttentionReranker(dropping)
    with pytest.raises(InputError, match=r"^documents\[1\] has no tokens, since the token"):
        reranker.signals(QUERY, ["a wolf", TOKENLESS[0]])
    with pytest.raises(InputError, match=r"has no tokens, since the tokenizer drops"):
        reranker.rerank(TOKENLESS[1], DOCUMENTS)


def test_the_same_document_twice_is_ranked_twice(llm: FrozenLM) -> None:
    same = Document("0.5", id="twin")
    ranking = preset(llm).rerank(QUERY, [same, Document("0.9", id="best"), same])
    assert [(hit.index, hit.document.id) for hit in ranking] == [
        (1, "best"),
        (0, "twin"),
        (2, "twin"),
    ]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "query='' is blank; give a text."),
        (" \n", "query=' \\n' is blank; give a text."),
        (None, "query=None is a NoneType; give a text."),
    ],
)
def test_a_blank_query_is_refused(
    reranker: HeadRoutedAttentionReranker, query: Any, message: str
) -> None:
    named = partial(reranker.signals, heads=HeadSet.parse("0-0"))
    for call in (reranker.rerank, reranker.score, reranker.signals, named):
        with pytest.raises(InputError) as error:
            call(query, DOCUMENTS)
        assert str(error.value) == message


@pytest.mark.parametrize("top_n", [0, -1])
def test_a_top_n_below_one_is_refused(reranker: HeadRoutedAttentionReranker, top_n: int) -> None:
    with pytest.raises(InputError) as error:
        reranker.rerank(QUERY, DOCUMENTS, top_n=top_n)
    assert str(error.value) == f"top_n={top_n} returns nothing; give 1 or more, or None for all."


def test_one_string_is_no_list_of_documents(reranker: HeadRoutedAttentionReranker) -> None:
    with pytest.raises(InputError, match="documents is one string; give a list of texts"):
        reranker.rerank(QUERY, "a wolf")


def test_a_candidate_that_is_no_text_is_named(reranker: HeadRoutedAttentionReranker) -> None:
    with pytest.raises(InputError, match=r"documents\[1\] is a int; give a str or a"):
        reranker.rerank(QUERY, ["a wolf", 7])  # type: ignore[list-item]


def test_signals_of_a_blank_document_are_refused(reranker: HeadRoutedAttentionReranker) -> None:
    with pytest.raises(InputError, match=r"documents\[1\] is blank and has no signals"):
        reranker.signals(QUERY, ["a wolf", ""])


def test_signals_of_no_documents_are_empty(reranker: HeadRoutedAttentionReranker) -> None:
    assert reranker.signals(QUERY, []).shape == (len(reranker.llm.heads), 0)


STRICT = LongTexts(on_too_long="error")


def test_a_document_of_fifty_thousand_words_is_refused_with_a_way_out(llm: FrozenLM) -> None:
    documents = ["a wolf", "wolf " * 50_000]
    with pytest.raises(PromptTooLongError) as error:
        HeadRoutedAttentionReranker(llm, long_texts=STRICT).rerank(QUERY, documents)
    assert error.value.tokens > 250_000
    assert error.value.limit == 4096
    cut = int(str(error.value).split("max_doc_tokens=")[1].split()[0])
    fitting = HeadRoutedAttentionReranker(llm, max_doc_tokens=cut)
    assert len(fitting.rerank(QUERY, documents)) == 2


def test_control_tokens_in_documents_and_query_are_plain_text(llm: FrozenLM) -> None:
    reranker = HeadRoutedAttentionReranker(llm)
    hostile = "".join(families.CONTROLS) * 3
    scores = reranker.score(f"what is {hostile}?", [hostile, "a wolf", f"rain {hostile}"])
    assert all(-1 < score < 1 for score in scores)
    controls = {llm.encoder.encode([token])[0] for token in families.CONTROLS}
    assert all(
        len(ids) == len(token)
        for ids, token in zip(
            (llm.encoder.encode([token])[0] for token in families.CONTROLS),
            families.CONTROLS,
            strict=True,
        )
    )
    assert len(controls) == len(families.CONTROLS)


@pytest.mark.parametrize("written", ["99-0", "0-9,99-0"])
def test_an_unknown_head_is_named_with_what_there_is(llm: FrozenLM, written: str) -> None:
    reranker = HeadRoutedAttentionReranker(llm, FixedHeads(HeadSet.parse(written)))
    unknown = written.replace(",", ", ")
    with pytest.raises(HeadError) as error:
        reranker.rerank(QUERY, DOCUMENTS)
    assert str(error.value) == (
        f"'tiny' has no head {unknown}; it has layers 0 to 3 with 4 heads each, counted from 0."
    )


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_first_stage_weight_that_is_no_weight_is_refused(llm: FrozenLM, weight: float) -> None:
    with pytest.raises(InputError, match=r"first_stage_weight=\S+ must be a finite number"):
        HeadRoutedAttentionReranker(llm, first_stage_weight=weight)


def test_an_unknown_layout_is_refused(llm: FrozenLM) -> None:
    with pytest.raises(
        InputError, match="layout='diagonal' is unknown; give one of: sequential, parallel"
    ):
        HeadRoutedAttentionReranker(llm, layout="diagonal")


# Arguments of wrong types: what is given, and words of the message.
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"selector": 5}, "selector is a int; give a selector, such as FixedHeads(heads), or None"),
    ({"selector": "13-18"}, "selector is a str; give a selector"),
    ({"selector": HeadSet([(0, 1)])}, "selector is a routehead_plugins.heads.HeadSet; give a sel"),
    ({"selector": AllHeads}, "; give a selector"),
    ({"layout": 3}, "layout is a int; give a layout, its name, or None"),
    ({"layout": ""}, "layout='' is unknown; give one of: sequential, parallel, late."),
    ({"layout": ["parallel"]}, "layout is a list; give a layout"),
    ({"layout": ParallelLayout}, "layout is a type; give a layout"),
    ({"calibrate": "yes"}, "calibrate='yes' must be True or False."),
    ({"calibrate": None}, "calibrate=None must be True or False."),
    ({"drop_outliers": None}, "drop_outliers=None must be True or False."),
    ({"drop_outliers": 0}, "drop_outliers=0 must be True or False."),
    ({"null_share": "1"}, "null_share='1' must be a number from 0 to 1."),
    ({"null_share": math.nan}, "null_share=nan must be a number from 0 to 1."),
    ({"null_share": None}, "null_share=None must be a number from 0 to 1."),
    ({"null_share": True}, "null_share=True must be a number from 0 to 1."),
    ({"reweighting": "reattn"}, "reweighting is a str; give a Reweighting, or None for none."),
    ({"reweighting": True}, "reweighting is a bool; give a Reweighting"),
    ({"first_stage_weight": "x"}, "first_stage_weight='x' must be a finite number, 0 or more."),
    ({"first_stage_weight": True}, "first_stage_weight=True must be a finite number, 0 or more."),
    ({"first_stage_weight": 10**400}, "must be a finite number, 0 or more."),
    (
        {"first_stage_weight": 1e39},
        "first_stage_weight=1e+39 is beyond float32; give 1e+30",
    ),
    ({"max_doc_tokens": True}, "max_doc_tokens=True is not a count"),
    ({"max_doc_tokens": 1.5}, "max_doc_tokens=1.5 is not a count"),
    ({"max_doc_tokens": "9"}, "max_doc_tokens='9' is not a count"),
]
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("rerank", (b"query", DOCUMENTS), {}, "query=b'query' is a bytes; give a text."),
    ("rerank", ([QUERY], DOCUMENTS), {}, "query=['which wolf ran?'] is a list; give a text."),
    ("rerank", (QUERY, {"d1": "a wolf"}), {}, "documents is a dict; give its values as a list."),
    ("score", (QUERY, {"a", "b"}), {}, "documents is a set, which has no order"),
    ("signals", (QUERY, b"a wolf"), {}, "documents is a bytes; give a list"),
    ("score", (QUERY, None), {}, "documents is a NoneType; give a list"),
    ("rerank", (QUERY, ["a", "b", "c", None]), {}, "documents[3] is a NoneType; give a str"),
    ("rerank", (QUERY, DOCUMENTS, "2"), {}, "top_n='2' is not a count"),
    ("rerank", (QUERY, DOCUMENTS), {"top_n": 1.5}, "top_n=1.5 is not a count"),
    ("rerank", (QUERY, DOCUMENTS), {"instruction": 5}, "instruction=5 is a int; give a text."),
    ("rerank", (QUERY, []), {"instruction": 5}, "instruction=5 is a int; give a text."),
    ("score", (QUERY, [""]), {"instruction": " "}, "instruction=' ' is blank; give a text."),
    ("rerank", (QUERY, DOCUMENTS), {"spans": "yes"}, "spans='yes' must be True or False."),
    ("rerank", (QUERY, []), {"spans": None}, "spans=None must be True or False."),
    ("signals", (QUERY, DOCUMENTS), {"heads": "0-1"}, "heads is a str; give a HeadSet, such as"),
    ("signals", (QUERY, DOCUMENTS), {"heads": [(0, 1)]}, "heads is a list; give a HeadSet"),
    ("rerank_batch", (None,), {}, "requests is a NoneType; give a list of pairs"),
    ("rerank_batch", ({QUERY: DOCUMENTS},), {}, "requests is a dict; give its values as a list."),
    ("rerank_batch", (QUERY,), {}, "requests is one string; give a list of pairs of a query and"),
    ("rerank_batch", ([(QUERY, []), "ab"],), {}, "requests[1] is a str; give a pair of a query"),
    ("rerank_batch", ([(QUERY, [], 3)],), {}, "requests[0] is a tuple; give a pair of a query"),
    ("rerank_batch", ([(" ", [])],), {}, "requests[0][0]=' ' is blank; give a text."),
    ("rerank_batch", ([(QUERY, []), (QUERY, {"d": "a"})],), {}, "requests[1][1] is a dict"),
    ("rerank_batch", ([(QUERY, ["a", 7])],), {}, "requests[0][1][1] is a int; give a str or a"),
    ("rerank_batch", ([],), {"top_n": True}, "top_n=True is not a count"),
    ("rerank_batch", ([],), {"show_progress": 1}, "show_progress=1 must be True or False."),
]


def check_message(error: pytest.ExceptionInfo[InputError], words: str) -> None:
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


@pytest.mark.parametrize(("settings", "words"), SETTINGS, ids=range(len(SETTINGS)))
def test_a_setting_of_a_wrong_type_is_refused(
    llm: FrozenLM, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedAttentionReranker(llm, **settings)
    check_message(error, words)


@pytest.mark.parametrize("backbone", [None, "embedded", families.tiny_model("llama")], ids=type)
def test_a_backbone_that_is_not_wrapped_is_refused(backbone: Any) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedAttentionReranker(backbone)
    check_message(error, "; give a FrozenLM, such as FrozenLM(model, tokenizer), or load one by")


@pytest.mark.parametrize(("method", "arguments", "named", "words"), CALLS, ids=range(len(CALLS)))
def test_an_argument_of_a_wrong_type_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
    llm: FrozenLM,
    method: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr(FrozenLM, "read", lambda *_, **__: pytest.fail("the LLM was run"))
    with pytest.raises(InputError) as error:
        getattr(HeadRoutedAttentionReranker(llm), method)(*arguments, **named)
    check_message(error, words)


def test_numbers_of_numpy_are_numbers(llm: FrozenLM) -> None:
    plain = HeadRoutedAttentionReranker(llm, max_doc_tokens=5, null_share=0, first_stage_weight=2)
    given: dict[str, Any] = {
        "max_doc_tokens": np.int32(5),
        "null_share": np.float32(0),
        "first_stage_weight": np.float64(2),
        "calibrate": np.True_,
    }
    documents: Any = np.array(DOCUMENTS)
    two: Any = np.int64(2)
    ranking = HeadRoutedAttentionReranker(llm, **given).rerank(QUERY, documents, two)
    assert ranking == plain.rerank(QUERY, DOCUMENTS, 2)


def test_documents_may_come_from_a_generator(reranker: HeadRoutedAttentionReranker) -> None:
    expected = reranker.rerank(QUERY, DOCUMENTS)
    assert reranker.rerank(QUERY, (text for text in DOCUMENTS)) == expected
    assert reranker.rerank_batch((query, iter(DOCUMENTS)) for query in [QUERY]) == [expected]


def test_scores_that_are_no_numbers_are_refused(llm: FrozenLM) -> None:
    with pytest.raises(RouteHeadError, match="'tiny' computed numbers that are not finite in"):
        preset(llm).rerank(QUERY, ["nan", "0.2"])


# The first stage's scores.


def test_fusion_adds_both_sides_standardised(llm: FrozenLM) -> None:
    documents = [
        Document("0.1", score=30.0),
        Document("0.2", score=10.0),
        Document("0.3", score=20.0),
    ]
    z = math.sqrt(1.5)  # of three values at equal distances
    scores = preset(llm, first_stage_weight=2.0).score(QUERY, documents)
    assert scores == pytest.approx([-z + 2 * z, 0 - 2 * z, z + 0], abs=1e-5)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_fusion_is_off_where_one_document_has_no_score(
    llm: FrozenLM, missing: float | None
) -> None:
    documents = [Document("0.1", score=30.0), Document("0.2", score=missing)]
    assert preset(llm, first_stage_weight=2.0).score(QUERY, documents) == pytest.approx([0.1, 0.2])


def test_equal_first_stage_scores_change_no_order(llm: FrozenLM) -> None:
    documents = [Document(text, score=5.0) for text in ("0.1", "0.3", "0.2")]
    ranking = preset(llm, first_stage_weight=1.0).rerank(QUERY, documents)
    assert [hit.index for hit in ranking] == [1, 2, 0]


def test_blank_documents_rank_last_under_fusion_too(llm: FrozenLM) -> None:
    documents = [Document(" ", score=99.0)] + [
        Document(str(place / 10), score=-float(place)) for place in range(9)
    ]
    for weight in (0.0, 5.0):
        ranking = preset(llm, first_stage_weight=weight).rerank(QUERY, documents)
        assert ranking[-1].index == 0
        assert ranking[-1].score < ranking[-2].score


@pytest.mark.parametrize("unit", [1e-300, 1.0, 1e20, 1e38, 1e200, 1e300])
def test_fusion_does_not_depend_on_the_unit_of_retrieval_scores(llm: FrozenLM, unit: float) -> None:
    texts, scores = ["0.1", "0.3", "0.2"], [30.0, -10.0, 5.0]
    documents = [Document(t, score=s * unit) for t, s in zip(texts, scores, strict=True)]
    plain = [Document(t, score=s) for t, s in zip(texts, scores, strict=True)]
    fused = preset(llm, first_stage_weight=1.0)
    assert fused.score(QUERY, documents) == pytest.approx(fused.score(QUERY, plain), abs=1e-6)


@pytest.mark.parametrize("outlier", [-1e30, -1e300, 1e30])
def test_one_outlier_among_retrieval_scores_still_counts(llm: FrozenLM, outlier: float) -> None:
    scores = {"0.3": outlier, "0.1": 7.0, "0.2": 6.0}
    documents = [Document(text, score=score) for text, score in scores.items()]
    ranking = preset(llm, first_stage_weight=100.0).rerank(QUERY, documents)
    assert ranking[0 if outlier > 0 else -1].index == 0


def test_blank_documents_rank_last_under_any_weight(llm: FrozenLM) -> None:
    documents = [Document(" ", score=5.0), Document("0.1", score=2.0), Document("0.2", score=1.0)]
    for weight in (1e17, 1e30):
        ranking = preset(llm, first_stage_weight=weight).rerank(QUERY, documents)
        assert ranking[-1].index == 0
        assert ranking[-1].score < ranking[-2].score


@pytest.mark.parametrize("method", ["rerank", "signals"])
def test_broken_weights_are_told_as_such(method: str) -> None:
    model: Any = families.tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(math.nan)
    llm = FrozenLM(model, families.tiny_tokenizer(), name="broken")
    broken = HeadRoutedAttentionReranker(llm, first_stage_weight=1.0)
    documents = [Document(text, score=float(i)) for i, text in enumerate(DOCUMENTS)]
    with pytest.raises(RouteHeadError, match=r"not finite in float32; its weights are damaged"):
        getattr(broken, method)(QUERY, documents)


# Batches and threads.


def test_a_batch_equals_its_queries_one_by_one(
    reranker: HeadRoutedAttentionReranker, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [(QUERY, DOCUMENTS), ("rain", DOCUMENTS[:2])]
    assert reranker.rerank_batch(requests, top_n=2) == [
        reranker.rerank(query, documents, top_n=2) for query, documents in requests
    ]
    assert capsys.readouterr() == ("", "")
    reranker.rerank_batch(requests, show_progress=True)
    assert "2/2" in capsys.readouterr().err


def test_sixteen_concurrent_calls_equal_serial_ones(reranker: HeadRoutedAttentionReranker) -> None:
    queries = [f"query {number} about wolves" for number in range(16)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(reranker.arerank(query, DOCUMENTS) for query in queries))

    for ranking, query in zip(asyncio.run(together()), queries, strict=True):
        assert ranking == reranker.rerank(query, DOCUMENTS)


# Where in the text.


def test_spans_are_given_on_request_and_are_exact_in_the_original_text(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    documents = ["  a wolf\tran \u00fcber the hill \U0001f43a!", " ", "rain fell on grey stones"]
    assert all(hit.spans == () for hit in reranker.rerank(QUERY, documents))
    for hit in reranker.rerank(QUERY, documents, spans=True):
        assert bool(hit.spans) == (hit.index != 1)
        assert list(hit.spans) == sorted(hit.spans, key=lambda span: -span.score)
        for span in hit.spans:
            words = hit.document.text[span.start : span.end]
            assert words == words.strip() != ""


def test_one_word_alone_stands_above_no_mean(llm: FrozenLM) -> None:
    (hit,) = HeadRoutedAttentionReranker(llm).rerank(QUERY, ["wolf"], spans=True)
    assert hit.spans == ()


def test_no_span_points_into_text_that_was_cut_off(llm: FrozenLM) -> None:
    cut = HeadRoutedAttentionReranker(llm, max_doc_tokens=12)
    (hit,) = cut.rerank(QUERY, ["a wolf ran over the hill in the rain"], spans=True)
    assert hit.spans
    assert all(span.start < 12 for span in hit.spans)


def test_the_layout_is_the_one_the_heads_were_chosen_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: FrozenLM
) -> None:
    monkeypatch.setattr(FrozenLM, "from_pretrained", lambda *_, **__: llm)
    path = tmp_path / "heads.json"
    HeadSet.parse("0-1").save(path)
    assert HeadRoutedAttentionReranker.from_pretrained("tiny", heads=path).layout.name == (
        "sequential"
    )
    HeadSet([(0, 1)], layout="spiral").save(path)
    for heads in (path, HeadSet.load(path)):
        with pytest.raises(InputError, match="layout='spiral' is unknown"):
            HeadRoutedAttentionReranker.from_pretrained("tiny", heads=heads)
    with pytest.raises(InputError) as error:
        HeadRoutedAttentionReranker.from_pretrained("tiny", heads=path, layout="sequential")
    assert str(error.value) == (
        "the heads were chosen for the spiral layout, but layout='sequential'; "
        "leave layout out, or choose heads for this one."
    )
    HeadSet([(0, 1)], layout="parallel").save(path)
    assert HeadRoutedAttentionReranker(llm, as_selector(path)).layout == ParallelLayout()
    ranking = HeadRoutedAttentionReranker(llm, as_selector(path)).rerank("q", ["a", "b"])
    assert ranking.layout == "parallel"


def test_wrong_heads_show_when_the_llm_is_loaded(
    monkeypatch: pytest.MonkeyPatch, llm: FrozenLM
) -> None:
    monkeypatch.setattr(FrozenLM, "from_pretrained", lambda *_, **__: llm)
    with pytest.raises(HeadError, match="'tiny' has no head 99-0"):
        HeadRoutedAttentionReranker.from_pretrained("tiny", heads="99-0")


# A router.

HEADS = HeadSet.parse("0-1,2-3,1-0,2-0")


def make_router(llm: FrozenLM, layout: str = "parallel") -> HeadRouter:
    """A router that chooses other heads for each of three queries."""
    embeddings = llm.embed([QUERY, "rain", "what is grey?"], layer=1)
    draw = torch.Generator().manual_seed(0)
    space = QuerySpace.fit(embeddings, 1)
    return HeadRouter(
        heads=replace(
            HEADS, layout=layout, model="tiny", recipe=Recipe(aggregation="standardised")
        ),
        space=space,
        bias=torch.zeros(4),
        projection=torch.randn(2, space(embeddings).shape[1], generator=draw),
        embeddings=torch.randn(4, 2, generator=draw),
        max_heads=2,
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, llm: FrozenLM) -> list[Any]:
    """What is said of the layers that are needed, whenever the LLM is loaded."""
    found: list[Any] = []

    def load(*_: Any, layers: Any, **__: Any) -> FrozenLM:
        found.append(layers)
        return llm

    monkeypatch.setattr(FrozenLM, "from_pretrained", load)
    return found


@pytest.mark.parametrize("kind", ["object", "folder", "heads"])
def test_a_router_chooses_the_heads_of_every_query(
    tmp_path: Path, llm: FrozenLM, loaded: list[Any], kind: str
) -> None:
    router = make_router(llm)
    router.save_pretrained(tmp_path)
    kinds: dict[str, dict[str, Any]] = {
        "object": {"router": router},
        "folder": {"router": tmp_path},
        "heads": {"heads": f"routed:{tmp_path}"},
    }
    reranker = HeadRoutedAttentionReranker.from_pretrained("tiny", **kinds[kind])
    assert reranker.layout == ParallelLayout()
    assert [layers(4) for layers in loaded] == [3]  # layer 3 is never read
    chosen = []
    for query in (QUERY, "rain", "what is grey?"):
        ranking = reranker.rerank(query, DOCUMENTS)
        assert ranking.heads == router.select(query, llm)
        assert (len(ranking.heads), ranking.layout) == (2, "parallel")
        fixed = HeadRoutedAttentionReranker(llm, FixedHeads(ranking.heads))
        assert ranking == fixed.rerank(query, DOCUMENTS)
        chosen.append(str(ranking.heads))
    assert len(set(chosen)) > 1


@pytest.mark.usefixtures("loaded")
def test_a_router_is_refused_in_the_other_layout(llm: FrozenLM) -> None:
    for asked, trained in (("sequential", "parallel"), ("parallel", "sequential")):
        router = make_router(llm, trained)
        assert HeadRoutedAttentionReranker.from_pretrained("tiny", router=router).layout.name == (
            trained
        )
        with pytest.raises(InputError) as error:
            HeadRoutedAttentionReranker.from_pretrained("tiny", router=router, layout=asked)
        assert str(error.value) == (
            f"the heads were chosen for the {trained} layout, but layout='{asked}'; "
            "leave layout out, or choose heads for this one."
        )


def test_heads_and_a_router_together_are_refused_before_anything_is_loaded(
    llm: FrozenLM, loaded: list[Any]
) -> None:
    for router, named in (("x", "router='x'"), (make_router(llm), "router")):
        with pytest.raises(InputError) as error:
            HeadRoutedAttentionReranker.from_pretrained("tiny", heads="0-1", router=router)
        assert str(error.value) == (
            f"heads='0-1' and {named} both choose heads; leave one of them out."
        )
    assert loaded == []


def test_a_router_of_another_llm_shows_when_the_llm_is_loaded(
    llm: FrozenLM, loaded: list[Any]
) -> None:
    router = make_router(llm)
    other = replace(router, heads=replace(router.heads, model="another"))
    with pytest.raises(RouterMismatchError, match="trained for 'another', but the LLM is 'tiny'"):
        HeadRoutedAttentionReranker.from_pretrained("tiny", router=other)
    assert len(loaded) == 1


COPIED = "which of the wolves ran over the hill"


def test_a_copy_of_the_query_is_not_read(llm: FrozenLM) -> None:
    plain = ["rain fell on a grey stone", "a wolf ran over the hill", "seven stones by a river"]
    copied = [plain[0], f"{COPIED}? {plain[1]}", f"{plain[2]} {COPIED.upper()}"]
    left = [plain[0], f"? {plain[1]}", f"{plain[2]} "]
    dropping = HeadRoutedAttentionReranker(llm, drop_query_copies=True)
    keeping = HeadRoutedAttentionReranker(llm)
    assert dropping.score(COPIED, copied) == keeping.score(COPIED, left)
    assert dropping.score(COPIED, plain) == keeping.score(COPIED, plain)
    assert keeping.score(COPIED, copied) != keeping.score(COPIED, left)


def test_a_document_that_is_a_copy_of_the_query_ranks_last_and_comes_back_whole(
    llm: FrozenLM,
) -> None:
    reranker = HeadRoutedAttentionReranker(llm, drop_query_copies=True)
    ranking = reranker.rerank(COPIED, [COPIED, "a wolf ran", f" {COPIED}\n"], spans=True)
    assert [hit.index for hit in ranking] == [1, 0, 2]
    assert [hit.document.text for hit in ranking] == ["a wolf ran", COPIED, f" {COPIED}\n"]
    assert [bool(hit.spans) for hit in ranking] == [True, False, False]


def test_spans_lie_in_the_whole_text_where_a_copy_was_left_out(llm: FrozenLM) -> None:
    text = f"a wolf, {COPIED}, ran far and a grey stone fell into the river"
    left = text.replace(COPIED, "")
    dropping = HeadRoutedAttentionReranker(llm, drop_query_copies=True)
    (hit,) = dropping.rerank(COPIED, [text], spans=True)
    (other,) = HeadRoutedAttentionReranker(llm).rerank(COPIED, [left], spans=True)
    assert len(hit.spans) == len(other.spans) > 0
    for span, expected in zip(hit.spans, other.spans, strict=True):
        words = text[span.start : span.end].replace(COPIED, "")
        assert (words, span.score) == (left[expected.start : expected.end], expected.score)


def test_the_best_documents_are_read_once_more_in_the_parallel_layout(
    llm: FrozenLM,
) -> None:
    texts = [f"{what} wolf ran {where}" for what in ("a", "no", "every") for where in ("by", "off")]
    late = HeadRoutedAttentionReranker(llm, layout="late", max_doc_tokens=5)
    options = RerankerOptions(llm.name, layout="late", heads="all", refine=3, max_doc_tokens=5)
    refined = HeadRoutedAttentionReranker.from_options(options, llm)
    assert refined.refinement is not None
    second = refined.refinement.scorer
    assert isinstance(second, HeadRoutedAttentionReranker)
    assert (second.layout.name, second.max_doc_tokens) == ("parallel", 5)
    scores = refined.score("which wolf?", texts)
    best = [hit.index for hit in late.rerank("which wolf?", texts)][:3]
    again = second.score("which wolf?", [texts[index] for index in best])
    assert [hit.index for hit in refined.rerank("which wolf?", texts)][:3] == [
        best[index] for index in sorted(range(3), key=lambda index: -again[index])
    ]
    rest = [index for index in range(6) if index not in best]
    expected = late.score("which wolf?", texts)
    assert [scores[i] for i in rest] == pytest.approx([expected[i] for i in rest], abs=1e-6)
    assert min(scores[i] for i in best) > max(scores[i] for i in rest)


@pytest.mark.parametrize("layout", [None, "parallel", "sequential"])
def test_only_the_late_layout_is_refined(llm: FrozenLM, layout: str | None) -> None:
    options = RerankerOptions(llm.name, layout=layout, heads="all", refine=3)
    with pytest.raises(InputError) as error:
        HeadRoutedAttentionReranker.from_options(options, llm)
    assert str(error.value) == (
        f"refine=3 is for the late layout, but layout={layout or 'sequential'!r}; leave one of "
        "them out."
    )


def test_a_refinement_of_another_kind_is_refused(llm: FrozenLM) -> None:
    given: Any = 20
    with pytest.raises(InputError) as error:
        HeadRoutedAttentionReranker(llm, refinement=given)
    assert str(error.value) == "refinement is a int; give a Refinement, or None for none."
