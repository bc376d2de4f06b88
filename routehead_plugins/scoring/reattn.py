"""Reweighting of token scores before they are summed per document.

Follows ReAttn (arXiv 2602.19969), which reduces attention to words of the query that many
candidates contain, and raises documents whose attention is spread over many tokens. Only the
abstract was available, so the formulas are ours and may differ from the paper's. With s_ij the
score of token j in document i, n_i tokens in document i, N documents, and df(t) the number of
documents that contain token t:

* w(t) = log((N + 1) / (df(t) + 1)) / log(N + 1) for tokens of the query, 1 for all others;
* s'_ij = w(t_ij) s_ij and B_i = sum_j s'_ij;
* p_ij = max(s'_ij, 0) / sum_j max(s'_ij, 0) and E_i = - sum_j p_ij log p_ij / log n_i;
* W_i = 1 + alpha E_i where B_i > 0, else 1; the document scores W_i B_i.

Calibrated scores can be negative; p ignores negative tokens, B includes them. No document scores
below the sum of its negative tokens, since w is at most 1 and W is 1 for negative sums: calibrated
attention stays above -1, and at most 1 + alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from routehead_plugins.data import Span, check_flag, check_number
from routehead_plugins.errors import InputError
from routehead_plugins.scoring.token_scores import document_sums, owners, spread


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """Choice of the weights to apply; by default both halves of ReAttn.

    Attributes:
        idf: Whether tokens of the query count less, the more candidates contain them.
        entropy: Alpha, the bonus of a document whose attention is spread evenly; 0 for none.

    Raises:
        InputError: ``entropy`` is negative or not finite, or a value has another type.
    """

    idf: bool = True
    entropy: float = 1.0

    def __post_init__(self) -> None:
        check_flag("idf", self.idf)
        check_number("entropy", self.entropy, least=0)


def reweighted_signals(
    token_scores: Tensor,
    spans: Sequence[Span],
    query_ids: Sequence[int],
    document_ids: Sequence[Sequence[int]],
    reweighting: Reweighting,
) -> Tensor:
    """Sum the weighted scores of each document's tokens: (heads, tokens) to (heads, documents)."""
    if reweighting.idf:
        weights = idf_weights(query_ids, document_ids)
        token_scores = token_scores * _prompt_weights(weights, spans, document_ids, token_scores)
    sums = document_sums(token_scores, owners(spans, token_scores), len(spans))
    return sums * entropy_factors(token_scores, spans, reweighting.entropy)


def idf_weights(query_ids: Sequence[int], document_ids: Sequence[Sequence[int]]) -> Tensor:
    """Weight tokens that query and documents share by how few documents contain them.

    A token that every document contains weighs 0, as it does not tell documents apart; a single
    document therefore loses every token that it shares with the query. Tokens that are not in the
    query weigh 1, more than any that are: one in a single document weighs 1 - log 2 / log(N + 1).

    Tokens are compared by id. A word has the same id in query and document only in the same case
    and with the same space before it; query and documents both start behind a space.

    Returns:
        Between 0 and 1, float32, shape (tokens,), document by document.
    """
    count = len(document_ids)
    ids = torch.tensor(list(chain.from_iterable(document_ids)), dtype=torch.long, device="cpu")
    sizes = torch.tensor(
        [len(document) for document in document_ids], dtype=torch.long, device="cpu"
    )
    documents = torch.arange(count, device="cpu").repeat_interleave(sizes)
    vocabulary, rows = ids.unique(return_inverse=True)
    # A document counts once for each of its tokens, however often it contains it.
    containing = torch.stack([rows, documents]).unique(dim=1)[0].bincount(minlength=len(vocabulary))
    # log((N + 1) / (df + 1)) / log(N + 1), in a form that is exactly 0 where df is N.
    logs = torch.arange(
        1, count + 2, dtype=torch.float32, device="cpu"
    ).log()  # of df + 1, for every df
    idf = 1 - logs[containing] / logs[count]
    in_query = torch.isin(vocabulary, torch.tensor(query_ids, dtype=torch.long, device="cpu"))
    return idf.where(in_query, 1.0)[rows]


def entropy_factors(token_scores: Tensor, spans: Sequence[Span], alpha: float) -> Tensor:
    """Compute the factor of each document from how evenly its score is spread over its tokens.

    A document whose sum is not positive gets 1: a larger factor would lower its score most where
    attention is spread evenly. Since the product is 0 where the sum is, scores change continuously
    there, and no document changes its sign. Dropped tokens still count as tokens of their document;
    spans must not overlap.

    Returns:
        From 1, all on one token, to 1 + alpha, shape (heads, documents). A document of one token
        gets 1.
    """
    documents, count = owners(spans, token_scores), len(spans)
    sums = document_sums(token_scores, documents, count)
    positive = token_scores.clamp(min=0)
    totals = spread(document_sums(positive, documents, count), documents)  # (heads, tokens)
    shares = positive / totals.where(totals > 0, 1)
    # No division by log 1 for a document of one token.
    most = torch.tensor([max(span.size, 2) for span in spans], device="cpu").to(token_scores).log()
    entropies = -document_sums(torch.xlogy(shares, shares), documents, count) / most
    return (1 + alpha * entropies).where(sums > 0, 1)


def _prompt_weights(
    weights: Tensor, spans: Sequence[Span], document_ids: Sequence[Sequence[int]], like: Tensor
) -> Tensor:
    """Put the documents' token weights into their spans, and 1 between them, shape (tokens,)."""
    for index, (span, ids) in enumerate(zip(spans, document_ids, strict=True)):
        if span.size != len(ids):
            raise InputError(
                f"document_ids[{index}] has {len(ids)} tokens, but its span has {span.size}; "
                "give the tokens that were read, after any cut."
            )
    all_weights = torch.ones(like.shape[-1], dtype=torch.float32, device="cpu")
    # Spans may stand in any order: layouts read the best candidate last.
    all_weights[torch.cat([torch.arange(*span, device="cpu") for span in spans])] = weights
    return all_weights.to(like)
