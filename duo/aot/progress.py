"""What a command that takes longer than a second is doing, on a terminal's standard error: one line, replaced as it goes on and gone at the end."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

AFTER = 1.0  # seconds of silence; then a new line each second


class Progress:
    """`with Progress() as progress: progress.now("compiling net ...")`. Shows nothing where standard error is no terminal."""

    def __init__(self, after: float = AFTER) -> None:
        self._stream = sys.stderr
        self._shown = self._stream.isatty()
        self._after, self._text, self._width = after, "", 0
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def now(self, text: str) -> None:
        """Says what is being done from now on."""
        self._text = text

    def __enter__(self) -> Progress:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """The work is over: the line goes, and what is printed next begins at its place."""
        if self._shown:
            self._over.set()
            self._thread.join()
            self._write("")

    def _run(self) -> None:
        while not self._over.wait(self._after):
            if self._text:
                self._write(f"{self._text} {time.monotonic() - self._started:.0f} s")

    def _write(self, text: str) -> None:
        if text or self._width:
            self._stream.write(f"\r{text}{' ' * (self._width - len(text))}{'' if text else chr(13)}")
            self._stream.flush()
        self._width = len(text)
