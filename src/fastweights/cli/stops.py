"""Commands that are stopped between two steps, keep what they have, and say how to go on."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stopped(BaseException):
    """Somebody wants the command to stop, and no step is half done."""


class Stops:
    """Within it Ctrl-C and SIGTERM raise `Stopped`, but never in the middle of a step, unless they come again."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that came; 0 before."""
        self._in_a_step = False

    def __enter__(self) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot be told of signals
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        self._old = {number: signal.signal(number, self._note) for number in numbers}

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if not self._in_a_step:
            raise Stopped

    @contextmanager
    def after(self) -> Iterator[None]:
        """Wait for the end of this block."""
        self._in_a_step = True
        try:
            yield
        finally:
            self._in_a_step = False
        if self.number:
            raise Stopped
