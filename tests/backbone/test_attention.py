"""The tap against eager attention over the full prompt, and the manners of a guest."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import families
import pytest
import reference
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import attention
from routehead_plugins.backbone import frozen_lm as backbone
from routehead_plugins.backbone.view import tapped_view
from routehead_plugins.errors import UnsupportedModelError
from routehead_plugins.layouts import ReadOptions, SequentialLayout

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]


@pytest.fixture(scope="module", params=families.CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reranker(family: str) -> HeadRoutedAttentionReranker:
    model = families.tiny_model(family)
    return HeadRoutedAttentionReranker(FrozenLM(model, families.tiny_tokenizer(), name=family))


def expected_signals(
    family: str, reranker: HeadRoutedAttentionReranker, heads: HeadSet
) -> torch.Tensor:
    """Two full eager passes over the whole prompt, and a loop over tokens."""
    pieces = reranker.llm.encoder.pieces(QUERY, DOCUMENTS[::-1], numbered=True)
    prefix, spans = list(pieces.prefix), []
    for document in pieces.documents:
        spans.append((len(prefix) + document.text.start, len(prefix) + document.text.end))
        prefix += document.ids
    twin = reference.eager_twin(families.tiny_model(family))
    query = reference.tail_attention(twin, prefix, list(pieces.tail))
    null = reference.tail_attention(twin, prefix, list(pieces.null_tail))
    return torch.tensor(
        reference.signals(
            query,
            null if reranker.calibrate else None,
            spans[::-1],
            list(heads),
            drop_outliers=reranker.readout.drop_outliers,
        )
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=0)
    # Hundreds of times the tolerance, or the comparison above would pass on zeros.
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("drop_outliers", [True, False])
def test_signals_equal_those_of_eager_attention(
    family: str, reranker: HeadRoutedAttentionReranker, calibrate: bool, drop_outliers: bool
) -> None:
    exact = HeadRoutedAttentionReranker(
        reranker.llm, calibrate=calibrate, drop_outliers=drop_outliers
    )
    signals = exact.signals(QUERY, DOCUMENTS)
    assert signals.shape == (len(exact.llm.heads), len(DOCUMENTS))
    assert_close(signals, expected_signals(family, exact, exact.llm.heads))


@pytest.mark.parametrize("written", ["0-1", "2-3,0-0,2-1", "3-0"])
def test_chosen_heads_are_read_in_the_order_given(
    family: str, reranker: HeadRoutedAttentionReranker, written: str
) -> None:
    heads = HeadSet.parse(written)
    signals = reranker.signals(QUERY, DOCUMENTS, heads)
    assert_close(signals, expected_signals(family, reranker, heads))


def test_llama4_tempers_attention_by_position_where_tails_share_positions() -> None:
    config = cast(Any, copy.deepcopy(families.CONFIGS["llama4"]))
    config.floor_scale, config.attn_scale = 16, 0.5  # far below the length of the prompt
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    llm = FrozenLM(model, families.tiny_tokenizer())
    read = SequentialLayout().read(llm, QUERY, DOCUMENTS, llm.heads, ReadOptions())
    pieces = llm.encoder.pieces(QUERY, DOCUMENTS[::-1], numbered=True)
    prefix = [*pieces.prefix, *(token for piece in pieces.documents for token in piece.ids)]
    twin = reference.eager_twin(model)
    for actual, tail in ((read.query, pieces.tail), (read.null, pieces.null_tail)):
        expected = reference.tail_attention(twin, prefix, list(tail)).flatten(0, 1)
        assert_close(cast(torch.Tensor, actual), expected)


@pytest.fixture
def llama() -> HeadRoutedAttentionReranker:
    model = families.tiny_model("llama")
    return HeadRoutedAttentionReranker(FrozenLM(model, families.tiny_tokenizer()))


def test_one_document_and_many_are_read_alike(llama: HeadRoutedAttentionReranker) -> None:
    heads = llama.llm.heads
    for documents in (["only one"], ["x"] * 9):
        signals = llama.signals(QUERY, documents)
        assert signals.shape == (len(heads), len(documents))
        assert signals.isfinite().all()


def test_documents_run_once_and_both_tails_in_one_pass(
    llama: HeadRoutedAttentionReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    run = attention.run

    def counted(view: Any, ids: torch.Tensor, *rest: Any) -> None:
        passes.append(tuple(ids.shape))
        run(view, ids, *rest)

    monkeypatch.setattr(backbone, "run", counted)
    llama.signals(QUERY, DOCUMENTS)
    pieces = llama.llm.encoder.pieces(QUERY, DOCUMENTS, numbered=True)
    prefix = len(pieces.prefix) + sum(len(document.ids) for document in pieces.documents)
    both = {pieces.tail[:end] for end in range(1, len(pieces.tail) + 1)}
    both |= {pieces.null_tail[:end] for end in range(1, len(pieces.null_tail) + 1)}
    assert passes == [(1, prefix), (1, len(both))]  # what the tails share is run once
    llama.signals("another query", DOCUMENTS)
    assert len(passes) == 3  # the same documents are not run again


def test_no_layer_runs_beyond_the_deepest_chosen_head(llama: HeadRoutedAttentionReranker) -> None:
    layers = cast(Any, llama.llm._view).layers
    ran: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(layers)
    ]
    finished: list[int] = []
    hooks += [
        layer.mlp.register_forward_hook(lambda *_, number=number: finished.append(number))
        for number, layer in enumerate(layers)
    ]
    try:
        llama.signals(QUERY, DOCUMENTS, HeadSet.parse("1-3,0-2"))
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0, 1] * 2  # the documents, then the tails
    assert finished == [0] * 2  # layer 1 stops at its keys: no value product, no MLP


def test_long_prompts_are_read_in_chunks_with_the_same_result(
    llama: HeadRoutedAttentionReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.signals(QUERY, DOCUMENTS)
    monkeypatch.setattr(attention, "_MAX_SCORES", 1)
    torch.testing.assert_close(llama.signals(QUERY, DOCUMENTS), whole, atol=1e-7, rtol=0)


ALL_SEEN = [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (None, ALL_SEEN),
        (causal_mask_function, ALL_SEEN),
        (
            sliding_window_causal_mask_function(3),
            [[0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1]],
        ),
        (  # position 4 begins a chunk
            chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)),
            [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1]],
        ),
        (
            chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long)),
            [[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]],
        ),
    ],
)
def test_rows_see_what_their_layer_shows_them_of_the_past_and_their_own_path(
    function: attention.MaskFunction | None, seen: list[list[int]]
) -> None:
    # Two documents at positions 1 to 2 and 1; a tail of one token with two continuations.
    rows = attention.Rows(
        weights=torch.ones(1, 3) / 3,
        positions=torch.tensor([4, 5, 5]),
        sees=torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool(),
        past=torch.tensor([0, 1, 2, 1]),
    )
    assert rows.mask(function)[0, 0].int().tolist() == seen


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything a guest could leave behind."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


@pytest.mark.parametrize("fails", [False, True], ids=["after a call", "after an error"])
def test_the_model_is_left_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.tiny_model("gemma2").train()
    before = state_of(model)
    reranker = HeadRoutedAttentionReranker(FrozenLM(model, families.tiny_tokenizer()))
    if fails:
        monkeypatch.setattr(attention, "_softmax", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reranker.rerank(QUERY, DOCUMENTS)
        monkeypatch.undo()
    reranker.rerank(QUERY, DOCUMENTS)
    after = state_of(model)
    torch.testing.assert_close(after.pop("parameters"), before.pop("parameters"), atol=0, rtol=0)
    assert after == before


def test_a_model_in_training_mode_is_read_without_dropout() -> None:
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.attention_dropout = 0.9
    model = AutoModelForCausalLM.from_config(config).train()
    reranker = HeadRoutedAttentionReranker(FrozenLM(model, families.tiny_tokenizer()))
    torch.testing.assert_close(
        reranker.signals(QUERY, DOCUMENTS), reranker.signals(QUERY, DOCUMENTS), atol=0, rtol=0
    )


def test_hooks_of_the_caller_stay_and_are_not_called() -> None:
    model = families.tiny_model("llama")
    calls: list[str] = []
    layer = cast(Any, model).model.layers[0]
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    reranker = HeadRoutedAttentionReranker(FrozenLM(model, families.tiny_tokenizer()))
    reranker.rerank(QUERY, DOCUMENTS)
    assert calls == []
    with torch.no_grad():
        model(torch.tensor([[1, 20, 30]]))
    assert calls == ["before", "after"]


def test_the_view_shares_the_memory_of_the_model() -> None:
    model = families.tiny_model("qwen3")
    view = tapped_view(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in view.parameters()} <= own


def test_a_failed_call_does_not_spoil_the_next(llama: HeadRoutedAttentionReranker) -> None:
    before = llama.score(QUERY, DOCUMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_softmax", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.score(QUERY, DOCUMENTS)
    assert llama.score(QUERY, DOCUMENTS) == before


def test_threads_that_read_different_heads_at_once_do_not_mix(
    llama: HeadRoutedAttentionReranker,
) -> None:
    sets = [HeadSet.parse(written) for written in ("0-0", "3-1,1-1", "2-2", "3-3,0-1")] * 8

    def read(heads: HeadSet) -> torch.Tensor:
        # The layout, since the re-ranker itself takes one query at a time.
        return llama.layout.read(llama.llm, QUERY, DOCUMENTS, heads, ReadOptions()).query

    serial = [read(heads) for heads in sets]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(read, sets))
    for one, other in zip(together, serial, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_model_itself_can_be_used_while_it_is_read() -> None:
    model = families.tiny_model("mistral")
    reranker = HeadRoutedAttentionReranker(FrozenLM(model, families.tiny_tokenizer()))
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        expected = model(ids).logits
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: [reranker.score(QUERY, DOCUMENTS) for _ in range(5)])
            while not reading.done():
                torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=0)
    assert len(set(map(tuple, reading.result()))) == 1


def test_a_model_without_attention_is_refused_by_name() -> None:
    config = MambaConfig(vocab_size=families.VOCABULARY, hidden_size=16, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError) as error:
        FrozenLM(MambaForCausalLM(config), families.tiny_tokenizer())
    assert str(error.value).startswith("'MambaForCausalLM' has no attention that can be read (")
    assert str(error.value).endswith("Granite or GPT-OSS.")


def test_an_encoder_is_refused_by_name() -> None:
    config = BertConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(UnsupportedModelError, match="its attention is not causal") as error:
        FrozenLM(BertForMaskedLM(config), families.tiny_tokenizer())
    assert str(error.value).startswith("'BertForMaskedLM' has no attention that can be read (")
