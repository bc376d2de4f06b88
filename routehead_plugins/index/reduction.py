"""Make documents smaller: fewer tokens of each, and fewer bits for each number.

Tokens are kept by the attention that a query without content pays to them. It is a guess at what
any query will attend to, and takes no query to make.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from routehead_plugins.backbone import DocumentKeys, FrozenLM
from routehead_plugins.index.config import IndexConfig
from routehead_plugins.layouts import LateDocument, LateLayout, piece_of_rows

_LARGEST = 127


def quantised(keys: DocumentKeys, dtype: str) -> DocumentKeys:
    """Round keys to a number format.

    Args:
        keys: Keys in a floating-point format.
        dtype: ``"float16"``, or ``"int8"`` with a factor for every token and key head.
    """
    if dtype == "float16":
        return DocumentKeys(keys.columns, keys.table.half(), keys.positions)
    table = torch.empty(keys.table.shape, dtype=torch.int8, device=keys.table.device)
    scales = torch.empty(
        len(keys.table), len(keys.columns.heads), dtype=torch.float16, device=keys.table.device
    )
    for column, columns in enumerate(keys.columns.slices.values()):
        values = keys.table[:, columns].float()
        # The factor is rounded first, so that the numbers are divided by what is kept.
        scale = (values.abs().amax(dim=1) / _LARGEST).half()
        # 0 for keys of zeros, and where half precision does not hold the factor.
        divisor = scale.float().where(scale > 0, 1.0)
        rounded = (values / divisor[:, None]).round().clamp(-_LARGEST, _LARGEST)
        table[:, columns] = rounded.to(torch.int8)
        scales[:, column] = scale
    return DocumentKeys(keys.columns, table, keys.positions, scales)


def kept_rows(importance: Tensor, text_tokens: int, budget: float) -> Tensor:
    """Choose the tokens of a document to keep.

    Args:
        importance: Of every token of the document, shape (tokens,).
        text_tokens: Number of tokens of its text, which come first; the others are kept.
        budget: Share of the text's tokens to keep; at least one is.

    Returns:
        Indices in ascending order.
    """
    count = min(max(1, math.ceil(budget * text_tokens)), text_tokens)
    # A stable order, so that equal tokens are chosen alike on every machine.
    order = importance[:text_tokens].argsort(descending=True, stable=True)
    rest = torch.arange(text_tokens, len(importance), device=order.device)
    return torch.cat([order[:count].sort().values, rest])


def rows_of(keys: DocumentKeys, rows: Tensor) -> DocumentKeys:
    """Return the keys of some tokens."""
    scales = None if keys.scales is None else keys.scales[rows]
    return DocumentKeys(keys.columns, keys.table[rows], keys.positions[rows], scales)


def reduced(
    document: LateDocument, config: IndexConfig, llm: FrozenLM, layout: LateLayout
) -> LateDocument:
    """Bring a document into the form that an index keeps.

    Args:
        document: The document, as it was run.
        config: Budget and number format.
        llm: The frozen LLM.
        layout: The layout that reads it.
    """
    piece, keys = document.piece, document.keys
    if config.budget < 1 and piece.text.size:
        importance = layout.null_attention(llm, keys, config.heads)
        keys = rows_of(keys, kept_rows(importance, piece.text.size, config.budget))
        piece = piece_of_rows(piece, keys, config.frame)
    return LateDocument(piece, quantised(keys, config.dtype))
