"""The README is short, its Python runs and prints what its comments say, its figures are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pages import README, comparison, in_one_line, python_blocks, results

from routehead_plugins import FrozenLM

TEXT = README.read_text()


def test_the_readme_is_a_page_and_no_book() -> None:
    assert len(TEXT.split()) <= 1200


def test_the_python_blocks_print_what_their_comments_say(
    embedded: FrozenLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FrozenLM, "from_pretrained", lambda *_, **__: embedded)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = python_blocks(README)
    for block in blocks:
        assert block.not_run is None
        assert block.run(names) == block.expected
    assert len(blocks) >= 1


def test_every_capability_links_to_the_documentation() -> None:
    section = TEXT.partition("## What it does")[2].partition("\n## ")[0]
    paragraphs = [text for text in section.split("\n\n") if text.strip()]
    assert len(paragraphs) >= 8
    for paragraph in paragraphs:
        assert "](docs/" in paragraph, paragraph[:40]


def test_the_readme_says_what_is_missing_and_what_is_out_of_scope() -> None:
    limits = TEXT.partition("## Not there yet")[2].partition("\n## ")[0]
    for said in ("135M", "GPU", "gains nothing over static weights", "image-text"):
        assert said in limits


def test_the_first_result_is_in_its_file() -> None:
    routers = results("router-parallel")
    unseen = routers["unseen"]["macro-average"]
    means, better = unseen["means"], comparison(unseen["comparisons"], "weights", "bm25")
    said = (
        f"mean nDCG@10 from {means['bm25']:.4f} to {means['weights']:.4f} "
        f"({better['difference']:+.4f} [{better['low']:+.4f}, {better['high']:+.4f}], "
        f"Holm-corrected p = {better['p_holm']:.3f})"
    )
    first = in_one_line(README).partition("```")[0]
    assert said in first
    assert f"with BM25 reaches {means['likelihood+bm25']:.4f}" in first
    times = routers["cost"]["milliseconds"]
    cold, warm = (times["likelihood"] / times[f"static_{name}"] for name in ("cold", "warm"))
    assert f"at {cold:.1f} times the cost, or {warm:.0f} times once documents are cached" in first
    assert routers["date"].startswith(re.findall(r"\d{4}-\d\d-\d\d", first)[0])
