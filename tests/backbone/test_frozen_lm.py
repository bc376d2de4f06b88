"""The frozen LLM: its properties, its cache key, and one thread at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import families
import pytest
import torch

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.backbone import KeyValues

HEADS = HeadSet.parse("1-2,0-1")
PREFIX, TAIL = (5, 6, 7, 8), (9, 10)


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


def test_device_number_format_and_sizes_are_those_of_the_model(llm: FrozenLM) -> None:
    assert (llm.device, llm.dtype) == (torch.device("cpu"), torch.float32)
    assert (llm.num_layers, llm.max_tokens, len(llm.heads)) == (4, 4096, 16)
    assert (llm.width, llm.embedding_layer) == (32, 3)


def test_tails_stand_behind_the_longest_piece_of_the_context(llm: FrozenLM) -> None:
    (prefix,) = llm.prefill([PREFIX], last_layer=1)
    pieces = [prefix, *llm.prefill([(1, 2), (3, 4, 11)], last_layer=1, behind=prefix)]
    read = llm.read(lambda: pieces, [TAIL], HEADS)
    assert read.shape == (1, 2, 9)
    assert torch.equal(read, llm.read(lambda: pieces, [TAIL], HEADS, start=7))
    assert not torch.equal(read, llm.read(lambda: pieces, [TAIL], HEADS, start=9))


def test_many_threads_hold_the_context_of_one_query_at_a_time(llm: FrozenLM) -> None:
    together, most = 0, 0
    count = threading.Lock()

    def context() -> list[KeyValues]:
        nonlocal together, most
        with count:
            together += 1
            most = max(most, together)
        pieces = llm.prefill([PREFIX], last_layer=1)  # the lock is re-entrant
        with count:
            together -= 1
        return pieces

    expected = llm.read(context, [TAIL], HEADS)
    with ThreadPoolExecutor(8) as pool:
        readings = list(pool.map(lambda _: llm.read(context, [TAIL], HEADS), range(32)))
    assert most == 1
    assert all(torch.equal(reading, expected) for reading in readings)


def test_an_error_in_the_context_leaves_the_llm_free(llm: FrozenLM) -> None:
    def broken() -> list[KeyValues]:
        raise RuntimeError("no context")

    with pytest.raises(RuntimeError, match="no context"):
        llm.read(broken, [TAIL], HEADS)
    with ThreadPoolExecutor(1) as pool:  # another thread, for which the lock is not re-entrant
        assert pool.submit(llm.prefill, [PREFIX], last_layer=0).result(timeout=30)


def test_the_cache_key_changes_with_the_weights() -> None:
    model = families.tiny_model("llama")
    llm = FrozenLM(model, families.tiny_tokenizer())
    before = llm.cache_key
    assert llm.cache_key == before
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert llm.cache_key != before
