"""Re-rank documents with the attention heads of a frozen LLM, chosen per query."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from routehead_plugins.data import Document, Ranking, ScoredDocument, Span, TextSpan, Usage
from routehead_plugins.heads import Head, HeadSet, Recipe

if TYPE_CHECKING:
    from routehead_plugins.backbone import FrozenLM
    from routehead_plugins.index import DocumentIndex
    from routehead_plugins.reranker import HeadRoutedAttentionReranker
    from routehead_plugins.selection import HeadRouter

__version__ = "0.1.0"

# Loaded on first use, so that `routehead --help` and the adapters' modules load no torch.
_LAZY = {
    "DocumentIndex": "index",
    "FrozenLM": "backbone",
    "HeadRouter": "selection",
    "HeadRoutedAttentionReranker": "reranker",
}

__all__ = [
    "Document",
    "DocumentIndex",
    "FrozenLM",
    "Head",
    "HeadRoutedAttentionReranker",
    "HeadRouter",
    "HeadSet",
    "Ranking",
    "Recipe",
    "ScoredDocument",
    "Span",
    "TextSpan",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
