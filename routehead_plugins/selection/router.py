"""Trained routers, which choose heads and their weights for each query (RouteHead).

A router gives every head a logit,

    logit_h(q) = b_h + s(q) * c_h(x)

b_h is the bias of head h, independent of the query; x is the query in the router's space
(``QuerySpace``); c_h(x) is the correction learned from similar queries; and s(q), between 0 and 1,
is the query's familiarity: far from all training queries, only the bias is left. Logits are read in
one of two ways:

``"gates"``
    As published (arXiv 2604.24608): heads with a logit above the threshold, equally weighted.
``"weights"``
    The logit is the head's signed weight; heads whose weight is within the threshold are not read.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from routehead_plugins.backbone import FrozenLM, check_max_doc_tokens, isolated
from routehead_plugins.data import check_count, check_number
from routehead_plugins.errors import InputError, ModelLoadError, RouterMismatchError, short_repr
from routehead_plugins.files import reason
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.selection.query_space import SOURCES, QuerySpace
from routehead_plugins.selection.router_files import (
    RouterFiles,
    check_shapes,
    fingerprint,
    unreadable,
)
from routehead_plugins.selection.selectors import (
    Selector,
    fits_adapter,
    named_adapter,
    same_model,
)

READINGS = ("gates", "weights")

_PROVENANCE = ("model", "layout", "data")
_RECIPE = ("aggregation", "first_stage_weight")
_SETTINGS = ("reading", "threshold", "max_heads", "max_doc_tokens", "description")
_KINDS: dict[str, type[Router]] = {}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Router(Selector):
    """Base class of routers, which ``routehead train`` makes.

    Attributes:
        heads: The heads to choose from, in the order of the tensors, with the LLM, layout,
            aggregation and first-stage weight they were fitted for.
        space: The space in which queries are compared.
        bias: Logit of each head before correction, shape (heads,).
        reading: How logits are read, one of ``READINGS``.
        threshold: Logits up to this value (weights: up to it on either side) are not read.
        max_heads: Maximum number of heads to read; ``None`` for no limit. At least one is read.
        max_doc_tokens: Length at which documents were cut in training.
        description: Further records of the training, as JSON values.

    Raises:
        InputError: A setting is out of range, or the shapes of the tensors do not match.
    """

    heads: HeadSet
    space: QuerySpace
    bias: Tensor
    reading: str = "weights"
    threshold: float = 0.0
    max_heads: int | None = None
    max_doc_tokens: int | None = None
    description: Mapping[str, Any] | None = None

    # Each kind defines its name in files, its own tensors with their axes, and its settings.
    kind: ClassVar[str]
    tensors: ClassVar[Mapping[str, str]]
    settings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):  # not an abstract class in between
            _KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise InputError(
                f"reading={short_repr(self.reading)} is not one of {', '.join(READINGS)}; "
                "give one of them."
            )
        check_number("threshold", self.threshold)
        check_max_doc_tokens(self.max_doc_tokens)
        if self.max_heads is not None:
            check_count("max_heads", self.max_heads)
        shapes = {**QuerySpace.tensors, "bias": "heads", **self.tensors}
        check_shapes(self._all_tensors(), shapes, {"heads": len(self.heads)})

    @property
    def layout(self) -> str | None:
        """The prompt layout it was trained for."""
        return self.heads.layout

    @property
    def routes(self) -> bool:
        """Whether the choice depends on the query."""
        return True

    def layers(self, num_layers: int) -> int:  # noqa: ARG002
        """Count the layers needed to read any head it may choose, and to embed the query."""
        # One more than for embedding, as the states after the last loaded layer are normalised.
        return max(self.heads.last_layer, self.space.layer if self.routes else 0) + 1

    @property
    def tail_layer(self) -> int | None:
        """Layer before which the query's own pass in the late layout embeds it.

        ``None`` if queries are embedded alone, in a pass of their own, or not at all.
        """
        return self.space.layer if self.routes and self.space.source == "tail" else None

    @abstractmethod
    def correction(self, queries: Tensor) -> Tensor:
        """Compute the correction that was learned from similar queries.

        Args:
            queries: Queries in the router's space, shape (queries, coordinates).

        Returns:
            c_h(x), shape (queries, heads).
        """

    @isolated(torch.device("cpu"))
    def logits(self, embeddings: Tensor) -> Tensor:
        """Compute the logits of queries.

        Args:
            embeddings: From ``embed``, shape (queries, width).

        Returns:
            Shape (queries, heads), the heads in the router's order.
        """
        share = self.space.familiarity(embeddings)[:, None]
        return self.bias + share * self.correction(self.space(embeddings))

    def choose(self, logits: Tensor) -> HeadSet:
        """Turn one query's logits into a head set.

        Args:
            logits: Shape (heads,).

        Returns:
            The heads above the threshold, largest first, ties in the router's order: at most
            ``max_heads``, at least one.
        """
        size = logits.abs() if self.reading == "weights" else logits
        count = max(1, int((size > self.threshold).sum()))
        count = min(count, len(self.heads) if self.max_heads is None else self.max_heads)
        order = size.argsort(descending=True, stable=True)[:count]
        indices = cast(list[int], order.tolist())
        weights = logits[indices].tolist() if self.reading == "weights" else None
        return replace(
            self.heads,
            heads=self.heads.pick(indices),
            method="routed",
            scores=None,
            source=None,
            recipe=replace(self.heads.recipe, weights=weights),
        )

    def candidates(self, llm: FrozenLM) -> HeadSet:
        """Return the router's heads, or the chosen ones if the choice does not vary."""
        return self.heads if self.routes else self.select("", llm)

    def select(self, query: str, llm: FrozenLM) -> HeadSet:
        """Choose the heads for a query in one pass over it; a blank query gets those of the bias.

        Raises:
            InputError: The pass that reads the query embeds it; see ``select_by``.
            RouterMismatchError: The router was trained for another LLM.
            HeadError: The LLM does not have the router's heads.
        """
        if self.tail_layer is not None and not query.strip():
            self._check(llm)
            return self.choose(self.bias)
        return self.select_all([query], llm)[0]

    def select_by(self, embedding: Tensor, llm: FrozenLM) -> HeadSet:
        """Choose the heads for a query that is embedded already.

        Args:
            embedding: Shape (width,), from the pass that ``space.source`` names.
            llm: The LLM that made it.

        Raises:
            RouterMismatchError: The router was trained for another LLM.
            HeadError: The LLM does not have the router's heads.
        """
        self._check(llm)
        if len(embedding) != len(self.space.mean):
            raise self._mismatch(llm)
        return self.choose(self.logits(embedding[None])[0])

    def select_all(self, queries: Sequence[str], llm: FrozenLM) -> list[HeadSet]:
        """Choose the heads for several queries in one pass; see ``select``."""
        if not self.routes:
            self._check(llm)
            return [self.choose(self.bias)] * len(queries)
        # Blank queries are embedded too, so that an LLM of another width is always noticed.
        logits = self.logits(self.embed(queries, llm))
        blank = torch.tensor(
            [not query.strip() for query in queries], dtype=torch.bool, device="cpu"
        )
        return [self.choose(row) for row in torch.where(blank[:, None], self.bias, logits)]

    def embed(self, queries: Sequence[str], llm: FrozenLM) -> Tensor:
        """Embed queries for ``logits`` and ``space``.

        Args:
            queries: Texts of the queries.
            llm: The LLM that the router was trained for.

        Returns:
            Shape (queries, width), on the CPU.

        Raises:
            InputError: The pass that reads a query embeds it.
            RouterMismatchError: The router was trained for another LLM.
            HeadError: The LLM does not have the router's heads.
        """
        self._check(llm)
        space = self.space
        if space.source == "tail":
            raise InputError(
                "the router embeds queries in the pass that reads them; use it with "
                "HeadRoutedAttentionReranker, or embed them by LateLayout().embed."
            )
        embeddings = llm.embed(queries, layer=space.layer, pooling=space.pooling)
        # Names alone do not identify an LLM, since a folder may hold any.
        if embeddings.shape[1] != len(space.mean):
            raise self._mismatch(llm)
        return embeddings

    def _check(self, llm: FrozenLM) -> None:
        if not same_model(self.heads.model, llm.name):
            raise self._mismatch(llm)
        if not fits_adapter(self.heads, llm):
            raise RouterMismatchError(
                f"the router was trained with {named_adapter(self.heads.adapter)}, but the LLM has "
                f"{named_adapter(llm.adapter_label)}; load the same, or train one for it."
            )
        self.heads.check_within(llm.heads, llm.name)

    def _mismatch(self, llm: FrozenLM) -> RouterMismatchError:
        return RouterMismatchError(
            f"the router was trained for {self.heads.model!r}, but the LLM is {llm.name!r}; train "
            "one for it (routehead train), or leave the router out."
        )

    def __repr__(self) -> str:
        # Journals tell routers apart by this; a tensor's own repr leaves out most of its numbers.
        digest = fingerprint(self._config(), self._all_tensors())
        return f"{type(self).__name__}({self.heads.model!r}, {len(self.heads)} heads, {digest})"

    def _config(self) -> dict[str, Any]:
        heads, space = self.heads, self.space
        return {
            "kind": self.kind,
            **{name: getattr(heads, name) for name in _PROVENANCE},
            **({} if heads.adapter is None else {"adapter": heads.adapter}),
            **{name: getattr(heads.recipe, name) for name in _RECIPE},
            "calibration": "null query",
            **{name: getattr(self, name) for name in (*_SETTINGS, *self.settings)},
            "embedding_layer": space.layer,
            "embedding_pooling": space.pooling,
            "embedding_source": space.source,
            "familiar": list(space.familiar),
            "heads": [str(head) for head in heads],
        }

    def _all_tensors(self) -> dict[str, Tensor]:
        """Collect all tensors under their names in the file."""
        own = {name: getattr(self, name) for name in ("bias", *self.tensors)}
        return {name: getattr(self.space, name) for name in QuerySpace.tensors} | own

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Args:
            folder: The folder; created if missing.
            card: Text of a model card, in Markdown; ``None`` leaves an existing card as it is.

        Raises:
            InputError: The folder cannot be written, or ``description`` is not JSON.
        """
        RouterFiles(self._config(), self._all_tensors(), card).save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
    ) -> Router:
        """Load a router of any kind.

        Args:
            name: A folder, or the id of a repository on the Hub, to which all options apply.
            local_files_only: Whether to use the local cache only, never the network.
            revision: Branch, tag or commit; ``None`` for the latest.
            token: Access token; ``None`` takes the one of ``hf auth login``, ``False`` none.
            cache_dir: Folder of the local cache; ``None`` for the usual one.
            force_download: Whether to download again what is in the cache.

        Raises:
            ModelLoadError: There is no such router, or its files are damaged.
        """
        loaded = RouterFiles.from_pretrained(
            name,
            local_files_only=local_files_only,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
        )
        try:
            return _router(loaded.config, loaded.tensors)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelLoadError(unreadable(name, error)) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        card: str | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the router to the Hub.

        Args:
            repo_id: ``owner/name``; created if missing.
            private: Whether a new repository is private.
            card: Text of a model card, in Markdown; ``None`` leaves an existing card as it is.
            token: Access token; ``None`` takes the one of ``hf auth login``.
            revision: Branch to upload to; ``None`` for the main one.

        Returns:
            URL of the commit.

        Raises:
            InputError: The Hub cannot be reached or refuses, or ``description`` is not JSON.
        """
        contents = RouterFiles(self._config(), self._all_tensors(), card)
        try:
            return str(contents.push_to_hub(repo_id, private=private, token=token, branch=revision))
        except Exception as error:  # of many types, depending on the Hub's client
            raise InputError(
                f"the router cannot be uploaded to {repo_id!r} ({reason(error)}); check "
                "the name, the network, and that you are logged in (hf auth login)."
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadRouter(Router):
    """Router by learned embeddings of heads: ``c_h(x) = (W x) . e_h / sqrt(d)``.

    Attributes:
        projection: W, shape (d, coordinates).
        embeddings: e_h of each head, shape (heads, d).
    """

    projection: Tensor
    embeddings: Tensor

    kind = "heads"
    tensors: ClassVar = {"projection": "d coordinates", "embeddings": "heads d"}

    @property
    def routes(self) -> bool:
        """Whether it has a correction; without one, all queries get the heads of the bias."""
        return bool(self.projection.any()) and bool(self.embeddings.any())

    def correction(self, queries: Tensor) -> Tensor:
        """Compute the scaled dot products; see ``Router.correction``."""
        routed = queries @ self.projection.T @ self.embeddings.T
        return routed / math.sqrt(len(self.projection))

    def trimmed(self) -> HeadRouter:
        """Return a copy without the heads that the bias alone never chooses."""
        indices = sorted(self.heads.indices_of(list(self.choose(self.bias))))
        heads = replace(self.heads, heads=self.heads.pick(indices), scores=None)
        bias, embeddings = self.bias[indices], self.embeddings[indices]
        return replace(self, heads=heads, bias=bias, embeddings=embeddings)


def _router(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    """Build a router, checking everything that would otherwise only fail at the first query."""
    if config["kind"] not in _KINDS:
        raise ValueError(f"kind is {short_repr(config['kind'])}, not one of {', '.join(_KINDS)}")
    kind = _KINDS[config["kind"]]
    if not isinstance(config["heads"], list):
        raise TypeError("its heads are not a list")
    heads = HeadSet.parse(",".join(config["heads"]))
    recipe = Recipe(**{name: config[name] for name in _RECIPE})
    provenance = {name: config[name] for name in _PROVENANCE}
    provenance["adapter"] = config.get("adapter")  # routers of earlier releases have none
    heads = replace(heads, method="routed", recipe=recipe, **provenance)
    floats = {n: _floats(n, tensors[n]) for n in (*QuerySpace.tensors, "bias", *kind.tensors)}
    # Deviations may be infinite; the space checks them.
    if not all(bool(t.isfinite().all()) for name, t in floats.items() if name != "deviation"):
        raise ValueError("it contains a number that is not finite")
    near, far = (check_number("familiar", distance) for distance in config["familiar"])
    space = QuerySpace(
        layer=config["embedding_layer"],
        **{name: floats.pop(name) for name in QuerySpace.tensors},
        familiar=(near, far),
        pooling=config["embedding_pooling"],
        source=config.get("embedding_source", SOURCES[0]),  # older routers know no other
    )
    given = {name: config[name] for name in (*_SETTINGS, *kind.settings)}
    return kind(heads=heads, space=space, **given, **cast(dict[str, Any], floats))


def _floats(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
    return tensor.float()
