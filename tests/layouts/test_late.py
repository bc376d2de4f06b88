"""The late layout against a pass for every layer, and what it promises."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import families
import pytest
import reference
import routers
import torch
from transformers import AutoModelForCausalLM

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import BytesCache, DocumentKeys, KeyValues, TailQueries, attention
from routehead_plugins.backbone import frozen_lm as backbone
from routehead_plugins.errors import InputError, PromptTooLongError
from routehead_plugins.layouts import LateLayout
from routehead_plugins.layouts.late import document_keys
from routehead_plugins.options import RerankerOptions
from routehead_plugins.scoring import LongTexts
from routehead_plugins.selection import FixedHeads, QuerySpace, Router

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]


def late(family: str = "llama", **options: Any) -> HeadRoutedAttentionReranker:
    llm = FrozenLM(families.tiny_model(family), families.tiny_tokenizer(), name=family)
    return HeadRoutedAttentionReranker(llm, layout=LateLayout(**options))


def expected_signals(reranker: HeadRoutedAttentionReranker, family: str) -> torch.Tensor:
    llm, layout = reranker.llm, cast(LateLayout, reranker.layout)
    pieces, frame = llm.encoder.pieces(QUERY, DOCUMENTS, numbered=False), layout.frame(llm)
    spans, at = [], len(pieces.prefix)
    for document in pieces.documents:
        spans.append((at + document.text.start, at + document.text.end))
        at += len(document.ids)
    twin = reference.eager_twin(families.tiny_model(family))
    documents = [list(document.ids) for document in pieces.documents]
    query, null = (
        reference.late_attention(twin, list(pieces.prefix), documents, list(tail), frame.start)
        for tail in (pieces.tail, pieces.null_tail)
    )
    return torch.tensor(reference.signals(query, null, spans, list(llm.heads), drop_outliers=True))


@pytest.mark.parametrize("room", [4, 512])  # within a window of 24 tokens, and beyond it
@pytest.mark.parametrize("family", families.CONFIGS)
def test_signals_equal_those_of_a_pass_for_every_layer(family: str, room: int) -> None:
    reranker = late(family, document_room=room)
    expected = expected_signals(reranker, family)
    torch.testing.assert_close(reranker.signals(QUERY, DOCUMENTS), expected, atol=3e-6, rtol=0)
    # Where every layer has a window, documents 512 tokens ahead are beyond it.
    beyond = room == 512 and family in ("mistral", "phi3", "phimoe")
    assert (expected.abs().max() < 1e-3) == beyond


@pytest.fixture
def llama() -> HeadRoutedAttentionReranker:
    return late()


def test_scores_do_not_depend_on_the_order_of_candidates(
    llama: HeadRoutedAttentionReranker,
) -> None:
    scores = dict(zip(DOCUMENTS, llama.score(QUERY, DOCUMENTS), strict=True))
    for order in itertools.permutations(DOCUMENTS):
        again = dict(zip(order, llama.score(QUERY, order), strict=True))
        assert again == pytest.approx(scores, abs=1e-6)
    assert len(set(scores.values())) == 3


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes (batch, tokens) of every forward from here on."""
    passes: list[tuple[int, ...]] = []
    run = attention.run

    def counted(view: Any, ids: torch.Tensor, *rest: Any) -> None:
        passes.append(tuple(ids.shape))
        run(view, ids, *rest)

    monkeypatch.setattr(backbone, "run", counted)
    return passes


def test_a_query_over_cached_documents_runs_its_tail_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reranker = late(cache=BytesCache("1GB"))
    cold = reranker.signals(QUERY, DOCUMENTS)
    passes = passes_of(monkeypatch)
    warm = reranker.signals(QUERY, DOCUMENTS)
    pieces = reranker.llm.encoder.pieces(QUERY, DOCUMENTS, numbered=False)
    assert passes == [(1, len(pieces.tail))]  # the null query's queries are kept as well
    assert torch.equal(warm, cold)
    reranker.signals("another", [DOCUMENTS[1], "new"])
    assert [shape[0] for shape in passes[1:]] == [1, 1]  # what is new, and the tail


def test_a_cached_document_is_smaller_than_its_keys_and_values() -> None:
    cache: BytesCache[DocumentKeys] = BytesCache("1GB")
    chosen = FixedHeads(HeadSet.parse("2-3,2-2"))
    reranker = HeadRoutedAttentionReranker(late().llm, chosen, layout=LateLayout(cache))
    reranker.score(QUERY, DOCUMENTS[:1])
    (tokens,) = (len(piece.ids) for piece in pieces_of(reranker, DOCUMENTS[:1]))
    width = 8  # both heads share one key head
    assert cache.nbytes == tokens * (width * 4 + 8)  # float32, and the positions


def pieces_of(reranker: HeadRoutedAttentionReranker, documents: list[str]) -> Sequence[Any]:
    return reranker.llm.encoder.pieces(QUERY, documents, numbered=False).documents


def test_no_score_depends_on_what_earlier_queries_left_in_the_cache() -> None:
    fresh, used = (late(cache=BytesCache("1GB")) for _ in range(2))
    for queried in (DOCUMENTS[2:], ["moss " * 60, DOCUMENTS[0]]):
        used.signals("another", queried)
    assert torch.equal(used.signals(QUERY, DOCUMENTS), fresh.signals(QUERY, DOCUMENTS))


def test_keys_are_kept_for_every_head_that_a_query_may_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reranker = late(cache=BytesCache("1GB"))  # its selector reads every head
    whole = reranker.signals(QUERY, DOCUMENTS)
    passes = passes_of(monkeypatch)
    heads = HeadSet.parse("3-2,0-1")
    some = reranker.signals(QUERY, DOCUMENTS, heads)
    assert len(passes) == 1
    indices = reranker.llm.heads.indices_of(list(heads))
    torch.testing.assert_close(some, whole[indices], atol=1e-7, rtol=0)


def test_new_weights_make_the_caches_forget() -> None:
    model = families.tiny_model("llama")
    llm = FrozenLM(model, families.tiny_tokenizer())
    reranker = HeadRoutedAttentionReranker(llm, layout=LateLayout(BytesCache("1GB")))
    reranker.score(QUERY, DOCUMENTS)
    model.load_state_dict(families.tiny_model("llama", seed=1).state_dict())
    fresh = FrozenLM(families.tiny_model("llama", seed=1), families.tiny_tokenizer())
    torch.testing.assert_close(
        reranker.signals(QUERY, DOCUMENTS),
        HeadRoutedAttentionReranker(fresh, layout="late").signals(QUERY, DOCUMENTS),
        atol=1e-6,
        rtol=0,
    )


def test_threads_share_the_caches() -> None:
    reranker = late(cache=BytesCache(20_000))
    lists = [[f"{word} {number}" for word in DOCUMENTS] for number in range(8)] * 4
    expected = [late().signals(QUERY, documents) for documents in lists[:8]] * 4
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda documents: reranker.signals(QUERY, documents), lists))
    for one, other in zip(read, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


FAMILIES = ["llama", "gemma2", "gpt-oss", "mistral"]  # plain, soft caps, sinks, windows


def tail_queries(llm: FrozenLM, tail: tuple[int, ...], room: int = 512) -> TailQueries:
    frame = LateLayout(document_room=room).frame(llm)
    return llm.tail_queries(prefix_of(llm), tail, llm.heads, start=frame.start, length=frame.length)


@pytest.mark.parametrize("part", [1, 7, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_read_in_parts_are_read_as_together(
    family: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = late(family).llm
    frame = LateLayout(document_room=4).frame(llm)
    pieces = llm.encoder.pieces(QUERY, DOCUMENTS, numbered=False)
    ids = [piece.ids for piece in pieces.documents]
    documents = document_keys(llm, frame, ids, llm.key_columns(llm.heads), prefix_of(llm))
    queries = tail_queries(llm, pieces.tail, room=4)
    whole = queries.attention(DocumentKeys.join(documents), llm.heads)
    monkeypatch.setattr("routehead_plugins.backbone.tail_queries._PART", part)
    halves = [DocumentKeys.join(documents[:1]), DocumentKeys.join(documents[1:])]
    sums = torch.logaddexp(*(queries.log_sums(half, llm.heads) for half in halves))
    read = torch.cat([queries.attention(half, llm.heads, sums) for half in halves], dim=2)
    torch.testing.assert_close(read, whole, atol=1e-6, rtol=0)
    in_small_parts = queries.attention(DocumentKeys.join(documents), llm.heads)
    torch.testing.assert_close(in_small_parts, whole, atol=1e-6, rtol=0)
    # More tokens than are kept at once are read twice.
    monkeypatch.setattr("routehead_plugins.backbone.tail_queries._BUFFERED", 3)
    twice = queries.attention(DocumentKeys.join(documents), llm.heads)
    torch.testing.assert_close(twice, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_tails_read_together_are_read_as_alone(family: str, shared: int) -> None:
    llm = late(family).llm
    frame = LateLayout(document_room=4).frame(llm)
    ids = [piece.ids for piece in llm.encoder.documents(DOCUMENTS)]
    documents = document_keys(llm, frame, ids, llm.key_columns(llm.heads), prefix_of(llm))
    keys = DocumentKeys.join(documents)
    same = tuple(range(30, 30 + shared))
    tails = [(*same, 60, 61, 62, 63), (*same, 99, 98), (*same, 150, 33, 201)]
    alone = [tail_queries(llm, tail, room=4) for tail in tails]
    expected = torch.cat([queries.attention(keys, llm.heads) for queries in alone])
    together = TailQueries.join(alone, shared)
    assert together.weights.shape == (3, shared + 4 + 2 + 3)
    torch.testing.assert_close(together.attention(keys, llm.heads), expected, atol=1e-6, rtol=0)


def prefix_of(llm: FrozenLM) -> KeyValues:
    frame = LateLayout().frame(llm)
    last = llm.heads.last_layer
    (prefix,) = llm.prefill([frame.prefix], last_layer=last, length=frame.length)
    return prefix


def test_a_tail_longer_than_its_room_is_refused_and_so_is_a_document_over_the_context() -> None:
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.max_position_embeddings = 400
    model = AutoModelForCausalLM.from_config(config).eval()
    llm = FrozenLM(model, families.tiny_tokenizer(), name="tiny")
    reranker = HeadRoutedAttentionReranker(
        llm, layout="late", long_texts=LongTexts(on_too_long="error")
    )
    # 29 tokens are the prefix, of the other 371 the tail has 186; its fixed part has 112.
    assert len(reranker.score("q" * 70, ["x" * 300] * 3)) == 3
    with pytest.raises(PromptTooLongError) as error:
        reranker.score("q" * 100, ["x"])
    assert str(error.value).startswith("the query makes a tail of ")
    assert str(error.value).endswith("with 'tiny'; shorten the query.")
    with pytest.raises(PromptTooLongError, match=r"set max_doc_tokens=369 or less\.$"):
        reranker.score(QUERY, ["x" * 370])


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [0, 2])
def test_queries_are_embedded_by_the_states_of_their_tails(
    family: str, pooling: str, layer: int
) -> None:
    reranker = late(family)
    llm, layout = reranker.llm, cast(LateLayout, reranker.layout)
    pieces, frame = llm.encoder.pieces(QUERY, [], numbered=False), layout.frame(llm)
    prefix, tail = pieces.prefix, pieces.tail
    ids = torch.tensor([[*prefix, *tail]])
    positions = torch.arange(len(prefix)), frame.start + torch.arange(len(tail))
    with torch.no_grad():
        states = families.tiny_model(family)(
            ids, position_ids=torch.cat(positions)[None], output_hidden_states=True
        ).hidden_states[layer][0, len(prefix) :]
    expected = states[-1] if pooling == "last" else states.mean(dim=0)
    embeddings = layout.embed(llm, ["rain", QUERY], layer=layer, pooling=pooling)
    torch.testing.assert_close(embeddings[1], expected, atol=3e-6, rtol=0)
    assert embeddings.shape == (2, llm.width)
    # All tails end with the same token.
    alike = torch.allclose(embeddings[0], embeddings[1])
    assert alike == (layer == 0 and pooling == "last")


def test_no_queries_have_no_embeddings(llama: HeadRoutedAttentionReranker) -> None:
    layout = cast(LateLayout, llama.layout)
    assert layout.embed(llama.llm, [], layer=1).shape == (0, llama.llm.width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1, "pooling": "max"}, "pooling='max' does not exist; choose one of mean, last."),
        ({"layer": 4}, "layer=4 is not a layer of 'llama'; give 0 to 3."),
        ({"layer": -1}, "layer=-1 is not a layer of 'llama'; give 0 to 3."),
    ],
)
def test_an_embedding_that_no_tail_has_is_refused(
    llama: HeadRoutedAttentionReranker, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        cast(LateLayout, llama.layout).embed(llama.llm, [QUERY], **options)
    assert str(error.value) == message


@pytest.fixture
def routed(llama: HeadRoutedAttentionReranker) -> HeadRoutedAttentionReranker:
    """A re-ranker whose router embeds queries by their tails, at the depth of its heads."""
    layout = cast(LateLayout, llama.layout)
    queries = [QUERY, *routers.QUERIES]
    embeddings = layout.embed(llama.llm, queries, layer=routers.LAYER)
    space = QuerySpace.fit(embeddings, routers.LAYER, source="tail", coordinates=6)
    heads = replace(routers.HEADS, model="llama", layout="late")
    return HeadRoutedAttentionReranker(
        llama.llm, routers.make("heads", space, heads=heads, max_heads=2)
    )


def test_routing_takes_no_pass_of_its_own(
    routed: HeadRoutedAttentionReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, router = cast(LateLayout, routed.layout), cast(Router, routed.selector)
    expected = {}
    for query in (QUERY, "why b?"):
        (embedding,) = layout.embed(routed.llm, [query], layer=routers.LAYER)
        chosen = router.choose(router.logits(embedding[None])[0])
        fixed = HeadRoutedAttentionReranker(routed.llm, FixedHeads(chosen))
        expected[query] = chosen.heads, fixed.score(query, DOCUMENTS)
    assert len({heads for heads, _ in expected.values()}) == 2
    routed.score("rain", DOCUMENTS)  # prefix and null tail are kept from here on
    for query, (heads, scores) in expected.items():
        passes = passes_of(monkeypatch)
        ranking = routed.rerank(query, DOCUMENTS)
        assert ranking.heads.heads == heads
        found = {hit.index: hit.score for hit in ranking}
        assert [found[index] for index in range(3)] == pytest.approx(scores, abs=1e-6)
        tails = [shape for shape in passes if shape[0] == 1]
        documents = [shape for shape in passes if shape[0] > 1]
        assert (len(tails), len(documents)) == (1, 1)


def test_a_search_routes_by_the_tail_as_well(
    routed: HeadRoutedAttentionReranker, tmp_path: Path
) -> None:
    routed.index((Document(text, id=text) for text in DOCUMENTS), tmp_path / "index")
    options = RerankerOptions("llama", router=routed.selector, documents=tmp_path / "index")
    reranker = HeadRoutedAttentionReranker.from_options(options, routed.llm)
    hits = {hit.id: hit.score for hit in reranker.search(QUERY)}
    assert [hits[text] for text in DOCUMENTS] == pytest.approx(
        reranker.score(QUERY, DOCUMENTS), abs=1e-6
    )
    assert reranker.rerank(QUERY, DOCUMENTS).heads == routed.rerank(QUERY, DOCUMENTS).heads
