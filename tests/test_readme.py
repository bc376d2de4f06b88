"""The README's Python runs and prints what its comments say; its figures stand in result files."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from routehead_plugins import FrozenLM
from routehead_plugins.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_print_what_their_comments_say(
    embedded: FrozenLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FrozenLM, "from_pretrained", lambda *_, **__: embedded)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), names)
        expected = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert printed.getvalue().splitlines() == expected
    assert len(BLOCKS) >= 1


def test_every_command_the_readme_names_exists() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    named = set(re.findall(r"^(?:\.venv/bin/)?routehead (\w+)", README, re.MULTILINE))
    assert named
    assert named <= known
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make (\w+)", README, re.MULTILINE)) <= targets


def test_every_ratio_of_the_speed_table_stands_in_its_file() -> None:
    results = json.loads((ROOT / "benchmarks/results/latency-embedded-cpu.json").read_text())
    table = re.search(r"\| documents \|(.+)\n\|[-| ]+\n((?:\| \d.+\n)+)", README)
    assert table is not None
    names = [cell.strip(" `") for cell in table[1].strip("| ").split("|")]
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in table[2].splitlines()]
    assert [row[0] for row in rows] == list(results["sizes"])
    for size, *cells in rows:
        ratios = results["sizes"][size]["ratios"]
        for name, cell in zip(names, cells, strict=True):
            assert cell == (f"{ratios[name]['median']:.2f}" if name in ratios else "-"), name


def test_every_figure_of_the_results_table_stands_in_its_file() -> None:
    """Rows read: | collection | method | nDCG@10 | ... |, as the result files have them."""
    rows = re.findall(r"^\| ([\w-]+) \| ([\w:+,-]+) \| (0\.\d{4}) \|", README, re.MULTILINE)
    assert rows
    for collection, method, figure in rows:
        path = ROOT / "benchmarks" / "results" / f"quality-{collection}.json"
        methods = json.loads(path.read_text())["collections"][collection]["methods"]
        assert f"{methods[method]['means']['nDCG@10']:.4f}" == figure, (collection, method)


def test_every_figure_of_the_comparison_stands_in_its_file() -> None:
    variants = json.loads((ROOT / "benchmarks/results/compare-macro.json").read_text())["variants"]
    table = re.search(
        r"\| method \| sequential \| shuffled \| parallel \|\n.+\n((?:\|.+\n)+)", README
    )
    assert table is not None
    columns = ("sequential", "sequential-shuffled", "parallel")
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in table[1].splitlines()]
    assert len(rows) >= 15
    for method, *cells in rows:
        means = [variants[column]["methods"][method]["means"]["nDCG@10"] for column in columns]
        assert cells == [f"{mean:.4f}" for mean in means], method


def test_every_figure_of_the_halves_of_reweighting_stands_in_its_file() -> None:
    said = re.search(
        r"without it (\S+)\nsequential, (\S+) parallel\): (.+?)\.\n", README, re.DOTALL
    )
    assert said is not None
    text = " ".join(said[3].split())
    for column, layout in enumerate(("sequential", "parallel")):
        path = ROOT / "benchmarks" / "results" / f"reweighting-bundled-{layout}.json"
        methods = json.loads(path.read_text())["collections"]["bundled"]["methods"]
        means = {name: each["means"]["nDCG@10"] for name, each in methods.items()}
        assert said[column + 1] == f"{means['none']:.4f}"
        for name, word in (("idf", "IDF"), ("entropy", "entropy"), ("idf+entropy", "both")):
            figures = re.search(rf"{word} (\S+)(?: \(.+?\))? and ([^\s,]+)", text)
            assert figures is not None
            assert figures[column + 1] == f"{means[name] - means['none']:+.3f}"


def _routers(layout: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"router-{layout}.json"
    return cast(dict[str, Any], json.loads(path.read_text()))


def _unseen(method: str, baseline: str) -> dict[str, Any]:
    found = _routers("parallel")["unseen"]["macro-average"]["comparisons"]
    (one,) = (each for each in found if (each["method"], each["baseline"]) == (method, baseline))
    return cast(dict[str, Any], one)


def test_the_first_result_stands_in_its_file() -> None:
    means = _routers("parallel")["unseen"]["macro-average"]["means"]
    against = _unseen("weights", "bm25")
    low, high = against["low"], against["high"]
    said = (
        f"mean nDCG@10 from {means['bm25']:.4f} to {means['weights']:.4f} "
        f"({against['difference']:+.4f} [{low:+.4f}, {high:+.4f}], "
        f"Holm-corrected p = {against['p_holm']:.3f})"
    )
    first = " ".join(README.partition("```")[0].split())
    assert said in first
    assert f"with BM25 has {means['likelihood+bm25']:.4f}, at" in first


def test_every_figure_of_the_table_of_routers_stands_in_its_file() -> None:
    table = re.search(r"\| method \| parallel: unseen \|.+\n.+\n((?:\|.+\n)+)", README)
    assert table is not None
    questions = ("unseen", "own, judged", "own, synthesized")
    found = [
        _routers(layout)[question]["macro-average"]["means"]
        for layout in ("parallel", "sequential")
        for question in questions
    ]
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in table[1].splitlines()]
    assert [row[0] for row in rows][:2] == ["bm25", "all"]
    assert len(rows) >= 12
    for method, *cells in rows:
        expected = [f"{means[method]:.4f}" if method in means else "-" for means in found]
        assert cells == expected, method


def test_what_is_said_of_routers_stands_in_their_files() -> None:
    text = " ".join(README.split())
    path = ROOT / "benchmarks" / "results" / "quality-bundled-parallel.json"
    methods = json.loads(path.read_text())["collections"]["bundled"]["methods"]
    before, after = (methods[name]["means"]["nDCG@10"] for name in ("bm25", "routed"))
    assert f"from {before:.4f} to {after:.4f}" in text
    own = _routers("parallel")["own, judged"]["macro-average"]["comparisons"]
    (one,) = (c for c in own if (c["method"], c["baseline"]) == ("weights", "bm25"))
    assert (
        "{difference:+.3f} [{low:+.3f}, {high:+.3f}] over BM25 (p = {p_holm:.3f})".format(**one)
        in text
    )
    for method, baseline, said in (
        ("weights", "bm25", "`weights` has {:+.3f} [{:+.3f}, {:+.3f}] over BM25"),
        ("routed-listwise-forced", "weights", "they lose ({:+.3f} [{:+.3f}, {:+.3f}]"),
        ("weights", "likelihood+bm25", "0.7022 ({:+.4f} [{:+.4f}, {:+.4f}]"),
    ):
        one = _unseen(method, baseline)
        assert said.format(one["difference"], one["low"], one["high"]) in text
    times = _routers("parallel")["cost"]["milliseconds"]
    cold, warm = (times["likelihood"] / times[f"static_{name}"] for name in ("cold", "warm"))
    assert f"Query likelihood takes {cold:.1f} times as long" in text
    assert f"at {cold:.1f} times the cost, and {warm:.0f} times once documents are cached" in text
    assert f"costs {times['select']:.0f} ms on two cores" in text
