"""The frozen LLM: the only room that knows transformers."""

from routehead_plugins.backbone.adapter import PROJECTIONS, Adapter, same_adapter
from routehead_plugins.backbone.attention import Rows, Tap, run
from routehead_plugins.backbone.batching import batches
from routehead_plugins.backbone.conversions import Conversion, conversions
from routehead_plugins.backbone.device import check_finite, pick_device, pick_dtype
from routehead_plugins.backbone.frozen_lm import FrozenLM, Gradients
from routehead_plugins.backbone.isolation import isolated
from routehead_plugins.backbone.kv_cache import BytesCache, KeyValueCache, KeyValues, joined
from routehead_plugins.backbone.loading import EMBEDDED, load, load_tokenizer
from routehead_plugins.backbone.minilm import MiniLM
from routehead_plugins.backbone.prompt import (
    DocumentPiece,
    Pieces,
    PromptEncoder,
    TokenCache,
    check_max_doc_tokens,
)
from routehead_plugins.backbone.tail_queries import DocumentKeys, KeyColumns, TailQueries
from routehead_plugins.backbone.text_tasks import QueryLikelihood, Standardiser, check_pooling
from routehead_plugins.backbone.token_tree import token_tree

__all__ = [
    "EMBEDDED",
    "PROJECTIONS",
    "Adapter",
    "BytesCache",
    "Conversion",
    "DocumentKeys",
    "DocumentPiece",
    "FrozenLM",
    "Gradients",
    "KeyColumns",
    "KeyValueCache",
    "KeyValues",
    "MiniLM",
    "Pieces",
    "PromptEncoder",
    "QueryLikelihood",
    "Rows",
    "Standardiser",
    "TailQueries",
    "Tap",
    "TokenCache",
    "batches",
    "check_finite",
    "check_max_doc_tokens",
    "check_pooling",
    "conversions",
    "isolated",
    "joined",
    "load",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "run",
    "same_adapter",
    "token_tree",
]
