"""Queries of a tail at some heads, to be compared with the keys of documents it never saw.

To read attention is to take a softmax over products of queries and keys. The queries of a tail are
kept here together with the share of the softmax that does not belong to documents: what the prefix,
the tail itself and sinks take. Documents' keys may then be read at any time, from any place and in
any number, without running the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from routehead_plugins.backbone.kv_cache import KeyValues
from routehead_plugins.heads import HeadSet


@dataclass(frozen=True)
class KeyColumns:
    """The columns of a table of keys, one row per token: the keys of several heads side by side.

    Attributes:
        heads: ``(layer, key head)`` pairs in the order of the columns.
        widths: Number of columns of each.
    """

    heads: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls, heads: HeadSet, available: HeadSet, shapes: Mapping[int, tuple[int, int]]
    ) -> KeyColumns:
        """Collect the distinct key heads that some query heads are compared with.

        Args:
            heads: The query heads.
            available: Every query head of the LLM.
            shapes: Layer -> number of its key heads, and the width of a key.
        """
        pairs = sorted(
            {
                (layer, _key_head_of(index, len(available.by_layer[layer]), shapes[layer][0]))
                for layer, index in heads
            }
        )
        return cls(tuple(pairs), tuple(shapes[layer][1] for layer, _ in pairs))

    @property
    def width(self) -> int:
        """Number of columns in all."""
        return sum(self.widths)

    @property
    def last_layer(self) -> int:
        """The deepest layer among them."""
        return self.heads[-1][0]

    @cached_property
    def slices(self) -> dict[tuple[int, int], slice]:
        """Columns of each ``(layer, key head)``."""
        slices, start = {}, 0
        for pair, width in zip(self.heads, self.widths, strict=True):
            slices[pair] = slice(start, start + width)
            start += width
        return slices

    def keys(self, key_values: KeyValues) -> DocumentKeys:
        """Collect the keys of a document, in memory of their own."""
        layers = key_values.layers
        table = torch.cat([layers[layer][0][0, head] for layer, head in self.heads], dim=1)
        positions = torch.arange(key_values.start, key_values.end, device=table.device)
        return DocumentKeys(self, table, positions)


def _key_head_of(head: int, heads: int, key_heads: int) -> int:
    """Return the key head that a query head is compared with, in a layer of grouped heads."""
    return head // (heads // key_heads)


@dataclass(frozen=True)
class DocumentKeys:
    """Keys of a document, or of several one after the other, at some key heads.

    Attributes:
        columns: What the columns of the table are.
        table: Keys after rotary embedding, shape (tokens, width).
        positions: Position of every token in its prompt, shape (tokens,).
        scales: Factors of the table's values, one per token and key head, shape (tokens, key
            heads); ``None`` for 1.
    """

    columns: KeyColumns
    table: Tensor
    positions: Tensor
    scales: Tensor | None = None

    @classmethod
    def join(cls, documents: Sequence[DocumentKeys]) -> DocumentKeys:
        """Put documents one after the other; they have the same columns and number format."""
        scales = [document.scales for document in documents if document.scales is not None]
        return cls(
            documents[0].columns,
            torch.cat([document.table for document in documents]),
            torch.cat([document.positions for document in documents]),
            torch.cat(scales) if scales else None,
        )

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.table.nbytes + self.positions.nbytes + scales

    def of(self, layer: int, key_head: int) -> Tensor:
        """Return the keys of one key head, float32, shape (tokens, width)."""
        keys = self.table[:, self.columns.slices[layer, key_head]].float()
        if self.scales is None:
            return keys
        column = self.columns.heads.index((layer, key_head))
        return keys.mul_(self.scales[:, column, None].float())


@dataclass(frozen=True)
class LayerQueries:
    """Queries of a tail's tokens, which are called rows, in one layer.

    Attributes:
        heads: Indices of the heads.
        key_heads: The key head of each.
        queries: Scaled and after rotary embedding, float32, shape (heads, rows, width).
        rest: Logarithm of the sum of the exponentials of all scores that do not belong to
            documents, shape (heads, rows).
        softcap: The layer caps scores softly at this size.
        sees: Returns which keys the rows may see, given the keys' positions, (rows, keys); ``None``
            if the layer hides no document from the tail, as windows and chunks do.
    """

    heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    queries: Tensor
    rest: Tensor
    softcap: float | None
    sees: Callable[[Tensor], Tensor] | None

    def scores(self, index: int, keys: Tensor, seen: Tensor | None) -> Tensor:
        """Compute the scores of a head: keys of shape (tokens, width) to (rows, tokens)."""
        scores = self.queries[index] @ keys.T
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores if seen is None else scores.masked_fill(~seen, -torch.inf)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return self.queries.nbytes + self.rest.nbytes


@dataclass(frozen=True)
class TailQueries:
    """Queries of one tail at the heads of several layers.

    Attributes:
        layers: Layer -> its queries.
    """

    layers: Mapping[int, LayerQueries]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(layer.nbytes for layer in self.layers.values())

    def attention(
        self, keys: DocumentKeys, heads: HeadSet, log_sums: Tensor | None = None
    ) -> Tensor:
        """Read the attention of some heads to documents.

        Args:
            keys: The documents' keys, at the key heads of all these heads.
            heads: The heads, all of them among those of the queries.
            log_sums: What ``log_sums`` returns for all documents, where these are only some of
                them; ``None`` if these are all.

        Returns:
            Mean over the tail's tokens, float32, shape (heads, tokens).
        """
        shape = len(heads), len(keys.table)
        attention = torch.empty(shape, dtype=torch.float32, device=keys.table.device)
        for index, scores, rest in self._scores(keys, heads):
            if log_sums is None:
                peak = torch.maximum(scores.amax(dim=1), rest)
                exponentials = scores.sub_(peak[:, None]).exp_()
                totals = exponentials.sum(dim=1) + (rest - peak).exp()
                attention[index] = (1 / (totals * len(totals))) @ exponentials
            else:
                totals = log_sums[index].logaddexp(rest)
                attention[index] = scores.sub_(totals[:, None]).exp_().mean(dim=0)
        return attention

    def log_sums(self, keys: DocumentKeys, heads: HeadSet) -> Tensor:
        """Sum the exponentials of the scores over the documents' tokens.

        Returns:
            Logarithms of the sums, shape (heads, rows); those of documents that are read in several
            parts are the ``logaddexp`` of the parts'.
        """
        sums = {index: scores.logsumexp(dim=1) for index, scores, _ in self._scores(keys, heads)}
        return torch.stack([sums[index] for index in range(len(heads))])

    def _scores(self, keys: DocumentKeys, heads: HeadSet) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield index in ``heads``, scores (rows, tokens) and ``rest`` (rows,), head by head."""
        indices = sorted(range(len(heads)), key=lambda index: heads[index])
        for layer, group in groupby(indices, key=lambda index: heads[index].layer):
            queries = self.layers[layer]
            seen = None if queries.sees is None else queries.sees(keys.positions)
            held: tuple[int, Tensor] | None = None
            for index in group:
                row = queries.heads.index(heads[index].head)
                key_head = queries.key_heads[row]
                if held is None or held[0] != key_head:  # heads of a group share their keys
                    held = key_head, keys.of(layer, key_head)
                yield index, queries.scores(row, held[1], seen), queries.rest[row]
