"""Options for loading an LLM and reading its heads, in one place.

``RerankerOptions`` feeds ``HeadRoutedAttentionReranker.from_pretrained``, every adapter and every
command. To add an option, add it to the two classes below and, where the command line should have
it too, a line to ``cli/options.py``. Importing this module loads no
torch, so that importing an adapter and printing ``--help`` do not either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from routehead_plugins.heads import HeadSet

if TYPE_CHECKING:
    import torch

HeadsLike: TypeAlias = HeadSet | str | Path | Sequence[tuple[int, int]]
"""A head set, its name, its file, or ``(layer, head)`` pairs."""


class OptionValues(TypedDict, total=False):
    """The fields of ``RerankerOptions`` except ``model``, as keyword arguments."""

    heads: HeadsLike | None
    router: Any
    device: str | torch.device | None
    dtype: str | torch.dtype
    layout: str | None
    document_cache: str | int | None
    window: int | None
    stride: int | None
    max_doc_tokens: int | None
    first_stage_weight: float | None
    local_files_only: bool


@dataclass(frozen=True)
class RerankerOptions:
    """Options for loading an LLM, choosing its heads and laying out the prompt.

    Values are checked by the code that uses them.

    Attributes:
        model: ``"embedded"``, a Hub id such as ``"Qwen/Qwen3-0.6B"``, a local directory, or a
            ``.gguf`` file.
        heads: ``"all"``, ``"layers:10-19"``, ``"13-18,13-1"``, a published set such as
            ``"qr:Llama-3.1-8B-Instruct"``, ``"routed"`` or ``"routed:FOLDER"``, a ``HeadSet``, its
            file, or ``(layer, head)`` pairs. ``None`` leaves the choice to the router.
        router: A ``Router``, its folder, or its id on the Hub. Without heads and router: the
            router that comes with the library for this LLM, or all heads where there is none.
        device: ``None`` picks cuda, then mps, then cpu.
        dtype: ``"auto"`` takes bfloat16 where the device is fast at it, float32 elsewhere; or a
            name or torch dtype.
        layout: ``"sequential"`` (all documents in one prompt) or ``"parallel"`` (each on its own,
            any number of them); ``None`` takes the layout that the heads were chosen for.
        document_cache: Memory for keys and values that later queries reuse, such as ``"2GB"``:
            of documents in the parallel layout, of whole lists in the sequential one.
        window: Documents read at once in the sequential layout; ``None`` for all.
        stride: Step between window starts, in documents; ``None`` for half a window.
        max_doc_tokens: Longer documents are cut here, the query never is.
        first_stage_weight: Weight of the candidates' own scores, where all carry one; ``None``
            takes the weight fitted together with the heads, if any.
        local_files_only: Whether to use only the local cache of the Hub, never the network.
    """

    model: str = "embedded"
    heads: HeadsLike | None = None
    router: Any = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype = "auto"
    layout: str | None = None
    document_cache: str | int | None = None
    window: int | None = None
    stride: int | None = None
    max_doc_tokens: int | None = None
    first_stage_weight: float | None = None
    local_files_only: bool = False
