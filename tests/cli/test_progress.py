"""Progress of reading: none for what is quick, lines in a file, a bar on a terminal that shows names as they are."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastweights.cli import progress
from fastweights.cli.progress import ReadingBar


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(capsys, clock):
    with ReadingBar("reading [v2]\x1b.txt", 5_000_000) as bar:
        for second in range(16):
            clock[0] = float(second)
            bar.show(second * 100_000)
    assert capsys.readouterr().err.splitlines() == [
        rf"reading [v2]\x1b.txt: {done} of 5.0 MB" for done in ("0.2", "0.7", "1.2")
    ]


def test_a_bar_on_a_terminal(clock):
    file = io.StringIO()
    with ReadingBar("reading [v2]\x1b.txt", None) as bar:
        bar._console = Console(file=file, force_terminal=True, width=100)
        clock[0] = 1.0
        bar.show(1)
        assert file.getvalue() == ""
        clock[0] = 3.0
        bar.show(100)
    assert r"reading [v2]\x1b.txt" in file.getvalue()
