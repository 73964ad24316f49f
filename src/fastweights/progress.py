"""How far something has come: a bar on a terminal, elsewhere a line every few seconds; both on standard error."""

from __future__ import annotations

import time

from rich import progress as rich_progress
from rich.console import Console

_FIRST, _EVERY = 2.0, 5.0
"""Seconds until the first line, and between lines."""


class Progress:
    """Progress of one thing after another, each with a title and a total; use it in a `with` block.

    Args:
        title: of the first, if it is known.
        unit: what is counted, where lines say it.
        show: whether to show anything, as only one of several processes should.
    """

    def __init__(self, title: str = "", *, unit: str = "", show: bool = True) -> None:
        self.title, self.unit = title, unit
        self.console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        self._lines = show and not self.console.is_terminal
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description:<24}", markup=False),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[note]}", markup=False),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=self.console,
            disable=not show or self._lines,
        )
        self._line, self._said = "", False

    def __enter__(self) -> Progress:
        self._bar.start()
        if self.title:
            self.begin(self.title)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._bar.stop()

    def begin(self, title: str) -> None:
        """Go over to another thing, whose total is not known yet."""
        self._end()
        self.title, self._said = title, False
        self._next = time.monotonic() + _FIRST
        self._task = self._bar.add_task(title, total=None, note="")
        if self._lines:
            self.console.print(title)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` is done."""
        self._bar.update(self._task, completed=done, total=total, note=note)
        parts = (f"{self.title}: {done:,} of {total:,} {self.unit}".strip(), note)
        self._line = ", ".join(part for part in parts if part)
        if self._lines and time.monotonic() >= self._next:
            self.console.print(self._line)
            self._line, self._said = "", True
            self._next = time.monotonic() + _EVERY

    def _end(self) -> None:
        """The last line of what had lines."""
        if self._said and self._line:
            self.console.print(self._line)
        self._line = ""
