"""Processes that need not import torch and transformers first: forks of one that has, in an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

MODELS = "import fastweights.evaluation.comparison, fastweights.training.pipeline, transformers.generation"
"""What most commands import, which takes five seconds."""

_PARENT = """
import json, os, runpy, sys
{preload}
for line in os.fdopen({requests}):
    job = json.loads(line)
    fork = os.fork()
    if not fork:
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
    os.write({replies}, b"%d\\n" % fork)
    os.write({replies}, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
"""


class Fork:
    """One such process.

    Attributes:
        pid: its number, of no process any more once it has ended.
        out: file that its standard output goes to.
    """

    def __init__(self, pid: int, replies: int, streams: list[Path]) -> None:
        self.pid, self.out = pid, streams[1]
        self._replies, self._streams = replies, streams

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What came of it once it has ended."""
        code = _line(self._replies)
        if not code:
            raise RuntimeError("the process that was to fork this one is gone")
        out, err = (stream.read_text(encoding="utf-8") for stream in self._streams[1:])
        return subprocess.CompletedProcess([], int(code), out, err)


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._requests)
        os.close(self._replies)
        os.killpg(self._parent.pid, signal.SIGKILL)  # with a fork that a test that failed did not wait for
        self._parent.wait()
        self._folder.cleanup()

    def start(self, *arguments: object, code: str | None = None, given: str = "") -> Fork:
        """Begin one; wait for it before the next.

        Args:
            arguments: of the command `fastweights`, or of `code`.
            code: Python to run instead.
            given: its standard input.
        """
        streams = [Path(self._folder.name) / name for name in ("in", "out", "err")]
        for stream, content in zip(streams, (given, "", ""), strict=True):
            stream.write_text(content, encoding="utf-8")
        job = {"arguments": [str(one) for one in arguments], "code": code, "streams": [str(one) for one in streams]}
        os.write(self._requests, json.dumps(job).encode() + b"\n")
        return Fork(int(_line(self._replies)), self._replies, streams)

    def run(self, *arguments: object, code: str | None = None, given: str = "") -> subprocess.CompletedProcess[str]:
        """What comes of one, as of `start`."""
        return self.start(*arguments, code=code, given=given).wait()


def _line(file: int) -> bytes:
    line = b""
    while (byte := os.read(file, 1)) not in (b"", b"\n"):
        line += byte
    return line
