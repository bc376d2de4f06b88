"""Token ids of texts that were seen before, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

_TokenIds = tuple[int, ...]


class TokenCache:
    """Tokenizes a text once while it is in use; the longest unused go first. Thread-safe."""

    def __init__(
        self, encode: Callable[[Sequence[str]], list[_TokenIds]], max_tokens: int = 1_000_000
    ) -> None:
        """Start empty.

        Args:
            encode: Tokenizes texts, one by one.
            max_tokens: How many tokens are kept; a million take some 40 MB.
        """
        self._encode = encode
        self._max_tokens = max_tokens
        self._tokens = 0
        self._held: OrderedDict[str, _TokenIds] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __call__(self, texts: Sequence[str]) -> list[_TokenIds]:
        """Tokenize texts, those that are new in one batch."""
        with self._lock:
            found = {text: self._held[text] for text in texts if text in self._held}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        found |= zip(new, self._encode(new), strict=True)
        with self._lock:
            for text in dict.fromkeys(texts):
                self._keep(text, found[text])
        return [found[text] for text in texts]

    def _keep(self, text: str, ids: _TokenIds) -> None:
        self._tokens += len(ids) - len(self._held.pop(text, ()))
        self._held[text] = ids
        while self._tokens > self._max_tokens:
            _, dropped = self._held.popitem(last=False)
            self._tokens -= len(dropped)
