"""The options: one list of them, whose two spellings agree."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routehead_plugins.errors import InputError
from routehead_plugins.options import OptionValues, RerankerOptions


def test_keyword_arguments_are_the_fields_but_the_model_with_their_types() -> None:
    types = {field.name: field.type for field in fields(RerankerOptions)}
    assert types.pop("model") == "str"
    keywords = OptionValues.__annotations__
    assert {name: hint.__forward_arg__ for name, hint in keywords.items()} == types


def test_every_option_has_a_default_and_a_sentence_on_its_meaning() -> None:
    RerankerOptions()
    section = inspect.cleandoc(RerankerOptions.__doc__ or "").partition("Attributes:")[2]
    for field in fields(RerankerOptions):
        assert f"\n    {field.name}: " in section


def test_a_token_is_never_shown() -> None:
    assert "hf_secret" not in repr(RerankerOptions(token="hf_secret"))
    with pytest.raises(InputError) as error:
        RerankerOptions(token=["hf_secret"])  # type: ignore[arg-type]
    assert "hf_secret" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": None}, "model=None is a NoneType; give a text."),
        ({"model": ["x"]}, "model=['x'] is a list; give a text."),
        ({"model": " "}, "model=' ' is blank; give a text."),
        ({"device": ["cpu"]}, "device=['cpu'] is a list; give a name such as"),
        ({"device": True}, "device=True is a bool; give a name such as"),
        ({"dtype": 16}, "dtype=16 is a int; give a name such as"),
        ({"layout": 3}, "layout=3 is a int; give a name, or leave it out."),
        ({"window": 2.5}, "window=2.5 is not a count; give a whole number, 1 or more."),
        ({"window": "3"}, "window='3' is not a count"),
        ({"window": True}, "window=True is not a count"),
        ({"stride": 0, "window": 3}, "stride=0 is not a count"),
        ({"max_doc_tokens": math.inf}, "max_doc_tokens=inf is not a count"),
        ({"first_stage_weight": "x"}, "first_stage_weight='x' must be a finite number, 0 or more"),
        ({"first_stage_weight": -1}, "first_stage_weight=-1 must be a finite number, 0 or more"),
        ({"first_stage_weight": 10**400}, "must be a finite number, 0 or more"),
        ({"local_files_only": "yes"}, "local_files_only='yes' must be True or False."),
    ],
    ids=range(16),
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(
    wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as error:
        RerankerOptions(**wrong)
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


def test_options_become_plain_values() -> None:
    given: dict[str, Any] = {
        "model": Path("some") / "folder",
        "dtype": None,
        "window": np.int64(4),
        "stride": torch.tensor(2),
        "max_doc_tokens": np.uint16(9),
        "first_stage_weight": np.float32(0.5),
        "local_files_only": np.True_,
    }
    assert repr(RerankerOptions(**given)) == repr(
        RerankerOptions(
            model=str(Path("some") / "folder"),
            window=4,
            stride=2,
            max_doc_tokens=9,
            first_stage_weight=0.5,
            local_files_only=True,
        )
    )


def test_objects_of_torch_and_numbers_of_accelerators_are_kept() -> None:
    given: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float16}
    assert vars(RerankerOptions(**given)) == vars(RerankerOptions()) | given
    given = {"device": 0}
    assert vars(RerankerOptions(**given)) == vars(RerankerOptions()) | given
