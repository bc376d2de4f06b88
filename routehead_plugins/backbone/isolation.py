"""Settings of the caller's thread that are meant for the caller's own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Switch off autocast and the default device in this thread.

    Autocast would round products to half the digits, also those that caches keep for later. The
    default number format belongs to the whole process and cannot be switched off for one thread:
    tensors are made with a format of their own instead.

    Args:
        device: Device of the LLM.
    """
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # Early releases of PyTorch cannot tell the default device once it was set and unset.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
