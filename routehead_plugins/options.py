"""Options for loading an LLM and reading its heads, in one place.

``RerankerOptions`` feeds ``HeadRoutedAttentionReranker.from_pretrained``, every adapter and every
command. To add an option, add it to the two classes below and, where the command line should have
it too, a line to ``cli/options.py``. Importing this module loads no
torch, so that importing an adapter and printing ``--help`` do not either.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from routehead_plugins.data import check_count, check_flag, check_number, check_text
from routehead_plugins.errors import InputError, class_name, short_repr
from routehead_plugins.heads import HeadSet

if TYPE_CHECKING:
    import torch

HeadsLike: TypeAlias = HeadSet | str | Path | Sequence[tuple[int, int]]
"""A head set, its name, its file, or ``(layer, head)`` pairs."""


class LoadValues(TypedDict, total=False):
    """The fields of ``LoadOptions``, as keyword arguments."""

    local_files_only: bool
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    trust_remote_code: bool
    model_kwargs: Mapping[str, Any] | None


class OptionValues(LoadValues, total=False):
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
    drop_query_copies: bool
    documents: str | Path | None
    refine: int | None
    adapter: Any
    long_documents: str
    chunk_tokens: int | None
    chunk_stride: int | None
    chunk_aggregation: str
    on_too_long: str


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for finding and loading an LLM, named as in transformers' ``from_pretrained``.

    Attributes:
        local_files_only: Whether to use only the local cache of the Hub, never the network.
        revision: Branch, tag or commit of the LLM on the Hub.
        token: Access token of the Hub, for the LLM, router and adapter.
        cache_dir: Local cache of the Hub.
        trust_remote_code: Whether code that comes with the LLM may run.
        model_kwargs: Further arguments for loading the weights.

    Raises:
        InputError: A value is of another type, or an argument is one that is not free to choose.
    """

    local_files_only: bool = False
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        given: Any = self  # callers need not check types
        for name in ("local_files_only", "trust_remote_code"):
            self._set(name, check_flag(name, getattr(given, name)))
        self._set("cache_dir", _as_text(given.cache_dir))
        for name in ("revision", "cache_dir"):
            if getattr(given, name) is not None:
                check_text(name, getattr(given, name))
        if not isinstance(given.token, str | bool | None) or given.token == "":
            raise InputError(
                f"token is a {class_name(given.token)}; give the text of an access token, or leave "
                "it out."
            )
        self._check_model_kwargs(given.model_kwargs)

    @property
    def hub(self) -> dict[str, Any]:
        """The options that hold for routers and adapters from the Hub as well."""
        names = ("local_files_only", "token", "cache_dir")
        return {name: getattr(self, name) for name in names}

    def _check_model_kwargs(self, kwargs: object) -> None:
        if kwargs is None:
            return
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise InputError(
                f"model_kwargs={short_repr(kwargs)} is not a mapping of names to values; give "
                'such as {"quantization_config": ...}.'
            )
        for key in kwargs:
            if key in _NOT_FREE:
                raise InputError(f"model_kwargs has {key!r}, {_NOT_FREE[key]}.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


_COUNTS = ("window", "stride", "max_doc_tokens", "refine", "chunk_tokens", "chunk_stride")
_LONG_TEXTS = {"long_documents": ("truncate", "chunk"), "on_too_long": ("cut", "error")}
_TWICE = "which is an option of its own; give it there"
_DEVICES = "but an LLM is read whole on one device; give device= alone"
# Arguments that would contradict what the library does itself, and why.
_NOT_FREE = {
    "attn_implementation": "but attention is computed by the library, whatever the model has; "
    "leave it out",
    **dict.fromkeys((f.name for f in fields(LoadOptions)), _TWICE),
    **dict.fromkeys(("dtype", "torch_dtype"), "which is the option dtype; give it there"),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "tp_plan"), _DEVICES),
    "gguf_file": "which is the model itself; give the path of the file as the model",
    **dict.fromkeys(
        ("config", "output_loading_info", "state_dict", "subfolder"),
        "which the library gives itself; load the model yourself and wrap it: FrozenLM(model, "
        "tokenizer)",
    ),
}


@dataclass(frozen=True)
class RerankerOptions(LoadOptions):
    """Options for loading an LLM, choosing its heads and laying out the prompt.

    Types and ranges are checked here, before an LLM is loaded; whether a name exists, such as that
    of a layout, is checked by the code that uses it.

    Attributes:
        model: ``"embedded"``, a Hub id such as ``"Qwen/Qwen3-0.6B"``, a local directory, or a
            ``.gguf`` file.
        heads: ``"all"``, ``"layers:10-19"``, ``"13-18,13-1"``, a published set such as
            ``"qr:Llama-3.1-8B-Instruct"``, ``"routed"`` or ``"routed:FOLDER"``, a ``HeadSet``, its
            file, or ``(layer, head)`` pairs. ``None`` leaves the choice to the router.
        router: A ``Router``, its folder, or its id on the Hub. Without heads and router: the
            router that comes with the library for this LLM, or all heads where there is none.
        adapter: A LoRA adapter from `routehead align`: an ``Adapter``, its folder, or its id on the
            Hub. The LLM itself stays as it is. Without heads and router, the heads in the adapter's
            folder are read.
        device: ``None`` picks cuda, then mps, then cpu.
        dtype: ``"auto"`` takes bfloat16 where the device is fast at it, float32 elsewhere; or a
            name or torch dtype.
        layout: ``"sequential"`` (all documents in one prompt), ``"parallel"`` (each on its own,
            any number of them) or ``"late"`` (the same, hidden from all but the heads that are
            read); ``None`` takes the layout that the heads were chosen for.
        document_cache: Memory for keys and values that later queries reuse, such as ``"2GB"``:
            of documents in the parallel and late layouts, of whole lists in the sequential one.
        window: Documents read at once in the sequential layout; ``None`` for all.
        stride: Step between window starts, in documents; ``None`` for half a window.
        max_doc_tokens: Longer documents are cut here, the query never is.
        first_stage_weight: Weight of the candidates' own scores, where all carry one; ``None``
            takes the weight fitted together with the heads, if any.
        drop_query_copies: Whether passages of documents that repeat the query are left out before
            the LLM reads them, so that a copied query lifts no document. The score of a document
            that has one is replaced by the mean of the others. A document that is such a passage
            and nothing else ranks last like a blank one, so leave it off where questions are to be
            found by their own words.
        documents: Folder of a document index, for the late layout: its documents need not be run.
            Without heads and router, the heads that it was made for are read, and without
            ``max_doc_tokens``, documents are cut where its were.
        refine: Late layout: how many of the best documents are read once more in the parallel
            layout, with the heads that come with the library for it, and put in that order;
            ``None`` for none.
        long_documents: ``"truncate"`` reads a document up to ``max_doc_tokens``; ``"chunk"``
            divides one that is longer than ``chunk_tokens`` into passages, each read on its own.
        chunk_tokens: Longest passage; ``None`` for 256. Sentences are not torn where one ends
            near the end of a passage.
        chunk_stride: Tokens from the start of a passage to that of the next; ``None``: passages
            have no common part.
        chunk_aggregation: What a document gets at each head: ``"max"`` of its passages,
            ``"first"``, or ``"mean_of_top(3)"``.
        on_too_long: What becomes of documents and queries that do not fit the LLM's context:
            ``"cut"`` reads their beginning and warns, ``"error"`` raises ``PromptTooLongError``.
        local_files_only: Whether to use only the local cache of the Hub, never the network.
        revision: Branch, tag or commit of the LLM on the Hub; ``None`` for the latest.
        token: Access token of the Hub for LLM, router and adapter; ``None`` takes that of
            ``hf auth login`` or ``$HF_TOKEN``, ``False`` none. Never recorded or shown.
        cache_dir: Folder of the Hub's local cache; ``None`` for the usual one.
        trust_remote_code: Whether code that comes with the LLM may run. Its attention is compared
            with the library's all the same.
        model_kwargs: Further arguments of transformers' ``from_pretrained`` for the weights, such
            as ``{"quantization_config": ...}``.

    Raises:
        InputError: A value is out of range or of another type.
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
    drop_query_copies: bool = False
    documents: str | Path | None = None
    refine: int | None = None
    adapter: Any = None
    long_documents: str = "truncate"
    chunk_tokens: int | None = None
    chunk_stride: int | None = None
    chunk_aggregation: str = "max"
    on_too_long: str = "cut"

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self  # callers need not check types
        self._set("model", _as_text(given.model))
        self._set("documents", _as_text(given.documents))
        self._set("adapter", _as_text(given.adapter))
        check_text("model", given.model)
        if given.dtype is None:
            self._set("dtype", "auto")
        _check_kind("dtype", given.dtype, 'a name such as "float32", or a torch dtype')
        if type(given.device) is not int:  # torch takes the number of an accelerator
            _check_kind("device", given.device, 'a name such as "cuda", or a torch device')
        _check_kind("layout", given.layout, "a name")
        _check_kind("documents", given.documents, "the folder of an index")
        if not hasattr(given.adapter, "fingerprint"):
            _check_kind("adapter", given.adapter, "an Adapter, its folder or its id on the Hub")
        for name in _COUNTS:
            if getattr(given, name) is not None:
                self._set(name, check_count(name, getattr(given, name)))
        self._check_long_texts(given)
        weight = given.first_stage_weight
        if weight is not None:
            self._set("first_stage_weight", check_number("first_stage_weight", weight, least=0))
        self._set("drop_query_copies", check_flag("drop_query_copies", given.drop_query_copies))

    @staticmethod
    def _check_long_texts(given: Any) -> None:
        """Check what is said of long texts; ``Chunking`` checks the rest."""
        for name, allowed in _LONG_TEXTS.items():
            if getattr(given, name) not in allowed:
                raise InputError(
                    f"{name}={short_repr(getattr(given, name))} does not exist; give "
                    f"{' or '.join(allowed)}."
                )
        if given.long_documents == "chunk":
            return
        for name in ("chunk_tokens", "chunk_stride", "chunk_aggregation"):
            if getattr(given, name) not in (None, "max"):
                raise InputError(
                    f"{name}={short_repr(getattr(given, name))} is for long_documents='chunk'; "
                    "give that too, or leave it out."
                )


def _as_text(value: object) -> object:
    """Convert a path to text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_kind(name: str, value: object, expected: str) -> None:
    """Check that an option is a text or an object of torch, which is not imported for that."""
    if value is None or isinstance(value, str) or type(value).__module__ == "torch":
        return
    raise InputError(
        f"{name}={short_repr(value)} is a {class_name(value)}; give {expected}, or leave it out."
    )
