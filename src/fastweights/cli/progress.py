"""How much of a text was read, for those who wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastweights.cli.console import note, printable

if TYPE_CHECKING:
    from types import TracebackType

PATIENCE = 2.0
"""Seconds in which nothing is shown."""
_BETWEEN_LINES = 5.0


class ReadingBar:
    """On standard error: a bar on a terminal, elsewhere a line every few seconds.

    Args:
        what: is done, such as "reading book.txt".
        total: bytes that there are to read; None if nobody knows.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = printable(what), total
        self._console = Console(stderr=True)
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int) -> None:
        """Say how many bytes were read so far."""
        now = time.monotonic()
        if now - self._start < PATIENCE:
            return
        if self._console.is_terminal:
            self._move(done)
        elif now - self._last_line >= _BETWEEN_LINES or self._last_line == self._start:
            self._last_line = now
            of = "" if self.total is None else f" of {self.total / 1e6:.1f}"
            note(f"{self.what}: {done / 1e6:.1f}{of} MB")

    def _move(self, done: int) -> None:
        if self._bar is None:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=self._console)
            self._bar.add_task(self.what, total=self.total, completed=done)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)
