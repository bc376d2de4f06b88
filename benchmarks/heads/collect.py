"""Signals and likelihoods of collections, computed once and stored on disk.

A part is one collection in one variant, or its likelihoods. Parts can be computed separately, in
any order and on any machine; parts that are in the folder are not computed again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from benchmarks.common import RESULTS, folders_by_name
from routehead_plugins import FrozenLM
from routehead_plugins.cli.runtime import (
    check_minimum,
    load_llm,
    progress,
    sample_queries,
    signals_folder,
    with_candidates,
)
from routehead_plugins.io import CORPUS_FILE, Collection, atomic_write_text, load_collection
from routehead_plugins.layouts import get_layout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.signals import (
    CollectOptions,
    SignalSet,
    collect_likelihoods,
    collect_signals,
)

SHUFFLE = 0  # seed of the shuffled order of candidates
# Variant -> its layout, and the seed if candidates are shuffled. The parallel layout reads each
# document on its own, so that there is no order to shuffle.
VARIANTS: dict[str, tuple[str, int | None]] = {
    "sequential": ("sequential", None),
    "sequential-shuffled": ("sequential", SHUFFLE),
    "parallel": ("parallel", None),
}
LAYOUTS = ("sequential", "parallel")  # also variants, with candidates in BM25's order
# Queries of a collection share documents, but hardly ever a whole list of documents.
DOCUMENT_CACHE = {"sequential": None, "parallel": "4GB", "late": "4GB"}
LIKELIHOOD = "likelihood"
PARTS = (*VARIANTS, LIKELIHOOD)


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Options of both comparisons, of heads and of routers; the help texts describe the fields.

    Raises:
        InputError: A number is too small, or two collections have the same name.
    """

    collections: Annotated[list[Path], typer.Argument(help="BEIR folders.")]
    queries: Annotated[int, typer.Option(help="Judged queries per collection, at most.")] = 100
    hits: Annotated[int, typer.Option(help="Candidates per query.")] = 20
    max_doc_tokens: Annotated[int, typer.Option(help="Cut longer documents here.")] = 120
    signals: Annotated[
        Path | None, typer.Option(help="Folder of the signals. (default: the user's cache)")
    ] = None
    model: Annotated[
        str, typer.Option(help="embedded, a Hub id, a local directory, or a .gguf file.")
    ] = "embedded"
    device: Annotated[str | None, typer.Option(help="Default: the fastest available.")] = None
    # Not "auto", since the signals on disk are found by their dtype.
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16"
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS

    def __post_init__(self) -> None:
        check_minimum("--queries", self.queries)
        check_minimum("--hits", self.hits)
        folders_by_name(self.collections)

    @property
    def paths(self) -> dict[str, Path]:
        """Name of each collection -> its folder."""
        return folders_by_name(self.collections)

    @property
    def folder(self) -> Path:
        """Folder of the signals."""
        return self.signals or signals_folder()

    @property
    def llm(self) -> RerankerOptions:
        """How the LLM is loaded, and where documents are cut."""
        return RerankerOptions(
            self.model, device=self.device, dtype=self.dtype, max_doc_tokens=self.max_doc_tokens
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Options that figures depend on; paths are reduced to names."""
        return {
            "queries": self.queries,
            "hits": self.hits,
            "max_doc_tokens": self.max_doc_tokens,
            "model": Path(self.model).name if Path(self.model).exists() else self.model,
            "dtype": self.dtype,
            "seed": self.seed,
        }


class Collector:
    """Computes parts, or loads them; the LLM is loaded when it is first needed.

    Args:
        options: The collections and how they are read.
    """

    def __init__(self, options: ComparisonOptions) -> None:
        self.options = options
        self.folder = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def llm(self) -> FrozenLM:
        """The LLM with all its layers, which the likelihood and the signals of all heads need."""
        return load_llm(self.options.llm)

    def load(self, path: Path) -> Collection:
        """Load a sample of a collection's judged queries, with candidates."""
        collection = load_collection(path)
        # The same sample as `routehead detect`, which then finds the same signals.
        sample = sample_queries(collection, self.options.queries, self.options.seed)
        sampled = replace(
            collection,
            topics={query_id: collection.topics[query_id] for query_id in sample},
            qrels={query_id: collection.qrels[query_id] for query_id in sample},
        )
        return self.retrieved(sampled)

    def collect(self, collection: Collection, part: str) -> None:
        """Compute one of ``PARTS`` of a collection from `load`."""
        if part == LIKELIHOOD:
            self.likelihoods(collection)
        else:
            self.signals(collection, part)

    def signals(self, collection: Collection, variant: str) -> SignalSet:
        """Return the signals of all heads for the candidates, in a variant or another layout."""
        layout, shuffle = VARIANTS.get(variant, (variant, None))
        options = CollectOptions(self.options.hits, self.options.max_doc_tokens, shuffle)
        with progress(f"{collection.name}: {variant}", len(collection.topics)) as advance:
            return collect_signals(
                collection,
                self.llm,
                get_layout(layout, document_cache=DOCUMENT_CACHE[layout]),
                self.folder,
                options,
                advance=advance,
            )

    def likelihoods(self, collection: Collection) -> dict[str, Tensor]:
        """Return query -> likelihood given each candidate that is not blank, in the run's order."""
        with progress(f"{collection.name}: {LIKELIHOOD}", len(collection.topics)) as advance:
            return collect_likelihoods(
                collection,
                self.llm,
                self.folder,
                hits=self.options.hits,
                max_doc_tokens=self.options.max_doc_tokens,
                advance=advance,
            )

    def retrieved(self, collection: Collection) -> Collection:
        """Add candidates from BM25 where there are none.

        They are stored, since not every machine with a GPU has a JVM.
        """
        if collection.run is not None:
            return collection
        corpus = hashlib.sha256((collection.path / CORPUS_FILE).read_bytes()).hexdigest()
        key = json.dumps([corpus, collection.topics, self.options.hits], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        path = self.folder / f"candidates-{collection.name}-{digest}.json"
        if not path.exists():
            retrieved = with_candidates(collection, collection.topics, self.options.hits)
            atomic_write_text(path, json.dumps(retrieved.run))
        return replace(collection, run=json.loads(path.read_text(encoding="utf-8")))
