"""One re-ranker per loader: under many threads, in copies, never in pickles."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import routehead_plugins
from routehead_plugins.adapters._lazy import OPTION_NAMES, LazyReranker, check_options
from routehead_plugins.errors import InputError
from routehead_plugins.options import RerankerOptions


class Weights:
    """A re-ranker that must not be pickled or copied."""

    def __reduce_ex__(self, protocol: object) -> Any:
        pytest.fail("the weights were pickled or copied")


class Loader:
    """Stands in for the class that loads; loading takes a moment and must not overlap."""

    def __init__(self) -> None:
        self.loads: list[RerankerOptions] = []
        self._loading = threading.Lock()

    def from_options(self, options: RerankerOptions) -> Weights:
        assert self._loading.acquire(blocking=False), "two LLMs are loaded at the same time"
        time.sleep(0.05)
        self.loads.append(options)
        self._loading.release()
        return Weights()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[RerankerOptions]:
    loader = Loader()
    monkeypatch.setattr(routehead_plugins, "HeadRoutedAttentionReranker", loader, raising=False)
    return loader.loads


def test_many_threads_load_once(loads: list[RerankerOptions]) -> None:
    lazy, start = LazyReranker(RerankerOptions("m")), threading.Barrier(16)

    def get(_: int) -> Any:
        start.wait()
        return lazy.get()

    assert loads == []
    with ThreadPoolExecutor(16) as pool:
        rerankers = list(pool.map(get, range(16)))
    assert loads == [RerankerOptions("m")]
    assert all(reranker is rerankers[0] for reranker in rerankers)


def test_different_loaders_load_one_after_another(loads: list[RerankerOptions]) -> None:
    loaders = [LazyReranker(RerankerOptions(f"m{number}")) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(LazyReranker.get, loaders))
    assert sorted(options.model for options in loads) == ["m0", "m1", "m2", "m3"]


@pytest.mark.parametrize("loaded_before", [True, False])
def test_copies_share_the_reranker(loads: list[RerankerOptions], loaded_before: bool) -> None:
    lazy = LazyReranker()
    if loaded_before:
        lazy.get()
    for duplicate in (copy.copy(lazy), copy.deepcopy(lazy), copy.deepcopy([lazy])[0]):
        assert duplicate.get() is lazy.get()
    assert loads == [RerankerOptions()]


def test_pickles_hold_the_options_and_no_weights(loads: list[RerankerOptions]) -> None:
    lazy = LazyReranker(RerankerOptions("m"))
    unused = pickle.dumps(lazy)
    lazy.get()
    assert pickle.dumps(lazy) == unused
    assert loads == [RerankerOptions("m")]
    pickle.loads(unused).get()
    assert loads == [RerankerOptions("m")] * 2


def test_a_ready_reranker_is_used_and_never_pickled(loads: list[RerankerOptions]) -> None:
    ready = Weights()
    lazy = LazyReranker(ready=ready)
    assert lazy.get() is copy.deepcopy(lazy).get() is ready
    with pytest.raises(TypeError) as error:
        pickle.dumps(lazy)
    assert str(error.value) == "a ready reranker cannot be pickled; give arguments to load one."
    pickle.loads(pickle.dumps(LazyReranker(RerankerOptions("m"), ready))).get()
    assert loads == [RerankerOptions("m")]


def test_a_loader_provides_the_reranker_of_its_options() -> None:
    lazy, ready = LazyReranker(RerankerOptions("m")), LazyReranker(ready=Weights())
    assert lazy.provides(RerankerOptions("m"))
    assert not lazy.provides(RerankerOptions("m", heads="0-1"))
    assert ready.provides(RerankerOptions("m"))


def test_options_are_checked_by_name() -> None:
    check_options(OPTION_NAMES)
    check_options([], ready=Weights())
    with pytest.raises(TypeError) as unknown:
        check_options(["model", "modle", "topn"])
    assert str(unknown.value) == (
        "unexpected argument 'modle', 'topn'; the options of the re-ranker are "
        f"{', '.join(OPTION_NAMES)}; check the spelling."
    )
    with pytest.raises(InputError) as beside:
        check_options(["model", "heads"], ready=Weights())
    assert str(beside.value) == (
        "model, heads cannot change a ready reranker; "
        "expected either reranker= or the arguments to load one; drop one of the two."
    )
