"""What several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import torch

from routehead_plugins import FrozenLM

# Most tests run tiny models, for which a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is remembered about the machine out of the real home, in subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
