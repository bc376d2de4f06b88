"""The router that comes with the library, and the figures in its card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import AllHeads, FixedHeads, published_heads
from routehead_plugins.selection.names import SHIPPED, choose_selector, shipped_router
from routehead_plugins.selection.router import HeadRouter, Router

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path for path in SHIPPED.iterdir() if path.is_dir())
DOCUMENTS = ["The Eiffel Tower is in Paris.", "Leonardo da Vinci painted the Mona Lisa."]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_router_is_whole_and_small(folder: Path) -> None:
    router = Router.from_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert router.heads.model is not None
    assert shipped_router(router.heads.model) == folder


def test_the_embedded_llm_has_one_and_takes_it_by_default(embedded: FrozenLM) -> None:
    router = choose_selector(RerankerOptions("embedded"))
    assert isinstance(router, HeadRouter)
    reranker = HeadRoutedAttentionReranker.from_pretrained("embedded")
    assert repr(reranker.selector) == repr(router)
    assert reranker.layout.name == router.layout == "parallel"
    ranking = reranker.rerank("Who painted the Mona Lisa?", DOCUMENTS)
    assert [hit.index for hit in ranking] == [1, 0]
    # The LLM that is loaded whole reads the same.
    whole = HeadRoutedAttentionReranker(embedded, router)
    assert whole.rerank("Who painted the Mona Lisa?", DOCUMENTS).heads == ranking.heads


def test_the_late_layout_has_heads_of_its_own(embedded: FrozenLM) -> None:
    selector = choose_selector(RerankerOptions("embedded", layout="late"))
    assert selector == FixedHeads(published_heads("ndcg:embedded/late"))
    reranker = HeadRoutedAttentionReranker(embedded, selector)
    ranking = reranker.rerank("Who painted the Mona Lisa?", DOCUMENTS)
    assert (ranking.layout, [hit.index for hit in ranking]) == ("late", [1, 0])
    assert isinstance(choose_selector(RerankerOptions("no/other", layout="late")), AllHeads)


def test_it_counts_the_first_stage_where_there_is_one(embedded: FrozenLM) -> None:
    reranker = HeadRoutedAttentionReranker(embedded, choose_selector(RerankerOptions("embedded")))
    plain = reranker.score("Who painted the Mona Lisa?", DOCUMENTS)
    scored = [
        Document(text, score=score) for text, score in zip(DOCUMENTS, (9.0, 1.0), strict=True)
    ]
    fused = reranker.score("Who painted the Mona Lisa?", scored)
    assert fused[0] - fused[1] > plain[0] - plain[1]


def test_the_cards_figures_are_those_of_the_results() -> None:
    (card,) = ((folder / "README.md").read_text() for folder in FOLDERS)
    results = json.loads((ROOT / "benchmarks/results/router-parallel.json").read_text())
    means = results["unseen"]["macro-average"]["means"]
    rows = re.findall(r"^\| ([\w+]+) \| (0\.\d{4}) \|$", card, re.MULTILINE)
    quoted = {name: figure for name, figure in rows if name in means}
    assert set(quoted) == {"bm25", "all", "weights", "likelihood", "likelihood+bm25"}
    assert quoted == {name: f"{means[name]:.4f}" for name in quoted}
    unseen = json.loads((ROOT / "benchmarks/results/quality-bundled-parallel.json").read_text())
    methods = unseen["collections"]["bundled"]["methods"]
    before, after = (methods[name]["means"]["nDCG@10"] for name in ("bm25", "routed"))
    assert f"from {before:.4f} to {after:.4f}" in card
