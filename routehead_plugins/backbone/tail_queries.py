"""Queries of a tail at some heads, to be compared with the keys of documents it never saw.

To read attention is to take a softmax over products of queries and keys. The queries of a tail are
kept here together with the share of the softmax that does not belong to documents: what the prefix,
the tail itself and sinks take. Documents' keys may then be read at any time, from any place and in
any number, without running the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from routehead_plugins.backbone.kv_cache import KeyValues
from routehead_plugins.heads import HeadSet

_ALL = slice(None)
# Tokens whose scores are computed at once.
_PART = 8192
# Tokens up to which all scores are kept until their sum is known; they take 100 MB or so.
_BUFFERED = 200_000
# Of tokens that no row sees; a score that is not infinite.
_LEAST = -1e30


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

    def to(self, device: torch.device) -> DocumentKeys:
        """Move the tensors to a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return DocumentKeys(self.columns, self.table.to(device), self.positions.to(device), scales)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.table.nbytes + self.positions.nbytes + scales

    def of(self, layer: int, key_head: int, rows: slice = _ALL) -> tuple[Tensor, Tensor | None]:
        """Return keys of one key head, and the factors they are to be multiplied by.

        Args:
            layer: The layer.
            key_head: The key head.
            rows: The tokens.

        Returns:
            Float32 of shape (rows, width), and of shape (rows,) or ``None`` for 1.
        """
        keys = self.table[rows, self.columns.slices[layer, key_head]].float()
        if self.scales is None:
            return keys, None
        column = self.columns.heads.index((layer, key_head))
        return keys, self.scales[rows, column].float()


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

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return self.queries.nbytes + self.rest.nbytes


@dataclass(frozen=True)
class TailQueries:
    """Queries of one tail, or of several, at the heads of several layers.

    Attributes:
        layers: Layer -> its queries.
        weights: Share of each row in the mean over a tail's tokens, shape (tails, rows).
        states: Hidden states of the first tail's tokens before some layer, shape (rows, width);
            ``None`` if none are kept.
    """

    layers: Mapping[int, LayerQueries]
    weights: Tensor
    states: Tensor | None = None

    @classmethod
    def join(cls, tails: Sequence[TailQueries], shared: int) -> TailQueries:
        """Put several tails together, so that documents' keys are read once for all of them.

        Args:
            tails: One tail each, at the same heads.
            shared: Number of first tokens that all of them have in common, whose rows are equal.
        """
        starts = [0, *(shared for _ in tails[1:])]
        ends = [tail.weights.shape[1] for tail in tails]
        own = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        weights = tails[0].weights.new_zeros(len(tails), sum(s.stop - s.start for s in own))
        at = 0
        for index, (tail, rows) in enumerate(zip(tails, own, strict=True)):
            weights[index, :shared] = tail.weights[0, :shared]
            count = rows.stop - shared
            at += rows.stop - rows.start
            weights[index, at - count : at] = tail.weights[0, shared:]
        layers = {}
        for layer, first in tails[0].layers.items():
            parts = [tail.layers[layer] for tail in tails]
            cut = list(zip(parts, own, strict=True))
            # What a row sees of documents depends on its position alone.
            seers = [(part.sees, rows) for part, rows in cut]
            layers[layer] = replace(
                first,
                queries=torch.cat([part.queries[:, rows] for part, rows in cut], dim=1),
                rest=torch.cat([part.rest[:, rows] for part, rows in cut], dim=1),
                sees=None if first.sees is None else partial(_seen_by_all, seers),
            )
        return cls(layers, weights, tails[0].states)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        states = 0 if self.states is None else self.states.nbytes
        return sum(layer.nbytes for layer in self.layers.values()) + states

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
            Mean over a tail's tokens, float32, shape (tails, heads, tokens).
        """
        if log_sums is None and len(keys.table) > _BUFFERED:
            log_sums = self.log_sums(keys, heads)
        shape = len(self.weights), len(heads), len(keys.table)
        attention = torch.empty(shape, dtype=torch.float32, device=keys.table.device)
        for group in self._groups(heads):
            if log_sums is None:
                group.read(keys, attention)
            else:
                group.read_in_parts(keys, attention, log_sums)
        return attention

    def of_tails(self, indices: Sequence[int]) -> TailQueries:
        """Return the queries of some of the tails."""
        weights = self.weights[list(indices)]
        rows = weights.any(dim=0).nonzero()[:, 0]
        layers = {
            layer: replace(
                queries,
                queries=queries.queries[:, rows],
                rest=queries.rest[:, rows],
                sees=None if queries.sees is None else partial(_seen_by_some, queries.sees, rows),
            )
            for layer, queries in self.layers.items()
        }
        return TailQueries(layers, weights[:, rows])

    def masses(self, keys: DocumentKeys, heads: HeadSet, documents: Tensor, count: int) -> Tensor:
        """Sum the attention of some heads to each document; gradients flow through it.

        Args:
            keys: The documents' keys, at the key heads of all these heads.
            heads: The heads, all of them among those of the queries.
            documents: Index of each token's document, shape (tokens,); ``count`` outside of all.
            count: Number of documents.

        Returns:
            Mean over a tail's tokens, float32, shape (tails, heads, documents).
        """
        parts, indices = [], []
        for group in self._groups(heads):
            parts.append(group.masses(keys, documents, count))
            indices += group.indices
        order = torch.tensor(indices, device=keys.table.device).argsort()
        return torch.cat(parts, dim=1)[:, order]

    def log_sums(self, keys: DocumentKeys, heads: HeadSet) -> Tensor:
        """Sum the exponentials of the scores over the documents' tokens.

        Returns:
            Logarithms of the sums, shape (heads, rows); those of documents that are read in several
            parts are the ``logaddexp`` of the parts'.
        """
        rows = next(iter(self.layers.values())).rest.shape[1]
        sums = torch.empty(len(heads), rows, dtype=torch.float32, device=keys.table.device)
        for group in self._groups(heads):
            parts = [group.scores(keys, rows).logsumexp(dim=-1) for rows in _parts(keys)]
            sums[group.indices] = torch.stack(parts).logsumexp(dim=0)
        return sums

    def _groups(self, heads: HeadSet) -> Iterator[_Group]:
        """Yield the heads that share their keys together, layer by layer."""
        grouped: dict[tuple[int, int], list[int]] = {}
        for index, (layer, head) in enumerate(heads):
            queries = self.layers[layer]
            key_head = queries.key_heads[queries.heads.index(head)]
            grouped.setdefault((layer, key_head), []).append(index)
        for (layer, key_head), indices in sorted(grouped.items()):
            queries = self.layers[layer]
            rows = [queries.heads.index(heads[index].head) for index in indices]
            yield _Group(
                indices,
                (layer, key_head),
                queries.queries[rows],
                queries.rest[rows],
                self.weights,
                queries.softcap,
                queries.sees,
            )


@dataclass(frozen=True)
class _Group:
    """Queries of heads that are compared with the same keys; see ``LayerQueries``.

    Scores of all rows at once are many times larger than the keys. They are computed for as many
    tokens as a processor's cache holds, so that memory is not passed over for every operation.
    """

    indices: list[int]
    key_head: tuple[int, int]
    queries: Tensor
    rest: Tensor
    weights: Tensor
    softcap: float | None
    sees: Callable[[Tensor], Tensor] | None

    def scores(self, keys: DocumentKeys, rows: slice) -> Tensor:
        """Compute the scores of some tokens, shape (heads, rows, tokens)."""
        exact, scales = keys.of(*self.key_head, rows)
        scores = self.queries @ exact.T
        if scales is not None:
            scores.mul_(scales)
        if self.softcap is not None:
            # Gradients need the result of tanh as it is.
            scores = scores.div_(self.softcap).tanh_() * self.softcap
        if self.sees is not None:
            scores.masked_fill_(~self.sees(keys.positions[rows]), -torch.inf)
        return scores

    def masses(self, keys: DocumentKeys, documents: Tensor, count: int) -> Tensor:
        """Sum the attention to each document's tokens, shape (tails, heads, documents)."""
        scores = torch.cat([self.scores(keys, _ALL), self.rest[..., None]], dim=-1)
        attention = self.weights @ scores.softmax(dim=-1)[..., :-1]  # (heads, tails, tokens)
        sums = attention.new_zeros(*attention.shape[:2], count + 1)
        return sums.index_add(2, documents, attention)[..., :count].transpose(0, 1)

    def read(self, keys: DocumentKeys, attention: Tensor) -> None:
        """Fill in the attention to all tokens, shape (tails, heads of all groups, tokens)."""
        parts, peaks, sums = [], [], []
        for rows in _parts(keys):
            scores = self.scores(keys, rows)
            peak = scores.amax(dim=-1).clamp(min=_LEAST)
            sums.append(scores.sub_(peak[..., None]).exp_().sum(dim=-1))
            parts.append(scores)
            peaks.append(peak)
        peak = torch.stack(peaks)
        totals = (peak + torch.stack(sums).log()).logsumexp(dim=0).logaddexp(self.rest)
        for rows, exponentials, share in zip(
            _parts(keys), parts, (peak - totals).exp(), strict=True
        ):
            self._fill(attention, rows, share[:, None], exponentials)

    def read_in_parts(self, keys: DocumentKeys, attention: Tensor, log_sums: Tensor) -> None:
        """The same, given the sums over the tokens of all documents."""
        totals = log_sums[self.indices].logaddexp(self.rest)
        for rows in _parts(keys):
            exponentials = self.scores(keys, rows).sub_(totals[..., None]).exp_()
            self._fill(attention, rows, torch.ones_like(totals)[:, None], exponentials)

    def _fill(self, attention: Tensor, rows: slice, share: Tensor, exponentials: Tensor) -> None:
        """Average over each tail's tokens: (heads, 1, rows) and (heads, rows, tokens)."""
        attention[:, self.indices, rows] = ((share * self.weights) @ exponentials).transpose(0, 1)


def _seen_by_all(
    seers: Sequence[tuple[Callable[[Tensor], Tensor] | None, slice]], positions: Tensor
) -> Tensor:
    """Tell which keys the rows of several tails see, shape (rows, keys)."""
    return torch.cat([sees(positions)[rows] for sees, rows in seers if sees is not None])


def _seen_by_some(sees: Callable[[Tensor], Tensor], rows: Tensor, positions: Tensor) -> Tensor:
    """Tell which keys some of the rows see, shape (rows, keys)."""
    return sees(positions)[rows]


def _parts(keys: DocumentKeys) -> list[slice]:
    """Divide the tokens into parts of ``_PART``."""
    count = len(keys.table)
    return [slice(start, min(start + _PART, count)) for start in range(0, count, _PART)]
