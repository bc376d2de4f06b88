"""Device and number format, chosen by measurement."""

from __future__ import annotations

import time
from functools import cache

import torch

from routehead_plugins.errors import InputError

# Shape of one feed-forward product of a small LLM over a few hundred tokens.
_ROWS, _INNER, _COLUMNS = 256, 576, 1536
_REPEATS = 25
# Below this gain the three digits of bfloat16 are not worth giving up float32's seven for.
_WORTHWHILE = 1.3


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, or the fastest there is: cuda, then mps, then cpu.

    Raises:
        InputError: The device is unknown or not present on this machine.
    """
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device={str(device)!r} is not available ({str(error).splitlines()[0]}); "
                "leave device=None to have one picked."
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format asked for; ``"auto"`` takes the faster one on this device.

    Args:
        dtype: ``"auto"``, a name such as ``"float32"``, or a torch dtype.
        device: Where the LLM will run.

    Raises:
        InputError: The name is not that of a floating-point format.
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


@cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    """Time the same product in both formats; processors differ by a factor of twenty here."""
    seconds = {dtype: _best_time(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    fast = seconds[torch.bfloat16] * _WORTHWHILE < seconds[torch.float32]
    return torch.bfloat16 if fast else torch.float32


def _best_time(dtype: torch.dtype, device: torch.device) -> float:
    """Shortest of several runs: noise on a shared machine only ever adds time."""
    left = torch.ones(_ROWS, _INNER, dtype=dtype, device=device)
    right = torch.ones(_INNER, _COLUMNS, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        (left @ right).sum().item()  # .item() waits for an accelerator to finish
        best = min(best, time.perf_counter() - start)
    return best
