"""Training runs: they learn what is planted, resume, stop early, and write what peft reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import PeftModel
from planted import config, examples, tiny

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.alignment import (
    Alignment,
    LossWeights,
    Progress,
    align,
)
from routehead_plugins.alignment.checkpoint import open_checkpoint
from routehead_plugins.errors import InputError, UnsupportedModelError
from routehead_plugins.heads import Recipe
from routehead_plugins.selection import FixedHeads


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return tiny()


def losses_of(result: Alignment) -> list[float]:
    return [record["losses"]["loss"] for record in result.history if "losses" in record]


def equal(one: Alignment, other: Alignment) -> bool:
    return one.adapter.fingerprint == other.adapter.fingerprint and one.heads == other.heads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"losses": LossWeights(distillation=0, preference=1), "hard_share": 1.0},
        {"losses": LossWeights(spread=0.1, head_entropy=0.1, attention_entropy=0.1)},
        {"signal": "calibrated"},
        {"layout": "parallel"},
        {"head_weights": "signed", "standardise": False, "head_learning_rate": 0.01},
        {"checkpoints": True, "accumulate": 3, "schedule": "linear", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_training_lowers_the_loss(llm: FrozenLM, options: dict[str, Any]) -> None:
    both = examples(grades=True)
    result = align(llm, both[:6], config(epochs=20, **options), held_out=both[:6])
    assert result.gain is not None
    looks = [record["held_out"]["loss"] for record in result.history if "held_out" in record]
    assert min(looks) < 0.8 * looks[0]
    assert result.gain.measure == "ndcg@10"


def test_only_the_losses_that_are_switched_on_are_computed(llm: FrozenLM) -> None:
    both = examples(6, grades=True)
    result = align(llm, both, config(epochs=1, losses=LossWeights(preference=0, spread=0.5)))
    records = [record["losses"] for record in result.history if "losses" in record]
    assert {frozenset(record) for record in records} == {
        frozenset({"loss", "distillation", "spread"})
    }
    for record in records:
        weighted = record["distillation"] + 0.5 * record["spread"]
        assert record["loss"] == pytest.approx(weighted)


def test_the_same_seed_gives_the_same_result(llm: FrozenLM) -> None:
    one, same, other = (align(llm, examples(), config(seed=seed)) for seed in (0, 0, 1))
    assert equal(one, same)
    assert losses_of(one) == losses_of(same)
    assert not equal(one, other)


def test_the_result_is_that_of_the_best_look(llm: FrozenLM) -> None:
    # At this rate, training goes astray.
    result = align(llm, examples(), config(epochs=8, learning_rate=0.5, head_learning_rate=2.0))
    looks = [record["held_out"]["loss"] for record in result.history if "held_out" in record]
    assert result.gain is not None
    assert result.gain.measure == "loss"
    assert result.gain.after == pytest.approx(min(looks), rel=1e-5)
    assert result.gain.before == pytest.approx(looks[0], rel=1e-5)


def test_training_stops_early_when_held_out_queries_no_longer_gain(llm: FrozenLM) -> None:
    options = {"learning_rate": 0.5, "head_learning_rate": 2.0, "evaluate_every": 1}
    result = align(llm, examples(), config(epochs=50, patience=2, **options))
    looks = [record["held_out"]["loss"] for record in result.history if "held_out" in record]
    assert len(losses_of(result)) < 150
    assert min(looks) == looks[-3]


class Stop(Exception):  # noqa: N818
    pass


def stop_after(steps: int) -> Any:
    def advance(progress: Progress) -> None:
        if progress.step == steps:
            raise Stop

    return advance


@pytest.mark.parametrize("steps", [3, 4, 11])  # at a look, between two, and late
def test_an_interrupted_run_resumes_as_if_it_had_not_been(
    llm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr("routehead_plugins.alignment.run._SAVE_SECONDS", -1.0)
    expected = align(llm, examples(), config())
    with pytest.raises(Stop):
        align(llm, examples(), config(), folder=tmp_path, advance=stop_after(steps))
    seen: list[int] = []
    resumed = align(
        llm, examples(), config(), folder=tmp_path, advance=lambda p: seen.append(p.step)
    )
    assert seen[0] == steps + 1
    assert equal(resumed, expected)
    assert resumed.gain == expected.gain
    assert losses_of(resumed) == losses_of(expected)
    # A finished run is not repeated.
    seen.clear()
    again = align(llm, examples(), config(), folder=tmp_path, advance=lambda p: seen.append(p.step))
    assert seen == []
    assert equal(again, expected)


KILLED = """
import os, signal
import routehead_plugins.alignment.run as module
from planted import config, examples, tiny
module._SAVE_SECONDS = -1.0
def advance(progress):
    if progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
module.align(tiny(), examples(), config(), folder={folder!r}, advance=advance)
"""


def test_a_killed_run_resumes(llm: FrozenLM, tmp_path: Path) -> None:
    state, tests = tmp_path / "state", Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(folder=str(state))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps: list[int] = []
    resumed = align(llm, examples(), config(), folder=state, advance=lambda p: steps.append(p.step))
    assert steps[0] == 6
    torch.testing.assert_close(losses_of(resumed), losses_of(align(llm, examples(), config())))


@pytest.mark.parametrize(
    ("options", "others", "message"),
    [
        ({"rank": 8}, {}, "a run with rank=4, this one has 8"),
        ({}, {"count": 13}, "a run with examples="),
        ({"losses": LossWeights(spread=1.0)}, {}, "a run with losses="),
    ],
)
def test_the_state_of_another_run_is_refused(
    llm: FrozenLM, tmp_path: Path, options: Any, others: Any, message: str
) -> None:
    with pytest.raises(Stop):
        align(llm, examples(), config(), folder=tmp_path, advance=stop_after(3))
    with pytest.raises(InputError, match=message) as caught:
        align(llm, examples(**others), config(**options), folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert "delete the file to start anew" in str(caught.value)


def test_a_damaged_state_is_refused(llm: FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        align(llm, examples(), config(), folder=tmp_path, advance=stop_after(3))
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be resumed from"):
        align(llm, examples(), config(), folder=tmp_path)


def test_two_runs_do_not_share_a_folder(llm: FrozenLM, tmp_path: Path) -> None:
    with (
        open_checkpoint(tmp_path, {}),
        pytest.raises(InputError, match="is used by another process"),
    ):
        align(llm, examples(), config(), folder=tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_folder_holds_what_peft_and_the_reranker_read(llm: FrozenLM, tmp_path: Path) -> None:
    result = align(llm, examples(), config())
    result.save(tmp_path)
    model = PeftModel.from_pretrained(families.tiny_model("llama"), tmp_path)
    merged: Any = model.merge_and_unload()
    theirs = FrozenLM(merged, families.tiny_tokenizer(), name="tiny")
    heads = HeadSet.load(tmp_path / "heads.json")
    assert heads == result.heads
    documents = examples()[0].documents
    for reader in (theirs, llm.with_adapter(tmp_path)):
        read = heads if reader.adapter else replace(heads, adapter=None)  # it is merged
        reranker = HeadRoutedAttentionReranker(reader, FixedHeads(read))
        scores = reranker.score("wolf", documents)
        ours = HeadRoutedAttentionReranker(
            llm.with_adapter(result.adapter), FixedHeads(result.heads)
        )
        assert scores == pytest.approx(ours.score("wolf", documents), abs=1e-3)
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["queries"] == 9
    assert history["settings"]["rank"] == 4


@pytest.mark.parametrize("layout", ["late", "parallel"])
@pytest.mark.parametrize("kind", ["log", "calibrated"])
def test_training_scores_are_those_of_the_reranker(llm: FrozenLM, kind: str, layout: str) -> None:
    held_out = examples(4)
    result = align(llm, examples(), config(epochs=2, signal=kind, layout=layout), held_out=held_out)
    reader = llm.with_adapter(result.adapter)
    reranker = HeadRoutedAttentionReranker(reader, FixedHeads(result.heads), drop_outliers=False)
    losses = []
    for example in held_out:
        scores = torch.tensor(reranker.score(example.query, example.documents))
        teacher = (torch.tensor(example.teacher) / 0.3).log_softmax(dim=0)
        losses.append(float((teacher.exp() * (teacher - scores.log_softmax(dim=0))).sum()))
    assert result.gain is not None
    assert sum(losses) / 4 == pytest.approx(result.gain.after, rel=1e-3)


def test_progress_counts_steps_and_tokens(llm: FrozenLM) -> None:
    seen: list[Progress] = []
    align(llm, examples(), config(epochs=1), advance=seen.append)
    assert [(one.step, one.steps) for one in seen] == [(1, 3), (2, 3), (3, 3)]
    assert 0 < seen[0].tokens < seen[-1].tokens
    assert "loss" in seen[-1].held_out
    assert [one.looked for one in seen] == [0, 0, 3]


def test_a_loss_that_is_not_finite_is_an_error(
    llm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "routehead_plugins.alignment.trainer.distillation",
        lambda scores, *_: scores.sum() * torch.nan,
    )
    with pytest.raises(InputError, match="the loss became nan in step 1; choose a lower"):
        align(llm, examples(), config(held_out=0.0))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "examples leaves no query to learn from"),
        (["text"], {}, "examples holds a str; give AlignmentExample objects"),
        (
            examples(2, teacher=False, grades=True),
            {"losses": LossWeights(preference=0)},
            "has nothing to learn from with distillation=1 and preference=0",
        ),
    ],
)
def test_examples_that_cannot_be_learned_from_are_refused(
    llm: FrozenLM, given: Sequence[Any], options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        align(llm, given, config(**options))


def test_a_run_goes_on_from_the_adapter_of_another(llm: FrozenLM) -> None:
    first = align(llm, examples(), config(held_out=0.0), held_out=examples(6))
    start = replace(first.adapter, heads=first.heads)
    second = align(llm, examples(), config(held_out=0.0), held_out=examples(6), start=start)
    assert first.gain is not None
    assert second.gain is not None
    # Weights of heads are taken over as well.
    assert second.gain.before == pytest.approx(first.gain.after, rel=1e-4)
    assert second.gain.after < second.gain.before
    assert second.settings["start"] == start.label
    assert "start" not in first.settings


@pytest.mark.parametrize(
    "weights",
    [None, [0.5, -1.0], [1.0, 2.0, 3.0]],
    ids=["none", "negative", "of other heads"],
)
def test_weights_that_cannot_be_taken_over_start_equal(
    llm: FrozenLM, weights: list[float] | None
) -> None:
    heads = HeadSet([(0, 0), (1, 1)])
    start = llm.new_adapter(range(2), rank=2)
    own = HeadSet(
        [(0, 0), (1, 1)] if weights is None else [(0, n) for n in range(len(weights))],
        recipe=Recipe(weights=weights),
    )
    settings = config(heads=heads, held_out=0.0, epochs=1)
    begun, fresh = (
        align(llm, examples(), settings, start=replace(start, heads=kept)) for kept in (own, None)
    )
    assert losses_of(begun) == losses_of(fresh)


def test_an_llm_with_an_adapter_is_refused(llm: FrozenLM) -> None:
    adapted = llm.with_adapter(llm.new_adapter(range(2), name="first"))
    with pytest.raises(UnsupportedModelError, match="has the adapter 'first'; train with the LLM"):
        align(adapted, examples(), config())
