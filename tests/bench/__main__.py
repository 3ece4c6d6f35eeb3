"""`python -m tests.bench [--only NAME,...] [--frameworks NAME,...] [--threads N] [--rounds N] [--json FILE]`

Every framework runs each workload in a process of its own, on the same inputs and the same mathematics, and its results are compared with
those of the first framework before anything is timed. The processes of a workload are all alive and take turns: one at a time runs a slice of
40 ms (or a call, where that is longer), behind a quarter of that which does not count, until its threads sleep; the others wait. A figure
is the median of its slices. In brackets stands the median, over the turns, of its time as a multiple of the best peer's (below 1: faster): what
the machine did meanwhile happened to both. Behind a bar: duo's rate as a share of memcpy's, on as many threads, in the same turns. First calls, imports
and memory need fresh processes, which take turns as wholes. The file of `--json` has every value and the quartiles.

A framework that is not installed is left out; `--python NAME=PATH` names the interpreter that has it. Environment variables that change
how BLAS libraries choose kernels and threads are removed: a handicapped peer makes no comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from tests.bench.harness import Row, pooled, table
from tests.bench.processes import PROCESSES, Setting, version
from tests.bench.turns import take_turns
from tests.bench.worker import FRAMEWORKS, WORKLOADS


def listed(parser: argparse.ArgumentParser, what: str, given: str | None, known: dict) -> list[str]:
    names = given.split(",") if given else list(known)
    unknown = [n for n in names if n not in known]
    if unknown:
        parser.error(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Runs the benchmarks asked for; gives the exit code: 1 when a framework failed or a result differed."""
    every = {**WORKLOADS, **{name: (fn.__doc__ or "").rstrip(".") for name, fn in PROCESSES.items()}}
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="workloads:\n" + "\n".join(f"  {name:12}{text}" for name, text in every.items()),
    )  # fmt: skip
    parser.add_argument("--only", help="workloads, with commas between (default: all)")
    parser.add_argument("--frameworks", help=f"of {', '.join(FRAMEWORKS)} (default: those installed)")
    parser.add_argument("--threads", type=int, default=1, help="for every framework (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each workload is run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few short samples: shows that it runs, not how fast")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a framework's interpreter")
    options = parser.parse_args()
    names = listed(parser, "workload", options.only, every)
    chosen = listed(parser, "framework", options.frameworks, FRAMEWORKS)
    pythons = dict(pair.split("=", 1) for pair in options.python)
    setting = Setting(options.threads, options.quick, pythons)
    versions = {f: version(setting, f) for f in FRAMEWORKS if f in chosen}
    frameworks = [f for f, found in versions.items() if found]
    shown = dict.fromkeys(f"{FRAMEWORKS[f].package} {versions[f]}" for f in frameworks)
    print(
        f"{processor()}, {os.cpu_count()} processors, {options.threads} thread(s); Python {platform.python_version()}, {', '.join(shown)}"
    )
    missing = [f for f, found in versions.items() if not found]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = _rows(name, setting, frameworks, options.rounds, Path(folder))
            rows += found
            print(table(found), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([row.written() for row in rows], indent=1))
    return int(any(row.error for row in rows))


def _rows(name: str, setting: Setting, frameworks: list[str], rounds: int, folder: Path) -> list[Row]:
    if name in PROCESSES:
        return PROCESSES[name](setting, frameworks, 1 if setting.quick else max(3, rounds))
    return pooled([row for _ in range(rounds) for row in take_turns(setting, frameworks, name, folder)])


if __name__ == "__main__":
    sys.exit(main())
