"""Teachers: slower or other models whose scores of candidates are learned from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from cachetools import LRUCache
from huggingface_hub import hf_hub_download
from torch import Tensor

from routehead_plugins.backbone import FrozenLM, MiniLM, QueryLikelihood, pick_device
from routehead_plugins.data import Document, check_text
from routehead_plugins.errors import InputError, ModelLoadError, missing_extra, short_repr
from routehead_plugins.files import parse_json, reason, show_path
from routehead_plugins.io import JSON, Collection, Journal, StrPath, make_folder
from routehead_plugins.signals.collect import non_blank_candidates
from routehead_plugins.signals.store import llm_settings, sha256

LIKELIHOOD, MINILM = "likelihood", "minilm"
"""Names of the teachers that are no models of sentence-transformers."""

# Texts whose embeddings are kept: candidates of one query are often those of others.
_KEPT = 50_000
# Queries whose texts are embedded together.
_AHEAD = 256


class Teacher(Protocol):
    """A model that scores the candidates of a query."""

    @property
    def name(self) -> str:
        """Name for records."""

    @property
    def temperature(self) -> float:
        """Temperature at which a softmax over its scores tells candidates apart."""

    @property
    def settings(self) -> Mapping[str, JSON]:
        """All that its scores depend on beside query and documents, for records on disk."""

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Score documents; higher is better.

        Args:
            query: The query.
            documents: The candidates, none of them blank.
        """


@dataclass(frozen=True)
class LikelihoodTeacher:
    """Likelihood of the query given each document, by a causal LLM (arXiv 2204.07496).

    Attributes:
        llm: The LLM, with all its layers.
        max_doc_tokens: Longer documents are cut here.
    """

    llm: FrozenLM
    max_doc_tokens: int | None = None
    temperature: float = field(default=0.2, init=False)

    @property
    def name(self) -> str:
        """Name for records."""
        return f"{LIKELIHOOD} of {self.llm.name}"

    @property
    def settings(self) -> Mapping[str, JSON]:
        """LLM, number format and length of documents."""
        return llm_settings(self.llm, max_doc_tokens=self.max_doc_tokens)

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Return the mean log likelihood of the query's tokens; see ``Teacher.score``."""
        return QueryLikelihood(self.llm, max_doc_tokens=self.max_doc_tokens).score(query, documents)


class EncoderTeacher:
    """Cosine, or the model's own similarity, of the embeddings of query and document.

    Attributes:
        name: Name for records.
        temperature: See ``Teacher``.
    """

    temperature = 0.05

    def __init__(
        self,
        name: str,
        embed_queries: Callable[[Sequence[str]], Tensor],
        embed_documents: Callable[[Sequence[str]], Tensor],
        similarity: Callable[[Tensor, Tensor], Tensor] = torch.mv,
    ) -> None:
        """Compose a teacher of functions.

        Args:
            name: Name for records.
            embed_queries: Returns vectors, shape (queries, width).
            embed_documents: Returns vectors, shape (documents, width).
            similarity: Compares vectors of documents with that of a query, shape (documents,).
        """
        self.name = name
        self._queries = _Embeddings(embed_queries)
        self._documents = _Embeddings(embed_documents)
        self._similarity = similarity

    @property
    def settings(self) -> Mapping[str, JSON]:
        """The name."""
        return {"teacher": self.name}

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Return similarities; see ``Teacher.score``."""
        scores: list[float] = self.scores([query], [document.text for document in documents])[
            0
        ].tolist()
        return scores

    def query_vectors(self, queries: Sequence[str]) -> Tensor:
        """Embed queries, shape (queries, width)."""
        return self._queries.of(queries)

    def prepare(self, queries: Sequence[str], texts: Sequence[str]) -> None:
        """Embed texts that will be scored soon: together they take less time than one by one."""
        self._queries.of(queries)
        self._documents.of(texts)

    def scores(self, queries: Sequence[str] | Tensor, texts: Sequence[str]) -> Tensor:
        """Score texts for several queries, each text embedded once.

        Args:
            queries: The queries, at least one, or their vectors.
            texts: The texts, at least one.

        Returns:
            Similarities, shape (queries, texts).
        """
        vectors = queries if isinstance(queries, Tensor) else self.query_vectors(queries)
        table = self._documents.of(texts)
        return torch.stack([self._similarity(table, vector) for vector in vectors])


class _Embeddings:
    """Vectors of texts; those of the last many texts are kept."""

    def __init__(self, embed: Callable[[Sequence[str]], Tensor]) -> None:
        self._embed = embed
        self._kept: LRUCache[str, Tensor] = LRUCache(_KEPT)

    def of(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of texts, shape (texts, width)."""
        vectors = {text: self._kept[text] for text in texts if text in self._kept}
        new = [text for text in dict.fromkeys(texts) if text not in vectors]
        if new:
            vectors |= zip(new, self._embed(new).float().cpu(), strict=True)
        self._kept.update(vectors)
        return torch.stack([vectors[text] for text in texts])


@dataclass(frozen=True)
class CrossEncoderTeacher:
    """Logits of a cross-encoder, which reads query and document together (arXiv 1901.04085).

    Attributes:
        name: Name for records.
        model: A ``CrossEncoder`` of sentence-transformers.
    """

    name: str
    model: Any
    temperature: float = field(default=1.0, init=False)

    @property
    def settings(self) -> Mapping[str, JSON]:
        """The name."""
        return {"teacher": self.name}

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Return the logits; see ``Teacher.score``."""
        pairs = [(query, document.text) for document in documents]
        scores = self.model.predict(
            pairs,
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        logits: list[float] = scores.float().flatten().tolist()
        return logits


def load_teacher(
    name: str,
    llm: FrozenLM | None = None,
    *,
    device: str | torch.device | None = None,
    max_doc_tokens: int | None = None,
    local_files_only: bool = False,
) -> Teacher:
    """Load a teacher by name.

    Args:
        name: ``"likelihood"`` of ``llm``; ``"likelihood:NAME"`` of another LLM; ``"minilm"``, the
            sentence encoder all-MiniLM-L6-v2 in a package; or the folder or Hub id of a bi-encoder
            or cross-encoder of sentence-transformers.
        llm: The LLM of ``"likelihood"``, with all its layers.
        device: ``None`` picks one.
        max_doc_tokens: For likelihoods: longer documents are cut here.
        local_files_only: Whether to use only the local cache of the Hub, never the network.

    Raises:
        InputError: There is no LLM for ``"likelihood"``.
        ModelLoadError: No model of that name can be loaded.
        MissingExtraError: A package that it needs is not installed.
    """
    check_text("teacher", name)
    kind, _, model = name.partition(":")
    picked = pick_device(device)
    if name == MINILM:
        encoder = MiniLM(picked)
        return EncoderTeacher(name, encoder.embed, encoder.embed)
    if kind == LIKELIHOOD and model:
        other = FrozenLM.from_pretrained(model, device=picked, local_files_only=local_files_only)
        return LikelihoodTeacher(other, max_doc_tokens)
    if kind == LIKELIHOOD:
        if llm is None:
            raise InputError(
                'teacher="likelihood" needs an LLM; give one, or its name: "likelihood:NAME".'
            )
        return LikelihoodTeacher(llm, max_doc_tokens)
    return _sentence_transformer(name, picked, local_files_only)


def _sentence_transformer(name: str, device: torch.device, local_files_only: bool) -> Teacher:
    """Load a bi-encoder or a cross-encoder, as its configuration says."""
    try:
        from sentence_transformers import CrossEncoder, SentenceTransformer
    except ImportError as error:
        raise missing_extra(error, "teacher") from error
    options: dict[str, Any] = {"device": str(device), "local_files_only": local_files_only}
    # Which errors a folder or connection that is broken raises depends on several libraries.
    try:
        if _is_cross_encoder(name, local_files_only):
            return CrossEncoderTeacher(name, CrossEncoder(name, **options))
        model = SentenceTransformer(name, **options)
    except Exception as error:
        raise ModelLoadError(
            f"teacher={show_path(name, 80)!r} cannot be loaded ({reason(error)}); give likelihood, "
            "minilm, or the folder or Hub id of a model of sentence-transformers."
        ) from error

    def embed_queries(queries: Sequence[str]) -> Tensor:
        return torch.as_tensor(model.encode_query(list(queries), show_progress_bar=False))

    def embed_documents(texts: Sequence[str]) -> Tensor:
        return torch.as_tensor(model.encode_document(list(texts), show_progress_bar=False))

    def similarity(documents: Tensor, query: Tensor) -> Tensor:
        return torch.as_tensor(model.similarity(query[None], documents))[0]

    return EncoderTeacher(name, embed_queries, embed_documents, similarity)


def _is_cross_encoder(name: str, local_files_only: bool) -> bool:
    """Read from a model's configuration whether it has an output for pairs of texts."""
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        path = Path(hf_hub_download(name, "config.json", local_files_only=local_files_only))
    if not path.exists():
        return False  # of a bi-encoder in several folders
    config = parse_json(path.read_text(encoding="utf-8"))
    kinds = config.get("architectures") or [] if isinstance(config, dict) else []
    return any("SequenceClassification" in str(kind) for kind in kinds)


def collect_teacher(
    collection: Collection,
    teacher: Teacher,
    folder: StrPath,
    *,
    hits: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Score each query's candidates by a teacher.

    Args:
        collection: A collection with candidates.
        teacher: The teacher.
        folder: Folder of finished scores, from which an interrupted run resumes.
        hits: Number of candidates per query.
        advance: Callback after every query.

    Returns:
        Query id -> scores of its non-blank candidates, in first-stage order.

    Raises:
        InputError: The folder cannot be created, or a score is not a number.
        UnsupportedModelError: An LLM was loaded without its last layers.
        CollectionError: The collection has no candidates.
    """
    settings = dict(teacher.settings)
    # A journal with other settings is dropped when it is opened, so each has a file of its own.
    kind = LIKELIHOOD if isinstance(teacher, LikelihoodTeacher) else "teacher"
    name = f"{kind}-{collection.name}-{_digest(settings)}"
    scores: dict[str, Tensor] = {}
    topics, ids = collection.topics, list(collection.topics)
    with Journal(make_folder(folder, "a teacher's scores") / name, settings) as journal:
        for start in range(0, len(ids), _AHEAD):
            candidates = {
                query_id: non_blank_candidates(collection, query_id, hits)
                for query_id in ids[start : start + _AHEAD]
            }
            keys = {key: _key(key, topics[key], own) for key, own in candidates.items()}
            new = [key for key, own in candidates.items() if own and keys[key] not in journal.done]
            if new and isinstance(teacher, EncoderTeacher):
                texts = [document.text for key in new for document in candidates[key]]
                teacher.prepare([topics[key] for key in new], texts)
            for query_id, documents in candidates.items():
                if query_id in new:
                    own = _finite_scores(teacher, query_id, topics[query_id], documents)
                    journal.append(keys[query_id], own)
                if documents:
                    scores[query_id] = torch.tensor(journal.done[keys[query_id]])
                advance()
    return scores


def _key(query_id: str, query: str, documents: Sequence[Document]) -> str:
    """Name the scores of a query's candidates."""
    content = [query, [[document.id, document.text] for document in documents]]
    return f"{query_id} {_digest(content)}"


def _finite_scores(
    teacher: Teacher, query_id: str, query: str, documents: Sequence[Document]
) -> list[float]:
    scores = teacher.score(query, documents)
    if not all(map(math.isfinite, scores)):
        raise InputError(
            f"the teacher {short_repr(teacher.name)} gives query {query_id!r} scores that are not "
            "finite; choose another."
        )
    return scores


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True), 12)
