"""Work in a process beside this one."""

import os
import signal
import sys
import time

import psutil
import pytest
import torch

from fastweights.cli.beside import beside
from fastweights.errors import FastWeightsError


def threads_and_process():
    print("hello", file=sys.stderr)
    return torch.get_num_threads(), os.getpid()


def fail():
    raise FastWeightsError("no such thing")


def time_out():
    raise TimeoutError("of its own")


def take_no_signal(file, seconds):
    """As a training does, which notes the signal, ends in its own time, and leaves what comes next to the process."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    file.touch()
    while not told:
        time.sleep(seconds)
    raise SystemExit(143)


def leave():
    os.kill(os.getpid(), signal.SIGKILL)


def test_it_shares_the_threads_and_says_what_it_does_to_a_file(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with beside(tmp_path / "log") as other:
            assert torch.get_num_threads() == 2
            first, second = other.do(threads_and_process), other.do(threads_and_process)
            threads, process = other.result(first, "first")
            assert threads == 1
            assert process != os.getpid()
            assert other.result(second, "second") == (threads, process)
        assert torch.get_num_threads() == 3
        assert (tmp_path / "log").read_text() == "hello\nhello\n"
        assert not psutil.pid_exists(process)
    finally:
        torch.set_num_threads(before)


def test_what_goes_wrong_there_is_said_here(tmp_path):
    with beside(tmp_path / "log") as other:
        with pytest.raises(FastWeightsError, match="no such thing"):
            other.result(other.do(fail), "failing")
        with pytest.raises(TimeoutError, match="of its own"):
            other.result(other.do(time_out), "timing out")
        with pytest.raises(FastWeightsError, match="leaving: the process that did it ended before it was done"):
            other.result(other.do(leave), "leaving")
        with pytest.raises(FastWeightsError, match="after it: the process that did it ended before it was done"):
            other.result(other.do(fail), "after it")


def test_it_ends_at_once_where_this_process_has_no_more_use_for_it(tmp_path):
    start, processes = time.monotonic(), []

    def interrupted():
        with beside(tmp_path / "log") as other:
            processes.append(other.result(other.do(os.getpid), "first"))
            other.do(take_no_signal, tmp_path / "begun", 0.1)
            other.do(time.sleep, 300)
            while not (tmp_path / "begun").exists():
                time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 60
    assert not psutil.pid_exists(processes[0])
