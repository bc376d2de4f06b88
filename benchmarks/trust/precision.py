"""How far scores depend on the company of a document, and on the dtype of the LLM."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import nn

from benchmarks.trust.report import Outcome, Sizes
from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.backbone import load
from routehead_plugins.errors import RouteHeadError
from routehead_plugins.io import BUNDLED, load_collection
from routehead_plugins.options import RerankerOptions

# Largest difference of a document's score, which lies between -1 and 1, in other company.
TOLERANCES = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}
# Least rank correlation with float32, Kendall's tau averaged over the queries.
LEAST = {"bfloat16": 0.8, "float16": 0.9, "int8": 0.6}

# Few queries, short documents and half of the layers: 16 bits are slow on many processors.
_BATCHED, _CORRELATED = 2, 6  # queries
_DOCUMENTS = 8
_WORDS = 8  # of a document
_HEADS = "layers:10-14"
_DTYPES = ("float32", "bfloat16", "float16")
_INT8 = "int8"

Request = tuple[str, list[str]]


def check_batches(folder: Path, sizes: Sizes, seed: int) -> Outcome:  # noqa: ARG001
    """Score the same documents in other company; compare with each request on its own."""
    requests = _requests(seed, _BATCHED)
    figures: dict[str, Any] = {}
    for dtype in _DTYPES:
        llm = _load(dtype)
        differences = list(_differences(llm, requests))
        figures[dtype] = {"largest difference": max(differences), "tolerance": TOLERANCES[dtype]}
    parts = [f"{name} {f['largest difference']:.1e}" for name, f in figures.items()]
    return Outcome(
        all(f["largest difference"] <= f["tolerance"] for f in figures.values()),
        f"embedded LLM, {_HEADS}, {len(requests)} queries of {_DOCUMENTS} documents, alone or in a "
        "batch, with or without a document cache, in another order: largest difference "
        f"{', '.join(parts)} (at most {', '.join(f'{t:.0e}' for t in TOLERANCES.values())})",
        figures,
    )


def check_dtypes(folder: Path, sizes: Sizes, seed: int) -> Outcome:  # noqa: ARG001
    """Correlate rankings in other dtypes with those in float32."""
    requests = _requests(seed, _CORRELATED)
    expected = _scores(_load("float32"), requests)
    figures: dict[str, Any] = {}
    for dtype in (*_DTYPES[1:], _INT8):
        try:
            scores = _scores(_load(dtype), requests)
        except RouteHeadError as error:
            figures[dtype] = {"refused": str(error)}
            continue
        taus = [
            float(kendalltau(one, other).statistic)
            for one, other in zip(expected, scores, strict=True)
        ]
        figures[dtype] = {"mean": fmean(taus), "least": min(taus), "bound": LEAST[dtype]}
    parts = [
        f"{name} refused" if "refused" in figure else f"{name} {figure['mean']:.3f}"
        for name, figure in figures.items()
    ]
    return Outcome(
        all("refused" in f or f["mean"] >= f["bound"] for f in figures.values()),
        f"embedded LLM, {_HEADS}, {len(requests)} queries of {_DOCUMENTS} documents: mean "
        f"Kendall's tau with float32: {', '.join(parts)} "
        f"(at least {', '.join(map(str, LEAST.values()))})",
        figures,
    )


def _requests(seed: int, count: int) -> list[Request]:
    """Draw queries of the bundled collection, each with the first words of some documents."""
    collection, rng = load_collection(BUNDLED), random.Random(seed)
    texts = [" ".join(d.text.split()[:_WORDS]) for d in collection.corpus.values()]
    queries = rng.sample(list(collection.topics.values()), count)
    return [(query, rng.sample(texts, _DOCUMENTS)) for query in queries]


def _load(dtype: str) -> FrozenLM:
    """Load the embedded LLM; int8 is PyTorch's dynamic quantisation of its linear layers."""
    kind = torch.float32 if dtype == _INT8 else getattr(torch, dtype)
    model, tokenizer = load("embedded", dtype=kind, device=torch.device("cpu"))
    if dtype == _INT8:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is to move to another package
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return FrozenLM(model, tokenizer, name=f"embedded, {dtype}")


def _reranker(llm: FrozenLM, cache: str | None = None) -> HeadRoutedAttentionReranker:
    options = RerankerOptions("embedded", heads=_HEADS, layout="parallel", document_cache=cache)
    return HeadRoutedAttentionReranker.from_options(options, llm)


def _scores(llm: FrozenLM, requests: list[Request]) -> list[list[float]]:
    reranker = _reranker(llm)
    return [reranker.score(query, documents) for query, documents in requests]


def _differences(llm: FrozenLM, requests: list[Request]) -> Iterator[float]:
    """Yield differences of the same document's scores, read in one company and in another."""
    expected = _scores(llm, requests)
    cached = _reranker(llm, "1GB")
    cached.score(requests[0][0], [requests[1][1][0], *requests[0][1][::2]])  # half of the first
    batch = cached.rerank_batch(requests)
    for (query, documents), scores, ranking in zip(requests, expected, batch, strict=True):
        yield from (abs(hit.score - scores[hit.index]) for hit in ranking)
        reversed_scores = _reranker(llm).score(query, documents[::-1])[::-1]
        yield from (abs(a - b) for a, b in zip(scores, reversed_scores, strict=True))
