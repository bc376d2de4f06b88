"""Choose the device and the number format."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

from routehead_plugins.errors import InputError, RouteHeadError

# Shape of a feed-forward product of a small LLM over a few hundred tokens.
_ROWS, _INNER, _COLUMNS = 256, 576, 1536
_REPEATS = 25
# Smaller speed-ups do not make up for bfloat16's three digits instead of float32's seven.
_MIN_SPEEDUP = 1.3


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the given device, or the best one available: cuda, then mps, then cpu.

    Args:
        device: Name of the device or a torch device; ``None`` picks one.

    Raises:
        InputError: The device is unknown or not present on this machine.
    """
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device={str(device)!r} is not available ({str(error).splitlines()[0]}); "
                "leave device=None to use the best one available."
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the given number format; ``"auto"`` picks float32 or bfloat16 by their speed.

    Args:
        dtype: ``"auto"``, a name such as ``"float32"``, or a torch dtype.
        device: Device on which the LLM will run.

    Raises:
        InputError: The name is not a floating-point format of torch.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return _fast_dtype(device)
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise InputError(
            f"dtype={dtype!r} is not a floating-point format; "
            'give "auto", "float32", "bfloat16" or "float16".'
        )
    return named


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


@cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where it is fast enough, else float32; both are timed on the device."""
    # Timed, because the ratio of the two differs by a factor of twenty between processors.
    seconds = {dtype: _best_time(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    fast = seconds[torch.bfloat16] * _MIN_SPEEDUP < seconds[torch.float32]
    return torch.bfloat16 if fast else torch.float32


def _best_time(dtype: torch.dtype, device: torch.device) -> float:
    """Time a matrix product, in seconds: the shortest of several runs, as noise only adds time."""
    left = torch.ones(_ROWS, _INNER, dtype=dtype, device=device)
    right = torch.ones(_INNER, _COLUMNS, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        (left @ right).sum().item()  # .item() waits for an accelerator to finish
        best = min(best, time.perf_counter() - start)
    return best
