"""`python -m tests.bench [--only NAME,...] [--threads N] [--rounds N] [--quick] [--json FILE]`

Prints a table of medians, and each framework's ratio to duo's best. A framework that is not installed is left out. Environment variables
that change how BLAS libraries choose their kernels and threads are removed first: a handicapped peer makes no comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

if __name__ == "__main__":
    for name in [n for n in os.environ if n.startswith(("OPENBLAS_", "MKL_", "OMP_", "GOTO_", "BLIS_"))]:
        del os.environ[name]  # before NumPy is imported, which loads its BLAS

from tests.bench.harness import describe, measure, table
from tests.bench.processes import PROCESSES
from tests.bench.workloads import WORKLOADS


def main() -> int:
    """Runs the benchmarks asked for; gives the exit code."""
    every = {**WORKLOADS, **PROCESSES}
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="duo beside NumPy and PyTorch")
    parser.add_argument("--only", help=f"names, with commas between: {', '.join(every)}")
    parser.add_argument("--threads", type=int, default=1, help="for duo and for PyTorch (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="samples of each case, taken in turn (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds: shows that it runs, not how fast")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(every)
    unknown = [n for n in names if n not in every]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(every)}")
    print(describe(options.threads))
    rows = []
    for name in names:
        if name in WORKLOADS:
            cases = WORKLOADS[name](options.threads)
            found = measure(cases, 2 if options.quick else options.rounds, 0.002 if options.quick else 0.05)
        else:
            found = PROCESSES[name](1 if options.quick else 5, options.threads)
        rows += found
        print(table(found), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([row.__dict__ for row in rows], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
