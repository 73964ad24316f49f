import pytest

from fastweights.progress import Progress


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
    assert " 500/2000" in err
    assert "loss [a]" in err


def test_nothing_where_others_show_it(capsys, clock):
    with Progress("reading", show=False) as progress:
        clock[0] = 100.0
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
