"""Find out whether bfloat16 or float32 is faster on this machine, and remember it on disk.

The ratio of the two differs by a factor of a hundred between processors, therefore both are timed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from routehead_plugins.errors import InputError
from routehead_plugins.files import atomic_write_bytes, user_cache

# Shape of a feed-forward product of a small LLM over a few hundred tokens, and over a few.
_INNER, _COLUMNS = 576, 1536
_ROWS, _FEW_ROWS = 256, 8
_REPEATS = 25
_MAX_SECONDS = 0.2
# Where bfloat16 is this many times slower over a few tokens, it is not timed over hundreds.
_HOPELESS = 3.0
# Smaller speed-ups do not make up for bfloat16's three digits instead of float32's seven.
_MIN_SPEEDUP = 1.3

_FORMATS = (torch.float32, torch.bfloat16)
# Parts of the names of processor features on which the speed of either format depends.
_FEATURES = ("avx", "amx", "fma", "bf16", "fp16", "i8mm", "sve", "sme", "asimd")
# Variables that make torch's libraries ignore features of the processor.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where it is clearly faster, else float32.

    The answer is kept in a small file, one per machine and setting, in the folder
    ``routehead/dtype`` of the user's cache (``$XDG_CACHE_HOME``, or ``~/.cache``). A file that
    cannot be read or written is as good as none.

    Args:
        device: Device on which the LLM will run.
    """
    setting = _setting(device)
    path = _answer_path(setting)
    remembered = None if path is None else _read_answer(path, setting)
    if remembered is not None:
        return remembered
    dtype, is_sure = _measure(device)
    if path is not None and is_sure:
        with suppress(OSError, InputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() or not path.exists():  # not a pipe, which would block
                atomic_write_bytes(path, _answer(dtype, setting))
    return dtype


def _measure(device: torch.device) -> tuple[torch.dtype, bool]:
    """Time both formats; also tell whether the answer is sure enough to be kept."""
    float32, bfloat16 = _best_times(device, _FEW_ROWS)
    is_sure = bfloat16 >= _HOPELESS * float32
    # A machine that is busy with other work may be too slow to time hundreds of tokens now.
    if not is_sure and bfloat16 * _ROWS / _FEW_ROWS < _MAX_SECONDS:
        float32, bfloat16 = _best_times(device, _ROWS)
        is_sure = True
    is_fast = bfloat16 * _MIN_SPEEDUP < float32
    return torch.bfloat16 if is_fast else torch.float32, is_sure


def _best_times(device: torch.device, rows: int) -> tuple[float, float]:
    """Time a product of some rows in float32 and bfloat16, in seconds.

    The two take turns, so that other work on the machine slows both. The shortest of several runs
    counts, as noise only adds time. The time for all runs is limited.
    """
    products = [_product(dtype, device, rows) for dtype in _FORMATS]
    best = [float("inf")] * len(_FORMATS)
    end = time.perf_counter() + _MAX_SECONDS
    for run in range(_REPEATS):
        # The first run of a format may compile its kernel; at least one more is needed.
        if run > 1 and time.perf_counter() > end:
            break
        for index, (left, right) in enumerate(products):
            start = time.perf_counter()
            (left @ right).sum().item()  # .item() waits for an accelerator to finish
            best[index] = min(best[index], time.perf_counter() - start)
    return best[0], best[1]


def _product(
    dtype: torch.dtype, device: torch.device, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.ones(rows, _INNER, dtype=dtype, device=device)
    return left, torch.ones(_INNER, _COLUMNS, dtype=dtype, device=device)


def _setting(device: torch.device) -> str:
    """Describe all that the speed of the two formats depends on."""
    lines = [f"torch {torch.__version__}", f"device {device.type}"]
    if device.type == "cuda":
        lines.append(torch.cuda.get_device_name(device))
    lines += [*_processor(), f"threads {torch.get_num_threads()}"]
    lines += [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return "\n".join(lines) + "\n"


def _processor() -> list[str]:
    """Return the model and the relevant features of the processor."""
    lines = [platform.machine(), platform.processor()]
    with suppress(OSError, ValueError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
        named = {name.strip().lower(): value.strip() for name, value in fields.items()}
        lines += [named[name] for name in ("model name", "cpu part") if name in named]
        features = named.get("flags", named.get("features", "")).split()
        lines.append(" ".join(f for f in features if any(part in f for part in _FEATURES)))
    return lines


def _answer_path(setting: str) -> Path | None:
    """Return the file for a setting; ``None`` if the user has no folder for caches."""
    folder = user_cache("dtype")
    name = hashlib.sha256(setting.encode()).hexdigest()[:16]
    return None if folder is None else folder / f"{name}.txt"


def _answer(dtype: torch.dtype, setting: str) -> bytes:
    return f"{dtype}\n{setting}".encode()


def _read_answer(path: Path, setting: str) -> torch.dtype | None:
    """Read a file; whatever is not exactly an answer for the setting counts as none."""
    answers = {_answer(dtype, setting): dtype for dtype in _FORMATS}
    with suppress(OSError):
        if path.is_file():  # not a pipe, which would block
            with path.open("rb") as file:
                return answers.get(file.read(max(map(len, answers)) + 1))
    return None
