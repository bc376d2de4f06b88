"""Choose the device and the number format."""

from __future__ import annotations

import torch
from torch import Tensor

from routehead_plugins.backbone.fast_dtype import fast_dtype
from routehead_plugins.errors import InputError, RouteHeadError, short_repr
from routehead_plugins.files import reason

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the given device, or the best one available: cuda, then mps, then cpu.

    Args:
        device: Name of the device or a torch device; ``None`` picks one.

    Raises:
        InputError: The device is unknown or not present on this machine.
    """
    if device is not None:
        advice = "leave device=None to use the best one available."
        try:
            picked = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
            given = str(device) if isinstance(device, torch.device) else device
            raise InputError(
                f"device={short_repr(given)} is not available ({reason(error)}); {advice}"
            ) from error
        if picked.type == "meta":
            raise InputError(f"device='meta' is not available (it holds no numbers); {advice}")
        return picked
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the given number format; ``"auto"`` picks float32 or bfloat16 by their speed.

    Args:
        dtype: ``"auto"``, a name such as ``"float32"``, or a torch dtype.
        device: Device on which the LLM will run.

    Raises:
        InputError: It is not a floating-point format of 16, 32 or 64 bits.
    """
    given = dtype
    if isinstance(dtype, str):
        dtype = fast_dtype(device) if dtype == "auto" else getattr(torch, dtype, dtype)
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES:
        return dtype
    raise InputError(
        f"dtype={short_repr(given)} is not a floating-point format; "
        'give "auto", "float32", "bfloat16" or "float16".'
    )


def check_finite(values: Tensor, name: str, dtype: torch.dtype) -> None:
    """Check that what an LLM computed are finite numbers.

    Args:
        values: Scores, signals or embeddings.
        name: Name of the LLM, for the message.
        dtype: Number format of its parameters, which decides on the advice.

    Raises:
        RouteHeadError: A value is infinite or not a number.
    """
    if bool(values.isfinite().all()):
        return
    format_name = str(dtype).removeprefix("torch.")
    advice = 'load it with dtype="float32"'
    if dtype.itemsize >= torch.float32.itemsize:
        advice = "its weights are damaged or out of range: download or save it again"
    raise RouteHeadError(
        f"{name!r} computed numbers that are not finite in {format_name}; {advice}."
    )
