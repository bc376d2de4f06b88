"""Memory: what is free, and what a method takes at its peak beyond the model itself.

On an accelerator its allocator counts. On a CPU the method runs in a process of its own: the
resident set is noted when the model is loaded and a query of two documents has been run, the
kernel's high-water mark is reset, the query is run once, and the mark is read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from subject import SubjectOptions

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Where containers on Linux have their limit and use, second version of control groups, then first.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_bytes(device: torch.device) -> int:
    """How much more memory can be taken."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        # Half of all there is, where nobody says how much of it is free.
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free


def extra_bytes(options: SubjectOptions, method: str, documents: int) -> int:
    """Peak of a method on the CPU over the loaded model, measured in a process of its own.

    Raises:
        RuntimeError: The process failed; the message is the last line it wrote.
    """
    order = json.dumps({"options": asdict(options), "method": method, "documents": documents})
    child = subprocess.run(
        [sys.executable, __file__, order], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        raise RuntimeError(last)
    return int(child.stdout.strip().splitlines()[-1])


def peak_over_now(call: Callable[[], object], device: torch.device) -> int:
    """Run something, and say by how much memory rose at its highest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    # getrusage() will not do: its maximum is never reset, and loading a model takes twice its size.
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def can_measure(device: torch.device) -> bool:
    """Whether peaks can be measured on this device and system."""
    return device.type == "cuda" or (device.type == "cpu" and os.access(_CLEAR, os.W_OK))


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}")


def _child(order: dict[str, Any]) -> int:
    from methods import make_method
    from subject import SubjectOptions, load_subject
    from workload import make_documents, make_queries

    subject = load_subject(SubjectOptions(**order["options"]))
    encoder = subject.llm.encoder
    documents = make_documents(encoder, max(2, order["documents"]), subject.doc_tokens)
    first, second = make_queries(encoder, 2)
    small = make_method(order["method"], subject, documents[:2])
    small.prepare(first)
    small.run(first)
    method = make_method(order["method"], subject, documents[: order["documents"]])
    method.prepare(second)
    return peak_over_now(lambda: method.run(second), subject.device)


if __name__ == "__main__":
    print(_child(json.loads(sys.argv[1])))
