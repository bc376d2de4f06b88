"""What a model is refused for when it is wrapped, and that the check leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import census
import families
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.backbone import KeyValues, probe
from routehead_plugins.backbone.attention import decoder_of
from routehead_plugins.errors import InputError, UnsupportedModelError

_T5 = T5Config(vocab_size=264, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
_VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32
)


def wrap(model: Any) -> FrozenLM:
    return FrozenLM(model, families.tiny_tokenizer())


@pytest.mark.parametrize(
    "model", [None, "llama", 7, {}, nn.Linear(2, 2), families.tiny_tokenizer(), PreTrainedModel]
)
def test_what_is_no_model_is_refused_with_its_class(model: object) -> None:
    with pytest.raises(InputError, match=r"^model is a \w[\w.]+; give a causal LLM of") as error:
        wrap(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [None, {}, families.CONFIGS["llama"]])
def test_a_module_that_only_has_a_configuration_is_refused_by_name(config: object) -> None:
    module: Any = nn.Linear(2, 2)
    module.config = config
    with pytest.raises(UnsupportedModelError, match=r"'Linear' has no .* not a model of "):
        wrap(module)


@pytest.mark.parametrize(
    "make",
    [
        lambda: T5ForConditionalGeneration(_T5),
        lambda: T5EncoderModel(_T5),
        lambda: ViTModel(_VIT),
    ],
    ids=["encoder and decoder", "encoder", "images"],
)
def test_models_that_generate_no_text_are_refused_by_name(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=f"^'{type(model).__name__}' has no") as error:
        wrap(model)
    assert "\n" not in str(error.value)


def test_a_decoder_with_a_classifier_is_read() -> None:
    config = copy.deepcopy(families.CONFIGS["llama"])
    config.pad_token_id = None
    assert len(wrap(LlamaForSequenceClassification(cast(LlamaConfig, config))).heads) == 16


class _Other(nn.Module):
    """A key projection that changes with the number of tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        keys: torch.Tensor = self.inner(states)
        return keys * states.shape[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_whose_eager_attention_differs_is_refused(layer: int) -> None:
    model = cast(Any, families.tiny_model("llama"))
    attention = model.model.layers[layer].self_attn
    attention.k_proj = _Other(attention.k_proj)
    with pytest.raises(UnsupportedModelError, match="eager attention differs from what is read"):
        wrap(model)


class _ByIndex:
    """Reads an LLM, and favours the first keys of the cache."""

    def __init__(self, llm: FrozenLM, share: float) -> None:
        self.prefill, self._llm, self._share = llm.prefill, llm, share

    def read(
        self,
        context: Callable[[], Sequence[KeyValues]],
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
    ) -> torch.Tensor:
        attention = self._llm.read(context, tails, heads)
        if len(context()) == 1:
            return attention
        return attention * torch.linspace(1 + self._share, 1, attention.shape[-1])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_model_that_reads_documents_by_their_order_is_refused(share: float) -> None:
    llm = wrap(families.tiny_model("llama"))
    reader = _ByIndex(llm, share)
    if not share:
        probe.check_reading(llm._whole, llm.heads, reader)
        return
    with pytest.raises(UnsupportedModelError, match="it takes positions from the cache"):
        probe.check_reading(llm._whole, llm.heads, reader)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "llama4"])
def test_half_precision_is_not_taken_for_a_difference(family: str, dtype: torch.dtype) -> None:
    assert len(wrap(cast(Any, families.tiny_model(family)).to(dtype)).heads) == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_difference_shows_in_half_precision_as_well(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match="eager attention differs"):
        wrap(cast(Any, census.tiny_causal_lm("bart")).to(dtype))


def test_weights_that_are_not_numbers_are_left_to_be_told_when_scores_are() -> None:
    model = families.tiny_model("llama")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    assert len(wrap(model).heads) == 16


def test_a_model_that_has_returned_attention_before_is_read() -> None:
    model = families.tiny_model("qwen3")
    model.set_attn_implementation("eager")
    model(torch.tensor([[5, 6]]), output_attentions=True)
    assert len(wrap(model).heads) == 16


def test_the_check_draws_no_random_numbers_and_copies_no_weights() -> None:
    model = families.tiny_model("gemma3").train()
    before, weights = torch.get_rng_state(), {p.data_ptr() for p in model.parameters()}
    llm = wrap(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.data_ptr() for p in llm._whole.parameters()} <= weights
    assert model.training


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 2), ("gemma3", 2), ("qwen2-window", 3), ("llama4", 2)],
)
def test_layers_are_compared_down_to_the_first_of_the_last_kind(family: str, layers: int) -> None:
    config = copy.deepcopy(families.CONFIGS[family])
    decoder = decoder_of(AutoModelForCausalLM.from_config(config))
    assert probe._layers_of_every_kind(decoder) == layers


def test_a_model_of_one_layer_is_compared_as_well() -> None:
    model = cast(Any, families.tiny_model("mistral"))
    model.model.layers = model.model.layers[:1]
    assert [*wrap(model).heads.by_layer] == [0]
    attention = model.model.layers[0].self_attn
    attention.k_proj = _Other(attention.k_proj)
    with pytest.raises(UnsupportedModelError, match="eager attention differs"):
        wrap(model)
