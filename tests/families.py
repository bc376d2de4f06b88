"""One row per model family: a tiny model with random weights that has the family's quirks."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhimoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY = 264  # 256 bytes and a few control tokens

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
_FOUR_LAYERS = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": LlamaConfig(**_SMALL),  # grouped heads
    "llama-multi-head": LlamaConfig(**_SMALL | {"num_key_value_heads": 4}),  # no groups
    "llama-multi-query": LlamaConfig(**_SMALL | {"num_key_value_heads": 1}),  # one group
    "qwen2": Qwen2Config(**_SMALL),  # biases on q, k, v
    "qwen2-window": Qwen2Config(  # window in the upper layers only
        **_SMALL, use_sliding_window=True, sliding_window=24, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),  # norms on q and k, head_dim of its own
    "mistral": MistralConfig(**_SMALL, sliding_window=24),  # window shorter than the prompt
    "mistral-full": MistralConfig(**_SMALL, sliding_window=None),
    "gemma2": Gemma2Config(  # soft cap, alternating windows, eager only
        **_SMALL,
        head_dim=16,
        sliding_window=24,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        layer_types=_FOUR_LAYERS,
    ),
    "gemma3": Gemma3TextConfig(  # two rotary bases, scaling of its own
        **_SMALL, head_dim=16, sliding_window=24, query_pre_attn_scalar=8, layer_types=_FOUR_LAYERS
    ),
    "phi3": Phi3Config(**_SMALL, sliding_window=24),  # fused q, k, v
    "olmo2": Olmo2Config(**_SMALL),  # norm after attention
    "granite": GraniteConfig(**_SMALL, attention_multiplier=0.11),  # scaling of its own
    "smollm3": SmolLM3Config(**_SMALL, no_rope_layers=[1, 0, 1, 0]),  # layers without rotary
    "gpt-oss": GptOssConfig(  # attention sinks, experts, alternating windows
        **_SMALL,
        head_dim=16,
        sliding_window=24,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=_FOUR_LAYERS,
    ),
    "phimoe": PhimoeConfig(  # a window that stands in the mask alone
        **_SMALL, sliding_window=24, num_local_experts=2, num_experts_per_tok=1
    ),
    "qwen2-moe": Qwen2MoeConfig(  # the same, in the upper layers only
        **_SMALL,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
    ),
    "llama4": Llama4TextConfig(  # chunks, and layers without rotary
        **_SMALL,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=24,
        no_rope_layers=[1, 0, 1, 0],
    ),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a model of a family, the same one for the same seed, in float32 on the CPU."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])  # a model's owner may change its configuration
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return cast(PreTrainedModel, model.eval())


CONTROLS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<think>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; ``<think>`` is a control token that is not marked special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(CONTROLS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in CONTROLS[:-1]])
    backend.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer
