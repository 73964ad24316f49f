import pytest

from fastweights.progress import BYTES, Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastweights.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds_where_there_is_no_terminal(capsys, clock):
    with Progress("reading [v2]/x", unit="tokens") as progress:
        for second in range(14):
            clock[0] = second
            progress(1000 * second, 20_000, f"loss {second}")
        progress.begin("another")
        progress(1, 2)
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "reading [v2]/x",
        *(f"reading [v2]/x: {second},000 of 20,000 tokens, loss {second}" for second in (2, 7, 12, 13)),
        "another",
    ]


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Progress("reading [v2]/x") as progress:
        progress(500, 2000, "loss [a]")
    err = capsys.readouterr().err
    assert "reading [v2]/x" in err
    assert "500 of 2,000" in err
    assert "loss [a]" in err


def test_nothing_where_others_show_it(capsys, clock):
    with Progress("reading", show=False) as progress:
        clock[0] = 100.0
        progress(1, 2)
    assert capsys.readouterr() == ("", "")


def test_what_may_be_quick_shows_nothing_at_first(capsys, clock):
    with Progress("reading", unit=BYTES, quick=True) as progress:
        for second in range(16):
            clock[0] = float(second)
            progress(second * 100_000, 5_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"reading: {done} of 5.0 MB" for done in ("0.2", "0.7", "1.2", "1.5")]
    with Progress("reading", unit=BYTES, quick=True) as progress:
        progress(100, None)
    assert capsys.readouterr().err == ""


def test_nor_does_a_bar(capsys, clock, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Progress("reading [v2]", unit=BYTES, quick=True) as progress:
        progress(1, None)
        assert capsys.readouterr().err == ""
        clock[0] = 3.0
        progress(2_000_000, None)
    err = capsys.readouterr().err
    assert "reading [v2]" in err
    assert "2.0 MB" in err
