"""Build an LLM without its deeper layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def outline(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the LLM of a configuration without memory for its parameters."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def num_layers(model: PreTrainedModel) -> int:
    """Tell how many layers an LLM has by its configuration."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def without_deeper(kind: Any, layers: int) -> Any:
    """Derive a class whose models have the leading layers of their kind only.

    The configuration stays as it is: what a layer does may depend on the number of all layers, as
    where Gemma 3n shares keys and values among the last of them.

    Args:
        kind: Class of the LLM. One whose layers do not stand in one list keeps all of them.
        layers: How many to keep, from the first on.
    """

    class Leading(kind):  # type: ignore[misc]  # any class of transformers
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            lists = _layer_lists(self)
            if len(lists) == 1:
                del lists[0][layers:]
            # Only its building differs.
            self.__class__ = kind

    return Leading


def _layer_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Find the lists in a decoder that have one entry per layer."""
    total = num_layers(model)
    children = model.get_decoder().children()
    return [child for child in children if isinstance(child, nn.ModuleList) and len(child) == total]
