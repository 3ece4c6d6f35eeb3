"""A workload's processes, one per framework, that take turns in slices: all are alive, one runs. What the machine does meanwhile (other
guests of its host, clocks, memory) happens to every framework alike, which it does not to processes that run minutes apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.harness import Row
from tests.bench.processes import Setting
from tests.bench.worker import CASES

SLICES, QUICK_SLICES = 15, 2  # of each case


class Worker:
    """A framework's process for a workload; it waits at a pipe until it is asked."""

    def __init__(self, setting: Setting, framework: str, workload: str, folder: Path) -> None:
        self.framework, self.workload = framework, workload
        self.printed = folder / f"{framework}.txt"
        command = ["-m", "tests.bench.worker", framework, workload, "--threads", str(setting.threads)]
        command += ["--folder", str(folder), *(["--quick"] if setting.quick else [])]
        with self.printed.open("w") as printed:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": printed}
            self.process = setting.started(framework, command, **pipes)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, question: str) -> Any:
        """The answer. Raises EOFError with the reason when the process has ended."""
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        lines = self.output().strip().splitlines() or ["no output"]
        raise EOFError(f"the process ended with {self.process.wait()}: {lines[-1][:200]}")

    def output(self) -> str:
        """What the process has printed."""
        return self.printed.read_text(errors="replace")

    def prepare(self, name: str) -> list[Row]:
        """A row without values for each of the framework's cases of that name."""
        try:
            return [Row(**row) for row in self.ask(f"prepare {name}")]
        except EOFError as ended:
            return [Row(name, self.framework, "", error=str(ended))]

    def turn(self, number: int, row: Row) -> None:
        """Times a slice of the case of that number and adds the value, or the error, to its row."""
        try:
            answer = self.ask(f"turn {number}")
        except EOFError as ended:
            answer = str(ended)
        if isinstance(answer, str):
            row.error = answer
        else:
            row.values.append(answer)


def take_turns(setting: Setting, frameworks: Sequence[str], workload: str, folder: Path) -> list[Row]:
    """The rows of a workload."""
    rows: list[Row] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(setting, framework, workload, folder)) for framework in frameworks]
        for name in CASES[workload]:
            found = [(worker, worker.prepare(name)) for worker in workers]
            timed = [
                (worker, number, row)
                for worker, prepared in found
                for number, row in enumerate(row for row in prepared if not row.error)
            ]
            for n in range(QUICK_SLICES if setting.quick else SLICES):
                for worker, number, row in timed if n % 2 == 0 else reversed(timed):
                    if not row.error:
                        worker.turn(number, row)
            rows += [row for _, prepared in found for row in prepared]
        failed = {row.framework.partition(":")[0] for row in rows if row.error}
        for worker in workers:
            if worker.framework in failed:
                print(worker.output()[-4000:], file=sys.stderr)
    return rows
