"""What several commands need: the LLM's arguments, candidates from BM25, a progress bar."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from routehead_plugins import __version__
from routehead_plugins.adapters.pyserini import HeadRoutedStage, bm25_run, build_index
from routehead_plugins.backbone import FrozenLM, check_max_doc_tokens, pick_device, pick_dtype
from routehead_plugins.data import Document, non_blank_indices
from routehead_plugins.io import Collection
from routehead_plugins.layouts import Layout, get_layout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.scoring import fuse
from routehead_plugins.selection import Selector, choose_selector

# Results go to stdout, everything about the work itself goes here.
err = Console(stderr=True)


@dataclass(frozen=True)
class ModelOptions:
    """How the LLM is loaded and prompted, as on the command line.

    Attributes:
        model: ``"embedded"``, a Hub id, a directory or a ``.gguf`` file.
        device: ``None`` picks one.
        dtype: ``"auto"`` picks one.
        max_doc_tokens: Where documents are cut; ``None`` for nowhere.
        layout: ``None`` takes the one the heads were chosen for.
        document_cache: How much of what was computed is kept.
        window: Documents read at once in the sequential layout; ``None`` for all.
        stride: Documents by which windows are apart.
    """

    model: str = "embedded"
    device: str | None = None
    dtype: str = "auto"
    max_doc_tokens: int | None = None
    layout: str | None = None
    document_cache: str | None = None
    window: int | None = None
    stride: int | None = None

    def load(self, selector: Selector | None = None) -> FrozenLM:
        """Load the LLM, with a sign of life on the terminal.

        Args:
            selector: The only one that will be used; layers it never needs are not loaded.
        """
        check_max_doc_tokens(self.max_doc_tokens)
        layers = None if selector is None else selector.layers
        with err.status(f"Loading {self.model} ..."):
            return FrozenLM.from_pretrained(
                self.model, device=self.device, dtype=self.dtype, layers=layers
            )

    def selector(self, heads: str | None = None, router: str | None = None) -> Selector:
        """Find what chooses the heads; see ``selection.choose_selector``."""
        options = RerankerOptions(
            self.model, heads=heads, router=router, layout=self.layout, window=self.window
        )
        return choose_selector(options)

    def arrange(self, selector: Selector) -> Layout:
        """Make the layout, the one of the selector's heads where none is named.

        Raises:
            InputError: There is no such layout, or a setting does not fit it.
        """
        return get_layout(
            self.layout or selector.layout,
            document_cache=self.document_cache,
            window=self.window,
            stride=self.stride,
        )

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, for journals and results; device and dtype as picked.

        Raises:
            InputError: The device or dtype does not exist.
        """
        device = pick_device(self.device)
        dtype = str(pick_dtype(self.dtype, device)).removeprefix("torch.")
        picked = {"device": device.type, "dtype": dtype, "version": __version__}
        return {k: v for k, v in asdict(self).items() if k != "document_cache"} | picked


@contextmanager
def bm25_stage(corpus: Path, hits: int, index: Path | None = None) -> Iterator[HeadRoutedStage]:
    """Retrieve from a Lucene index; a temporary one of the corpus where none is given.

    Args:
        corpus: Corpus file or BEIR folder; unused with an index.
        hits: Candidates per query.
        index: A Lucene index on disk.
    """
    if index is not None:
        yield HeadRoutedStage.from_index(index, hits=hits)
        return
    with tempfile.TemporaryDirectory(prefix="routehead-") as folder:
        with err.status(f"Indexing {corpus} with Lucene ..."):
            built = build_index(corpus, Path(folder) / "index")
        yield HeadRoutedStage.from_index(built, hits=hits)


def with_candidates(collection: Collection, topics: Mapping[str, str], hits: int) -> Collection:
    """Run BM25 where a collection brings no candidates.

    Args:
        collection: Left as it is.
        topics: The queries that candidates are needed for.
        hits: Candidates per query.
    """
    if collection.run is not None:
        return collection
    with bm25_stage(collection.path, hits) as stage:
        return replace(collection, run=bm25_run(stage.searcher, topics, hits))


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Draw a bar on stderr; what is yielded moves it on by one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def stamp(path: Path | None) -> list[Any] | None:
    """Tell one state of an input file or folder from another: path, size, time of change."""
    if path is None or not path.exists():
        return None
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def ranked(
    documents: Sequence[Document], scores: Sequence[float], weight: float
) -> list[tuple[str, float]]:
    """Order documents by score, fused where a weight is given; blank ones stay last.

    Args:
        documents: The candidates, with their retrieval scores.
        scores: The re-ranker's, one per document.
        weight: Of the retrieval scores; 0 leaves them out.

    Returns:
        Pairs of document id and score, best first.
    """
    places = non_blank_indices(documents)
    final = dict(enumerate(scores))
    if weight and places:
        fused = fuse(
            torch.tensor([scores[i] for i in places]),
            torch.tensor([documents[i].score or 0.0 for i in places]),
            weight,
        )
        lowest = float(fused.min())
        final = dict.fromkeys(final, lowest - 1) | dict(zip(places, fused.tolist(), strict=True))
    order = sorted(final, key=lambda i: -final[i])
    return [(documents[i].id or "", final[i]) for i in order]
