"""Trained routers: which heads to read for a query, and how much each counts (RouteHead).

Each gives every head a logit,

    logit_h(q) = b_h + s(q) * c_h(x)

b_h is what is known of head h whatever the query, x the query's place in the router's space
(``QuerySpace``), c_h(x) what the router has learned of such queries, and s(q) between 0 and 1 how
familiar the query is: far from all training queries only the static b_h is left. Two readings:

``"gates"``
    As published (arXiv 2604.24608): heads with a logit above the threshold, all with the same say.
``"weights"``
    The logit is the head's signed weight; heads up to the threshold on either side are not read.
"""

from __future__ import annotations

import math
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from routehead_plugins.backbone import FrozenLM, check_max_doc_tokens
from routehead_plugins.errors import InputError, RouterMismatchError
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.selection import router_files as files
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.selectors import Selector, same_model

READINGS = ("gates", "weights")

_PROVENANCE = ("model", "layout", "data")
_RECIPE = ("aggregation", "first_stage_weight")
_SETTINGS = ("reading", "threshold", "max_heads", "max_doc_tokens", "description")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Router(Selector):
    """What all routers share; made by ``routehead train``.

    Attributes:
        heads: The heads there are to choose from, in the order of the tensors, with the LLM,
            layout, aggregation and first-stage weight they were fitted for.
        space: Where queries are compared.
        bias: What is known of each head whatever the query, shape (heads,).
        reading: One of ``READINGS``.
        threshold: Logits up to here (weights: up to here on either side) are not read.
        max_heads: How many heads are read at most, P; at least one always is.
        max_doc_tokens: Where documents were cut when it was trained.
        description: Whatever else its maker records; must be JSON.

    Raises:
        InputError: A setting is out of range, or the tensors do not fit each other.
    """

    heads: HeadSet
    space: QuerySpace
    bias: Tensor
    reading: str = "weights"
    threshold: float = 0.0
    max_heads: int | None = None
    max_doc_tokens: int | None = None
    description: Mapping[str, Any] | None = None

    kind: ClassVar[str]
    tensors: ClassVar[Mapping[str, str]]
    numbers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise InputError(
                f"reading={self.reading!r} is not one of {', '.join(READINGS)}; give one of them."
            )
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold={self.threshold!r} bounds nothing; give a finite number.")
        check_max_doc_tokens(self.max_doc_tokens)
        files.check_count("max_heads", 1 if self.max_heads is None else self.max_heads)
        shapes = {**QuerySpace.tensors, "bias": "heads", **self.tensors}
        files.check_shapes(self._named(), shapes, {"heads": len(self.heads)})

    @property
    def layout(self) -> str | None:
        """The prompt layout it was trained for."""
        return self.heads.layout

    @property
    def routes(self) -> bool:
        """Whether it can tell one query from another."""
        return True

    def layers(self, num_layers: int) -> int:  # noqa: ARG002
        """Count the layers up to the deepest head it may choose, and to the query's embedding."""
        # States behind the last layer that is loaded are not the whole LLM's.
        return max(self.heads.last_layer, self.space.layer if self.routes else 0) + 1

    @abstractmethod
    def correction(self, queries: Tensor) -> Tensor:
        """What was learned of queries like these.

        Args:
            queries: In the router's space, shape (queries, coordinates).

        Returns:
            c_h(x), shape (queries, heads).
        """

    def logits(self, embeddings: Tensor) -> Tensor:
        """Route queries.

        Args:
            embeddings: From ``embed``, shape (queries, width).

        Returns:
            Shape (queries, heads), the heads in the router's order.
        """
        share = self.space.familiarity(embeddings)[:, None]
        return self.bias + share * self.correction(self.space(embeddings))

    def choose(self, logits: Tensor) -> HeadSet:
        """Make a head set of one query's logits.

        Args:
            logits: Shape (heads,).

        Returns:
            The heads above the threshold, largest first, equal ones in the router's order:
            ``max_heads`` at most and one at least.
        """
        size = logits.abs() if self.reading == "weights" else logits
        count = max(1, int((size > self.threshold).sum()))
        order = size.argsort(descending=True, stable=True)[:count][: self.max_heads]
        indices = cast(list[int], order.tolist())
        weights = logits[indices].tolist() if self.reading == "weights" else None
        return replace(
            self.heads,
            heads=self.heads.pick(indices),
            method="routed",
            recipe=replace(self.heads.recipe, weights=weights),
        )

    def select(self, query: str, llm: FrozenLM) -> HeadSet:
        """Choose the heads for a query, in one pass over the query alone.

        A blank query, of which nothing is known, gets the heads of the bias.

        Raises:
            RouterMismatchError: The router was trained for another LLM.
            HeadError: The LLM does not have its heads.
        """
        return self.select_all([query], llm)[0]

    def select_all(self, queries: Sequence[str], llm: FrozenLM) -> list[HeadSet]:
        """Choose the heads for several queries at once; see ``select``."""
        if not self.routes:
            self._check(llm)
            return [self.choose(self.bias)] * len(queries)
        # Blank ones are embedded as well: wrong LLMs show, whatever the query.
        logits = self.logits(self.embed(queries, llm))
        blank = torch.tensor([not query.strip() for query in queries], dtype=torch.bool)
        logits = torch.where(blank[:, None], self.bias, logits)
        return [self.choose(each) for each in logits]

    def embed(self, queries: Sequence[str], llm: FrozenLM) -> Tensor:
        """Embed queries as ``logits`` and ``space`` take them.

        Args:
            queries: Their texts.
            llm: The LLM that the router was trained for.

        Returns:
            Shape (queries, width), on the CPU.

        Raises:
            RouterMismatchError: The router was trained for another LLM.
            HeadError: The LLM does not have its heads.
        """
        self._check(llm)
        space = self.space
        embeddings = llm.embed(queries, layer=space.layer, pooling=space.pooling)
        # A folder may hold any LLM, so that names do not tell all of them apart.
        if embeddings.shape[1] != len(space.mean):
            raise self._mismatch(llm)
        return embeddings

    def _check(self, llm: FrozenLM) -> None:
        trained_for = self.heads.model
        if trained_for is not None and not same_model(trained_for, llm.name):
            raise self._mismatch(llm)
        self.heads.check_within(llm.heads, llm.name)

    def _mismatch(self, llm: FrozenLM) -> RouterMismatchError:
        return RouterMismatchError(
            f"the router was trained for {self.heads.model!r}, but the LLM is {llm.name!r}; train "
            "one for it (routehead train), or leave the router out."
        )

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Args:
            folder: Made where it is missing.
            card: Text of a model card, in Markdown.

        Raises:
            InputError: The folder cannot be written, or ``description`` is not JSON.
        """
        files.write_folder(folder, self._config(), self._named(), card)

    def __repr__(self) -> str:
        # Journals tell routers apart by this; tensors print a few of their numbers only.
        digest = files.digest(self._config(), self._named())
        return f"{type(self).__name__}({self.heads.model!r}, {len(self.heads)} heads, {digest})"

    def _config(self) -> dict[str, Any]:
        heads, space = self.heads, self.space
        return {
            "kind": self.kind,
            **{name: getattr(heads, name) for name in _PROVENANCE},
            **{name: getattr(heads.recipe, name) for name in _RECIPE},
            "calibration": "null query",
            **{name: getattr(self, name) for name in (*_SETTINGS, *self.numbers)},
            "embedding_layer": space.layer,
            "embedding_pooling": space.pooling,
            "familiar": list(space.familiar),
            "heads": [str(head) for head in heads],
        }

    def _named(self) -> dict[str, Tensor]:
        """All tensors by their names in the file."""
        own = {name: getattr(self, name) for name in ("bias", *self.tensors)}
        return {name: getattr(self.space, name) for name in QuerySpace.tensors} | own

    @classmethod
    def from_pretrained(cls, name: str | Path, *, local_files_only: bool = False) -> Router:
        """Load a router of whatever kind.

        Args:
            name: A folder, or the id of a repository on the Hub.
            local_files_only: Never ask the Hub, use what is in its local cache.

        Raises:
            ModelLoadError: There is no such router, or its files are damaged.
        """
        config, tensors = files.read_folder(name, local_files_only=local_files_only)
        try:
            return _router(config, tensors)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise files.damaged(name, error) from error

    def push_to_hub(self, repo_id: str, *, private: bool = False, card: str | None = None) -> str:
        """Upload the router.

        Args:
            repo_id: ``owner/name``; made where it is missing.
            private: Whether a new repository is private.
            card: Text of a model card, in Markdown.

        Returns:
            Address of the commit.

        Raises:
            InputError: The Hub cannot be reached, or refuses.
        """
        with tempfile.TemporaryDirectory(prefix="routehead-") as folder:
            self.save_pretrained(folder, card=card)
            return files.push_folder(folder, repo_id, private=private)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadRouter(Router):
    """Learned embeddings of heads: ``c_h(x) = (W x) . e_h / sqrt(d)``.

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
        """Whether it was given a correction: without, all queries get the heads of the bias."""
        return bool(self.projection.any()) and bool(self.embeddings.any())

    def correction(self, queries: Tensor) -> Tensor:
        """See ``Router.correction``."""
        routed = queries @ self.projection.T @ self.embeddings.T
        return routed / math.sqrt(len(self.projection))

    def trimmed(self) -> HeadRouter:
        """The same without heads that the bias alone never reads, and the layers behind them."""
        read = set(self.choose(self.bias))
        places = [place for place, head in enumerate(self.heads) if head in read]
        heads = replace(self.heads, heads=[self.heads[place] for place in places])
        bias, embeddings = self.bias[places], self.embeddings[places]
        return replace(self, heads=heads, bias=bias, embeddings=embeddings)


def _kinds() -> dict[str, type[Router]]:
    from routehead_plugins.selection.neighbours import NeighbourRouter  # which imports this module

    return {kind.kind: kind for kind in (HeadRouter, NeighbourRouter)}


def _router(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    """Put a router together; whatever does not fit would only fail at the first query."""
    kinds = _kinds()
    if config["kind"] not in kinds:
        raise ValueError(f"kind is {config['kind']!r}, not one of {', '.join(kinds)}")
    kind = kinds[config["kind"]]
    heads = HeadSet.parse(",".join(config["heads"]))
    recipe = Recipe(**{name: config[name] for name in _RECIPE})
    provenance = {name: config[name] for name in _PROVENANCE}
    heads = replace(heads, method="routed", recipe=recipe, **provenance)
    floats = {n: tensors[n].float() for n in (*QuerySpace.tensors, "bias", *kind.tensors)}
    # Deviations may be infinite, and are checked by the space.
    if not all(bool(t.isfinite().all()) for name, t in floats.items() if name != "deviation"):
        raise ValueError("it holds something that is not a finite number")
    near, far = map(float, config["familiar"])
    space = QuerySpace(
        layer=int(config["embedding_layer"]),
        **{name: floats.pop(name) for name in QuerySpace.tensors},
        familiar=(near, far),
        pooling=config["embedding_pooling"],
    )
    given = {name: config[name] for name in (*_SETTINGS, *kind.numbers)}
    return kind(heads=heads, space=space, **given, **cast(dict[str, Any], floats))
