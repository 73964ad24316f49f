"""Tables show all that they have, on a terminal of 80 columns or beyond it."""

from types import SimpleNamespace

import pytest

from fastweights.cli.tables import print_methods, print_parts, print_positions, print_recall
from fastweights.evaluation.perplexity import Evaluation, RangeLoss
from fastweights.evaluation.recall import Recall


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_loss_by_position(capsys):
    ends = (0, 128, 1024, 4096, 16384, None)
    rows = [
        SimpleNamespace(
            method=method,
            context="sliding",
            by_position=[RangeLoss(ends[i], ends[i + 1], 100, 12.34561 + i) for i in range(ranges)],
        )
        for method, ranges in (("fast weights alone", 5), ("static", 5))
    ]
    print_positions("m", rows)
    out = capsys.readouterr().out
    for text in ("fast weights alone", "sliding", "to 128", "to 1k", "to 4k", "to 16k", "beyond", "12.346", "16.346"):
        assert text in out
    rows[0].by_position = rows[0].by_position[:1]
    print_positions("m", rows)
    assert capsys.readouterr().out == ""  # one range says no more than the loss of all


def test_parts_with_retention(capsys):
    evaluations = {"all": 2.0, "window alone": 3.0, "teacher": 1.0}
    parts = {name: Evaluation(loss, 7.0, 3.0, 9.0, 1234) for name, loss in evaluations.items()}
    without = SimpleNamespace(parts=None)
    print_parts({"pure": [without], "hybrid": [without, SimpleNamespace(parts=parts)]})
    out = capsys.readouterr().out
    assert "1,234 tokens" in out
    assert "pure" not in out
    assert [line.split()[-2] for line in out.splitlines() if "hybrid" in line] == ["0.368", "0.135", "1.000"]
    print_parts({"pure": [without]})
    assert capsys.readouterr().out == ""


def test_recall_that_was_not_asked_is_a_dash(capsys):
    far, near = Recall(4096, 10, 0.1, 5.5, 2.3), Recall(64, 10, 0.9, 1.1, 0.25)
    print_recall("m", {"static": [near, far], "teacher": [near]})
    rows = [line for line in capsys.readouterr().out.splitlines() if "0.90" in line]
    assert [row.split()[3:] for row in rows] == [
        ["0.90", "(0.25)", "│", "0.10", "(2.30)", "│"],
        ["0.90", "(0.25)", "│", "-", "│"],
    ]


def test_no_number_is_cut_short(capsys):
    evaluation = Evaluation(3.49751, 33.045, 5.04621, 9876.54, 1234)
    row = SimpleNamespace(
        method="fast weights alone",
        context="sliding",
        evaluation=evaluation,
        time_ratio=10.25,
        peak_bytes_ratio=10.75,
        settings=None,
    )
    print_methods("m", [row], "text")
    out = capsys.readouterr().out
    assert "…" not in out
    for text in ("fast weights alone", "3.4975", "33.05", "5.0462", "10.25x", "10.75x", "9,876.54"):
        assert text in out
