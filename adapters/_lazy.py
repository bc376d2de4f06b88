"""Load the re-ranker at first use, in the same way for all adapters."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, Self

from routehead_plugins.data import check_text
from routehead_plugins.errors import InputError, class_name
from routehead_plugins.options import LoadOptions, RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.data import Document, Ranking

_LOADING_NAMES = [field.name for field in fields(LoadOptions)]
OPTION_NAMES = (
    *(field.name for field in fields(RerankerOptions) if field.name not in _LOADING_NAMES),
    *_LOADING_NAMES,
)

# One lock for all loaders: loading sets stderr and transformers' verbosity for the whole process.
LOADING = threading.Lock()


class Reranker(Protocol):
    """The part of ``HeadRoutedAttentionReranker`` that the adapters need."""

    def rerank(
        self,
        query: str,
        documents: Sequence[Document],
        top_n: int | None = None,
        *,
        instruction: str | None = None,
    ) -> Ranking:
        """Rank the documents, best first."""
        ...


class LazyReranker:
    """A ready re-ranker, or one that the first thread to use it loads for all.

    Copies and deep copies are the same object, so that they share one LLM. Pickles hold the
    options but no weights.
    """

    def __init__(self, options: RerankerOptions | None = None, ready: Any = None) -> None:
        self.options = options
        self._is_ready = ready is not None
        self._reranker = ready

    def provides(self, options: RerankerOptions) -> bool:
        """Tell whether the options are those of this loader; a ready re-ranker fits any."""
        return self._is_ready or self.options == options

    def get(self) -> Any:
        """Return the re-ranker; see its ``from_options`` for the errors of loading."""
        if self._reranker is None:
            with LOADING:
                if self._reranker is None:
                    from routehead_plugins import HeadRoutedAttentionReranker

                    self._reranker = HeadRoutedAttentionReranker.from_options(
                        self.options or RerankerOptions()
                    )
        return self._reranker

    def __eq__(self, other: object) -> bool:
        # pydantic compares private attributes too, but models with equal fields are equal.
        return isinstance(other, LazyReranker)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[LazyReranker], tuple[RerankerOptions | None]]:
        if self._is_ready and self.options is None:
            raise TypeError("a ready reranker cannot be pickled; give arguments to load one.")
        return LazyReranker, (self.options,)


def check_options(names: Collection[str], ready: object = None) -> None:
    """Check that options given to an adapter exist and do not contradict a ready re-ranker.

    Raises:
        InputError: There are options beside a ready re-ranker.
        TypeError: There is no such option.
    """
    unknown = [name for name in names if name not in OPTION_NAMES]
    if unknown:
        raise TypeError(
            f"unexpected argument {', '.join(map(repr, unknown))}; the options of the re-ranker "
            f"are {', '.join(OPTION_NAMES)}; check the spelling."
        )
    if ready is not None and names:
        raise InputError(
            f"{', '.join(names)} cannot change a ready reranker; "
            "expected either reranker= or the arguments to load one; drop one of the two."
        )


def check_reranker(ready: Any) -> Any:
    """Check that an object given as a re-ranker has what the adapters need.

    Returns:
        The object.

    Raises:
        InputError: It has no method ``rerank``.
    """
    if not callable(getattr(ready, "rerank", None)):
        raise InputError(
            f"reranker is a {class_name(ready)}; give a HeadRoutedAttentionReranker, or the "
            "arguments to load one."
        )
    return ready


def asking(instruction: object) -> dict[str, str]:
    """Return the argument of ``rerank`` for an instruction, none where there is none.

    A re-ranker of another kind then needs no such argument.

    Raises:
        InputError: It is blank, or not a text.
    """
    if instruction is None:
        return {}
    check_text("instruction", instruction)
    return {"instruction": str(instruction)}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in the errors of what is checked inside which item of the caller's is meant."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
