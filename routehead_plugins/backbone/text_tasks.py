"""Tasks of a frozen LLM on plain texts: embed, score by likelihood, continue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from routehead_plugins.backbone.batching import batches
from routehead_plugins.backbone.device import check_finite
from routehead_plugins.backbone.prompt import PromptEncoder, check_max_doc_tokens
from routehead_plugins.backbone.sampling import sample
from routehead_plugins.data import (
    Document,
    as_documents,
    as_list,
    check_text,
    non_blank_indices,
)
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet

POOLINGS = ("mean", "last")
"""Ways to pool a text's hidden states into one vector."""

# Tokens run at once, padding included.
_BATCH_TOKENS = 4096
# Share of the layers after which texts are embedded by default.
_EMBEDDING_DEPTH = 0.8


class TextTasks(ABC):
    """Tasks of ``FrozenLM`` that read no attention; each takes its lock while the LLM runs."""

    name: str
    encoder: PromptEncoder
    num_layers: int
    width: int

    @property
    @abstractmethod
    def heads(self) -> HeadSet:
        """Every head that can be read."""

    @abstractmethod
    def hidden_states(
        self, sequences: Sequence[tuple[int, ...]], layer: int
    ) -> tuple[Tensor, Tensor]:
        """Run some layers; return states (sequences, tokens, width) and lengths (sequences,)."""

    @abstractmethod
    def causal_lm(
        self, purpose: str, *, length: int | None = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """Lend the whole model to one thread at a time."""

    @abstractmethod
    def rotary_key(self, length: int) -> Hashable:
        """Return a key that is equal for sequences whose tokens are rotated alike."""

    def rotated_alike(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group the indices of sequences, given by their lengths, that one batch may hold."""
        groups: dict[Hashable, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(self.rotary_key(length), []).append(index)
        return list(groups.values())

    @property
    def embedding_layer(self) -> int:
        """Number of layers after which texts are embedded by default: four fifths of them."""
        return round(_EMBEDDING_DEPTH * self.num_layers)

    def check_embedding_layer(self, layer: int, *, last: bool = True) -> None:
        """Check that the states after ``layer`` layers can be computed.

        Args:
            layer: Number of layers.
            last: Whether the states after the LLM's last layer can be, too.

        Raises:
            InputError: The LLM has fewer layers, or was loaded with fewer.
        """
        loaded = self.heads.last_layer + 1
        # States after the last layer loaded are normalised, those after other layers are not.
        deepest = loaded if last and loaded == self.num_layers else loaded - 1
        if not 0 <= layer <= deepest:
            raise InputError(f"layer={layer} is not a layer of {self.name!r}; give 0 to {deepest}.")

    @torch.inference_mode()
    def embed(
        self,
        texts: Sequence[str],
        *,
        layer: int | None = None,
        pooling: str = "mean",
        max_tokens: int | None = 512,
    ) -> Tensor:
        """Embed texts, for a dense first stage or for a router: a layer's states, pooled.

        A few coordinates of an LLM's states are tens of times larger than the others in every text:
        standardise every coordinate over the corpus (``Standardiser``) before comparing.

        Args:
            texts: Texts to embed; a blank text gives zeros.
            layer: Number of layers to run; ``None`` for four fifths of them.
            pooling: ``"mean"`` of all tokens but the first, or ``"last"`` for the last token.
            max_tokens: Longer texts are cut here.

        Returns:
            Shape (texts, width), float32, on the CPU, not normalised.

        Raises:
            InputError: There is no such layer or pooling, or an item is not a text.
            RouteHeadError: An embedding is not finite.
        """
        texts = as_list(texts, "texts", "texts")
        for index, text in enumerate(texts):
            check_text(f"texts[{index}]", text, blank=True)
        check_pooling(pooling)
        layer = self.embedding_layer if layer is None else layer
        self.check_embedding_layer(layer)
        encoded = self.encoder.plain([text.strip() for text in texts], max_tokens)
        embeddings = torch.empty(len(texts), self.width, dtype=torch.float32, device="cpu")
        for batch in batches([len(ids) for ids in encoded], _BATCH_TOKENS):
            states, lengths = self.hidden_states([encoded[index] for index in batch], layer)
            embeddings[batch] = pool(states, lengths, pooling).cpu()
            check_finite(embeddings[batch], self.name, states.dtype)
        return embeddings

    @torch.inference_mode()
    def log_likelihoods(
        self, contexts: Sequence[tuple[int, ...]], target: tuple[int, ...]
    ) -> Tensor:
        """Compute the log likelihood of one continuation after each of several contexts.

        Args:
            contexts: Token ids, none of them empty.
            target: Token ids of the continuation.

        Returns:
            Sum over the target's tokens of the natural logarithm, shape (contexts,), on the CPU.

        Raises:
            UnsupportedModelError: The last layers or the output projection were not loaded.
            RouteHeadError: A likelihood is not finite.
        """
        likelihoods = torch.empty(len(contexts), dtype=torch.float32, device="cpu")
        lengths = [len(context) + len(target) for context in contexts]
        with self.causal_lm("cannot compute likelihoods") as model:
            for batch in self._batches(lengths):
                rows = [contexts[index] for index in batch]
                likelihoods[batch] = _log_likelihoods(model, rows, target)
                check_finite(likelihoods[batch], self.name, model.dtype)
        return likelihoods

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Group sequences into batches; the last token of each is predicted, but not run."""
        for group in self.rotated_alike([length - 1 for length in lengths]):
            for batch in batches([lengths[index] for index in group], _BATCH_TOKENS):
                yield [group[index] for index in batch]

    def write(
        self,
        prefix: str,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """Continue several texts to the end of the line, all in one batch.

        Args:
            prefix: Text before every prompt, such as examples.
            prompts: Texts to continue, none of them empty.
            max_tokens: Longest continuation, in tokens.
            temperature: Divides the logits before the softmax; 0 takes the likeliest token.
            seed: Random seed; the same seed gives the same texts.

        Returns:
            One line per prompt, possibly empty, cut at ``max_tokens``.

        Raises:
            UnsupportedModelError: The last layers or the output projection were not loaded.
        """
        decode, ends = self.encoder.decode, self.encoder.control_ids
        (first,), rest = self.encoder.plain([prefix]), self.encoder.encode(prompts)
        length = len(first) + max(map(len, rest), default=0) + max_tokens
        with self.causal_lm("cannot write", length=length) as model:
            lines = sample(
                model,
                first,
                rest,
                max_tokens=max_tokens,
                temperature=temperature,
                generator=torch.Generator().manual_seed(seed),
                ended=lambda ids: ids[-1] in ends or "\n" in decode(ids).lstrip(),
            )
        return [decode(ids).strip().partition("\n")[0].strip() for ids in lines]


@dataclass(frozen=True)
class QueryLikelihood:
    """Scorer of documents by how well they predict the query (UPR, arXiv 2204.07496).

    The baseline that the re-ranker is compared with. It takes one forward per document.

    Attributes:
        llm: The frozen LLM, loaded with all its layers.
        max_doc_tokens: Longer documents are cut here.

    Raises:
        InputError: ``max_doc_tokens`` is below 1.
    """

    llm: TextTasks
    max_doc_tokens: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_max_doc_tokens(self.max_doc_tokens)

    def score(self, query: str, documents: Sequence[str | Document]) -> list[float]:
        """Score documents, in the order given.

        Args:
            query: The query.
            documents: The candidates; blank ones get minus infinity.

        Returns:
            Mean over the query's tokens of the natural logarithm of their likelihood.

        Raises:
            InputError: The query is blank, or a candidate is not a text.
            UnsupportedModelError: The LLM was loaded without its last layers.
        """
        check_text("query", query)
        candidates = as_documents(documents)
        indices = non_blank_indices(candidates)
        contexts, target = self.llm.encoder.question(
            query, [candidates[index].text for index in indices], self.max_doc_tokens
        )
        likelihoods = self.llm.log_likelihoods(contexts, target) / len(target)
        scores = torch.full((len(candidates),), -torch.inf, dtype=torch.float32, device="cpu")
        scores[indices] = likelihoods
        return scores.tolist()


@dataclass(frozen=True)
class Standardiser:
    """Shift and scale every coordinate by its mean and deviation over a corpus.

    Attributes:
        mean: Shape (width,).
        deviation: Shape (width,), nowhere zero.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, embeddings: Tensor) -> Standardiser:
        """Measure mean and deviation over a corpus, embeddings of shape (documents, width)."""
        deviation = embeddings.std(dim=0, unbiased=False)
        return cls(embeddings.mean(dim=0), torch.where(deviation > 0, deviation, 1.0))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Standardise and L2-normalise, shape (texts, width): inner products become cosines."""
        return torch.nn.functional.normalize((embeddings - self.mean) / self.deviation, dim=-1)


def pool(states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """Pool states of shape (texts, tokens, width), padded on the right, to (texts, width).

    The first token, an attention sink, is left out; a text of that token alone gives zeros.
    """
    positions = torch.arange(states.shape[1], device=states.device)[None]
    mask = (positions > 0) & (positions < lengths[:, None])
    if pooling == "last":
        mask = mask & (positions == lengths[:, None] - 1)
    sums = (states.float() * mask.float()[..., None]).sum(dim=1)
    return sums / mask.float().sum(dim=1, keepdim=True).clamp(min=1)


def check_pooling(pooling: str) -> None:
    """Check that the pooling method exists.

    Raises:
        InputError: It is not one of ``POOLINGS``.
    """
    if pooling not in POOLINGS:
        raise InputError(
            f"pooling={pooling!r} does not exist; choose one of {', '.join(POOLINGS)}."
        )


def _log_likelihoods(
    model: PreTrainedModel, contexts: Sequence[tuple[int, ...]], target: tuple[int, ...]
) -> Tensor:
    """Score one batch, padded on the left: the target is in the same columns of every row."""
    width = max(map(len, contexts))
    padding = [width - len(context) for context in contexts]
    rows = [
        [context[0]] * count + [*context, *target[:-1]]
        for context, count in zip(contexts, padding, strict=True)
    ]
    columns = torch.arange(len(rows[0]), device=model.device)[None]
    positions = columns - torch.tensor(padding, device=model.device)[:, None]
    output = model(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=(positions >= 0).long(),
        position_ids=positions.clamp(min=0),
        use_cache=False,
        logits_to_keep=len(target),
    )
    logs: Tensor = output.logits[:, -len(target) :].float().log_softmax(dim=-1)
    wanted = torch.tensor(target, device=model.device)[None, :, None].expand(len(rows), -1, -1)
    return logs.gather(2, wanted).sum(dim=(1, 2)).cpu()
