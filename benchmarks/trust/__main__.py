"""Run the checks, print a table, and keep the figures.

    PYTHONPATH=tests python -m benchmarks.trust                # every check, as `make trust` does
    PYTHONPATH=tests python -m benchmarks.trust fuzz kills     # some of them

Everything is drawn from `--seed`, but for the times at which the system takes turns. The figures of
the checks that ran replace those in benchmarks/results/trust.json. The exit status is 1 if a check
fails.
"""

from benchmarks.common import run
from benchmarks.trust.checks import main

run(main)
