"""`routehead evaluate`, from a judged collection to a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Invoke = Callable[..., Result]


def test_evaluation_prints_a_table_and_writes_it(
    invoke: Invoke, collection: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table.json"
    result = invoke(
        *("evaluate", "--collection", collection, "--output", output),
        *("--methods", "bm25,all,0-1,2-3,layers:1-2,all+bm25", "--hits", 3),
    )
    assert result.exit_code == 0, result.output
    table = json.loads(output.read_text())
    methods = table["collections"]["wolves"]["methods"]
    assert list(methods) == ["bm25", "all", "0-1,2-3", "layers:1-2", "all+bm25"]
    # Query 1 has d1 (grade 1) before d3 (grade 2); query 2 has its only answer on top.
    assert methods["bm25"]["means"]["RR@10"] == 1
    assert methods["bm25"]["means"]["nDCG@10"] == pytest.approx((0.85972 + 1) / 2, abs=1e-4)
    assert table["settings"]["hits"] == 3
    assert list(tmp_path.glob("*.partial.jsonl")) == []


def test_a_heavy_first_stage_weight_gives_the_first_stage_order(
    invoke: Invoke, collection: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table.json"
    invoke(
        *("evaluate", "--collection", collection, "--output", output),
        *("--methods", "bm25,all+bm25", "--first-stage-weight", 1000),
    )
    methods = json.loads(output.read_text())["collections"]["wolves"]["methods"]
    assert methods["bm25"]["per_query"] == methods["all+bm25"]["per_query"]


def test_an_unknown_baseline_is_refused(invoke: Invoke, collection: Path) -> None:
    result = invoke("evaluate", "--collection", collection, "--methods", "all")
    assert str(result.exception).startswith("baseline 'bm25' is not among the methods all; add it")


def test_collections_of_the_same_name_are_refused(invoke: Invoke, collection: Path) -> None:
    result = invoke("evaluate", *("--collection", collection) * 2)
    assert str(result.exception) == (
        "two collections are called 'wolves'; give each once, or rename one."
    )
