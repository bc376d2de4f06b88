"""The options of the re-ranker as fields of pydantic models, for LangChain and LlamaIndex."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model

from routehead_plugins.errors import InputError, short_repr
from routehead_plugins.options import RerankerOptions

from ._lazy import LOADING, OPTION_NAMES, LazyReranker

# Fields that are neither shown nor written.
_SECRET = {"token"}


class _LazyModel(BaseModel):
    """A pydantic model that loads the re-ranker of its fields at first use.

    Copies share the re-ranker unless their options differ. Pickles hold no weights.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    _lazy: LazyReranker = PrivateAttr(default_factory=LazyReranker)

    def model_post_init(self, context: Any, /) -> None:
        """Prepare the loader."""
        super().model_post_init(context)
        self._lazy = LazyReranker(self._options())

    def _options(self) -> RerankerOptions:
        values = {name: getattr(self, name) for name in OPTION_NAMES}
        # None stands for the default of an option.
        return RerankerOptions(**{name: v for name, v in values.items() if v is not None})

    def _load_reranker(self) -> Any:
        """Return the re-ranker of the fields as they are now."""
        options = self._options()
        if not self._lazy.provides(options):
            with LOADING:
                if not self._lazy.provides(options):
                    # A new loader, because copies with the old options share this one.
                    self._lazy = LazyReranker(options)
        return self._lazy.get()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # Deep copies share routers and re-rankers, which are large and never change.
        memo = {} if memo is None else memo
        values = (self.__dict__.get(name) for name in (*OPTION_NAMES, "reranker"))
        memo.update((id(value), value) for value in values)
        return super().__deepcopy__(memo)


def one_line(error: ValidationError) -> str:
    """Turn the several lines of pydantic's error into one, which names the first wrong field."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)
    name = first["loc"][0] if first["loc"] else error.title
    return f"{name}={short_repr(first['input'])} cannot be used: {first['msg']}."


def _descriptions() -> dict[str, str]:
    """Read the descriptions of the options from the docstring of ``RerankerOptions``."""
    attributes = inspect.cleandoc(RerankerOptions.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _option_fields() -> dict[str, Any]:
    # Stands in for torch, which takes seconds to import, in the names of types.
    torch = SimpleNamespace(device=Any, dtype=Any)
    types = get_type_hints(RerankerOptions, localns={"torch": torch})
    descriptions, defaults = _descriptions(), RerankerOptions()
    return {
        name: (
            types[name],
            Field(
                getattr(defaults, name),
                description=descriptions.get(name),
                repr=name not in _SECRET,
                exclude=name in _SECRET,
            ),
        )
        for name in OPTION_NAMES
    }


# Any, because mypy cannot know fields that are made at run time.
OptionFields: Any = create_model("OptionFields", __base__=_LazyModel, **_option_fields())
