"""Rotary embeddings that depend on the length: as in one forward over the whole prompt."""

from __future__ import annotations

from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedModel,
)

from routehead_plugins import FrozenLM
from routehead_plugins.backbone.text_tasks import QueryLikelihood
from routehead_plugins.layouts import ReadOptions, get_layout

SHORT, LONG = "who dug?", "who dug the long tunnel under the lake, and in what year did it open?"
DOCUMENTS = ["A tunnel was dug below the lake.", "fog", "The harbour freezes in some winters."]
ALONE = ReadOptions(calibrate=False)
FACTORS: dict[str, Any] = {
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 3.0, 2.0, 5.0],
}


def longrope(limit: int) -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
    return Phi3Config(
        **families._SMALL,
        sliding_window=None,
        original_max_position_embeddings=limit,
        rope_parameters=rope | {"original_max_position_embeddings": limit},
    )


def longrope_experts(limit: int) -> Any:
    """A family whose own code scales by the length once more."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_mscale": 1.1, "long_mscale": 1.4}
    return PhimoeConfig(
        **families._SMALL,
        num_local_experts=2,
        sliding_window=None,
        rope_parameters=rope | FACTORS | {"original_max_position_embeddings": limit},
    )


def longrope_in_some_layers(limit: int) -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
    return Gemma3TextConfig(
        **families._SMALL,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4096,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": rope | {"original_max_position_embeddings": limit},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )


def dynamic(limit: int) -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return LlamaConfig(**families._SMALL | {"max_position_embeddings": limit}, rope_parameters=rope)


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def wrap(config: Any) -> FrozenLM:
    return FrozenLM(build(config), families.tiny_tokenizer())


def read(llm: FrozenLM, layout: Any, query: str, documents: list[str] = DOCUMENTS) -> Tensor:
    return layout.read(llm, query, documents, llm.heads, ALONE).query  # type: ignore[no-any-return]


def expected(config: Any, llm: FrozenLM, layout: str, query: str) -> Tensor:
    """One eager forward over the whole prompt."""
    sequential = layout == "sequential"
    texts = DOCUMENTS[::-1] if sequential else DOCUMENTS
    pieces = llm.encoder.pieces(query, texts, numbered=sequential)
    twin = reference.eager_twin(build(config))
    documents, tail = [list(piece.ids) for piece in pieces.documents], list(pieces.tail)
    if sequential:
        prefix = list(pieces.prefix) + [token for ids in documents for token in ids]
        return reference.tail_attention(twin, prefix, tail).flatten(0, 1)
    attention = reference.parallel_attention(twin, list(pieces.prefix), documents, tail)
    return attention.flatten(0, 1)


def pieces_of(layout: str, query: str) -> Any:
    encoder = wrap(LlamaConfig(**families._SMALL)).encoder
    return encoder.pieces(query, DOCUMENTS, numbered=layout == "sequential")


def length_of(layout: str, query: str) -> int:
    """Number of tokens of a prompt, or of its longest path."""
    pieces = pieces_of(layout, query)
    lengths = [len(piece.ids) for piece in pieces.documents]
    documents = sum(lengths) if layout == "sequential" else max(lengths)
    return len(pieces.prefix) + documents + len(pieces.tail)


def limits() -> dict[str, int]:
    """Where the limit falls in the prompt of the sequential layout and ``LONG``."""
    pieces, whole = pieces_of("sequential", LONG), length_of("sequential", LONG)
    prefix, documents = len(pieces.prefix), whole - len(pieces.tail)
    return {
        "within the prefix": prefix - 5,
        "within the documents": prefix + 20,
        "before the tail": documents,
        "within the tail": documents + 9,
        "before the last token": whole - 1,
        "after the prompt": whole,
    }


@pytest.mark.parametrize("layout", ["sequential", "parallel"])
@pytest.mark.parametrize("make", [longrope, longrope_experts, longrope_in_some_layers, dynamic])
def test_a_prompt_is_rotated_as_in_one_forward_wherever_the_limit_falls(
    make: Any, layout: str
) -> None:
    differ = set()
    for where, limit in limits().items():
        if make is dynamic:
            limit = max(limit, 80)  # four times the limit is the longest prompt
        config = make(limit)
        try:
            llm = wrap(config)
            exact = expected(config, llm, layout, LONG)
            computed = read(llm, get_layout(layout), LONG)
        except UnboundLocalError:  # in transformers itself, in earlier releases
            pytest.skip("this release of transformers cannot run such a model")
        torch.testing.assert_close(computed, exact, atol=3e-6, rtol=0, msg=where)
        differ.add(round(float(exact.double().square().sum()), 3))
    assert len(differ) > 1  # the limit does matter


@pytest.mark.parametrize("make", [longrope, dynamic])
@pytest.mark.parametrize("layout", ["sequential", "parallel"])
@pytest.mark.parametrize("queries", [(SHORT, LONG, SHORT), (LONG, SHORT, LONG)])
def test_results_do_not_depend_on_what_a_cache_holds(
    make: Any, layout: str, queries: tuple[str, ...]
) -> None:
    limit = length_of(layout, LONG) - 20  # between the ends of the two queries
    config = make(limit)
    llm, kept = wrap(config), get_layout(layout, document_cache="4MB")
    assert llm.rotary_key(length_of(layout, SHORT)) != llm.rotary_key(length_of(layout, LONG))
    for query in queries:
        fresh = read(wrap(config), get_layout(layout, document_cache="4MB"), query)
        assert torch.equal(read(llm, kept, query), fresh)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_forwards_of_the_caller_change_nothing_and_are_not_changed(make: Any) -> None:
    model = build(make(90))
    ids = torch.arange(120)[None] + 9
    llm = FrozenLM(model, families.tiny_tokenizer())
    layout = get_layout("parallel")
    fresh = read(llm, layout, SHORT, ["fog"])
    with torch.no_grad():
        logits = build(make(90))(ids).logits
        buffers = [buffer.clone() for buffer in model.buffers()]
        read(llm, layout, LONG)
        assert all(map(torch.equal, buffers, model.buffers()))
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(read(llm, layout, SHORT, ["fog"]), fresh)
    # And a model is wrapped as if it had run nothing before.
    again = FrozenLM(model, families.tiny_tokenizer())
    assert torch.equal(read(again, get_layout("parallel"), SHORT, ["fog"]), fresh)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_every_window_has_a_length_of_its_own(make: Any) -> None:
    config = make(150)
    llm = wrap(config)
    windows = get_layout("sequential", window=2, stride=1)
    computed = read(llm, windows, LONG)
    first, second = (
        read(wrap(config), get_layout("sequential"), LONG, DOCUMENTS[start : start + 2])
        for start in (0, 1)
    )
    spans = [layout_spans(llm, DOCUMENTS[start : start + 2]) for start in (0, 1)]
    middle = (first[:, slice(*spans[0][1])] + second[:, slice(*spans[1][0])]) / 2
    whole = torch.cat(
        [first[:, slice(*spans[0][0])], middle, second[:, slice(*spans[1][1])]], dim=1
    )
    torch.testing.assert_close(computed, whole, atol=1e-7, rtol=0)


def layout_spans(llm: FrozenLM, documents: list[str]) -> list[tuple[int, int]]:
    attention = get_layout("sequential").read(llm, LONG, documents, llm.heads, ALONE)
    return [(span.start, span.end) for span in attention.spans]


@pytest.mark.parametrize("make", [longrope, dynamic])
@pytest.mark.parametrize("layer", [2, 4])
def test_texts_are_embedded_alike_alone_and_beside_longer_ones(make: Any, layer: int) -> None:
    llm = wrap(make(40))
    texts = ["fog", "A tunnel was dug below the lake, and another one.", "rain" * 20]
    together = llm.embed(texts, layer=layer)
    alone = torch.cat([llm.embed([text], layer=layer) for text in texts])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    with torch.no_grad():
        ids = torch.tensor([llm.encoder.plain(texts)[2]])
        states = build(make(40)).model(ids, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(together[2], states[0, 1:].mean(dim=0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_likelihoods_do_not_depend_on_the_other_documents(make: Any) -> None:
    scorer = QueryLikelihood(wrap(make(60)))
    together = scorer.score(SHORT, DOCUMENTS)
    alone = [scorer.score(SHORT, [document])[0] for document in DOCUMENTS]
    assert together == pytest.approx(alone, abs=2e-6)


def test_continuations_are_rotated_alike_to_their_end() -> None:
    config = longrope(30)
    llm = wrap(config)
    (line,) = llm.write("fog ", ["and rain "], max_tokens=24, temperature=0, seed=0)
    # All with the long factors, since the text may reach beyond the limit.
    always_long = longrope(30)
    always_long.rope_parameters["short_factor"] = FACTORS["long_factor"]
    (expected_line,) = wrap(always_long).write(
        "fog ", ["and rain "], max_tokens=24, temperature=0, seed=0
    )
    assert line == expected_line


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 60},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 60,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_kinds_have_one_key_for_all_lengths(rope: dict[str, Any]) -> None:
    config = LlamaConfig(**families._SMALL, rope_parameters=rope | {"rope_theta": 1e4})
    llm = wrap(config)
    assert llm.rotary_key(1) is llm.rotary_key(4000) is None
    assert llm.max_tokens == 4096
    computed = read(llm, get_layout("sequential"), LONG)
    exact = expected(config, llm, "sequential", LONG)
    torch.testing.assert_close(computed, exact, atol=3e-6, rtol=0)


def test_keys_change_where_factors_do() -> None:
    long, ntk = wrap(longrope(50)), wrap(dynamic(50))
    assert long.rotary_key(1) == long.rotary_key(50) != long.rotary_key(51) == long.rotary_key(900)
    assert ntk.rotary_key(1) == ntk.rotary_key(50) != ntk.rotary_key(51) != ntk.rotary_key(52)
    assert ntk.max_tokens == 200  # four times the original length
