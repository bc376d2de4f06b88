"""Peak memory of a method beyond the model itself, on a CPU in a process of its own.

The process loads the model, runs a query over two documents, then measures one query.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.latency.memory import peak_over_now
from benchmarks.latency.methods import make_method
from benchmarks.latency.options import Options
from benchmarks.latency.subject import load_subject
from benchmarks.latency.workload import make_documents, make_queries

_ROOT = Path(__file__).parents[2]


def peak_in_process(options: Options, method: str, documents: int) -> int:
    """Measure the peak of a method over the loaded model, in bytes, in a new process.

    Raises:
        RuntimeError: The process failed; the message is the last line it wrote.
    """
    arguments = [json.dumps(options.subject), method, str(documents)]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.latency.peak", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        raise RuntimeError(last)
    return int(child.stdout.strip().splitlines()[-1])


def measure_here(options: Options, name: str, count: int) -> int:
    """Measure the peak of a method in this process; see ``peak_in_process``."""
    subject = load_subject(options)
    encoder = subject.llm.encoder
    documents = make_documents(encoder, max(2, count), subject.doc_tokens)
    first, second = make_queries(encoder, 2)
    small = make_method(name, subject, documents[:2])
    small.prepare(first)
    small.run(first)
    method = make_method(name, subject, documents[:count])
    method.prepare(second)
    return peak_over_now(partial(method.run, second), subject.device)


if __name__ == "__main__":
    subject_options, method_name, document_count = sys.argv[1:]
    print(measure_here(Options(**json.loads(subject_options)), method_name, int(document_count)))
