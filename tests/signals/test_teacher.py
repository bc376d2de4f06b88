"""The teacher: likelihoods that are computed once, and how they change the judgments."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import families
import pytest
import torch
from tables import query_signals, signal_set, table
from torch import Tensor

from routehead_plugins import Document, FrozenLM
from routehead_plugins.backbone import QueryLikelihood
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.signals.store import QuerySignals
from routehead_plugins.signals.teacher import collect_likelihoods, mix_teacher

TEXTS = {
    "d0": "a wolf ran over the hill",
    "d1": "rain",
    "d2": " \n",
    "d3": "seven grey stones by a river, one of them wet",
}
COLLECTION = Collection(
    "tiny",
    Path("tiny"),
    {key: Document(text, key) for key, text in TEXTS.items()},
    {"q0": "which wolf ran?", "q1": "rain?", "none": "nothing?", "blank": "what?"},
    {"q0": {"d0": 1}},
    {
        "q0": {"d3": 9.0, "d2": 7.5, "d0": 4.0},
        "q1": {"d0": 2.0, "d1": 1.5, "d3": 0.5},
        "blank": {"d2": 1.0},
    },
)


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries whose likelihood was computed."""
    score, calls = QueryLikelihood.score, list[str]()

    def counted(
        self: QueryLikelihood, query: str, documents: Sequence[str | Document]
    ) -> list[float]:
        calls.append(query)
        return score(self, query, documents)

    monkeypatch.setattr(QueryLikelihood, "score", counted)
    return calls


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_likelihoods_are_those_of_the_candidates_that_are_not_blank(
    llm: FrozenLM, tmp_path: Path
) -> None:
    advanced: list[int] = []
    likelihoods = collect_likelihoods(
        COLLECTION, llm, tmp_path / "new" / "folder", hits=2, advance=lambda: advanced.append(1)
    )
    scorer = QueryLikelihood(llm)
    expected = {
        "q0": scorer.score("which wolf ran?", [TEXTS["d3"]]),
        "q1": scorer.score("rain?", [TEXTS["d0"], TEXTS["d1"]]),
    }
    assert equal(likelihoods, {key: torch.tensor(scores) for key, scores in expected.items()})
    assert len(advanced) == 4


def test_documents_are_cut_to_the_given_length(llm: FrozenLM, tmp_path: Path) -> None:
    whole = collect_likelihoods(COLLECTION, llm, tmp_path, hits=3)
    cut = collect_likelihoods(COLLECTION, llm, tmp_path, hits=3, max_doc_tokens=4)
    shown = [TEXTS[key] for key in ("d0", "d1", "d3")]
    expected = QueryLikelihood(llm, max_doc_tokens=4).score("rain?", shown)
    assert cut["q1"].tolist() == pytest.approx(expected)
    assert not torch.equal(cut["q1"], whole["q1"])
    # Likelihoods with other settings stay on disk.
    assert len(list(tmp_path.iterdir())) == 2


def test_stored_likelihoods_are_not_computed_again(
    llm: FrozenLM, tmp_path: Path, asked: list[str]
) -> None:
    first = collect_likelihoods(COLLECTION, llm, tmp_path, hits=3)
    assert asked == ["which wolf ran?", "rain?"]
    assert equal(collect_likelihoods(COLLECTION, llm, tmp_path, hits=3), first)
    assert len(asked) == 2
    fewer = collect_likelihoods(COLLECTION, llm, tmp_path, hits=2)  # other candidates
    assert asked[2:] == ["which wolf ran?", "rain?"]
    assert [len(scores) for scores in fewer.values()] == [1, 2]
    other = replace(COLLECTION, corpus={**COLLECTION.corpus, "d1": Document("hail", "d1")})
    changed = collect_likelihoods(other, llm, tmp_path, hits=3)
    assert asked[4:] == ["rain?"]
    assert torch.equal(changed["q0"], first["q0"])
    assert not torch.equal(changed["q1"], first["q1"])


@pytest.mark.parametrize("lost", [1, 20])
def test_a_last_line_that_is_damaged_is_done_again(
    llm: FrozenLM, tmp_path: Path, asked: list[str], lost: int
) -> None:
    first = collect_likelihoods(COLLECTION, llm, tmp_path, hits=3)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    asked.clear()
    assert equal(collect_likelihoods(COLLECTION, llm, tmp_path, hits=3), first)
    assert asked == ["rain?"]
    assert path.read_bytes() == whole


def test_an_interrupted_job_resumes(llm: FrozenLM, tmp_path: Path, asked: list[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_likelihoods(COLLECTION, llm, tmp_path, hits=3, advance=stop)
    assert asked == ["which wolf ran?"]
    likelihoods = collect_likelihoods(COLLECTION, llm, tmp_path, hits=3)
    assert asked == ["which wolf ran?", "rain?"]
    assert list(likelihoods) == ["q0", "q1"]


def test_the_file_name_and_the_keys_never_change(
    llm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Users have likelihoods under these names; other names would compute all of them again.
    monkeypatch.setattr("routehead_plugins.signals.store.__version__", "0.1.0")
    collect_likelihoods(COLLECTION, llm, tmp_path, hits=3, max_doc_tokens=4)
    (path,) = tmp_path.iterdir()
    assert path.name == "likelihood-tiny-2bfbeb806b6e.partial.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [key for key, *_ in lines] == ["q0 1a85fbfd94f5", "q1 18d84d635bc8"]


def test_a_file_in_place_of_the_folder_is_refused(llm: FrozenLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        collect_likelihoods(COLLECTION, llm, tmp_path / "file", hits=3)
    message = str(error.value)
    assert message.startswith(f"a teacher's scores cannot be kept in '{tmp_path / 'file'}' (")
    assert message.endswith("); name another folder.")
    assert "\n" not in message


# How judgments change.


def slow_standardised(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / deviation for value in values]


def slow_opinion(query: QuerySignals, likelihood: Tensor) -> list[float]:
    sides = slow_standardised(likelihood.tolist()), slow_standardised(query.first_stage.tolist())
    parts = [math.exp(left + 0.5 * right) for left, right in zip(*sides, strict=True)]
    return [part / math.fsum(parts) for part in parts]


SIGNALS = signal_set(queries=4, grades=3)
LIKELIHOODS = {
    query.query_id: torch.randn(len(query.gains), generator=torch.Generator().manual_seed(place))
    for place, query in enumerate(SIGNALS.queries)
}


def test_without_a_share_judgments_keep_their_proportions() -> None:
    spam = SIGNALS.queries[0].gains.clone()
    spam[spam.argmin()] = -2.0
    signals = SIGNALS.subset([replace(SIGNALS.queries[0], gains=spam), *SIGNALS.queries[1:]])
    for query, old in zip(
        mix_teacher(signals, LIKELIHOODS, 0.0).queries, signals.queries, strict=True
    ):
        judged = old.gains.clamp(min=0)
        torch.testing.assert_close(query.gains * judged.sum(), judged)


def test_with_the_whole_share_judgments_are_what_the_teacher_says() -> None:
    for query, old in zip(
        mix_teacher(SIGNALS, LIKELIHOODS, 1.0).queries, SIGNALS.queries, strict=True
    ):
        expected = slow_opinion(old, LIKELIHOODS[old.query_id])
        assert query.gains.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_share_is_a_mean_of_both_and_the_rest_of_the_signals_stays() -> None:
    before = copy.deepcopy(SIGNALS)
    mixed = mix_teacher(SIGNALS, LIKELIHOODS, 0.3)
    assert (mixed.heads, mixed.data) == (SIGNALS.heads, SIGNALS.data)
    for query, old, kept in zip(mixed.queries, SIGNALS.queries, before.queries, strict=True):
        opinion = slow_opinion(old, LIKELIHOODS[old.query_id])
        total = float(old.gains.sum())
        expected = [
            0.7 * gain / total + 0.3 * said
            for gain, said in zip(old.gains.tolist(), opinion, strict=True)
        ]
        assert query.gains.tolist() == pytest.approx(expected, abs=1e-6)
        assert query.ideal_gains.tolist() == sorted(query.gains.tolist(), reverse=True)
        assert float(query.gains.sum()) == pytest.approx(1.0)
        for name in {field.name for field in fields(old)} - {"gains", "ideal_gains"}:
            assert getattr(query, name) is getattr(old, name)
        assert torch.equal(old.gains, kept.gains)
        assert torch.equal(old.ideal_gains, kept.ideal_gains)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_where_nothing_is_judged_relevant_the_teacher_is_right(share: float) -> None:
    for gains in ([0.0, 0.0, 0.0], [0.0, -1.0, 0.0]):
        signals = table([query_signals([[0.1, 0.2, 0.3]], gains)])
        likelihood = torch.tensor([-3.0, -1.0, -2.5])
        (query,) = mix_teacher(signals, {"q": likelihood}, share).queries
        assert query.gains.tolist() == pytest.approx(
            slow_opinion(signals.queries[0], likelihood), abs=1e-6
        )
        assert query.has_contrast


def test_queries_without_likelihoods_keep_their_judgments() -> None:
    some = {"q1": LIKELIHOODS["q1"]}
    mixed = mix_teacher(SIGNALS, some, 0.5).queries
    assert [one is other for one, other in zip(mixed, SIGNALS.queries, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, "0.5", True])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(InputError) as error:
        mix_teacher(SIGNALS, LIKELIHOODS, share)
    assert str(error.value) == f"share={share!r} is out of range; give a number from 0 to 1."


def test_likelihoods_of_other_candidates_are_refused() -> None:
    size = len(SIGNALS.queries[1].gains)
    with pytest.raises(InputError) as error:
        mix_teacher(SIGNALS, {**LIKELIHOODS, "q1": torch.zeros(3)}, 0.5)
    assert str(error.value) == (
        f"query 'q1' has {size} candidates in the signals but 3 likelihoods; compute both from "
        "the same candidates."
    )
