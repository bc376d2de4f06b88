"""What several test modules share."""

from __future__ import annotations

import pytest
import torch

from routehead_plugins import FrozenLM

# Most tests run tiny models, for which a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded() -> FrozenLM:
    """The embedded LLM, loaded once."""
    return FrozenLM.from_pretrained("embedded")
