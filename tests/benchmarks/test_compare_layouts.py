"""The comparison of layouts: the same recipes in each, and what a cascade orders by."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import wolves

from benchmarks.heads import index_size, layouts
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import significance
from routehead_plugins.training import fit_weights


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    families.tiny_model("llama").save_pretrained(tmp_path / "tiny")
    families.tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    # Choosing a penalty takes its time where few queries can be told apart by anything.
    monkeypatch.setattr(layouts, "fit_weights", partial(fit_weights, l1=0.05))
    monkeypatch.setattr(layouts, "SIZES", (2,))
    monkeypatch.setattr(significance, "RESAMPLES", 100)
    return {
        "hits": 5,
        "model": str(tmp_path / "tiny"),
        "dtype": "float32",
        "signals": tmp_path / "signals",
        "output": tmp_path / "results",
    }


def test_every_recipe_is_measured_in_both_layouts(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        wolves.write_collection(folder)
    layouts.main(layouts.Options(collections=folders, **options))
    content = json.loads((tmp_path / "results" / "layouts.json").read_text())
    means = {name: part["means"] for name, part in content["collections"].items()}
    recipes = ["all", "all+bm25", "ndcg-2+bm25", "weights-2+bm25", "weights+bm25"]
    recipes += ["weights-log+bm25"]
    rows = [f"{layout}/{row}" for layout in layouts.LAYOUTS for row in recipes]
    assert set(means["here"]) == {"bm25", *rows, "cascade-5", "cascade-10"}
    for row, mean in means["mean"].items():
        assert mean == pytest.approx((means["here"][row] + means["there"][row]) / 2)
    differences = content["collections"]["mean"]["differences"]
    for row in recipes:
        difference = differences[f"late/{row}"]["difference"]
        both = (means["mean"][f"{layout}/{row}"] for layout in ("late", "parallel"))
        assert difference == pytest.approx(next(both) - next(both))
    assert content["heads"]["here"]["late/ndcg-2+bm25"] == 2
    assert "| late/weights+bm25 |" in capsys.readouterr().out


def test_a_cascade_orders_the_best_of_the_late_layout_by_the_parallel_one() -> None:
    rows = {
        "late/weights+bm25": {"q": torch.arange(7, 0, -1).float(), "none": None},
        "parallel/weights+bm25": {"q": torch.arange(7).float(), "none": None},
    }
    scores = layouts.cascades(rows)["cascade-5"]
    assert scores["none"] is None
    assert scores["q"] is not None
    assert scores["q"].argsort(descending=True).tolist() == [4, 3, 2, 1, 0, 5, 6]


def test_every_form_of_an_index_is_measured(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_size, "fit_weights", partial(fit_weights, l1=0.05))
    monkeypatch.setattr(index_size, "SIZES", (2,))
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        wolves.write_collection(folder)
    index_size.main(layouts.Options(collections=folders, **options))
    rows = json.loads((tmp_path / "results" / "index-size.json").read_text())["rows"]
    assert len(rows) == 1 + 2 * len(index_size.FORMS)
    assert {row.partition(":")[0] for row in rows} == {"bm25", "ndcg-2", "weights"}
    whole, half = rows["weights: float16, 1.0"], rows["weights: float16, 0.5"]
    assert 0.4 < half["bytes"] / whole["bytes"] < 0.65
    assert rows["weights: int8, 1.0"]["bytes"] < whole["bytes"]
    assert half["difference"]["difference"] == pytest.approx(half["mean"] - whole["mean"])


def test_one_collection_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one collection leaves nothing to choose heads on"):
        layouts.Options(collections=[tmp_path], **options)
