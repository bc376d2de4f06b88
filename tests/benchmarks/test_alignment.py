"""The benchmark of aligned heads: what is measured, and the corpus to learn from."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import lora
import pytest
import torch
import wolves
from tables import query_signals
from torch import Tensor

from benchmarks.alignment import corpus, quality
from routehead_plugins import FrozenLM, HeadSet, Recipe
from routehead_plugins.errors import InputError, MissingExtraError
from routehead_plugins.evaluation import significance
from routehead_plugins.signals import EncoderTeacher
from routehead_plugins.training import fit_weights


def encoder(*_: Any, **__: Any) -> EncoderTeacher:
    """Knows the length of a text alone."""

    def embed(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    return EncoderTeacher("lengths", embed, embed)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    families.tiny_model("llama").save_pretrained(tmp_path / "tiny")
    families.tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    llm = FrozenLM.from_pretrained(tmp_path / "tiny", dtype="float32")
    adapter = lora.random_adapter(llm)
    heads = HeadSet(
        [(0, 1), (1, 0)],
        layout="late",
        adapter=adapter.label,
        recipe=Recipe(weights=[1.0, 0.5], aggregation="log", first_stage_weight=0.7),
    )
    replace(adapter, heads=heads).save_pretrained(tmp_path / "aligned", {})
    # Choosing a penalty takes its time where few queries can be told apart by anything.
    monkeypatch.setattr(quality, "fit_weights", partial(fit_weights, l1=0.05))
    monkeypatch.setattr(quality, "load_teacher", encoder)
    monkeypatch.setattr(significance, "RESAMPLES", 100)
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        wolves.write_collection(folder)
    return {
        "collections": folders,
        "adapter": str(tmp_path / "aligned"),
        "hits": 5,
        "model": str(tmp_path / "tiny"),
        "dtype": "float32",
        "signals": tmp_path / "signals",
        "output": tmp_path / "results",
    }


def test_an_adapter_is_measured_beside_everything_else(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.main(quality.Options(**options, likelihood=True))
    content = json.loads((tmp_path / "results" / "alignment-aligned.json").read_text())
    means = content["collections"]["mean"]["means"]
    alone = ["minilm", "likelihood", "aligned"]
    weighted = ["frozen/weights", "aligned/weights"]
    assert set(means) == {"bm25", *alone, *(f"{row}+bm25" for row in (*alone, *weighted))}
    for row, mean in means.items():
        single = [content["collections"][name]["means"][row] for name in ("here", "there")]
        assert mean == pytest.approx(sum(single) / 2)
    pairs = {(d["method"], d["baseline"]) for d in content["collections"]["mean"]["differences"]}
    assert ("aligned+bm25", "frozen/weights+bm25") in pairs
    assert ("aligned/weights+bm25", "minilm+bm25") in pairs
    assert content["adapter"].startswith("random-")
    assert str(tmp_path) not in json.dumps(content)
    printed = capsys.readouterr().out
    assert "| aligned+bm25 |" in printed
    assert "[" in printed


def test_an_adapter_without_heads_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "aligned" / "heads.json").unlink()
    with pytest.raises(InputError, match=r"has no heads.json; give an aligned one"):
        quality.main(quality.Options(**options))


def test_one_collection_is_not_enough(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="one collection leaves nothing"):
        quality.Options(**options | {"collections": options["collections"][:1]})


def test_the_middle_zone_counts_who_reaches_the_best_quarter() -> None:
    gains = [1, 0, 0, 1, 0, 1, 0, 1]
    query = query_signals(torch.zeros(1, 8), gains=gains)
    # Indices 2 to 5 are the middle; 3 and 2 are the best quarter.
    scores = torch.tensor([0.0, 1, 8, 9, 2, 3, 4, 5])
    zone = quality.middle_zone([(query, scores)])
    assert zone == quality.Zone(relevant=1 / 2, irrelevant=1 / 2)
    assert zone.gap == 0
    scores = torch.tensor([0.0, 1, 2, 9, 3, 8, 4, 5])
    assert quality.middle_zone([(query, scores)]).gap == 1


def test_passages_end_between_sentences() -> None:
    sentence = "This sentence has exactly seven words altogether."
    text = " ".join([sentence] * 5)
    assert list(corpus.passages(text, 15)) == [" ".join([sentence] * 2)] * 2  # the last is short
    assert list(corpus.passages(text, 40)) == [text]
    long = "Very " + "very " * 30 + "long."
    assert list(corpus.passages(f"{sentence} {long}", 15)) == [long]


def test_the_corpus_is_written_with_titles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "A wolf ran over the hill in May, while rain fell on seven grey stones."
    monkeypatch.setattr(corpus, "articles", lambda: iter([("Wolves", text), ("", text)]))
    corpus.corpus(tmp_path / "texts", words=60)
    rows = [
        json.loads(row) for row in (tmp_path / "texts" / "corpus.jsonl").read_text().splitlines()
    ]
    assert rows == [
        {"_id": "0", "title": "Wolves", "text": text},
        {"_id": "1", "title": "", "text": text},
    ]
    assert capsys.readouterr().out.endswith("2 passages\n")


def test_without_gensim_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("gensim"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install gensim==4.4.0"):
        next(corpus.articles())
