"""Keys and values: sizes as people write them, a bound that holds, and what is dropped first."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins.backbone.kv_cache import KeyValueCache, KeyValues, joined, parse_bytes
from routehead_plugins.errors import InputError


def key_values(tokens: int = 1, *, layers: int = 1, start: int = 0) -> KeyValues:
    """Eight bytes for each token and layer."""
    return KeyValues(
        tuple((torch.ones(1, 1, tokens, 1), torch.ones(1, 1, tokens, 1)) for _ in range(layers)),
        start,
    )


@pytest.mark.parametrize(
    ("written", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("512 mb", 512 * 10**6), ("64B", 64), (7, 7)],
)
def test_sizes_are_read_as_people_write_them(written: int | str, size: int) -> None:
    assert parse_bytes(written) == size


@pytest.mark.parametrize("written", ["", "2", "GB", "-1GB", "0MB", "2GB 3", 0, -5, True, 2.5, None])
def test_what_is_no_size_is_refused_in_one_line(written: object) -> None:
    with pytest.raises(InputError) as error:
        parse_bytes(written)  # type: ignore[arg-type]
    assert str(error.value) == (
        f'document_cache={written!r} is not a size; give "2GB", "512MiB" or a number of bytes.'
    )


@pytest.mark.parametrize("written", ["9" * 400 + "GB", "x" * 9999, -(10**5000)], ids=range(3))
def test_a_size_beyond_all_numbers_is_refused_in_one_short_line(written: int | str) -> None:
    with pytest.raises(InputError) as error:
        parse_bytes(written)
    assert len(str(error.value)) < 200


def test_the_longest_unused_goes_first() -> None:
    cache = KeyValueCache(16)
    cache.put("a", key_values())
    cache.put("b", key_values())
    assert cache.get("a", last_layer=0) is not None
    cache.put("c", key_values())
    assert cache.get("b", last_layer=0) is None
    assert cache.get("a", last_layer=0) is not None
    assert (cache.hits, cache.misses, cache.nbytes, len(cache)) == (2, 1, 16, 2)


def test_what_is_larger_than_the_bound_is_not_kept_and_drops_nothing_else() -> None:
    cache = KeyValueCache(16)
    cache.put("a", key_values())
    cache.put("b", key_values(tokens=3))
    assert cache.get("a", last_layer=0) is not None
    assert len(cache) == 1


def test_what_does_not_reach_deep_enough_is_not_found_until_it_is_replaced() -> None:
    cache = KeyValueCache(100)
    cache.put("a", key_values(layers=2))
    assert cache.get("a", last_layer=2) is None
    cache.put("a", key_values(layers=3))
    found = cache.get("a", last_layer=1)
    assert found is not None
    assert (found.last_layer, cache.nbytes) == (2, 24)


def test_a_cleared_cache_is_empty() -> None:
    cache = KeyValueCache(100)
    cache.put("a", key_values())
    cache.clear()
    assert (cache.get("a", last_layer=0), cache.nbytes, len(cache)) == (None, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=30))
def test_the_bound_holds_and_the_count_is_right(puts: list[tuple[int, int]]) -> None:
    cache = KeyValueCache(64)
    for key, tokens in puts:
        cache.put(key, key_values(tokens))
        held = [cache.get(other, last_layer=0) for other in range(6)]
        assert cache.nbytes == sum(found.nbytes for found in held if found is not None) <= 64
        assert cache.get(key, last_layer=0) is not None


def test_threads_keep_the_count_right() -> None:
    cache = KeyValueCache(80)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            cache.put(draw.randrange(8), key_values(draw.randint(1, 4)))
            cache.get(draw.randrange(8), last_layer=0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    held = [cache.get(key, last_layer=0) for key in range(8)]
    assert cache.nbytes == sum(found.nbytes for found in held if found is not None) <= 80


def test_a_copy_does_not_hold_on_to_what_it_was_cut_from() -> None:
    whole = torch.ones(4, 1, 9, 1)
    cut = KeyValues(((whole[:1, :, :2], whole[1:2, :, :2]),), start=3)
    copied = cut.copied()
    assert (copied.tokens, copied.start, copied.end) == (2, 3, 5)
    assert copied.layers[0][0].untyped_storage().nbytes() == 8


def test_what_a_forward_adds_stays_out_of_the_pieces() -> None:
    pieces = [key_values(2), key_values(3)]
    cache = joined(pieces, last_layer=0)
    assert cache.get_seq_length() == 5
    keys, values = cache.update(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), 0)
    assert keys.flatten().tolist() == values.flatten().tolist() == [1] * 5 + [0] * 4
    assert [piece.tokens for piece in pieces] == [2, 3]
    assert cache.get_seq_length() == 9
