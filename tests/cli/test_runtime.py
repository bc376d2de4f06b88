"""What commands share: the settings that tell one job from another."""

from __future__ import annotations

from dataclasses import fields

from routehead_plugins.cli.runtime import NOT_SETTINGS, settings
from routehead_plugins.options import RerankerOptions


def test_every_option_is_a_setting_or_named_as_none() -> None:
    options = RerankerOptions("m", dtype="float32", device="cpu", window=3)
    names = {field.name for field in fields(RerankerOptions)}
    recorded = settings(options)
    assert names >= NOT_SETTINGS
    assert recorded.keys() == (names - NOT_SETTINGS) | {"version"}
    assert (recorded["model"], recorded["window"]) == ("m", 3)
    assert (recorded["device"], recorded["dtype"]) == ("cpu", "float32")


def test_device_and_dtype_are_recorded_as_picked() -> None:
    recorded = settings(RerankerOptions(device=None, dtype="auto"))
    assert recorded["device"] in ("cpu", "cuda", "mps")
    assert recorded["dtype"] in ("float32", "bfloat16")
