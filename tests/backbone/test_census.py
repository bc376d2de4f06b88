"""The page of model families against the code: every causal LM class is on it, and it is true."""

from __future__ import annotations

import census
import pytest
import transformers

ENTRIES = census.entries_of(census.PAGE.read_text(encoding="utf-8"))


_FAILED = "a trial run failed: "
pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in census.PAGE.read_text(encoding="utf-8"),
    reason="the page is for another release of transformers",
)


def test_every_causal_lm_class_of_transformers_is_on_the_page() -> None:
    assert {*ENTRIES} == {*census.MODEL_TYPES}
    assert sum(entry.status == "not built" for entry in ENTRIES.values()) <= 3


def test_all_that_the_page_calls_exact_is_exact() -> None:
    exact = [entry for entry in ENTRIES.values() if entry.status == "exact"]
    assert len(exact) > 90
    assert all(max(entry.sequential, entry.parallel) < census.TOLERANCE for entry in exact)


@pytest.mark.parametrize("model_type", census.MODEL_TYPES)
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_becomes_of_a_class(model_type: str) -> None:
    entry, expected = census.examine(model_type), ENTRIES[model_type]
    assert (entry.class_name, entry.status) == (expected.class_name, expected.status)
    if not expected.reason.startswith(_FAILED):  # the rest is the wording of other packages
        assert entry.reason == expected.reason
    assert max(entry.sequential, entry.parallel) < census.TOLERANCE


def test_a_page_can_be_read_back() -> None:
    entries = [
        census.Entry("a", "A", "exact", "", 1e-7, 2e-8),
        census.Entry("b", "B", "refused", "it has no list of layers"),
        census.Entry("c", "C", "not built", "a draft model"),
    ]
    assert census.entries_of(census.page(entries)) == {e.model_type: e for e in entries}
