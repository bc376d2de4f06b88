"""The options: one list of them, whose two spellings agree."""

from __future__ import annotations

from dataclasses import fields

from routehead_plugins.options import OptionValues, RerankerOptions


def test_keyword_arguments_are_the_fields_but_the_model_with_their_types() -> None:
    types = {field.name: field.type for field in fields(RerankerOptions)}
    assert types.pop("model") == "str"
    keywords = OptionValues.__annotations__
    assert {name: hint.__forward_arg__ for name, hint in keywords.items()} == types


def test_every_option_has_a_default_and_a_sentence_on_its_meaning() -> None:
    RerankerOptions()
    section = (RerankerOptions.__doc__ or "").partition("Attributes:")[2]
    for field in fields(RerankerOptions):
        assert f"        {field.name}: " in section
