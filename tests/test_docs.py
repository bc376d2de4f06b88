"""The documentation is complete: links and commands exist, Python runs, figures are true."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import (
    CONTRIBUTING,
    DOCS,
    README,
    ROOT,
    broken_links,
    comparison,
    in_one_line,
    python_blocks,
    results,
    table,
)

import routehead_plugins
from routehead_plugins import FrozenLM
from routehead_plugins.cli.main import app
from routehead_plugins.selection import published_heads, published_names

PAGES = [README, CONTRIBUTING, *DOCS, *sorted((ROOT / "benchmarks").rglob("*.md"))]
API = ROOT / "docs" / "api.md"
RESULTS = ROOT / "docs" / "results.md"
SPEED = ROOT / "docs" / "speed.md"
GUIDE = ROOT / "docs" / "guide.md"
TRAINING = ROOT / "docs" / "training.md"
INDEX = ROOT / "docs" / "document-index.md"

by_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: str(path.relative_to(ROOT).with_suffix(""))
)


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^  - [\w ]+: ([\w-]+\.md)$", configuration, re.MULTILINE)
    assert sorted(listed) == [page.name for page in DOCS]


@by_page
def test_every_relative_link_exists(page: Path) -> None:
    assert broken_links(page) == []


@by_page
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    text = page.read_text().replace("\\\n", " ")
    for name, arguments in re.findall(
        r"(?:^|`|\$ )routehead ([a-z]+)([^`\n]*)", text, re.MULTILINE
    ):
        assert name in root.commands, name
        known = {"--help"}
        for parameter in root.commands[name].params:
            known |= {*parameter.opts, *parameter.secondary_opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", arguments)) <= known, (name, arguments)


@by_page
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make (\w+)", page.read_text(), re.MULTILINE)) <= targets


@by_page
def test_every_file_of_the_repository_that_is_named_exists(page: Path) -> None:
    folders = "benchmarks|examples|tests|docs|adapters|routehead_plugins"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+)`", page.read_text()):
        assert any(ROOT.glob(path.rstrip("/"))), path
    for module in re.findall(r"python -m (benchmarks[\w.]*)", page.read_text()):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in re.findall(r"python (benchmarks/\S+\.py)", page.read_text()):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_the_python_blocks_print_what_their_comments_say(
    page: Path, embedded: FrozenLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FrozenLM, "from_pretrained", lambda *_, **__: embedded)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in python_blocks(page):
        if block.not_run is None:
            assert block.run(names) == block.expected
        else:
            compile(block.code, page.name, "exec")


def test_few_python_blocks_are_not_run() -> None:
    blocks = [block for page in DOCS for block in python_blocks(page)]
    assert len(blocks) >= 12
    assert sum(block.not_run is not None for block in blocks) <= 2


def test_the_api_reference_has_every_public_name_and_no_other() -> None:
    named = re.findall(r"^::: (\S+)$", API.read_text(), re.MULTILINE)
    for name in named:
        # The folder adapters/ is imported from inside the package.
        full = re.sub("^adapters", "routehead_plugins.adapters", name)
        module, _, attribute = full.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    public = {name for name in routehead_plugins.__all__ if name != "__version__"}
    assert {f"routehead_plugins.{name}" for name in public} <= set(named)


def test_the_reference_of_the_command_line_has_every_command() -> None:
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    page = hooks["on_page_markdown"]((ROOT / "docs" / "cli.md").read_text())
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        section = page.partition(f"\n## `routehead {name}`\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert parameter.opts[0] in section, (name, parameter.name)
    assert hooks["on_page_markdown"]("# A page\n") == "# A page\n"


def test_every_head_set_that_ships_is_listed_with_its_size() -> None:
    listed: dict[str, int] = {}
    for names, sizes, *_ in table(
        ROOT / "docs" / "head-sets.md", "set | heads | chosen on | source"
    ):
        first, *others = re.findall(r"`([^`]+)`", names)
        stem = first.removesuffix("/parallel")
        full = [first, *(f"{stem}{other}" for other in others)]
        count = [int(size) for size in sizes.split(", ")]
        listed |= dict(zip(full, count * len(full) if len(count) == 1 else count, strict=True))
    for name in published_names():
        known = name if name in listed else name.removesuffix("/longmemeval")
        assert listed[known] == len(published_heads(name)), name
    assert set(listed) <= set(published_names())


def test_every_figure_without_training_is_in_its_file() -> None:
    """Rows read: | collection | method | nDCG@10 | ... |, as the result files have them."""
    rows = table(RESULTS, "collection | method | nDCG@10 | difference to BM25 [95 % CI] | p")
    assert len(rows) == 10
    for collection, method, figure, difference, p in rows:
        measured = results(f"quality-{collection}")["collections"][collection]
        assert f"{measured['methods'][method]['means']['nDCG@10']:.4f}" == figure
        if method == "bm25":
            assert (difference, p) == ("", "")
            continue
        one = comparison(measured["comparisons"], method, "bm25", "nDCG@10")
        assert "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**one) == difference
        assert f"{one['p_holm']:.3f}" == p


def test_every_figure_of_the_ways_of_choosing_heads_is_in_its_file() -> None:
    variants = results("compare-macro")["variants"]
    columns = ("sequential", "sequential-shuffled", "parallel")
    rows = table(RESULTS, "method | sequential | shuffled | parallel")
    assert len(rows) >= 15
    for method, *cells in rows:
        means = [variants[column]["methods"][method]["means"]["nDCG@10"] for column in columns]
        assert cells == [f"{mean:.4f}" for mean in means], method


def test_what_is_said_of_ways_of_choosing_heads_is_in_their_file() -> None:
    text, variants = in_one_line(RESULTS), results("compare-macro")["variants"]
    comparisons = variants["parallel"]["comparisons"]
    for method, said in (
        ("likelihood+bm25", "({:+.3f}, p = {:.3f}, in every layout"),
        ("weights-within+bm25", "`weights-within+bm25` ({:+.3f}, p = {:.3f})"),
        ("weights-pairs+bm25", "`weights-pairs+bm25` has {:+.3f} (p = {:.2f})"),
    ):
        one = comparison(comparisons, method, "bm25", "nDCG@10")
        assert said.format(one["difference"], one["p_holm"]) in text
    halves = [variants[layout]["reliability"] for layout in ("parallel", "sequential")]
    said = "{value:.2f} [{low:.2f}, {high:.2f}] in the {layout} "
    for layout, half in zip(("parallel", "sequential"), halves, strict=True):
        assert said.format(**half["specific"], layout=layout) in text
    static = " and ".join(f"{half['static']['value']:.2f}" for half in halves)
    assert f"against {static} for the mean itself" in text
    oracle = variants["parallel"]["oracle"]
    assert (
        f"best of {oracle['heads']} heads per query scores {oracle['best_head']:.3f}; "
        f"the best of {oracle['heads']} random rankings {oracle['best_random']:.3f}"
    ) in text


def test_every_figure_of_the_table_of_routers_is_in_its_file() -> None:
    header = (
        "method | parallel: unseen | own, judged | own, synthesized | "
        "sequential: unseen | own, judged | own, synthesized"
    )
    columns = [
        results(f"router-{layout}")[question]["macro-average"]["means"]
        for layout in ("parallel", "sequential")
        for question in ("unseen", "own, judged", "own, synthesized")
    ]
    rows = table(RESULTS, header)
    assert [row[0] for row in rows][:2] == ["bm25", "all"]
    assert len(rows) >= 12
    for method, *cells in rows:
        expected = [f"{means[method]:.4f}" if method in means else "-" for means in columns]
        assert cells == expected, method


def test_what_is_said_of_routers_is_in_their_files() -> None:
    text, routers = in_one_line(RESULTS), results("router-parallel")
    bundled = results("quality-bundled-parallel")["collections"]["bundled"]["methods"]
    before, after = (bundled[name]["means"]["nDCG@10"] for name in ("bm25", "routed"))
    assert f"from {before:.4f} to {after:.4f}" in text
    own = comparison(routers["own, judged"]["macro-average"]["comparisons"], "weights", "bm25")
    said = "{difference:+.3f} [{low:+.3f}, {high:+.3f}] over BM25 (p = {p_holm:.3f})"
    assert said.format(**own) in text
    unseen = routers["unseen"]["macro-average"]["comparisons"]
    for method, baseline, said in (
        ("weights", "bm25", "`weights` has {:+.3f} [{:+.3f}, {:+.3f}] over BM25"),
        ("routed-listwise-forced", "weights", "they lose ({:+.3f} [{:+.3f}, {:+.3f}]"),
        ("weights", "likelihood+bm25", "0.7022 ({:+.4f} [{:+.4f}, {:+.4f}]"),
    ):
        one = comparison(unseen, method, baseline)
        assert said.format(one["difference"], one["low"], one["high"]) in text
    against_all = comparison(unseen, "weights", "all")
    assert f"{against_all['difference']:+.3f} over `all` (p = {against_all['p_holm']:.3f})" in text
    times = routers["cost"]["milliseconds"]
    cold, warm = (times["likelihood"] / times[f"static_{name}"] for name in ("cold", "warm"))
    assert f"takes {cold:.1f} times as long as they do, {warm:.1f} times with a warm cache" in text
    shares = [times["select"] / times[name] for name in ("cold", "warm")]
    assert f"costs {times['select']:.0f} ms on two cores, {shares[0]:.1%} of a query" in text
    assert f"and {shares[1]:.0%} with a warm one" in text


def test_what_is_said_of_ablations_is_in_their_file() -> None:
    variants = results("router-parallel")["ablations"]["variants"]
    static = {
        v["change"]: v["static"]
        for v in variants
        if v["question"] == "unseen" and v["objective"] == "listwise"
    }
    assert f"({static['']:.4f} against {static['judged only']:.4f} without)" in in_one_line(RESULTS)
    assert f"({static['max_layer 19']:.4f} against {static['']:.4f};" in in_one_line(TRAINING)


def test_every_figure_of_reweighting_is_in_its_file() -> None:
    names = {"none": "none", "IDF": "idf", "entropy": "entropy", "both": "idf+entropy"}
    rows = table(RESULTS, "re-weighting | sequential | parallel")
    assert [row[0] for row in rows] == list(names)
    for column, layout in enumerate(("sequential", "parallel"), start=1):
        measured = results(f"reweighting-bundled-{layout}")["collections"]["bundled"]
        none = measured["methods"]["none"]["means"]["nDCG@10"]
        assert rows[0][column] == f"{none:.4f}"
        for row in rows[1:]:
            one = comparison(measured["comparisons"], names[row[0]], "none", "nDCG@10")
            figure, _, p = row[column].partition(" ")
            assert figure == f"{one['difference']:+.3f}"
            assert p == (f"(p = {one['p_holm']:.3f})" if one["p_holm"] < 0.05 else "")


def test_what_is_said_of_evidence_is_in_its_file() -> None:
    spans, text = results("spans-bundled"), in_one_line(GUIDE)
    test, chosen = spans["test"], spans["chosen on"]
    assert f"for {test['hit_rate']:.1%} of {test['answers']}".replace("%", " %") in text
    assert f"chance is {test['chance']:.1%} (p = {test['p']:.3f}".replace("%", " %", 1) in text
    said = f"{chosen['hit_rate']:.1%} against {chosen['chance']:.1%}".replace("%", " %")
    assert f"on the {chosen['answers']} answers that the method was chosen on, {said}" in text


def test_every_ratio_of_the_speed_table_is_in_its_file() -> None:
    sizes = results("latency-embedded-cpu")["sizes"]
    names = [
        "handwritten / ours",
        "ours / floor",
        "parallel-cold / ours",
        "likelihood / parallel-cold",
        "ours / parallel-warm",
        "likelihood / parallel-warm",
    ]
    rows = table(SPEED, "documents | " + " | ".join(f"`{name}`" for name in names))
    assert [row[0] for row in rows] == list(sizes)
    for size, *cells in rows:
        ratios = sizes[size]["ratios"]
        for name, cell in zip(names, cells, strict=True):
            assert cell == (f"{ratios[name]['median']:.2f}" if name in ratios else "-"), name


def test_what_is_said_of_speed_is_in_its_files() -> None:
    text, sizes = in_one_line(SPEED), results("latency-embedded-cpu")["sizes"]
    megabytes = {
        size: {name: f"{peak / 1e6:,.0f} MB" for name, peak in measured["memory"].items()}
        for size, measured in sizes.items()
    }
    hundred, twenty = megabytes["100"], megabytes["20"]
    assert f"{hundred['ours']} sequential (in windows), {hundred['parallel-cold']} parallel" in text
    assert f"{twenty['ours']} sequential, {twenty['handwritten']} written by hand" in text
    taps = [m["ratios"]["tap and scoring / ours"]["median"] for m in sizes.values()]
    assert f"Tap and scoring take {max(taps):.1%} of a query".replace("%", " %", 1) in text
    writing = [sizes[size]["ratios"]["listwise / ours"]["median"] for size in ("10", "20", "50")]
    assert f"takes {min(writing):.1f} to {max(writing):.1f} times `ours`" in text
    other = [measured["ratios"] for measured in results("latency-qwen3-0.6b-cpu")["sizes"].values()]
    floor, cold = (
        " and ".join(f"{ratios[name]['median']:.2f}" for ratios in other)
        for name in ("ours / floor", "parallel-cold / ours")
    )
    low = min(ratios["ours / floor"]["min"] for ratios in other)
    high = max(ratios["ours / floor"]["max"] for ratios in other)
    assert f"`ours / floor` is {floor} (rounds from {low:.2f} to {high:.2f})" in text
    assert f"`parallel-cold / ours` {cold}." in text


def test_every_figure_of_the_layouts_is_in_their_file() -> None:
    mean, text = results("layouts")["collections"]["mean"], in_one_line(RESULTS)
    means, differences = mean["means"], mean["differences"]
    rows = table(RESULTS, "recipe | parallel | late | late - parallel [95 % CI]")
    assert len(rows) == 13
    for recipe, *cells in rows:
        if recipe == "bm25":
            assert cells == [f"{means['bm25']:.4f}"] * 2 + [""]
            continue
        figures = [f"{means[f'{layout}/{recipe}']:.4f}" for layout in ("parallel", "late")]
        one = differences[f"late/{recipe}"]
        assert cells == [*figures, "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**one)]
    for row, said in (
        ("late/weights+bm25", "over all heads it is {difference:+.3f} [{low:+.3f}, {high:+.3f}]"),
        ("cascade-10", "best ten of the late ones, is {difference:+.3f} [{low:+.3f}, {high:+.3f}]"),
    ):
        assert said.format(**differences[row]) in text
    unseen = results("router-parallel")["unseen"]["macro-average"]["means"]
    best = max(mean for row, mean in means.items())
    assert unseen["weights"] > best  # "better than any row here"


def test_every_figure_of_the_size_of_an_index_is_in_its_file() -> None:
    measured = results("index-size")["rows"]
    header = "heads | form | KB per document | nDCG@10 | difference to whole, float16 [95 % CI]"
    rows = table(INDEX, header)
    assert len(rows) >= 20
    for heads, form, *cells in rows:
        figures = measured[f"{heads}: {form}"]
        expected = [f"{figures['bytes'] / 1000:.1f}", f"{figures['mean']:.4f}", ""]
        if "difference" in figures:
            said = "{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
            expected[2] = said.format(**figures["difference"])
        assert cells == expected, (heads, form)
    eight, sixteen = (measured[f"ndcg-{size}: int8, 1.0"] for size in (8, 16))
    assert eight["bytes"] < sixteen["bytes"]
    assert eight["mean"] > sixteen["mean"]


def test_every_figure_of_documents_that_are_run_beforehand_is_in_its_files() -> None:
    names = [
        "late-index / tail",
        "late-warm / tail",
        "parallel-warm / late-index",
        "late-cold / parallel-cold",
        "likelihood / late-index",
    ]
    sizes = {
        size: figures
        for name in ("latency-late-embedded-cpu", "latency-late-1000-embedded-cpu")
        for size, figures in results(name)["sizes"].items()
    }
    rows = table(SPEED, "documents | " + " | ".join(f"`{name}`" for name in names))
    assert [row[0] for row in rows] == list(sizes)
    for size, *cells in rows:
        ratios = sizes[size]["ratios"]
        for name, cell in zip(names, cells, strict=True):
            assert cell == (f"{ratios[name]['median']:.2f}" if name in ratios else "-"), name
    index, text = sizes["1000"]["notes"]["late-index"]["index"], in_one_line(SPEED)
    assert f"indexed at {index['share_of_bare_forward']:.2f} times" in text
    assert f"take {index['bytes_per_document'] / 1000:.1f} KB each" in text
    warm = sizes["100"]["ratios"]["late-index / tail"]["median"]
    said = f"{index['bytes_per_document'] / 1000:.0f} KB for 120 tokens: a query over 100 of them"
    assert f"{said} takes {warm:.1f} times as long" in in_one_line(README)
    scale = results("index-scale")
    opening, search = scale["opening"], scale["search"]
    said = f"open in {opening['seconds to open']:.2f} s with {opening['megabytes of memory']:,.0f}"
    assert f"{said} MB of memory" in text
    assert f"looked up in {opening['seconds to look up a thousand']:.3f} s" in text
    assert f"of 120 tokens takes {search['seconds of a search']:.0f} s" in text
