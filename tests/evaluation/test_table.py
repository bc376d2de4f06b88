"""The table of results, in Markdown, on the terminal and as JSON."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from routehead_plugins.errors import InputError
from routehead_plugins.evaluation.measures import evaluate
from routehead_plugins.evaluation.table import ResultTable


def table() -> ResultTable:
    qrels = {f"q{n}": {"a": 2, "b": 1} for n in range(6)}
    worst, best = [("c", 3.0), ("b", 2.0)], [("a", 3.0), ("b", 2.0)]
    measures = ["nDCG@10", "RR@10"]
    return ResultTable(
        {
            "tiny": {
                "bm25": evaluate({query: worst for query in qrels}, qrels, measures),
                "heads|13-1": evaluate({query: best for query in qrels}, qrels, measures),
            }
        },
        baseline="bm25",
        settings={"model": "embedded"},
        date="2026-11-21T00:00:00+00:00",
    )


def test_the_markdown_table_has_means_and_comparisons() -> None:
    assert table().to_markdown() == (
        "| collection | method | nDCG@10 | RR@10 | nDCG@10 - bm25 [95% CI] | p (Holm) "
        "| win/tie/loss |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| tiny | bm25 | 0.2398 | 0.5000 | - | - | - |\n"
        "| tiny | heads\\|13-1 | 1.0000 | 1.0000 | +0.7602 [+0.7602, +0.7602] | 0.0312 "
        "| 6/0/0 |\n"
    )


def test_the_terminal_table_shows_the_same_cells() -> None:
    output = io.StringIO()
    Console(file=output, width=140).print(table().to_rich())
    title, *lines = output.getvalue().splitlines()
    assert title.strip() == "tiny"
    assert [re.split(" {2,}", line.strip()) for line in lines[3:5]] == [
        ["bm25", "0.2398", "0.5000", "-", "-", "-"],
        ["heads|13-1", "1.0000", "1.0000", "+0.7602 [+0.7602, +0.7602]", "0.0312", "6/0/0"],
    ]


def test_the_terminal_table_names_the_collections_where_there_are_several() -> None:
    one = table()
    two = replace(one, evaluations={"a": one.evaluations["tiny"], "b": one.evaluations["tiny"]})
    output = io.StringIO()
    Console(file=output, width=140).print(two.to_rich())
    starts = [line.split()[:2] for line in output.getvalue().splitlines() if line.strip()]
    assert ["a", "bm25"] in starts
    assert ["b", "bm25"] in starts


def test_the_json_file_holds_all_that_is_needed_to_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().write_json(path)
    content = json.loads(path.read_text())
    assert content == table().to_dict()
    assert content["date"] == "2026-11-21T00:00:00+00:00"
    assert content["settings"] == {"model": "embedded"}
    assert (content["baseline"], content["seed"]) == ("bm25", 0)
    assert {"python", "torch", "transformers", "routehead-plugins"} <= content["versions"].keys()
    tiny = content["collections"]["tiny"]
    assert tiny["methods"]["bm25"]["queries"] == 6
    assert tiny["methods"]["bm25"]["means"]["RR@10"] == 0.5
    assert tiny["methods"]["bm25"]["per_query"]["RR@10"] == {f"q{n}": 0.5 for n in range(6)}
    assert [(c["measure"], c["method"], c["wins"]) for c in tiny["comparisons"]] == [
        ("nDCG@10", "heads|13-1", 6),
        ("RR@10", "heads|13-1", 6),
    ]


def test_settings_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        replace(table(), settings={"heads": {1}}).write_json(tmp_path / "table.json")
    assert str(caught.value) == (
        "settings={'heads': {1}} cannot be written as JSON (Object of type set is not JSON "
        "serializable); expected text, finite numbers, lists and dicts; convert other values."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_its_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^baseline='bm26' was not evaluated; expected one of"):
        replace(table(), baseline="bm26").write_json(tmp_path / "table.json")
