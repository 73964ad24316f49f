"""Work done in a process beside this one, at the same time, with a fair share of the cores.

Small models gain little from more than one core, so two that are trained side by side are done in nearly half the time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, TypeVar

import torch

from fastweights.cli.console import note
from fastweights.errors import FastWeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PATIENCE = 5.0
"""Seconds between two lines about what is waited for."""
_Value = TypeVar("_Value")


class Beside:
    """One process that does a thing after another; what it would print of its progress goes to a file.

    Args:
        log: for its progress, written anew.
        threads: that it computes with.
    """

    def __init__(self, log: Path, threads: int) -> None:
        self.log = log
        log.write_text("")
        # Not forked: torch's threads do not survive that.
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (str(log), threads))
        self._process = self._pool.submit(os.getpid)

    def do(self, task: Callable[..., _Value], *args: object) -> Future[_Value]:
        """Do it once all before is done.

        Args:
            task: a function of a module.
            args: of it; like what it returns, they must be what pickle takes.

        Returns:
            What `result` is to be given.
        """
        try:
            return self._pool.submit(task, *args)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
            return future

    def result(self, future: Future[_Value], title: str) -> _Value:
        """What came of a task, waited for if need be.

        Args:
            future: of `do`.
            title: what is waited for.

        Raises:
            FastWeightsError: the process ended before that; what the task itself raises is raised here.
        """
        try:
            while not wait([future], _PATIENCE).done:
                note(f"{title}: {self._last_line()}")
            return future.result()
        except BrokenProcessPool as error:
            raise FastWeightsError(
                f"{title}: the process that did it ended before it was done, as one that is stopped or has no memory "
                f"left does; its last words are in {self.log}: read them, and begin again"
            ) from error

    def end(self, *, at_once: bool) -> None:
        """End the process: when all is done, or at once."""
        if at_once:
            with contextlib.suppress(BrokenProcessPool, ProcessLookupError):
                # A training would take SIGTERM for the end of its own, and the process go on with what is next.
                os.kill(self._process.result(), signal.SIGKILL)
        self._pool.shutdown(cancel_futures=at_once)

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def beside(log: Path) -> Iterator[Beside]:
    """A process beside this one, within a `with` block, in which they share torch's threads.

    Args:
        log: for what it says of its progress.
    """
    threads = torch.get_num_threads()
    other = Beside(log, max(1, threads // 2))
    torch.set_num_threads(max(1, threads - threads // 2))
    done = False
    try:
        yield other
        done = True
    finally:
        torch.set_num_threads(threads)
        other.end(at_once=not done)


def _begin(log: str, threads: int) -> None:
    file = open(log, "a", buffering=1)  # noqa: SIM115 (to the end of the process)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Nobody would ask for what a killed process was having done."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
