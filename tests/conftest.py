"""What several test modules share."""

from __future__ import annotations

import families
import pytest
import torch

from routehead_plugins import FrozenLM

# Most tests run tiny models, for which a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded() -> FrozenLM:
    """The embedded LLM, loaded once."""
    return FrozenLM.from_pretrained("embedded")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny LLM with random weights."""
    folder = tmp_path_factory.mktemp("model")
    families.tiny_model("llama").save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return str(folder)
