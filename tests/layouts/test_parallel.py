"""The parallel layout against its mask and positions written out, and what it promises."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import reference
import torch
from transformers import AutoModelForCausalLM

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import KeyValueCache, attention
from routehead_plugins.backbone import frozen_lm as backbone
from routehead_plugins.errors import PromptTooLongError
from routehead_plugins.layouts import ParallelLayout, ReadOptions
from routehead_plugins.layouts import parallel as parallel_module
from routehead_plugins.scoring import LongTexts

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]


def parallel(model: str = "llama") -> HeadRoutedAttentionReranker:
    llm = FrozenLM(families.tiny_model(model), families.tiny_tokenizer(), name=model)
    return HeadRoutedAttentionReranker(llm, layout="parallel")


def expected_signals(
    family: str, reranker: HeadRoutedAttentionReranker, heads: HeadSet
) -> torch.Tensor:
    pieces = reranker.llm.encoder.pieces(QUERY, DOCUMENTS, numbered=False)
    opening, spans, place = list(pieces.prefix), [], len(pieces.prefix)
    for document in pieces.documents:
        spans.append((place + document.text.start, place + document.text.end))
        place += len(document.ids)
    twin = reference.eager_twin(families.tiny_model(family))
    documents = [list(document.ids) for document in pieces.documents]
    query, null = (
        reference.parallel_attention(twin, opening, documents, list(tail))
        for tail in (pieces.tail, pieces.null_tail)
    )
    return torch.tensor(reference.signals(query, null, spans, list(heads), drop_outliers=True))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_signals_equal_those_of_one_pass_with_the_mask_written_out(family: str) -> None:
    reranker = parallel(family)
    signals = reranker.signals(QUERY, DOCUMENTS)
    expected = expected_signals(family, reranker, reranker.llm.heads)
    torch.testing.assert_close(signals, expected, atol=3e-6, rtol=0)
    assert expected.abs().max() > 1e-3


@pytest.fixture
def llama() -> HeadRoutedAttentionReranker:
    return parallel()


def test_scores_do_not_depend_on_the_order_of_candidates(
    llama: HeadRoutedAttentionReranker,
) -> None:
    scores = dict(zip(DOCUMENTS, llama.score(QUERY, DOCUMENTS), strict=True))
    for order in itertools.permutations(DOCUMENTS):
        again = dict(zip(order, llama.score(QUERY, order), strict=True))
        assert again == pytest.approx(scores, abs=1e-6)
    assert len(set(scores.values())) == 3


def passes_of(
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[int, ...]]:
    """Shapes (batch, tokens) of every forward from here on."""
    passes: list[tuple[int, ...]] = []
    run = attention.run

    def counted(view: Any, ids: torch.Tensor, *rest: Any) -> None:
        passes.append(tuple(ids.shape))
        run(view, ids, *rest)

    monkeypatch.setattr(backbone, "run", counted)
    return passes


def test_batches_are_bounded_by_tokens_and_change_nothing(
    llama: HeadRoutedAttentionReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["x" * size for size in (3, 30, 7, 12, 12, 1)] + ["x" * 7]
    whole = llama.signals(QUERY, documents)
    passes = passes_of(monkeypatch)
    monkeypatch.setattr(parallel_module, "BATCH_TOKENS", 40)
    torch.testing.assert_close(llama.signals(QUERY, documents), whole, atol=1e-6, rtol=0)
    # Every text has a separator of two tokens; the opening is known, equal documents run once.
    assert passes[:-1] == [(1, 32), (2, 14), (2, 5)]


def cached(max_bytes: int | str = "1GB") -> tuple[HeadRoutedAttentionReranker, KeyValueCache]:
    cache = KeyValueCache(max_bytes)
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")
    return HeadRoutedAttentionReranker(llm, layout=ParallelLayout(cache)), cache


def test_a_document_in_the_cache_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker, cache = cached()
    cold = reranker.signals(QUERY, DOCUMENTS)
    passes = passes_of(monkeypatch)
    warm = reranker.signals(QUERY, DOCUMENTS)
    assert len(passes) == 1
    assert (cache.hits, cache.misses) == (3, 3)
    torch.testing.assert_close(warm, cold, atol=1e-7, rtol=0)
    reranker.signals("another", [DOCUMENTS[1], "new"])
    assert [shape[0] for shape in passes[1:]] == [1, 1]  # what is new, and the tail


def test_no_score_depends_on_what_earlier_queries_left_in_the_cache() -> None:
    fresh, (used, cache) = cached()[0], cached()
    for queried in (DOCUMENTS[2:], ["moss " * 60, DOCUMENTS[0]]):
        used.signals("another", queried)
    assert torch.equal(used.signals(QUERY, DOCUMENTS), fresh.signals(QUERY, DOCUMENTS))
    assert cache.hits == 2


def test_a_cache_too_small_for_a_document_changes_nothing() -> None:
    reranker, cache = cached(1)
    torch.testing.assert_close(
        reranker.signals(QUERY, DOCUMENTS), parallel().signals(QUERY, DOCUMENTS), atol=1e-6, rtol=0
    )
    assert len(cache) == 0


def test_a_cut_document_is_another_document() -> None:
    reranker, cache = cached()
    reranker.score(QUERY, DOCUMENTS)
    cut = HeadRoutedAttentionReranker(reranker.llm, layout=reranker.layout, max_doc_tokens=5)
    expected = HeadRoutedAttentionReranker(reranker.llm, layout="parallel", max_doc_tokens=5)
    assert cut.score(QUERY, DOCUMENTS) == pytest.approx(expected.score(QUERY, DOCUMENTS), abs=1e-7)
    assert cache.hits == 1  # "rain" is short enough for both


def test_a_query_that_reads_deeper_runs_the_documents_again() -> None:
    reranker, cache = cached()
    shallow, deep = HeadSet.parse("0-1"), HeadSet.parse("3-2,1-1")
    reranker.signals(QUERY, DOCUMENTS, shallow)
    first = reranker.signals(QUERY, DOCUMENTS, deep)
    assert (cache.hits, cache.misses, len(cache)) == (0, 6, 3)
    reranker.signals(QUERY, DOCUMENTS, shallow)
    assert cache.hits == 3
    torch.testing.assert_close(first, parallel().signals(QUERY, DOCUMENTS, deep), atol=1e-6, rtol=0)


def test_new_weights_make_the_cache_forget() -> None:
    model = families.tiny_model("llama")
    llm = FrozenLM(model, families.tiny_tokenizer())
    reranker = HeadRoutedAttentionReranker(llm, layout=ParallelLayout(KeyValueCache("1GB")))
    reranker.score(QUERY, DOCUMENTS)
    model.load_state_dict(families.tiny_model("llama", seed=1).state_dict())
    fresh = FrozenLM(families.tiny_model("llama", seed=1), families.tiny_tokenizer())
    torch.testing.assert_close(
        reranker.signals(QUERY, DOCUMENTS),
        HeadRoutedAttentionReranker(fresh, layout="parallel").signals(QUERY, DOCUMENTS),
        atol=1e-6,
        rtol=0,
    )


def test_two_llms_can_share_a_cache() -> None:
    layout = ParallelLayout(KeyValueCache("1GB"))
    for seed in (0, 1):
        llm = FrozenLM(families.tiny_model("llama", seed=seed), families.tiny_tokenizer())
        together = HeadRoutedAttentionReranker(llm, layout=layout).signals(QUERY, DOCUMENTS)
        alone = HeadRoutedAttentionReranker(llm, layout="parallel").signals(QUERY, DOCUMENTS)
        torch.testing.assert_close(together, alone, atol=1e-7, rtol=0)


def test_threads_share_a_cache_that_is_too_small_for_all() -> None:
    reranker, cache = cached(20_000)
    heads = reranker.llm.heads
    lists = [[f"{word} {number}" for word in DOCUMENTS] for number in range(8)] * 4
    expected = [parallel_signals(reranker.llm, documents, heads) for documents in lists]

    def read(documents: list[str]) -> torch.Tensor:
        # The layout, since the re-ranker itself takes one query at a time.
        return reranker.layout.read(reranker.llm, QUERY, documents, heads, ReadOptions()).query

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, lists))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert 0 < cache.nbytes <= 20_000


def parallel_signals(llm: FrozenLM, documents: list[str], heads: HeadSet) -> torch.Tensor:
    return ParallelLayout().read(llm, QUERY, documents, heads, ReadOptions()).query


def test_any_number_of_documents_fits_and_one_too_long_is_refused() -> None:
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.max_position_embeddings = 200
    model = AutoModelForCausalLM.from_config(config).eval()
    llm = FrozenLM(model, families.tiny_tokenizer(), name="tiny")
    reranker = HeadRoutedAttentionReranker(
        llm, layout="parallel", long_texts=LongTexts(on_too_long="error")
    )
    # 29 tokens open the prompt, the tail has 115, the separator 2: 54 are left for a text.
    assert len(reranker.score(QUERY, ["x" * 54] * 40 + ["y"] * 20)) == 60
    with pytest.raises(PromptTooLongError) as error:
        reranker.score(QUERY, ["x", "x" * 55])
    assert str(error.value) == (
        "the longest document makes a prompt of 201 tokens, but 'tiny' takes 200; "
        "set max_doc_tokens=54 or less."
    )
    with pytest.raises(PromptTooLongError, match=r"shorten the query\.$"):
        reranker.score("q" * 100, ["x"])
