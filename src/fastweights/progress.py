"""How far something has come: a bar on a terminal, elsewhere a line every few seconds; both on standard error."""

from __future__ import annotations

import time

from rich import progress as rich_progress
from rich.console import Console

BYTES = "MB"
"""Unit of what is counted in bytes and shown in millions of them."""
PATIENCE = 2.0
"""Seconds until the first line, or until anything is shown of what may well be quick."""
_EVERY = 5.0
"""Seconds between lines."""


class Progress:
    """Progress of one thing after another, each with a title and a total; use it in a `with` block.

    Args:
        title: of the first, if it is known.
        unit: what is counted, where lines say it.
        quick: whether it may be done in no time, so that nothing is shown at first.
        show: whether to show anything, as only one of several processes should.
    """

    def __init__(self, title: str = "", *, unit: str = "", quick: bool = False, show: bool = True) -> None:
        self.title, self.unit, self.quick = title, unit, quick
        self.console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        self._lines = show and not self.console.is_terminal
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description:<24}", markup=False),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.TextColumn("{task.fields[count]}", markup=False),
            rich_progress.TextColumn("{task.fields[note]}", markup=False),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=self.console,
            disable=not show or self._lines,
        )
        self._line, self._said = "", False

    def __enter__(self) -> Progress:
        if not self.quick:
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
        self._next = time.monotonic() + PATIENCE
        self._task = self._bar.add_task(title, total=None, count="", note="")
        if self._lines and not self.quick:
            self.console.print(title)

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` is done; None if nobody knows how much there is."""
        count = self._count(done, total)
        self._bar.update(self._task, completed=done, total=total, count=count, note=note)
        self._line = ", ".join(part for part in (f"{self.title}: {count}", note) if part)
        if time.monotonic() < self._next:
            return
        if self._lines:
            self.console.print(self._line)
            self._line, self._said = "", True
            self._next = time.monotonic() + _EVERY
        elif not self._bar.live.is_started:
            self._bar.start()

    def _count(self, done: int, total: int | None) -> str:
        if self.unit == BYTES:
            return f"{done / 1e6:.1f}{'' if total is None else f' of {total / 1e6:.1f}'} {BYTES}"
        return f"{done:,}{'' if total is None else f' of {total:,}'} {self.unit}".strip()

    def _end(self) -> None:
        """The last line of what had lines."""
        if self._said and self._line:
            self.console.print(self._line)
        self._line = ""
