"""Token scores, weighted before they are summed per document: pure functions of tensors.

After ReAttn (arXiv 2602.19969), which counts attention less on the query's own words where many
candidates hold them, and more in documents that it is spread over. The abstract says that much;
the paper's formulas were not at hand. These are ours, and may differ from the paper's. With s_ij
the score of token j in document i, n_i tokens in document i, N documents, and df(t) the number of
documents that hold token t:

* w(t) = log((N + 1) / (df(t) + 1)) / log(N + 1) for tokens of the query, 1 for all others;
* s'_ij = w(t_ij) s_ij and B_i = sum_j s'_ij;
* p_ij = max(s'_ij, 0) / sum_j max(s'_ij, 0) and E_i = - sum_j p_ij log p_ij / log n_i;
* W_i = 1 + alpha E_i where B_i > 0, else 1; the document scores W_i B_i.

Scores that are calibrated can be negative, and negative shares have no entropy: p leaves them out,
B does not. No score falls below the sum of the document's negative tokens, since w is at most 1
and W is 1 for negative sums: calibrated attention stays above -1, at most 1 + alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from routehead_plugins.data import Span
from routehead_plugins.errors import InputError
from routehead_plugins.scoring.token_scores import document_signals, membership


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """Which weights are put on; by default both halves of ReAttn.

    Attributes:
        idf: Whether tokens of the query count less, the more candidates hold them.
        entropy: By how much a document gains whose attention is spread evenly; alpha in the
            formulas. 0 leaves this half out.

    Raises:
        InputError: ``entropy`` is negative or no number.
    """

    idf: bool = True
    entropy: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.entropy) or self.entropy < 0:
            raise InputError(f"entropy={self.entropy!r} is not a weight; give 0 or more.")


def reweighted_signals(
    token_scores: Tensor,
    spans: Sequence[Span],
    query_ids: Sequence[int],
    document_ids: Sequence[Sequence[int]],
    reweighting: Reweighting,
) -> Tensor:
    """Sum the weighted scores of each document's tokens.

    With ``Reweighting(idf=False, entropy=0)`` the same as ``scoring.document_signals``.

    Args:
        token_scores: Calibrated, zero where outliers were dropped, shape (heads, tokens).
        spans: Tokens of each document, one span per document; they do not overlap.
        query_ids: Tokens of the query alone; see ``idf_weights``.
        document_ids: Tokens of each document as they were read, in the order of the spans.
        reweighting: Which weights are put on.

    Returns:
        Shape (heads, documents).

    Raises:
        InputError: A span and its document do not have the same number of tokens.
    """
    if reweighting.idf:
        weights = idf_weights(query_ids, document_ids)
        token_scores = token_scores * _placed(weights, spans, document_ids, token_scores)
    sums = document_signals(token_scores, None, spans, drop_outliers=False)
    return sums * entropy_factors(token_scores, spans, reweighting.entropy)


def idf_weights(query_ids: Sequence[int], document_ids: Sequence[Sequence[int]]) -> Tensor:
    """Weigh tokens that occur in query and documents by how few documents hold them.

    A token that every document holds weighs 0: it tells no document from another. So a single
    document loses every token it shares with the query. Tokens that are not the query's weigh 1,
    more than any that are: one in a single document weighs 1 - log 2 / log(N + 1).

    Token ids are compared as they are. A word has the same id in query and document only in the
    same case and with the same space before it; query and documents both begin behind a space.

    Args:
        query_ids: Tokens of the query alone, as they stand in the prompt: the instruction around
            it says nothing of what is looked for. How often one occurs does not matter.
        document_ids: Tokens of each document.

    Returns:
        Between 0 and 1, float32, shape (tokens,): those of the first document, then of the second,
        and so on.
    """
    count = len(document_ids)
    ids = torch.tensor(list(chain.from_iterable(document_ids)), dtype=torch.long)
    sizes = torch.tensor([len(document) for document in document_ids], dtype=torch.long)
    owners = torch.arange(count).repeat_interleave(sizes)
    vocabulary, places = ids.unique(return_inverse=True)
    holds = torch.zeros(len(vocabulary), count, dtype=torch.bool)
    holds[places, owners] = True
    # log((N + 1) / (df + 1)) / log(N + 1), in a form that is exactly 0 where df is N.
    logs = torch.arange(1, count + 2).log()  # of df + 1, for every df
    idf = 1 - logs[holds.sum(dim=1)] / logs[count]
    asked = torch.isin(vocabulary, torch.tensor(query_ids, dtype=torch.long))
    return idf.where(asked, 1.0)[places]


def entropy_factors(token_scores: Tensor, spans: Sequence[Span], alpha: float) -> Tensor:
    """Say how much more each document counts because its score is spread over its tokens.

    A document whose sum is not positive gets 1. Multiplied by more, it would rank the lower the
    more evenly it was read, the reverse of what is meant. As the product is 0 where the sum is,
    nothing jumps there, and no document changes its sign.

    Args:
        token_scores: Shape (heads, tokens), already weighted where that is wanted. Tokens that
            were dropped, as zeros, still count as tokens of their document.
        spans: Tokens of each document, one span per document; they do not overlap.
        alpha: What a document gains whose tokens all have the same score.

    Returns:
        Between 1, all on one token, and 1 + alpha, shape (heads, documents). A document of one
        token has nothing to spread, and gets 1.
    """
    members = membership(spans, token_scores)
    positive = token_scores.clamp(min=0)
    totals = (positive @ members) @ members.T  # of the token's document, (heads, tokens)
    shares = positive / totals.where(totals > 0, 1)
    most = members.sum(dim=0).clamp(min=2).log()  # no division by log 1 for one token
    entropies = -(torch.xlogy(shares, shares) @ members) / most
    return (1 + alpha * entropies).where(token_scores @ members > 0, 1)


def _placed(
    weights: Tensor, spans: Sequence[Span], document_ids: Sequence[Sequence[int]], like: Tensor
) -> Tensor:
    """Put weights where their documents stand, and 1 between them, shape (tokens,)."""
    for index, (span, ids) in enumerate(zip(spans, document_ids, strict=True)):
        if span.size != len(ids):
            raise InputError(
                f"document_ids[{index}] has {len(ids)} tokens, but its span has {span.size}; "
                "give the tokens that were read, after any cut."
            )
    placed = torch.ones(like.shape[-1])
    # Spans may stand in any order: layouts read the best candidate last.
    placed[torch.cat([torch.arange(*span) for span in spans])] = weights
    return placed.to(like)
