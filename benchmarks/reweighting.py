"""Ablate re-weighting (ReAttn) by halves: every variant reads the same attention.

    python benchmarks/reweighting.py                       # the bundled collection
    python benchmarks/reweighting.py DIR [DIR ...]         # BEIR folders of your own

The LLM is run once per query and layout; none of the variants is fitted to anything. Each
collection and layout gives benchmarks/results/reweighting-NAME-LAYOUT.json, the baseline being the
same heads without re-weighting, and its table is printed as Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.cli.detect import sample_queries
from routehead_plugins.cli.runtime import ModelOptions, progress, ranked, with_candidates
from routehead_plugins.data import Document
from routehead_plugins.evaluation import Evaluation, ResultTable, evaluate
from routehead_plugins.io import BUNDLED, Collection, load_collection
from routehead_plugins.layouts import LAYOUTS, Layout, ReadOptions, get_layout
from routehead_plugins.scoring import Readout, Reweighting
from routehead_plugins.selection import Selector, choose_selector

RESULTS = Path(__file__).parent / "results"
PLAIN = "none"
VARIANTS = {
    PLAIN: Readout(),
    "idf": Readout(reweighting=Reweighting(idf=True, entropy=0.0)),
    "entropy": Readout(reweighting=Reweighting(idf=False, entropy=1.0)),
    "idf+entropy": Readout(reweighting=Reweighting(idf=True, entropy=1.0)),
}


def main(
    collections: Annotated[list[Path] | None, typer.Argument(help="BEIR folders.")] = None,
    heads: str = "all",
    model: str = "embedded",
    dtype: str = "auto",
    hits: int = 20,
    max_doc_tokens: int = 120,
    queries: Annotated[int, typer.Option(help="Of each collection, at most.")] = 100,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure every variant on collections, in both layouts, and write the tables."""
    options = ModelOptions(model, None, dtype, max_doc_tokens)
    llm = options.load()
    for path in collections or [BUNDLED]:
        collection = _sampled(load_collection(path), queries, hits)
        for name in LAYOUTS:
            selector = choose_selector(model, heads, layout=name)
            # No cache for whole lists: they hardly ever come twice.
            layout = get_layout(name, document_cache="2GB" if name == "parallel" else None)
            table = ResultTable(
                {collection.name: _measured(collection, llm, selector, layout, options, hits)},
                baseline=PLAIN,
                settings={"heads": heads, "layout": name, "hits": hits, **options.settings()},
            )
            output.mkdir(parents=True, exist_ok=True)
            table.write_json(output / f"reweighting-{collection.name}-{name}.json")
            typer.echo(f"{name}\n\n{table.to_markdown()}")


def _sampled(collection: Collection, queries: int, hits: int) -> Collection:
    wanted = sample_queries(collection, queries, 0)
    return with_candidates(collection, {key: collection.topics[key] for key in wanted}, hits)


def _measured(
    collection: Collection,
    llm: FrozenLM,
    selector: Selector,
    layout: Layout,
    options: ModelOptions,
    hits: int,
) -> dict[str, Evaluation]:
    """Rank by every variant, from one reading of each query."""
    wanted = [key for key in collection.run or {} if key in collection.qrels]
    runs: dict[str, dict[str, list[tuple[str, float]]]] = {name: {} for name in VARIANTS}
    with progress(f"{collection.name}: {layout.name}", len(wanted)) as advance:
        for key in wanted:
            query = collection.topics[key]
            documents = [d for d in collection.candidates(key, hits) if not d.is_blank]
            for name, scores in _scores(query, documents, llm, selector, layout, options).items():
                runs[name][key] = ranked(documents, scores, weight=0.0)
            advance()
    qrels = {key: collection.qrels[key] for key in wanted}
    return {name: evaluate(run, qrels) for name, run in runs.items()}


def _scores(
    query: str,
    documents: Sequence[Document],
    llm: FrozenLM,
    selector: Selector,
    layout: Layout,
    options: ModelOptions,
) -> dict[str, list[float]]:
    heads = selector.select(query, llm)
    texts = [document.text for document in documents]
    with llm.turn:
        read = layout.read(
            llm, query, texts, heads, ReadOptions(max_doc_tokens=options.max_doc_tokens)
        )
    nothing = [None] * len(documents)
    return {name: each.scores(read, heads, nothing).tolist() for name, each in VARIANTS.items()}


if __name__ == "__main__":
    typer.run(main)
