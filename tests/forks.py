"""Processes that need not import torch and transformers first: forks of one that has, in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

MODELS = "import fastweights.evaluation.comparison, fastweights.training.pipeline, transformers.generation"
"""What most commands import, which takes five seconds."""

_PARENT = """
import ctypes, json, os, runpy, signal, sys
{preload}
def dies_with_its_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
dies_with_its_parent()
for line in os.fdopen({requests}):
    job = json.loads(line)
    fork = os.fork()
    if not fork:
        dies_with_its_parent()
        for number, name in enumerate(job["streams"]):
            file = os.open(name, os.O_RDWR)
            os.dup2(file, number)
            os.close(file)
        sys.argv = ["fastweights", *job["arguments"]]
        if job["code"] is None:
            runpy.run_module("fastweights", run_name="__main__")
        else:
            exec(job["code"], {{"__name__": "__main__"}})
        break
    os.write({replies}, b"began %d\\n" % fork)
    os.write({replies}, b"ended %d\\n" % os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
"""


class Fork:
    """One such process.

    Attributes:
        pid: its number, of no process any more once it has ended.
        out: file that its standard output goes to.
    """

    def __init__(self, pid: int, replies: int, streams: list[Path]) -> None:
        self.pid, self.out = pid, streams[1]
        self._replies, self._streams, self._code = replies, streams, None

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What came of it once it has ended."""
        self._code = _reply(self._replies, "ended") if self._code is None else self._code
        out, err = (stream.read_text(encoding="utf-8") for stream in self._streams[1:])
        return subprocess.CompletedProcess([], self._code, out, err)

    def end(self) -> None:
        """Kill it, if it has not been waited for."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Forks:
    """Starts them, one after another, in a `with` block.

    Args:
        preload: code that the process runs of which they are forks.
        environment: variables that differ from this process's.
    """

    def __init__(self, preload: str = MODELS, **environment: str) -> None:
        theirs, self._requests = os.pipe()
        self._replies, answers = os.pipe()
        self._folder = tempfile.TemporaryDirectory()
        code = _PARENT.format(preload=preload, requests=theirs, replies=answers)
        settings = {"pass_fds": (theirs, answers), "stdin": subprocess.DEVNULL, "env": os.environ | environment}
        self._parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **settings)
        os.close(theirs)
        os.close(answers)
        self._last: Fork | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._requests)
        os.close(self._replies)
        os.killpg(self._parent.pid, signal.SIGKILL)  # with a fork that a test that failed did not wait for
        self._parent.wait()
        self._folder.cleanup()

    def start(self, *arguments: object, code: str | None = None, given: str = "") -> Fork:
        """Begin one; the one before it is killed if it has not been waited for.

        Args:
            arguments: of the command `fastweights`, or of `code`.
            code: Python to run instead.
            given: its standard input.
        """
        if self._last is not None:
            self._last.end()
        streams = [Path(self._folder.name) / name for name in ("in", "out", "err")]
        for stream, content in zip(streams, (given, "", ""), strict=True):
            stream.write_text(content, encoding="utf-8")
        job = {"arguments": [str(one) for one in arguments], "code": code, "streams": [str(one) for one in streams]}
        os.write(self._requests, json.dumps(job).encode() + b"\n")
        self._last = Fork(_reply(self._replies, "began"), self._replies, streams)
        return self._last

    def run(self, *arguments: object, code: str | None = None, given: str = "") -> subprocess.CompletedProcess[str]:
        """What comes of one, as of `start`."""
        return self.start(*arguments, code=code, given=given).wait()


class Part:
    """A fork of this very process that runs a module, in the place of a `Popen` of `python -m MODULE`.

    Not multiprocessing's: begun by a thread of a pool, that would wait at its end for the pool's threads, itself one.

    Args:
        command: Python, -m, the module and its arguments.
        cwd: its working folder.
        env: its environment, of which what modules read as they are imported comes too late.
        stdout: file that its output goes to.
        stderr: `subprocess.STDOUT`, as its errors do.
    """

    def __init__(self, command: list[str], *, cwd: Path, env: Mapping[str, str], stdout: IO, stderr: int) -> None:
        assert command[:2] == [sys.executable, "-m"]
        assert stderr == subprocess.STDOUT
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(command[2:], cwd, env, stdout.fileno())

    def poll(self) -> int | None:
        """Its exit code, or None."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float = math.inf) -> int:
        """Its exit code, once it has ended."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired([], timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)


def _become(arguments: list[str], cwd: Path, env: Mapping[str, str], output: int) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(cwd)
        os.environ.update(env)
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _reply(file: int, what: str) -> int:
    line = b""
    while (byte := os.read(file, 1)) not in (b"", b"\n"):
        line += byte
    word, _, number = line.decode().partition(" ")
    if word != what:
        raise RuntimeError(f"the process that forks said {line!r}, where {what!r} and a number were to come")
    return int(number)
