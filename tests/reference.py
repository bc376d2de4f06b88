"""Slow, obviously correct scoring from full eager attention; what everything is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from routehead_plugins.heads import Head


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


def parallel_attention(
    twin: PreTrainedModel, opening: list[int], documents: list[list[int]], tail: list[int]
) -> Tensor:
    """One full pass with the positions and the mask of the parallel layout written out.

    Returns:
        Mean over tail rows, (layers, heads, tokens of opening and documents).
    """
    start = len(opening) + max(map(len, documents))
    return _attention_side_by_side(twin, opening, documents, tail, start)


def late_attention(
    twin: PreTrainedModel,
    opening: list[int],
    documents: list[list[int]],
    tail: list[int],
    start: int,
) -> Tensor:
    """One full pass for every layer: the tail sees documents in that layer and in no other.

    Args:
        twin: From ``eager_twin``.
        opening: Token ids before the documents.
        documents: Token ids of each document.
        tail: Token ids of the tail.
        start: Position of the tail.

    Returns:
        Mean over tail rows, (layers, heads, tokens of opening and documents).
    """
    past = len(opening) + sum(map(len, documents))
    stacks = (module for module in twin.modules() if isinstance(module, torch.nn.ModuleList))
    layers = next(stacks)
    read = []
    for seen in range(len(layers)):

        def hide(number: int, seen: int = seen) -> Any:
            def change(_: Any, arguments: Any, options: dict[str, Any]) -> Any:
                if number != seen:
                    mask = options["attention_mask"].clone()
                    mask[..., past:, len(opening) : past] = torch.finfo(torch.float32).min
                    options = options | {"attention_mask": mask}
                return arguments, options

            return change

        hooks = [
            layer.register_forward_pre_hook(hide(number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        try:
            read.append(_attention_side_by_side(twin, opening, documents, tail, start)[seen])
        finally:
            for hook in hooks:
                hook.remove()
    return torch.stack(read)


def _attention_side_by_side(
    twin: PreTrainedModel,
    opening: list[int],
    documents: list[list[int]],
    tail: list[int],
    start: int,
) -> Tensor:
    """Run documents that share their positions, and a tail that begins at a position."""
    ids, positions, owners = list(opening), list(range(len(opening))), [-1] * len(opening)
    for number, document in enumerate(documents):
        ids += document
        positions += range(len(opening), len(opening) + len(document))
        owners += [number] * len(document)
    past = len(ids)
    ids += tail
    positions += range(start, start + len(tail))
    owners += [len(documents)] * len(tail)

    def mask(window: int | None, chunk: int | None = None) -> Tensor:
        seen = [[False] * len(ids) for _ in ids]
        for row in range(len(ids)):
            for column in range(row + 1):
                near = window is None or positions[row] - positions[column] < window
                if chunk is not None:
                    latest = max(positions[row], positions[column])
                    near = latest // chunk == positions[column] // chunk
                known = owners[column] in (-1, owners[row]) or row >= past
                seen[row][column] = near and known
        added = torch.zeros(len(ids), len(ids))
        added[~torch.tensor(seen)] = torch.finfo(torch.float32).min
        return added[None, None]

    config = twin.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    masks: Any = mask(window)
    if getattr(config, "layer_types", None):
        masks = {"full_attention": mask(None), "sliding_attention": mask(window)}
        chunk = getattr(config, "attention_chunk_size", None)
        masks["chunked_attention"] = mask(None, chunk)
    with torch.no_grad():
        output: Any = twin(
            torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            attention_mask=masks,
            output_attentions=True,
            use_cache=False,
        )
    return torch.stack([m[0, :, past:, :past].float().mean(dim=1) for m in output.attentions])
