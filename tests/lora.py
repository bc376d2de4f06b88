"""Adapters for tests: random ones, and a model with one merged into its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from routehead_plugins import FrozenLM
from routehead_plugins.backbone import Adapter

PREFIX = "base_model.model."


def random_adapter(
    llm: FrozenLM, layers: Sequence[int] = range(3), *, seed: int = 1, name: str = "random"
) -> Adapter:
    """An adapter that changes what the LLM computes a lot."""
    fused = "qkv_proj" if "phi" in llm.name and "moe" not in llm.name else None
    projections = (fused,) if fused else ("q_proj", "k_proj", "v_proj")
    adapter = llm.new_adapter(layers, rank=4, alpha=6.0, projections=projections, name=name)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: torch.randn(value.shape, generator=generator) * 0.2
        for key, value in adapter.weights.items()
    }
    return replace(adapter, weights=weights)


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of a model whose weights have an adapter's change added: W + alpha / r * B A."""
    twin: PreTrainedModel = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    with torch.no_grad():
        for key, first in adapter.weights.items():
            if ".lora_A." in key:
                second = adapter.weights[key.replace(".lora_A.", ".lora_B.")]
                name = key.removeprefix(PREFIX).replace(".lora_A.", ".")
                parameters[name].add_(second @ first, alpha=scale)
    return twin
