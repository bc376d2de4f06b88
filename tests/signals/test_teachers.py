"""Teachers: how they are named, what they score, and how scores are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import families
import pytest
import torch
from tables import query_signals, table
from torch import Tensor

from routehead_plugins import Document, FrozenLM
from routehead_plugins.backbone import MiniLM, QueryLikelihood
from routehead_plugins.errors import InputError, MissingExtraError, ModelLoadError
from routehead_plugins.io import Collection
from routehead_plugins.signals import (
    EncoderTeacher,
    LikelihoodTeacher,
    collect_teacher,
    load_teacher,
    with_teacher,
)

TEXTS = {"d0": "a wolf ran over the hill", "d1": "rain", "d2": " \n", "d3": "seven grey stones"}
DOCUMENTS = [Document(text, key) for key, text in TEXTS.items() if text.strip()]
COLLECTION = Collection(
    "tiny",
    Path("tiny"),
    {key: Document(text, key) for key, text in TEXTS.items()},
    {"q0": "which wolf ran?", "q1": "rain?"},
    {},
    {"q0": {"d3": 9.0, "d2": 7.5, "d0": 4.0}, "q1": {"d0": 2.0, "d1": 1.5}},
)


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


class Lengths:
    """A teacher that prefers long documents, and counts its calls."""

    name, temperature = "lengths", 1.0

    def __init__(self, factor: float = 1.0) -> None:
        self.settings: Any = {"teacher": "lengths"}
        self.calls: list[str] = []
        self.factor = factor

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        self.calls.append(query)
        return [self.factor * len(document.text) for document in documents]


def test_likelihood_is_that_of_the_llm_or_of_another_one(llm: FrozenLM, model: str) -> None:
    own = load_teacher("likelihood", llm, max_doc_tokens=4)
    expected = QueryLikelihood(llm, max_doc_tokens=4).score("which wolf", DOCUMENTS)
    assert own.score("which wolf", DOCUMENTS) == expected
    other = load_teacher(f"likelihood:{model}", max_doc_tokens=4)
    assert isinstance(other, LikelihoodTeacher)
    assert other.name == f"likelihood of {model}"
    with pytest.raises(InputError, match=r'teacher="likelihood" needs an LLM'):
        load_teacher("likelihood")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    (tmp_path / "encoder").mkdir()
    return encoders.write_encoder(tmp_path / "encoder")


def test_minilm_scores_by_cosine(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders.write_package(tmp_path / "site", encoder)
    monkeypatch.syspath_prepend(tmp_path / "site")
    embed = MiniLM(torch.device("cpu")).embed
    expected = embed([document.text for document in DOCUMENTS]) @ embed(["which wolf"])[0]
    scores = load_teacher("minilm", device="cpu").score("which wolf", DOCUMENTS)
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)


def test_documents_of_several_queries_are_embedded_once() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.ones(len(texts), 2)

    teacher = EncoderTeacher("ones", lambda queries: torch.ones(len(queries), 2), embed)
    for _ in range(2):
        assert teacher.score("any", [*DOCUMENTS, DOCUMENTS[0]]) == [2.0] * 4
    assert seen == [document.text for document in DOCUMENTS]


def test_texts_are_scored_for_several_queries_at_once() -> None:
    embedded: list[str] = []

    def embed(texts: Sequence[str]) -> Tensor:
        embedded.extend(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    teacher = EncoderTeacher("sizes", embed, embed)
    scores = teacher.scores(["a", "bcd"], ["xy", "", "xy"])
    assert scores.tolist() == [[3.0, 1.0, 3.0], [7.0, 1.0, 7.0]]
    assert sorted(embedded) == ["", "a", "bcd", "xy"]
    vectors = teacher.query_vectors(["a"])
    assert vectors.tolist() == [[1.0, 1.0]]
    assert teacher.scores(vectors, ["xy"]).tolist() == [[3.0]]
    assert len(embedded) == 4


def test_a_bi_encoder_of_sentence_transformers_scores_by_its_similarity(encoder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(encoder), device="cpu")
    texts = [document.text for document in DOCUMENTS]
    expected = model.similarity(model.encode(["which wolf"]), model.encode(texts))[0]
    teacher = load_teacher(str(encoder), device="cpu")
    assert teacher.score("which wolf", DOCUMENTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert teacher.temperature == 0.05


def test_a_cross_encoder_scores_by_its_logits(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = encoders.write_cross_encoder(tmp_path / "cross")
    model = library.CrossEncoder(str(folder), device="cpu")
    pairs = [("which wolf", document.text) for document in DOCUMENTS]
    expected = model.predict(pairs, activation_fn=torch.nn.Identity())
    teacher = load_teacher(str(folder), device="cpu")
    assert teacher.score("which wolf", DOCUMENTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert teacher.temperature == 1.0


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "routehead-plugins\[teacher\]"'):
        load_teacher("somebody/encoder")


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be loaded") as caught:
        load_teacher(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_scores_are_those_of_the_candidates_that_are_not_blank(tmp_path: Path) -> None:
    advanced: list[int] = []
    scores = collect_teacher(
        COLLECTION, Lengths(), tmp_path, hits=3, advance=lambda: advanced.append(1)
    )
    assert {key: values.tolist() for key, values in scores.items()} == {
        "q0": [17.0, 24.0],
        "q1": [24.0, 4.0],
    }
    assert len(advanced) == 2


def test_scores_are_computed_once(tmp_path: Path) -> None:
    first, again, other = Lengths(), Lengths(), Lengths()
    collect_teacher(COLLECTION, first, tmp_path, hits=3)
    collect_teacher(COLLECTION, again, tmp_path, hits=3)
    other.settings = {"teacher": "other"}
    collect_teacher(COLLECTION, other, tmp_path, hits=3)
    assert [len(teacher.calls) for teacher in (first, again, other)] == [2, 0, 2]


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'lengths' gives query 'q0' scores that are not finite"):
        collect_teacher(COLLECTION, Lengths(float("inf")), tmp_path, hits=3)


def test_a_teacher_replaces_judgments_or_a_share_of_them() -> None:
    judged = query_signals(torch.rand(2, 3), [0, 2, 2])
    unjudged = replace(query_signals(torch.rand(2, 3), [0, 0, 0]), query_id="other")
    signals = table([judged, unjudged])
    given = torch.tensor([0.3, 0.1, 0.2])
    scores = {judged.query_id: given, "other": given}
    soft = (given / 0.1).softmax(dim=0)
    whole = with_teacher(signals, scores, 0.1)
    torch.testing.assert_close(whole.queries[0].gains, soft)
    half = with_teacher(signals, scores, 0.1, 0.5)
    torch.testing.assert_close(half.queries[0].gains, soft / 2 + torch.tensor([0, 0.25, 0.25]))
    torch.testing.assert_close(half.queries[1].gains, soft)
    none = with_teacher(signals, scores, 0.1, 0.0)
    assert none.queries[0] is judged
    torch.testing.assert_close(none.queries[1].gains, soft)
    assert with_teacher(signals, {}, 0.1).queries[1] is unjudged
    with pytest.raises(InputError, match="3 candidates in the signals but 2 scores"):
        with_teacher(signals, {"other": given[:2]}, 0.1)
