"""A tiny LLM and routers for it."""

from __future__ import annotations

import families
import pytest
from routers import KINDS, LAYER, QUERIES, make

from routehead_plugins import FrozenLM
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import Router


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def space(llm: FrozenLM) -> QuerySpace:
    return QuerySpace.fit(llm.embed(QUERIES, layer=LAYER), LAYER, coordinates=6)


@pytest.fixture(params=KINDS)
def router(request: pytest.FixtureRequest, space: QuerySpace) -> Router:
    return make(request.param, space)
