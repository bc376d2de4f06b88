"""The methods of a cross-encoder of sentence-transformers, so that code written for one runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from routehead_plugins.data import Document, as_list, check_flag, check_text, check_top_n
from routehead_plugins.errors import InputError, class_name, short_repr

if TYPE_CHECKING:
    from routehead_plugins.data import Ranking


class _Reranker(Protocol):
    """What the methods are made of; see ``HeadRoutedAttentionReranker``."""

    def rerank(
        self,
        query: str,
        documents: Iterable[str | Document],
        top_n: int | None = None,
        *,
        instruction: str | None = None,
    ) -> Ranking:
        """Rank documents."""

    def score(
        self,
        query: str,
        documents: Iterable[str | Document],
        *,
        instruction: str | None = None,
    ) -> list[float]:
        """Score documents."""


class _NoCard:
    def set_evaluation_metrics(self, *_: object, **__: object) -> None:
        """Do nothing."""


class CrossEncoderMethods:
    """``rank`` and ``predict`` with the arguments and results of ``CrossEncoder``.

    Scores are those of ``score``: a list is read as one, so that they are comparable within the
    list of a query. Pairs of the same query are one list.
    """

    @property
    def num_labels(self) -> int:
        """Scores of a pair: one."""
        return 1

    @property
    def model_card_data(self) -> _NoCard:
        """Takes what evaluators report, and keeps nothing of it."""
        return _NoCard()

    def rank(
        self: _Reranker,
        query: str,
        documents: Iterable[str | Document],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents, in the shape of ``CrossEncoder.rank``.

        Args:
            query: The query.
            documents: The candidates.
            top_k: Number of documents to return; ``None`` for all.
            return_documents: Whether to return their texts as well.
            prompt_name: Must be ``None``: a re-ranker has no prompts with names.
            prompt: Which documents are relevant: the ``instruction`` of ``rerank``.
            batch_size: Taken for compatibility; batches are made by length.
            show_progress_bar: Taken for compatibility; one query is one step.

        Returns:
            ``corpus_id`` and ``score`` of each, and ``text`` if asked for, best first.

        Raises:
            InputError: See ``rerank``.
        """
        del batch_size, show_progress_bar
        _check_prompt_name(prompt_name)
        with_texts = check_flag("return_documents", return_documents)
        if top_k is not None:
            check_top_n(top_k)
        ranking = self.rerank(query, documents, top_k, instruction=prompt)
        return [
            {"corpus_id": hit.index, "score": hit.score}
            | ({"text": hit.document.text} if with_texts else {})
            for hit in ranking
        ]

    def predict(
        self: _Reranker,
        inputs: Sequence[Sequence[str]] | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ) -> NDArray[np.float32] | torch.Tensor | list[torch.Tensor]:
        """Score pairs of query and document, in the shape of ``CrossEncoder.predict``.

        Args:
            inputs: Pairs of a query and a document, or one pair. The documents that are given for a
                query are its list: they are scored together, and a single one gets the score of a
                list of one.
            prompt_name: Must be ``None``: a re-ranker has no prompts with names.
            prompt: Which documents are relevant: the ``instruction`` of ``rerank``.
            batch_size: Taken for compatibility; batches are made by length.
            show_progress_bar: Taken for compatibility.
            convert_to_numpy: Whether to return an array rather than a list of tensors.
            convert_to_tensor: Whether to return a tensor.

        Returns:
            Scores in the order of the pairs, shape (pairs,), float32; one number for one pair.

        Raises:
            InputError: An item is not a pair of texts, or see ``rerank``.
        """
        del batch_size, show_progress_bar
        _check_prompt_name(prompt_name)
        pairs, is_one = _pairs(inputs)
        lists: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            lists.setdefault(query, []).append(index)
        scores = torch.zeros(len(pairs), device="cpu")
        for query, indices in lists.items():
            own = self.score(query, [pairs[index][1] for index in indices], instruction=prompt)
            scores[indices] = torch.tensor(own, device="cpu")
        result = scores[0] if is_one else scores
        if convert_to_tensor:
            return result
        if convert_to_numpy:
            return np.asarray(result, dtype=np.float32)[()]
        return result if is_one else list(scores)


def _check_prompt_name(name: object) -> None:
    if name is not None:
        raise InputError(
            f"prompt_name={short_repr(name)} is not known, as there are no prompts with names; "
            "give the text as prompt=."
        )


def _pairs(inputs: Any) -> tuple[list[tuple[str, str]], bool]:
    """Check pairs; also tell whether there is one that does not stand in a list."""
    items = as_list(inputs, "inputs", "pairs of a query and a document")
    is_one = bool(items) and all(isinstance(item, str) for item in items)
    pairs = [items] if is_one else items
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            what = f"has {len(pair)} texts" if isinstance(pair, tuple | list) else class_name(pair)
            what = what if what.startswith("has") else f"is a {what}"
            raise InputError(f"inputs[{index}] {what}; give a pair of a query and a document.")
        check_text(f"inputs[{index}][0]", pair[0])
        check_text(f"inputs[{index}][1]", pair[1], blank=True)
    return [(query, document) for query, document in pairs], is_one
