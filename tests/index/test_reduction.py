"""Keys in fewer bits, and fewer tokens of each document."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from indexed import TEXTS, documents, reranker

from routehead_plugins import DocumentIndex
from routehead_plugins.backbone import DocumentKeys, KeyColumns
from routehead_plugins.index.reduction import kept_rows, quantised
from routehead_plugins.layouts import LateLayout

QUERY = "which wolf ran?"
COLUMNS = KeyColumns(((0, 1), (3, 0)), (4, 2))


def keys_of(values: list[list[float]]) -> DocumentKeys:
    table = torch.tensor(values, dtype=torch.float32)
    return DocumentKeys(COLUMNS, table, torch.arange(len(table)))


@example([[0.0, 0.0, 0.0, 0.0, 0.0, 0.00390625]])  # a factor below the normal numbers
@given(
    st.lists(
        st.lists(st.floats(-900, 900, width=32), min_size=6, max_size=6), min_size=1, max_size=5
    )
)
def test_int8_is_off_by_half_a_step_of_each_token_and_key_head(values: list[list[float]]) -> None:
    keys = keys_of(values)
    rounded = quantised(keys, "int8")
    assert (rounded.table.dtype, cast(torch.Tensor, rounded.scales).shape) == (
        torch.int8,
        (len(values), 2),
    )
    for pair in COLUMNS.heads:
        exact, _ = keys.of(*pair)
        steps, factors = rounded.of(*pair)
        assert factors is not None
        step = exact.abs().amax(dim=1, keepdim=True) / 127
        # The factor itself is rounded to eleven bits.
        bound = step * 0.5 + exact.abs().amax(dim=1, keepdim=True) * 2**-10 + 1e-5
        assert ((steps * factors[:, None] - exact).abs() <= bound).all()


def test_float16_keeps_eleven_bits() -> None:
    keys = keys_of([[1.0, -2.5, 3.0009765625, 4, 5, 6]])
    rounded = quantised(keys, "float16")
    assert (rounded.table.dtype, rounded.scales) == (torch.float16, None)
    torch.testing.assert_close(rounded.table.float(), keys.table, rtol=2**-11, atol=0)


def test_the_most_important_tokens_are_kept_in_their_order() -> None:
    importance = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.0, 0.0])
    assert kept_rows(importance, 4, 0.5).tolist() == [1, 3, 4, 5]
    assert kept_rows(importance, 4, 0.01).tolist() == [1, 4, 5]
    assert kept_rows(importance, 4, 1.0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_half_of_the_tokens_takes_half_of_the_space(tmp_path: Path, dtype: str) -> None:
    for budget in (1.0, 0.5):
        reranker().index(documents(), tmp_path / str(budget), dtype=dtype, budget=budget)
    whole, half = (DocumentIndex(tmp_path / str(budget)) for budget in (1.0, 0.5))
    assert 0.45 < half.nbytes / whole.nbytes < 0.65  # separators are kept
    for text, document in zip(TEXTS, half.look_up(TEXTS), strict=True):
        assert document is not None
        piece = document.piece
        assert piece.kept is not None or len(text) == 1
        assert piece.text.size == len(piece.kept or ())
        (full,) = whole.look_up([text])
        assert full is not None
        ids = full.piece.ids[slice(*full.piece.text)]
        assert piece.ids[: piece.text.size] == tuple(ids[index] for index in piece.kept or ())


def test_documents_that_are_not_kept_are_cut_in_the_same_way(tmp_path: Path) -> None:
    ours = reranker()
    for name, kept in (("none", []), ("all", documents())):
        ours.index(kept, tmp_path / name, budget=0.5)
    signals = [
        reranker(DocumentIndex(tmp_path / name)).signals(QUERY, TEXTS) for name in ("none", "all")
    ]
    torch.testing.assert_close(*signals, atol=1e-6, rtol=0)
    assert not torch.allclose(signals[0], ours.signals(QUERY, TEXTS), atol=1e-3)


def test_evidence_lies_where_the_kept_tokens_are(tmp_path: Path) -> None:
    reranker().index(documents(), tmp_path, budget=0.25)
    index = DocumentIndex(tmp_path)
    ranking = reranker(index).rerank(QUERY, documents(), spans=True)
    kept = dict(zip(TEXTS, index.look_up(TEXTS), strict=True))
    assert any(hit.spans for hit in ranking)
    for hit in ranking:
        document = kept[hit.document.text]
        assert document is not None
        for span in hit.spans:
            # One token per character in this tokenizer, and some that join passages.
            inside = [index for index in document.piece.kept or () if span[0] <= index < span[1]]
            assert inside


def test_the_null_query_decides_what_is_kept(tmp_path: Path) -> None:
    ours = reranker()
    ours.index(documents(), tmp_path, budget=0.5)
    index = DocumentIndex(tmp_path)
    layout = cast(LateLayout, ours.layout)
    (piece,) = ours.llm.encoder.documents(TEXTS[:1])
    (keys,) = layout.run_documents(ours.llm, [piece], index.columns)
    attention = layout.null_attention(ours.llm, keys, index.config.heads)[: piece.text.size]
    (document,) = index.look_up(TEXTS[:1])
    assert document is not None
    kept = set(document.piece.kept or ())
    others = set(range(piece.text.size)) - kept
    assert min(attention[list(kept)]) >= max(attention[list(others)])
