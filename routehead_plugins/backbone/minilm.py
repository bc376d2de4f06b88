"""The sentence encoder all-MiniLM-L6-v2, from a package on PyPI, without downloads from the Hub.

BERT with six layers, whose states are averaged over a text's tokens (arXiv 1908.10084). It is read
from the archive in the package, which is neither unpacked nor imported.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from routehead_plugins.backbone.batching import batches
from routehead_plugins.backbone.isolation import isolated
from routehead_plugins.errors import MINILM_MODEL, MissingExtraError, ModelLoadError
from routehead_plugins.files import reason

_PACKAGE, _ARCHIVE = "all_minilm_l6_v2", "model.zip"
_MAX_TOKENS = 256
# Tokens run at once, padding included.
_BATCH_TOKENS = 4096


class MiniLM:
    """The sentence encoder all-MiniLM-L6-v2.

    Attributes:
        device: Device of its weights.
    """

    def __init__(self, device: torch.device) -> None:
        """Load the encoder.

        Args:
            device: Device for its weights.

        Raises:
            MissingExtraError: The package is not installed.
            ModelLoadError: The package holds something else.
        """
        archive = _find_archive()
        try:
            self._tokenizer, model = _read(archive)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
            raise ModelLoadError(
                f"the package of MiniLM cannot be read ({reason(error)}); install it again: "
                f"{MINILM_MODEL}"
            ) from error
        self.device = device
        self._model = cast(BertModel, model.float().eval().to(device))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MAX_TOKENS)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: The texts; cut after 256 tokens.

        Returns:
            Shape (texts, 384), float32, on the CPU, of length 1: products are cosines.
        """
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        vectors: dict[int, Tensor] = {}
        with isolated(self.device):
            for indices in batches([len(ids) for ids in encoded], _BATCH_TOKENS):
                pooled = self._pooled([encoded[index] for index in indices])
                vectors |= zip(indices, pooled.cpu(), strict=True)
        return torch.stack([vectors[index] for index in range(len(encoded))])

    def _pooled(self, sequences: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, sequences))
        ids = torch.tensor([own + [0] * (longest - len(own)) for own in sequences])
        mask = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in sequences])
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        shown = mask[..., None].to(states.dtype)
        return normalize((states * shown).sum(dim=1) / shown.sum(dim=1), dim=-1)


def _read(archive: Path) -> tuple[Tokenizer, nn.Module]:
    with zipfile.ZipFile(archive) as files:
        config = BertConfig(**json.loads(files.read("config.json")))
        tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
        weights = load(files.read("model.safetensors"))
    model = BertModel(config, add_pooling_layer=False)
    missing, _ = model.load_state_dict(weights, strict=False)
    if missing:
        raise ValueError(f"it lacks {missing[0]}")
    return tokenizer, model


def _find_archive() -> Path:
    """Return the archive in the package, which prints a line where it is imported.

    Raises:
        MissingExtraError: The package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        return Path(folder) / _ARCHIVE
    raise MissingExtraError(f"MiniLM is not installed; run: {MINILM_MODEL}", name=_PACKAGE)
