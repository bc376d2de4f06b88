"""Commands that are killed, or run out of disk, and are then run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.trust.forks import Ended, run_command
from benchmarks.trust.report import Outcome, Sizes
from benchmarks.trust.subject import CANDIDATES, save_llm, write_collection
from routehead_plugins import DocumentIndex, HeadRoutedAttentionReranker

KILLED = ("rerank", "detect", "train", "index")
FILLED = ("rerank", "detect", "evaluate", "train")

# Statuses of an output that cannot be written, and of a machine that failed.
_DOCUMENTED = (1, 2)
_OUTPUTS = {
    "rerank": "run.trec",
    "detect": "heads.json",
    "evaluate": "table.json",
    "train": "router",
    "index": "documents",
}
# A folder without this file is neither a router nor an index.
_CONFIG = "config.json"
_CARD = "README.md"
_PAGE = 4096
_DISK_PAGES = 1024


@dataclass(frozen=True)
class Job:
    """A command on a tiny LLM and a small collection.

    Attributes:
        name: The command.
        llm: Folder of the LLM.
        collection: The BEIR folder.
    """

    name: str
    llm: str
    collection: Path

    def arguments(self, folder: Path, *more: str) -> list[str]:
        """Return the command line of a run that keeps everything in a folder."""
        shared = ["--model", self.llm, "--dtype", "float32", *more]
        output = ["--output", str(self.output(folder))]
        if self.name == "rerank":
            files = {"topics": "queries.jsonl", "run": "run.bm25.trec", "corpus": "corpus.jsonl"}
            for option, name in files.items():
                output += [f"--{option}", str(self.collection / name)]
            return ["rerank", *output, *shared]
        if self.name == "index":
            return ["index", *output, "--corpus", str(self.collection / "corpus.jsonl"), *shared]
        output += ["--collection", str(self.collection), "--hits", str(CANDIDATES)]
        if self.name == "evaluate":
            return ["evaluate", *output, "--methods", "bm25,all,all+bm25", *shared]
        return [self.name, *output, "--signals", str(folder / "signals"), *shared]

    def output(self, folder: Path) -> Path:
        """Return the path of the output of a run that keeps everything in a folder."""
        return folder / "out" / _OUTPUTS[self.name]

    def content(self, folder: Path) -> Mapping[str, Any] | None:
        """Return what a run has put out, file by file; ``None`` for nothing that looks complete."""
        output = self.output(folder)
        if self.name == "index":
            return _indexed(output, self.collection)
        if self.name == "train":
            if not (output / _CONFIG).exists():
                return None
            return {path.name: path.read_bytes() for path in output.iterdir()}
        if not output.exists():
            return None
        content = output.read_bytes()
        if self.name != "evaluate":
            return {output.name: content}
        return {key: value for key, value in json.loads(content).items() if key != "date"}


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        job: The command.
        folder: The folder of the run.
        content: What it has put out.
        seconds: How long it ran.
    """

    job: Job
    folder: Path
    content: Mapping[str, Any]
    seconds: float


def check_kills(folder: Path, sizes: Sizes, seed: int) -> Outcome:
    """Kill commands at random times and run them again: the output is as if nothing had been."""
    rng = random.Random(seed)
    jobs = _jobs(folder, rng, KILLED)
    figures: dict[str, Any] = {}
    for job in jobs:
        figures[job.name] = _kill(_reference(job, folder / job.name), rng, sizes.kills)
    failed = sum(f["early"] + f["different"] + f["unfinished"] for f in figures.values())
    early = sum(f["early"] for f in figures.values())
    resumed = sum(f["left work behind"] for f in figures.values())
    return Outcome(
        not failed,
        f"{sizes.kills} kills each of {', '.join(KILLED)}: {failed - early} different after the "
        f"next run, {early} outputs that looked complete too early; {resumed} kills left a part of "
        "the work behind",
        figures,
    )


def check_full_disk(folder: Path, sizes: Sizes, seed: int) -> Outcome:  # noqa: ARG001
    """Run commands on a disk that fills up, with more space each time, until they end well."""
    rng = random.Random(seed)
    figures: dict[str, Any] = {}
    for job in _jobs(folder, rng, FILLED):
        reference = _reference(job, folder / job.name)
        with _disk(folder / f"disk-{job.name}") as (disk, mounted):
            figures[job.name] = {"device": "tmpfs" if mounted else "limit of file size"}
            figures[job.name] |= _fill(reference, disk, mounted=mounted)
    failures = [text for f in figures.values() for text in f["failures"]]
    runs = sum(f["full"] for f in figures.values())
    return Outcome(
        not failures and all(f["full"] for f in figures.values()),
        f"{runs} runs of {', '.join(FILLED)} on a full disk: {len(failures)} without one line and "
        "a documented status, with a previous output changed, or different after the next run",
        figures,
    )


def _jobs(folder: Path, rng: random.Random, names: tuple[str, ...]) -> list[Job]:
    _prepare_to_fork()
    llm = save_llm(folder / "llm")
    # Modules that are loaded here need not be loaded by every process.
    for room in ("evaluation", "training"):
        import_module(f"routehead_plugins.{room}")
    HeadRoutedAttentionReranker.from_pretrained(llm, dtype="float32").score("wolf", ["a wolf"])
    collection = write_collection(folder / "small", rng)
    return [Job(name, llm, collection) for name in names]


def _prepare_to_fork() -> None:
    """Keep progress bars from threads, and from a lock that a killed process would never release.

    By default all processes share that lock, so that every later one would wait for it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.monitor_interval = 0
    lock = threading.RLock()
    kinds: list[Any] = [tqdm]
    for kind in kinds:  # grows meanwhile: libraries derive bars, each with a lock of its own
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def _reference(job: Job, folder: Path) -> Reference:
    """Run a command twice: once to load its modules, and once to see how long it takes."""
    _fresh(folder)
    ended = run_command(job.arguments(folder))
    content = job.content(folder)
    if ended.status != 0 or content is None:
        raise RuntimeError(f"{job.name} cannot be run: {' '.join(ended.errors)[-300:]}")
    return Reference(job, folder, content, ended.seconds)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    return folder


def _kill(reference: Reference, rng: random.Random, count: int) -> dict[str, Any]:
    job, figures = reference.job, dict.fromkeys(("early", "different", "unfinished"), 0)
    killed = behind = left = 0
    seconds = reference.seconds
    while killed < count:
        folder = _fresh(reference.folder)
        ended = run_command(job.arguments(folder), kill_after=rng.uniform(0, seconds))
        if ended.status is not None:
            seconds *= 0.95  # it was faster than expected, and ended before the kill
            continue
        killed += 1
        behind += any(path.is_file() for path in folder.rglob("*"))
        figures["early"] += job.content(folder) not in (None, reference.content)
        ended = run_command(job.arguments(folder))
        figures["unfinished"] += ended.status != 0
        figures["different"] += ended.status == 0 and job.content(folder) != reference.content
        left += len(_surplus(job, folder))
    return {"kills": killed, **figures, "left work behind": behind, "files left over": left}


def _indexed(output: Path, collection: Path) -> Mapping[str, Any] | None:
    """Return the files of an index; ``None`` as long as it lacks documents, which it may."""
    if not (output / _CONFIG).exists():
        return None
    index = DocumentIndex(output)
    if index.verify() < len((collection / "corpus.jsonl").read_text().splitlines()):
        return None
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.bin")}


def _surplus(job: Job, folder: Path) -> list[Path]:
    """List files beside the output that no later run uses, such as half of a file."""
    if job.name == "index":
        return []  # a later run cuts off what was not finished
    output = job.output(folder)
    inside = set(output.iterdir()) if output.is_dir() else {output}
    expected = {output, *(path for path in inside if not path.name.startswith("."))}
    return [path for path in (folder / "out").rglob("*") if path not in expected]


def _fill(reference: Reference, disk: Path, *, mounted: bool) -> dict[str, Any]:
    """Run a command with more and more units of space, from none, until it ends well.

    A unit is a page of the disk, or an eighth of it where the size of files is limited instead.
    """
    job, failures, full, units = reference.job, list[str](), 0, 0
    statuses: set[int] = set()
    while True:
        folder = _fresh(disk / "work")
        before = _put_previous(reference, folder)
        if mounted:
            _fill_disk(disk, units * _PAGE)
            ended = run_command(job.arguments(folder))
            (disk / "filler").unlink()
        else:
            ended = run_command(job.arguments(folder), largest_file=units * _PAGE // 8)
        if ended.status == 0:
            break
        full += 1
        statuses.add(-1 if ended.status is None else ended.status)
        failures += [f"{units} units: {text}" for text in _problems(ended)]
        if _files(job.output(folder)) != before:
            failures.append(f"{units} units: the previous output has changed")
        ended = run_command(job.arguments(folder))
        if ended.status != 0 or job.content(folder) != reference.content:
            failures.append(f"{units} units: the next run differs: {ended.messages}")
        units += 1 + units // 4
    return {"full": full, "statuses": sorted(statuses), "failures": failures}


def _problems(ended: Ended) -> Iterator[str]:
    if len(ended.messages) != 1 or not ended.messages[0].startswith("routehead: "):
        yield f"not one line: {ended.errors[-3:]}"
    if ended.status not in _DOCUMENTED:
        yield f"status {ended.status}"


def _put_previous(reference: Reference, folder: Path) -> dict[str, bytes]:
    """Put an older output in place, and return its files."""
    output = reference.job.output(folder)
    if reference.job.name == "train":
        output.mkdir()
        for name, content in reference.content.items():  # what is no router is not replaced
            (output / name).write_bytes(content + b"\nolder" * (name == _CARD))
    else:
        output.write_bytes(b"an older output")
    return _files(output)


def _files(output: Path) -> dict[str, bytes]:
    paths = output.iterdir() if output.is_dir() else [output]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def _fill_disk(disk: Path, rest: int) -> None:
    """Write a file that leaves so many bytes free."""
    state = os.statvfs(disk)
    free = state.f_bavail * state.f_frsize
    if rest > free:
        raise RuntimeError(f"a command needs more than the {free:,} bytes of a small disk")
    (disk / "filler").write_bytes(bytes(free - rest))


@contextmanager
def _disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Mount a small disk where that is allowed; say whether it was."""
    folder.mkdir()
    size = f"size={_DISK_PAGES * _PAGE}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
