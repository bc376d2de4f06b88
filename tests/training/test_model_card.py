"""Model cards: valid for the Hub, complete, and literal about names and commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from routehead_plugins import HeadSet
from routehead_plugins.selection import HeadRouter, QuerySpace
from routehead_plugins.training.model_card import router_card

LABELS = {"utility": "ndcg", "shrinkage": 0.3, "groups": None}
RELIABILITY = {"queries": 7, "found": 0.91234, "kept": 0.5, "static": 0.4, "chance": 0.3}


def make_router(description: Mapping[str, Any] | None, model: str | None = "tiny") -> HeadRouter:
    return HeadRouter(
        heads=HeadSet([(0, 1)], model=model, layout="parallel"),
        space=QuerySpace.fit(torch.eye(3), 1),
        bias=torch.tensor([0.5]),
        projection=torch.zeros(1, 2),
        embeddings=torch.zeros(1, 1),
        description=description,
    )


def test_the_hub_can_read_the_metadata() -> None:
    text = router_card(make_router(None), [], "routehead train")
    card = ModelCard(text)
    assert card.data.to_dict() == {  # type: ignore[no-untyped-call]
        "library_name": "routehead-plugins",
        "tags": ["re-ranking", "attention-heads", "routehead"],
    }
    assert text.endswith("(`routehead evaluate`).\n")
    assert "\n\n\n" not in text


def test_names_and_commands_are_literal() -> None:
    part = {"name": "a {{ x }} <b>", "kind": "judged", "queries": 8}
    other = {"name": "c", "kind": "synthesized", "queries": 9}
    text = router_card(make_router({}), [part, other], "routehead train '{% x %}' & <y>")
    rows = "| a {{ x }} <b> | judged | 8 |\n| c | synthesized | 9 |\n\nwith routehead-plugins "
    assert f"| --- | --- | --- |\n{rows}" in text
    assert "\n```\nroutehead train '{% x %}' & <y>\n```\n" in text


def test_local_folders_are_not_disclosed(tmp_path: Path) -> None:
    text = router_card(make_router({}, str(tmp_path)), [], "routehead train")
    assert f"# Head router for {tmp_path.name}\n" in text
    assert str(tmp_path.parent) not in text
    assert "# Head router for an unnamed LLM\n" in router_card(make_router({}, None), [], "")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (LABELS, "- labels: ndcg, shrinkage 0.3; their reliability could not be measured"),
        (
            {**LABELS, **RELIABILITY},
            "- labels: ndcg, shrinkage 0.3; nDCG@10 of 7 queries: 0.9123 on the documents "
            "searched; on other documents 0.5000, one set for all 0.4000, random sets 0.3000",
        ),
    ],
)
def test_the_reliability_of_labels_is_shown(labels: dict[str, Any], line: str) -> None:
    text = router_card(make_router({"labels": labels}), [], "routehead train")
    assert f"\n{line}\n- weight of the retrieval score: None\n" in text


@pytest.mark.parametrize(
    ("strength", "line"),
    [
        (None, "None was clearly better than the static weights: this router is static."),
        (2.5, "Chosen: 2.5."),
    ],
)
def test_the_held_out_figures_are_shown(strength: float | None, line: str) -> None:
    description = {
        "strength": strength,
        "held_out_queries": 12,
        "held_out_ndcg@10": {"static": 0.5, "1.0": 0.4},
    }
    text = router_card(make_router(description), [], "routehead train")
    table = "| correction | nDCG@10 |\n| --- | --- |\n| static | 0.5 |\n| 1.0 | 0.4 |\n"
    assert "## Measured\n\nnDCG@10 on the 12 queries held out" in text
    assert f"\n{table}\n{line}\n\n## Limits\n" in text
