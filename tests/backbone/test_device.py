"""Device and number format: what is asked for, or what is measured to be fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from routehead_plugins.backbone import device as precision
from routehead_plugins.backbone.device import check_finite, pick_device, pick_dtype
from routehead_plugins.errors import InputError, RouteHeadError

CPU = torch.device("cpu")


def test_auto_is_what_is_fast_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_dtype", {CPU: torch.bfloat16}.__getitem__)
    assert pick_dtype("auto", CPU) == torch.bfloat16


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_dtype", lambda _: pytest.fail("measured"))
    assert pick_dtype("float32", CPU) == torch.float32
    assert pick_dtype(torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_format_can_be_named(name: str, dtype: torch.dtype) -> None:
    assert pick_dtype(name, CPU) == dtype
    assert pick_dtype(dtype, CPU) == dtype


NO_FORMATS: list[Any] = [
    *("int8", "complex64", "float31", "float8_e4m3fn", "Tensor", "", "Auto", "nn"),
    *(torch.int8, torch.float8_e5m2, 1, 1.5, None, b"float32", ["float32"]),
]


@pytest.mark.parametrize("name", NO_FORMATS, ids=repr)
def test_what_is_no_floating_point_format_is_refused(name: Any) -> None:
    with pytest.raises(InputError) as error:
        pick_dtype(name, CPU)
    assert str(error.value) == (
        f"dtype={name!r} is not a floating-point format; "
        'give "auto", "float32", "bfloat16" or "float16".'
    )


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_device_asked_for_is_used(device: str | torch.device) -> None:
    assert pick_device(device) == torch.device(device)


@pytest.mark.parametrize(
    ("cuda", "mps", "picked"),
    [(True, True, "cuda:1"), (True, False, "cuda:1"), (False, True, "mps"), (False, False, "cpu")],
)
def test_cuda_comes_before_mps_and_mps_before_the_processor(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, picked: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(picked)


NO_DEVICES: list[Any] = ["banana", "cuda:99", "cpu:x", "", 1.5, True, -1, 10**30, ["cpu"], "meta"]


@pytest.mark.parametrize("device", NO_DEVICES, ids=repr)
def test_a_device_that_is_not_there_is_refused_in_one_line(device: Any) -> None:
    with pytest.raises(InputError) as error:
        pick_device(device)
    before, after = (
        f"device={device!r} is not available (",
        "); leave device=None to use the best one available.",
    )
    message = str(error.value)
    assert message.startswith(before)
    assert message.endswith(after)
    assert len(message) > len(before) + len(after)  # the reason is in between
    assert "\n" not in message
    assert len(message) < 300


def test_the_reason_is_given_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no driver\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(InputError) as error:
        pick_device("cuda")
    assert str(error.value) == (
        "device='cuda' is not available (no driver Compile with TORCH_USE_CUDA_DSA); "
        "leave device=None to use the best one available."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, 'float16; load it with dtype="float32".'),
        (torch.bfloat16, 'bfloat16; load it with dtype="float32".'),
        (
            torch.float32,
            "float32; its weights are damaged or out of range: download or save it again.",
        ),
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_advice_that_fits_the_format(
    value: float, dtype: torch.dtype, advice: str
) -> None:
    check_finite(torch.zeros(2, 3), "tiny", dtype)
    with pytest.raises(RouteHeadError) as error:
        check_finite(torch.tensor([[0.0, value], [1.0, 2.0]]), "tiny", dtype)
    assert str(error.value) == f"'tiny' computed numbers that are not finite in {advice}"
