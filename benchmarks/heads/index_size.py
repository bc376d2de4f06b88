"""Measure what a smaller document index costs in quality: fewer heads, tokens and bits.

    python -m benchmarks.heads.index_size DIR DIR ... --signals FOLDER

Heads are chosen for each collection on the others, in the late layout, as by
`benchmarks.heads.layouts`. Documents are run once; their keys are then cut and rounded as an index
does, and the judged queries are read from them. Tokens are kept by one of several rules:

    null        those that a query without content attends to most; what an index does
    null-least  those that it attends to least
    first       the first ones, as a smaller --max-doc-tokens would
    random      any

Writes benchmarks/results/index-size.json and prints a table in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.common import (
    FITTING,
    Cache,
    command_line,
    markdown_table,
    results_json,
    run,
    signals_digest,
    with_options,
)
from benchmarks.heads.collect import Collector
from benchmarks.heads.layouts import Options
from benchmarks.heads.report import macro_average
from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.backbone import DocumentKeys, DocumentPiece, isolated
from routehead_plugins.cli.runtime import progress
from routehead_plugins.evaluation import Evaluation, compare, evaluate
from routehead_plugins.index import kept_rows, quantised, rows_of
from routehead_plugins.io import Collection, atomic_write_text
from routehead_plugins.layouts import LateLayout, LateTails, ReadOptions, piece_of_rows
from routehead_plugins.scoring import Readout
from routehead_plugins.selection import FIRST_STAGE
from routehead_plugins.signals import SignalSet
from routehead_plugins.training import detect, fit_weights, with_first_stage

SIZES = (8, 16, 32)
BUDGETS = (1.0, 0.5, 0.25, 0.1)
DTYPES = ("float16", "int8")
RULES = ("null-least", "first", "random")
_MEASURE = "nDCG@10"
_WHOLE = "float16, 1.0"


@dataclass(frozen=True)
class Form:
    """A form in which documents are kept."""

    dtype: str
    budget: float
    rule: str = "null"

    def __str__(self) -> str:
        rule = "" if self.rule == "null" else f", {self.rule}"
        return f"{self.dtype}, {self.budget}{rule}"


FORMS = (
    *(Form(dtype, budget) for dtype in DTYPES for budget in BUDGETS),
    *(Form("float16", budget, rule) for rule in RULES for budget in BUDGETS[1:]),
)


def main(options: Options) -> None:
    """Read the judged queries of every collection from every form of its documents."""
    collector = Collector(options)
    collections = {name: collector.load(path) for name, path in options.paths.items()}
    signals = {name: collector.signals(c, "late") for name, c in collections.items()}
    cache = Cache(options.folder / "layouts", (*FITTING, Path(__file__)))
    evaluations: dict[str, dict[str, Evaluation]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for name, collection in collections.items():
        train = reduce(add, [own for other, own in signals.items() if other != name])
        heads = head_sets(train, cache)
        reader = Reader(collector.llm, collection, options.hits, options.max_doc_tokens)
        evaluations[name], sizes[name] = reader.measure(heads)
    text = results_json(
        command_line("benchmarks.heads.index_size", list(collections), options.settings),
        {**options.settings, "collections": list(collections)},
        report(evaluations, sizes),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.output / "index-size.json", text)


def head_sets(train: SignalSet, cache: Cache) -> dict[str, HeadSet]:
    """Choose the best few heads, and signed weights over all; each with a weight of BM25."""
    digest = signals_digest(train)
    sets = {}
    for size in SIZES:
        few = cache.heads([f"ndcg-{size}", digest], partial(detect, train, "ndcg", size))
        sets[f"ndcg-{size}"] = with_first_stage(train, few)
    sets["weights"] = cache.heads(["weights", digest], partial(fit_weights, train))
    return sets


class Reader:
    """Reads the queries of a collection from documents that are cut and rounded.

    Args:
        llm: The frozen LLM.
        collection: Collection with candidates.
        hits: Candidates per query.
        max_doc_tokens: Length at which documents are cut.
    """

    def __init__(
        self, llm: FrozenLM, collection: Collection, hits: int, max_doc_tokens: int
    ) -> None:
        self.llm, self.collection = llm, collection
        self.layout, self.frame = LateLayout(), LateLayout().frame(llm)
        self.candidates = {
            query_id: [d for d in collection.candidates(query_id, hits) if not d.is_blank]
            for query_id in collection.topics
        }
        texts = dict.fromkeys(d.text for own in self.candidates.values() for d in own)
        pieces = llm.encoder.documents(list(texts), max_doc_tokens=max_doc_tokens)
        self.pieces = dict(zip(texts, pieces, strict=True))

    def measure(
        self, sets: Mapping[str, HeadSet]
    ) -> tuple[dict[str, Evaluation], dict[str, float]]:
        """Measure every form for every head set; also return bytes per document of each."""
        evaluations, sizes = {FIRST_STAGE: self._evaluation(lambda _: None)}, {}
        columns = self.llm.key_columns(HeadSet(sorted({h for s in sets.values() for h in s})))
        pieces = list(self.pieces.values())
        with progress(f"{self.collection.name}: documents", len(pieces)) as advance:
            keys = []
            for start in range(0, len(pieces), 64):
                part = pieces[start : start + 64]
                keys += self.layout.run_documents(self.llm, part, columns)
                advance(len(part))
        keys = [DocumentKeys(k.columns, k.table.half(), k.positions) for k in keys]
        with progress(f"{self.collection.name}: forms", len(sets) * len(FORMS)) as advance:
            for name, heads in sets.items():
                own, tails = self._own_columns(keys, heads), self._tails(heads)
                null = [self.layout.null_attention(self.llm, k, heads) for k in own]
                for form in FORMS:
                    kept = {
                        text: self._formed(form, piece, k, n)
                        for (text, piece), k, n in zip(self.pieces.items(), own, null, strict=True)
                    }
                    row = f"{name}: {form}"
                    evaluations[row] = self._evaluation(partial(self._scores, kept, heads, tails))
                    sizes[row] = sum(k.nbytes for _, k in kept.values()) / len(kept)
                    advance()
        return evaluations, sizes

    def _tails(self, heads: HeadSet) -> dict[str, LateTails]:
        return {
            query_id: self.layout.tails(self.llm, query, heads, ReadOptions())
            for query_id, query in self.collection.topics.items()
        }

    def _own_columns(self, keys: Sequence[DocumentKeys], heads: HeadSet) -> list[DocumentKeys]:
        columns = self.llm.key_columns(heads)
        parts = [keys[0].columns.slices[pair] for pair in columns.heads]
        indices = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        return [DocumentKeys(columns, k.table[:, indices], k.positions) for k in keys]

    def _formed(
        self, form: Form, piece: DocumentPiece, keys: DocumentKeys, null: Tensor
    ) -> tuple[DocumentPiece, DocumentKeys]:
        if form.budget < 1 and piece.text.size:
            importance = {
                "null": null,
                "null-least": -null,
                "first": -torch.arange(len(null)).float(),
                "random": torch.rand(len(null), generator=torch.Generator().manual_seed(len(null))),
            }[form.rule]
            keys = rows_of(keys, kept_rows(importance, piece.text.size, form.budget))
            piece = piece_of_rows(piece, keys, self.frame)
        return piece, quantised(keys, form.dtype)

    def _scores(
        self,
        kept: Mapping[str, tuple[DocumentPiece, DocumentKeys]],
        heads: HeadSet,
        tails: Mapping[str, LateTails],
        query_id: str,
    ) -> list[float] | None:
        candidates = self.candidates[query_id]
        if not candidates:
            return None
        pieces, keys = zip(*(kept[d.text] for d in candidates), strict=True)
        joined = DocumentKeys.join(keys)
        with torch.inference_mode(), isolated(self.llm.device):
            attention = tails[query_id].queries.attention(joined, heads)
        read = tails[query_id].attention_to(pieces, attention)
        scores: list[float] = (
            Readout().scores(read, heads.recipe, [d.score for d in candidates]).tolist()
        )
        return scores

    def _evaluation(self, score: Callable[[str], list[float] | None]) -> Evaluation:
        run = {}
        for query_id, candidates in self.candidates.items():
            scores = score(query_id)
            if scores is None:
                scores = [-float(rank) for rank in range(len(candidates))]
            pairs = zip((str(d.id) for d in candidates), scores, strict=True)
            run[query_id] = sorted(pairs, key=lambda pair: -pair[1])
        return evaluate(run, self.collection.qrels, (_MEASURE,))


def report(
    evaluations: Mapping[str, Mapping[str, Evaluation]], sizes: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Print a table, and return means, sizes and differences to whole documents in float16."""
    whole = macro_average(evaluations)
    rows = {}
    table = [["heads", "form", "bytes per document", _MEASURE, "difference to whole, float16"]]
    for row, figures in whole.items():
        name, _, form = row.partition(": ")
        base = f"{name}: {_WHOLE}"
        content: dict[str, Any] = {"mean": figures.mean(_MEASURE)}
        cells = [name, form, "", f"{content['mean']:.4f}", ""]
        if form:
            content["bytes"] = sum(own[row] for own in sizes.values()) / len(sizes)
            cells[2] = f"{content['bytes']:,.0f}"
        if form and form != _WHOLE:
            pair = compare({row: figures, base: whole[base]}, base, _MEASURE)[0]
            content["difference"] = asdict(pair)
            cells[4] = f"{pair.difference:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
        rows[row] = content
        table.append(cells)
    typer.echo(markdown_table(table))
    return {"measure": _MEASURE, "rows": rows}


if __name__ == "__main__":
    run(with_options(main, Options))
