"""Compiling the CPU kernels on first use, and sharing their work out among threads.

The threads are those of torch, where it brings GNU's OpenMP: they spin for a while after each of
torch's own operations, and others would have to wait for their cores. Elsewhere, and in a process
after a fork, where OpenMP's are gone, they are a small pool of Python threads. Both run kernels
without the GIL. Numba's own parallel loops would either crash when two Python threads enter them
(workqueue) or add a second pool of spinning threads beside torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import itertools
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("fastweights")

_WORTH_A_THREAD = 1_000_000
"""State updates per thread; fewer are done before another thread has woken up."""
_PROCESS = os.getpid()
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_SHARES_PER_THREAD = 4
"""Units are handed out in this many portions per thread, so that a thread that is held up gets fewer."""


@cache
def load_kernels(rule: str) -> ModuleType:
    """`ops/<rule>/cpu_kernels.py`; its kernels are compiled (once, where they can be kept) when first called."""
    try:
        import numba.core
    except ImportError as error:
        raise ImportError("backend='cpu' needs numba, which is not installed: pip install numba") from error
    name = f"..{rule}.cpu_kernels"
    with announced():
        try:
            return importlib.import_module(name, __package__)
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "no locator available" not in str(error):
                raise
            _say("fastweights: no place to keep compiled kernels in: set NUMBA_CACHE_DIR to a folder, to compile once")
            numba.config.CACHE_DIR = _private_folder().name  # type: ignore[attr-defined]
            return importlib.import_module(name, __package__)


@cache
def _private_folder() -> tempfile.TemporaryDirectory:
    """Of this process, and gone with it."""
    return tempfile.TemporaryDirectory(prefix="fastweights-kernels-")


def sources_version(folder: Path) -> int:
    """A number that changes with any file of the kernels in `folder`, or of what all kernels use.

    Numba's disk cache watches only the file of the cached function. As a closure variable of that function, this
    number is part of the cache's key, so a kernel never meets helpers or records other than those it was compiled with.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return int(digest.hexdigest()[:15], 16)


@contextmanager
def announced() -> Iterator[None]:
    """Tell the user, on standard error, if Numba compiles something: it takes seconds without a sign of life."""
    from numba.core import event

    class Listener(event.Listener):
        started = 0.0

        def on_start(self, event) -> None:
            if not self.started:
                self.started = time.perf_counter()
                _say("fastweights: compiling CPU kernels (kept on disk for the next time) ...")

        def on_end(self, event) -> None:
            pass

    listener = Listener()
    with event.install_listener("numba:compile", listener):
        yield
    if listener.started:
        _say(f"fastweights: done in {time.perf_counter() - listener.started:.0f} s")


def thread_count(updates: int) -> int:
    """How many threads a call with so many updates of numbers of the state is worth."""
    return max(1, min(torch.get_num_threads(), updates // _WORTH_A_THREAD))


def share_out(work: Callable[[int, int], None], units: int, threads: int) -> None:
    """Call work(first, end) until all units are done, on this thread and up to `threads` - 1 others."""
    if threads == 1 or units < 2:
        work(0, units)
        return
    portion = max(1, units // (_SHARES_PER_THREAD * threads))
    starts = itertools.count(0, portion)

    def take_shares() -> None:
        while (first := next(starts)) < units:
            work(first, min(first + portion, units))

    if os.getpid() == _PROCESS and (openmp := _openmp()) is not None:
        _run_team(openmp, take_shares)
        return
    helpers = [_pool(threads - 1, os.getpid()).submit(take_shares) for _ in range(threads - 1)]
    try:
        take_shares()
    finally:
        # One that has not started is busy elsewhere, and nothing is left for it to do. The others write to memory that
        # must not be given back under them.
        started = [helper for helper in helpers if not helper.cancel()]
        wait(started)
    for helper in started:
        helper.result()


def task_of(function: Any) -> Any:
    """A compiled `cfunc` of an address, as `run_on_team` takes it."""
    return _TASK(function.address)


def run_on_team(task: Any, record: int, threads: int) -> None:
    """Call task(record) on so many threads at once, and wait for all: a compiled function that shares its work out.

    Args:
        task: as ctypes calls it; it must do all the work if there is one thread alone.
        record: address of what it reads.
        threads: 1, or all of torch's (see `_run_team`).
    """
    if threads == 1:
        task(record)
    elif os.getpid() == _PROCESS and (openmp := _openmp()) is not None:
        openmp.GOMP_parallel(task, record, threads, 0)
    else:
        share_out(lambda first, end: task(record), threads, threads)


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # A fork copies the pool without its threads; the process's id makes the child start its own.
    return ThreadPoolExecutor(threads, thread_name_prefix="fastweights")


@cache
def _openmp() -> ctypes.CDLL | None:
    """The library that runs torch's threads, if it is GNU's and its threads are there."""
    if _forked():
        return None
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        library = ctypes.CDLL(str(path))
        library.GOMP_parallel.argtypes = (_TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
        return library
    return None


def is_fork() -> bool:
    """Whether this process is a copy of another, whose threads it does not have."""
    return os.getpid() != _PROCESS or _forked()


@cache
def _forked() -> bool:
    """Whether it was one when this was first asked (Linux's PF_FORKNOEXEC)."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return bool(int(fields[6]) & 0x40)
    except (OSError, IndexError, ValueError):
        return False


def _run_team(openmp: ctypes.CDLL, task: Callable[[], None]) -> None:
    """Run `task` on this thread and on all others of torch's team at once, as `#pragma omp parallel` does.

    The whole team, as OpenMP would end the threads that a smaller one leaves over.
    """
    errors, ended = [], set()

    def run(_) -> None:
        try:
            task()
        except BaseException as error:  # it must not leave through C
            errors.append(error)
        ended.add(threading.get_ident())

    openmp.GOMP_parallel(_TASK(run), None, torch.get_num_threads(), 0)
    if errors:
        raise errors[0]
    if threading.get_ident() not in ended:
        # A signal came before the first line of `run`, where ctypes takes the exception and drops it.
        raise KeyboardInterrupt


def _say(line: str) -> None:
    logger.info(line)
    print(line, file=sys.stderr, flush=True)
