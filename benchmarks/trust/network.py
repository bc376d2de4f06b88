"""Work without a network: every way to an address is closed, and each attempt is noted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from no_network import FORBIDDEN

from benchmarks.trust.report import Outcome, Sizes
from benchmarks.trust.subject import save_llm

_WORK = """
import json, sys
import routehead_plugins
from routehead_plugins import HeadRoutedAttentionReranker
from routehead_plugins.cli import app
from routehead_plugins.errors import ModelLoadError
from typer.testing import CliRunner

results = {"help": CliRunner().invoke(app, ["--help"]).exit_code == 0}
texts = ["A wolf ran over the hill.", "Rain falls."]
for name in ("embedded", sys.argv[1]):
    reranker = HeadRoutedAttentionReranker.from_pretrained(
        name, heads="layers:0-3", dtype="float32", device="cpu", local_files_only=True
    )
    results[f"re-ranking with {name.split('/')[-1]}"] = len(reranker.rerank("wolf", texts)) == 2
try:
    # The dtype is named, since what "auto" measures is kept in the home folder.
    HeadRoutedAttentionReranker.from_pretrained(
        "someone/missing", dtype="float32", local_files_only=True
    )
except ModelLoadError as error:
    results["missing LLM in one line"] = len(str(error).splitlines()) == 1
print(json.dumps({"results": results, "attempts": attempts}))
"""


def check_sockets(folder: Path, sizes: Sizes, seed: int) -> Outcome:  # noqa: ARG001
    """Import, show help, load and re-rank where every socket raises an error and is counted."""
    llm = save_llm(folder / "llm")
    home = folder / "home"
    home.mkdir()
    dropped = ("HF_", "XDG_", "TRANSFORMERS_")
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(dropped)}
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN + _WORK, llm],
        env=kept | {"HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return Outcome(False, "the process failed", {"error": done.stderr[-500:]})
    answer = json.loads(done.stdout.splitlines()[-1])
    attempts, results = answer["attempts"], answer["results"]
    traces = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    return Outcome(
        not attempts and not traces and len(results) == 4 and all(results.values()),
        "sockets forbidden; import, --help, re-ranking with the embedded and a local LLM, a "
        f"missing Hub id: {len(attempts)} attempts at the network, {len(traces)} files in the home "
        "folder",
        {"results": results, "attempts": attempts, "files": traces},
    )
