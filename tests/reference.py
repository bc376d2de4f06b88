"""Slow, obviously correct scoring from full eager attention; what everything is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from routehead_plugins.data import Head


def eager_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model and let the copy compute every attention matrix in full."""
    twin: PreTrainedModel = copy.deepcopy(model).eval()
    twin.set_attn_implementation("eager")
    return twin


def tail_attention(twin: PreTrainedModel, prefix: list[int], tail: list[int]) -> Tensor:
    """One full pass over prefix and tail; mean over tail rows, (layers, heads, prefix tokens)."""
    with torch.no_grad():
        output: Any = twin(torch.tensor([prefix + tail]), output_attentions=True, use_cache=False)
    rows = []
    for matrix in output.attentions:  # (1, heads, tokens, tokens)
        rows.append(matrix[0, :, len(prefix) :, : len(prefix)].float().mean(dim=1))
    return torch.stack(rows)


def signals(
    attention: Tensor,
    null: Tensor | None,
    spans: list[tuple[int, int]],
    heads: list[Head],
    *,
    drop_outliers: bool,
) -> list[list[float]]:
    """One number per head and document, one token at a time."""
    table = []
    for layer, index in heads:
        row = []
        for start, end in spans:
            values = [float(attention[layer, index, t]) for t in range(start, end)]
            if null is not None:
                values = [
                    v - float(null[layer, index, t])
                    for v, t in zip(values, range(start, end), strict=True)
                ]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
            floor = mean - 2 * variance**0.5
            kept = [v for v in values if not drop_outliers or v > floor or variance == 0]
            row.append(sum(kept))
        table.append(row)
    return table
