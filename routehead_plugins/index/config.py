"""What an index was made for: ``config.json``, read and compared before anything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routehead_plugins.backbone import FrozenLM, KeyColumns
from routehead_plugins.data import check_count, check_flag, check_number
from routehead_plugins.errors import IndexMismatchError, InputError, short_repr
from routehead_plugins.files import atomic_write_text, encode_json, read_json, show, show_path
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.layouts import LateFrame

CONFIG_FILE = "config.json"
DTYPES = ("int8", "float16")
"""Number formats of the keys in an index."""
_FORMAT, _VERSION = "routehead-index", 1
# Tokenized to see whether two tokenizers agree.
_PROBE = "Naïve coöperation, 1234.5 %: 東京 <|im_end|>\n\tdef f(x): return x"


@dataclass(frozen=True)
class IndexConfig:
    """What the keys in an index depend on, beside the texts.

    Attributes:
        model: Name of the LLM.
        weights: Digest of its weights; see ``FrozenLM.fingerprint``.
        tokenizer: Digest of what its tokenizer makes of a text.
        heads: Heads that may be read, with the recipe to combine them if it is the same for every
            query.
        columns: The keys that are kept.
        frame: Prefix, and positions of the prompt.
        max_doc_tokens: Length at which documents are cut; ``None`` for no cut.
        dtype: Number format of the keys, one of ``DTYPES``.
        budget: Share of each document's tokens that is kept.
        routed: Whether a router chooses among the heads for every query.
        adapter: Label of the LLM's adapter, for messages; the weights cover it. ``None`` for none.
    """

    model: str
    weights: str
    tokenizer: str
    heads: HeadSet
    columns: KeyColumns
    frame: LateFrame
    max_doc_tokens: int | None
    dtype: str
    budget: float
    routed: bool = False
    adapter: str | None = None

    @classmethod
    def of(
        cls,
        llm: FrozenLM,
        frame: LateFrame,
        heads: HeadSet,
        *,
        max_doc_tokens: int | None = None,
        dtype: str = "int8",
        budget: float = 1.0,
        routed: bool = False,
    ) -> IndexConfig:
        """Describe an index that is to be made.

        Raises:
            InputError: The number format or the budget cannot be used.
            HeadError: The LLM does not have the heads.
        """
        if dtype not in DTYPES:
            raise InputError(
                f"dtype={short_repr(dtype)} is no format of an index; give {' or '.join(DTYPES)}."
            )
        share = check_number("budget", budget, least=0, most=1)
        if share == 0:
            raise InputError("budget=0 keeps no token; give more than 0, up to 1 for all.")
        columns = llm.key_columns(heads)
        return cls(
            model=llm.name,
            weights=llm.fingerprint(columns.last_layer),
            tokenizer=_digest_of_tokenizer(llm),
            heads=heads,
            columns=columns,
            frame=frame,
            max_doc_tokens=max_doc_tokens,
            dtype=dtype,
            budget=share,
            routed=routed,
            adapter=llm.adapter_label,
        )

    @classmethod
    def load(cls, folder: Path) -> IndexConfig:
        """Read the configuration of an index.

        Raises:
            IndexMismatchError: The folder holds no index, or one of another version.
        """
        path = folder / CONFIG_FILE
        content = read_json(path, "an index of `routehead index`", IndexMismatchError)
        if content.get("format") != _FORMAT:
            raise IndexMismatchError(
                f"{show_path(path)} is not of an index: its format is "
                f"{show(content.get('format'))}, expected {_FORMAT!r}; name another folder."
            )
        if content.get("version") != _VERSION:
            raise IndexMismatchError(
                f"{show_path(path)} has version {show(content.get('version'))}, but this release "
                f"reads version {_VERSION}; upgrade routehead-plugins, or index again."
            )
        try:
            return cls(**_decoded(content))
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise IndexMismatchError(
                f"{show_path(path)} is damaged ({show(str(error))}); index again."
            ) from error

    def save(self, folder: Path) -> None:
        """Write the configuration, whole or not at all.

        Raises:
            InputError: The file cannot be written.
        """
        content = {"format": _FORMAT, "version": _VERSION, **_encoded(self)}
        text = encode_json(content, "the index's configuration", indent=1, ensure_ascii=False)
        atomic_write_text(folder / CONFIG_FILE, text + "\n")

    def check_same(self, other: IndexConfig, folder: Path) -> None:
        """Check that documents of another configuration may be added to this index.

        Raises:
            IndexMismatchError: The two differ; the message names both sides.
        """
        names = ["columns", "weights", "tokenizer", "frame", "max_doc_tokens", "dtype", "budget"]
        self._compare(other, names, folder)

    def check_readable(
        self,
        llm: FrozenLM,
        frame: LateFrame,
        heads: HeadSet,
        max_doc_tokens: int | None,
        folder: Path,
    ) -> None:
        """Check that some heads of an LLM can be read from this index.

        Raises:
            IndexMismatchError: They cannot; the message names both sides.
        """
        asked = IndexConfig.of(llm, frame, heads, max_doc_tokens=max_doc_tokens)
        weights = llm.fingerprint(self.columns.last_layer)
        if self.weights != weights:
            raise IndexMismatchError(
                f"the index {show_path(folder)} was made with {self.model!r} "
                f"({_identity(self.weights, self.adapter)}), but the LLM is {llm.name!r} "
                f"({_identity(weights, llm.adapter_label)}); load the LLM of the index, or index "
                "again."
            )
        self._compare(asked, ["tokenizer", "frame", "max_doc_tokens"], folder)
        missing = [pair for pair in asked.columns.heads if pair not in self.columns.slices]
        if missing:
            layer, head = missing[0]
            raise IndexMismatchError(
                f"the index {show_path(folder)} holds no keys for key head {layer}-{head}: it was "
                f"made for the heads {show(str(self.heads), 40)}, not for "
                f"{show(str(heads), 40)}; give those of the index, or index again."
            )

    def _compare(self, other: IndexConfig, names: list[str], folder: Path) -> None:
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise IndexMismatchError(
                    f"the index {show_path(folder)} was made with {_shown(name, ours)}, but now "
                    f"it is {_shown(name, theirs, short=True)}; use the same, or index again into "
                    "another folder."
                )


def _identity(weights: str, adapter: str | None) -> str:
    """Write digest and adapter for a message."""
    return f"weights {weights[:8]}" + ("" if adapter is None else f", adapter {adapter}")


def _digest_of_tokenizer(llm: FrozenLM) -> str:
    (piece,) = llm.encoder.documents([_PROBE])
    return hashlib.blake2b(json.dumps(piece.ids).encode(), digest_size=16).hexdigest()


def _shown(name: str, value: Any, *, short: bool = False) -> str:
    """Write a field for a message."""
    if name in {"weights", "tokenizer"}:
        value = value[:8]
    if isinstance(value, LateFrame):
        name, value = "prompt", (len(value.prefix), value.start, value.length)
    if isinstance(value, KeyColumns):
        name, value = "key heads", ",".join(f"{layer}-{head}" for layer, head in value.heads)
    text = show(str(value) if isinstance(value, HeadSet) else value, 40)
    return text if short else f"{name}={text}"


def _encoded(config: IndexConfig) -> Mapping[str, Any]:
    recipe = config.heads.recipe
    return {
        "model": config.model,
        "weights": config.weights,
        "tokenizer": config.tokenizer,
        "heads": [str(head) for head in config.heads],
        "head_weights": recipe.weights,
        "aggregation": recipe.aggregation,
        "first_stage_weight": recipe.first_stage_weight,
        "key_heads": [list(pair) for pair in config.columns.heads],
        "widths": list(config.columns.widths),
        "prefix": list(config.frame.prefix),
        "start": config.frame.start,
        "length": config.frame.length,
        "max_doc_tokens": config.max_doc_tokens,
        "dtype": config.dtype,
        "budget": config.budget,
        "routed": config.routed,
        **({} if config.adapter is None else {"adapter": config.adapter}),
    }


def _decoded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the values of the file into fields.

    Raises:
        KeyError: A value is missing.
        TypeError: A value has another type.
        ValueError: A value is out of range.
    """
    recipe = Recipe(
        weights=content["head_weights"],
        aggregation=content["aggregation"],
        first_stage_weight=content["first_stage_weight"],
    )
    heads = HeadSet(HeadSet.parse(",".join(content["heads"])).heads, layout="late", recipe=recipe)
    pairs = tuple((int(layer), int(head)) for layer, head in content["key_heads"])
    widths = tuple(check_count("widths", width) for width in content["widths"])
    if not pairs or len(pairs) != len(widths) or list(pairs) != sorted(set(pairs)):
        raise ValueError("key heads and widths do not fit each other")
    if content["dtype"] not in DTYPES:
        raise ValueError(f"dtype {content['dtype']!r} is unknown")
    cut = content["max_doc_tokens"]
    return {
        **{name: str(content[name]) for name in ("model", "weights", "tokenizer", "dtype")},
        "heads": heads,
        "columns": KeyColumns(pairs, widths),
        "frame": LateFrame(
            tuple(int(token) for token in content["prefix"]),
            int(content["start"]),
            int(content["length"]),
        ),
        "max_doc_tokens": None if cut is None else check_count("max_doc_tokens", cut),
        "budget": check_number("budget", content["budget"], least=0, most=1),
        "routed": check_flag("routed", content["routed"]),
        "adapter": None if content.get("adapter") is None else str(content["adapter"]),
    }
