"""What training is given: wrong types, shapes and numbers end in an InputError of one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tables import signal_set
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.signals import SignalSet
from routehead_plugins.training import (
    FitOptions,
    LabelOptions,
    choose_labels,
    detect,
    fit_router,
    fit_weights,
    split_folds,
)

SIGNALS = signal_set()
COUNT = len(SIGNALS.queries)
EMBEDDINGS = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(0))
OPTIONS = FitOptions(layer=1)


def changed(**tensors: Callable[[Tensor], Tensor]) -> SignalSet:
    """The signals with changes to tensors of the first query that has contrast."""
    queries = list(SIGNALS.queries)
    index = next(n for n, query in enumerate(queries) if query.has_contrast)
    values: dict[str, Any] = {
        name: change(getattr(queries[index], name).clone()) for name, change in tensors.items()
    }
    queries[index] = replace(queries[index], **values)
    return SIGNALS.subset(queries)


def spoiled(tensor: Tensor) -> Tensor:
    tensor[..., 0] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        (changed(mass=spoiled), " are not finite numbers; "),
        (changed(gains=spoiled), "judgments of query "),
        (changed(ideal_gains=spoiled), "judgments of query "),
        (changed(mass=lambda tensor: tensor[:, 1:]), "mass of query "),
        (changed(calibrated=lambda tensor: tensor[1:]), "calibrated of query "),
        (changed(first_stage=lambda tensor: tensor[None]), "first_stage of query "),
        (changed(gains=lambda tensor: tensor.long()), " is not a floating-point tensor; "),
        (SIGNALS.subset([]), "signals has no queries; compute signals of judged queries first."),
        ([1.0, 2.0], "signals is a list; give a SignalSet."),
        (None, "signals is a NoneType; give a SignalSet."),
    ],
)
@pytest.mark.parametrize(
    "train",
    [
        lambda signals: detect(signals, "ndcg", 2),
        fit_weights,
        lambda signals: fit_router(signals, EMBEDDINGS, OPTIONS),
        lambda signals: choose_labels(signals, None, [LabelOptions(candidates=4)]),
    ],
)
def test_signals_that_cannot_be_learned_from_are_refused(
    train: Callable[[Any], object], signals: object, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        train(signals)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (EMBEDDINGS[1:], f"there are {COUNT - 1} embeddings for {COUNT} queries; give one for"),
        (EMBEDDINGS[:, 0], f"embeddings has shape ({COUNT},); give one of shape ({COUNT}, width)."),
        (EMBEDDINGS[:, :0], f"embeddings has shape ({COUNT}, 0); give one of shape"),
        (spoiled(EMBEDDINGS.clone()), "embeddings are not finite numbers; compute them again."),
        (EMBEDDINGS.long(), "embeddings is a torch.Tensor; give a floating-point tensor of shape"),
        (EMBEDDINGS.tolist(), "embeddings is a list; give a floating-point tensor of shape"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embeddings: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        fit_router(SIGNALS, embeddings, OPTIONS)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("seed", [1.5, "0", True, None, 2**63])
def test_seeds_that_are_none_are_refused(seed: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: FitOptions(layer=1, seed=seed),
        lambda: LabelOptions(seed=seed),
        lambda: fit_weights(SIGNALS, seed=seed),
        lambda: detect(SIGNALS, "ndcg", 2, seed=seed),
        lambda: split_folds(SIGNALS.queries, 5, seed),
    ]
    for call in calls:
        with pytest.raises(InputError, match="is not a seed; give a whole number of at most 63"):
            call()


@pytest.mark.parametrize("folds", [0, 1, -2, 2.0, "5"])
def test_folds_that_hold_nothing_out_are_refused(folds: Any) -> None:
    with pytest.raises(InputError, match=r"^folds="):
        split_folds(SIGNALS.queries, folds, 0)


def test_options_of_another_type_are_refused() -> None:
    wrong: Any = {"layer": 1}
    with pytest.raises(InputError, match=r"^options is a dict; give FitOptions\.$"):
        fit_router(SIGNALS, EMBEDDINGS, wrong)
    with pytest.raises(InputError, match=r"^labels is a dict; give LabelOptions\.$"):
        FitOptions(layer=1, labels=wrong)
