"""GGUF files converted to safetensors, in the user's cache, so that the next load takes seconds.

A conversion is a folder as ``save_pretrained`` writes it. Its name says what it was made from: a
digest of the file's content, the number format of the weights, and the release of transformers. It
is made beside and renamed, so that it is whole or absent, whatever becomes of the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from routehead_plugins.backbone.kv_cache import parse_bytes
from routehead_plugins.errors import InputError, TooLargeError
from routehead_plugins.files import atomic_write_bytes, user_cache

LIMIT_VARIABLE = "ROUTEHEAD_CACHE_LIMIT"
"""Environment variable with the size of all conversions together; ``0`` keeps none."""

DEFAULT_LIMIT = "20GB"
"""Its default."""

# Changes whenever conversions are written otherwise.
_FORMAT = 1
_RECORD = "conversion.json"
_KNOWN = "files"


@dataclass(frozen=True)
class Conversion:
    """A converted file.

    Attributes:
        folder: Its folder.
        name: Name of the GGUF file.
        dtype: Number format of the weights.
        size: Size on disk, in bytes.
        used: When it was last loaded, in seconds since 1970.
    """

    folder: Path
    name: str
    dtype: str
    size: int
    used: float

    def remove(self) -> None:
        """Delete it; a process that is loading it converts the file again."""
        with suppress(OSError):
            # First the record, without which the rest is not loaded.
            (self.folder / _RECORD).unlink(missing_ok=True)
            shutil.rmtree(self.folder)


def conversions() -> list[Conversion]:
    """List the conversions in the user's cache, the one that was last used first."""
    folder = user_cache("gguf")
    kept = []
    for record in folder.glob(f"*/{_RECORD}") if folder is not None else ():
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(record.read_bytes())
            name, dtype = str(content["name"]), str(content["dtype"])
            used = record.stat().st_mtime
            kept.append(Conversion(record.parent, name, dtype, _size(record.parent), used))
    return sorted(kept, key=lambda conversion: -conversion.used)


def converted(
    file: Path, dtype: torch.dtype, convert: Callable[[Path, Callable[[int], None]], None]
) -> Path | None:
    """Return the folder of a file's conversion, which is made if there is none yet.

    Several threads and processes may call it at once: one converts, the others wait.

    Args:
        file: A GGUF file.
        dtype: Number format of the weights.
        convert: Writes the conversion into an empty folder. Before that, it calls its second
            argument with the size of the weights in bytes. Its exceptions are passed on.

    Returns:
        The folder; ``None`` where nothing can be kept, or not so much.

    Raises:
        InputError: The limit in the environment is not a size.
    """
    root, limit = user_cache("gguf"), _limit()
    if root is None or not limit:
        return None
    try:
        known = _Known.of(root, file)
        if known.sizes.get(str(dtype), 0) > limit:
            return None
        release = transformers.__version__
        name = str(dtype).removeprefix("torch.")
        folder = root / f"{known.digest[:24]}-{name}-{release}-{_FORMAT}"
        if _use(folder):
            return folder
        with FileLock(root / f"{folder.name}.lock"):
            if not _use(folder):
                with _beside(folder) as temporary:
                    convert(temporary, lambda size: _make_room(root, limit, size, known, dtype))
                    record = {"name": file.name, "dtype": name, "sha256": known.digest}
                    atomic_write_bytes(temporary / _RECORD, json.dumps(record).encode())
        return folder if _use(folder) else None
    except (OSError, InputError, TooLargeError):  # read-only, full, or no folder: load it directly
        return None


def _limit() -> int:
    """Return the size of all conversions together."""
    text = os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT
    return 0 if text.strip() == "0" else parse_bytes(text, LIMIT_VARIABLE)


@dataclass(frozen=True)
class _Known:
    """What is remembered about a file, so that its content need not be read again.

    Attributes:
        path: Where it is remembered.
        digest: SHA-256 of the content.
        sizes: Sizes of conversions that did not fit, by number format.
    """

    path: Path
    digest: str
    sizes: dict[str, int]

    @classmethod
    def of(cls, root: Path, file: Path) -> _Known:
        """Look a file up, or read it."""
        state = file.stat()
        identity = [os.path.realpath(file), state.st_size, state.st_mtime_ns, state.st_ino]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        path = root / _KNOWN / f"{name}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            content: Any = json.loads(path.read_bytes())
            return cls(path, str(content["sha256"]), dict(content["sizes"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as stream:
            known = cls(path, hashlib.file_digest(stream, "sha256").hexdigest(), {})
        known.save()
        return known

    def save(self) -> None:
        content = {"sha256": self.digest, "sizes": self.sizes}
        atomic_write_bytes(self.path, json.dumps(content).encode())


def _use(folder: Path) -> bool:
    """Note that a conversion is used now; return whether there is one."""
    try:
        os.utime(folder / _RECORD)
    except PermissionError:
        return (folder / _RECORD).is_file()  # a cache that others keep
    except OSError:
        return False
    return True


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Lend an empty folder that takes the name of ``folder`` in the end."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)  # what is left of a removed one
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_room(root: Path, limit: int, size: int, known: _Known, dtype: torch.dtype) -> None:
    """Remove conversions, those that were not used for longest first, until one more fits.

    Raises:
        TooLargeError: It does not fit even then.
    """
    for left in root.glob("*.tmp"):
        if time.time() - left.stat().st_mtime > 86_400:  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    if size > limit:
        known.sizes[str(dtype)] = size
        known.save()
        raise TooLargeError(f"{size:,} bytes are above the limit, {limit:,}.")
    kept = conversions()
    while kept and sum(conversion.size for conversion in kept) + size > limit:
        kept.pop().remove()
    if shutil.disk_usage(root).free < 1.1 * size:
        raise TooLargeError(f"{size:,} bytes do not fit the disk.")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
