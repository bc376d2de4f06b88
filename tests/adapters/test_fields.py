"""The options of the re-ranker are fields of both pydantic adapters, by themselves."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest

import routehead_plugins
from routehead_plugins.adapters._lazy import OPTION_NAMES
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.adapters.llama_index import HeadRoutedRerank
from routehead_plugins.options import RerankerOptions

OWN_FIELDS = {
    HeadRoutedCompressor: {
        "reranker",
        "top_n",
        "score_threshold",
        "score_key",
        "relevant_spans",
        "instruction",
    },
    HeadRoutedRerank: {
        "callback_manager",
        "top_n",
        "keep_retrieval_score",
        "metadata_mode",
        "score_threshold",
        "relevant_spans",
        "instruction",
    },
}
BOTH = pytest.mark.parametrize("adapter", OWN_FIELDS)


class Router:
    """Stands in for a router, which is large and never changes."""


class Weights:
    """Stands in for a loaded re-ranker, which must be neither copied nor pickled."""

    def __reduce_ex__(self, protocol: object) -> Any:
        pytest.fail("the weights were copied or pickled")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[RerankerOptions]:
    """Record what is loaded instead of loading it."""
    loaded: list[RerankerOptions] = []

    class Loader:
        @staticmethod
        def from_options(options: RerankerOptions) -> Weights:
            loaded.append(options)
            return Weights()

    monkeypatch.setattr(routehead_plugins, "HeadRoutedAttentionReranker", Loader, raising=False)
    return loaded


@BOTH
def test_fields_are_the_options_and_the_adapters_own(adapter: Any) -> None:
    options = {field.name: field.default for field in fields(RerankerOptions)}
    inherited = {
        name: field.default
        for name, field in adapter.model_fields.items()
        if name not in OWN_FIELDS[adapter]
    }
    assert inherited == options
    assert list(inherited) == list(OPTION_NAMES)
    assert OWN_FIELDS[adapter] <= set(adapter.model_fields)


@BOTH
def test_every_option_is_described_and_in_the_json_schema(adapter: Any) -> None:
    described = adapter.model_json_schema()["properties"]
    for field in fields(RerankerOptions):
        assert described[field.name]["description"].endswith(".")
    assert described["max_doc_tokens"]["description"].startswith("Longer documents are cut")


def test_a_new_option_appears_in_both_adapters() -> None:
    code = (
        "from dataclasses import dataclass\n"
        "from routehead_plugins import options\n"
        "@dataclass(frozen=True)\n"
        "class MoreOptions(options.RerankerOptions):\n"
        "    speed: int = 7\n"
        "options.RerankerOptions = MoreOptions\n"
        "from routehead_plugins.adapters.langchain import HeadRoutedCompressor\n"
        "from routehead_plugins.adapters.llama_index import HeadRoutedRerank\n"
        "from routehead_plugins.adapters.pyserini import HeadRoutedStage\n"
        "for adapter in HeadRoutedCompressor, HeadRoutedRerank:\n"
        "    print(adapter().speed, adapter(speed='3')._lazy.options.speed)\n"
        "print(HeadRoutedStage(None, corpus={}, speed=5)._lazy.options.speed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("7 3\n7 3\n5\n", "")


@BOTH
def test_options_given_are_the_options_loaded_with(
    adapter: Any, loads: list[RerankerOptions]
) -> None:
    options: dict[str, Any] = {
        "model": "m",
        "heads": "0-1",
        "router": "folder",
        "device": "cpu",
        "dtype": "float32",
        "layout": "parallel",
        "document_cache": "2GB",
        "window": 20,
        "stride": 10,
        "max_doc_tokens": 100,
        "first_stage_weight": 0.5,
        "drop_query_copies": True,
        "documents": "index",
        "refine": 5,
        "local_files_only": True,
    }
    assert adapter(**options)._load_reranker() is not None
    assert loads == [RerankerOptions(**options)]


@BOTH
def test_copies_share_the_llm_whether_it_is_loaded_or_not(
    adapter: Any, loads: list[RerankerOptions]
) -> None:
    unloaded = adapter(router=Router())
    before = [copy.copy(unloaded), copy.deepcopy(unloaded), unloaded.model_copy(deep=True)]
    reranker = unloaded._load_reranker()
    after = [copy.copy(unloaded), copy.deepcopy(unloaded), unloaded.model_copy(deep=True)]
    assert all(duplicate._load_reranker() is reranker for duplicate in before + after)
    assert len(loads) == 1


@BOTH
def test_changed_options_are_loaded_once_and_leave_copies_alone(
    adapter: Any, loads: list[RerankerOptions]
) -> None:
    original = adapter(model="m")
    changed = original.model_copy(update={"heads": "0-1"})
    reranker = original._load_reranker()
    with ThreadPoolExecutor(8) as pool:
        rerankers = list(pool.map(lambda _: changed._load_reranker(), range(8)))
    assert all(other is rerankers[0] is not reranker for other in rerankers)
    assert original._load_reranker() is reranker
    assert loads == [RerankerOptions("m"), RerankerOptions("m", heads="0-1")]


@BOTH
def test_pickles_hold_no_weights(adapter: Any, loads: list[RerankerOptions]) -> None:
    original = adapter(model="m")
    original._load_reranker()
    restored = pickle.loads(pickle.dumps(original))
    assert len(loads) == 1
    assert restored._load_reranker() is not original._load_reranker()
    assert loads == [RerankerOptions("m")] * 2


def test_loading_does_not_make_equal_models_differ(loads: list[RerankerOptions]) -> None:
    one, other = HeadRoutedCompressor(model="m"), HeadRoutedCompressor(model="m")
    one._load_reranker()
    assert one == other
    assert one != HeadRoutedCompressor(model="n")
    assert len(loads) == 1


@BOTH
def test_a_token_is_neither_shown_nor_written(adapter: Any) -> None:
    made = adapter(token="hf_secret")
    assert made.token == "hf_secret"
    assert "hf_secret" not in repr(made)
    assert "hf_secret" not in str(made.model_dump())
