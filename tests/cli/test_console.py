import io

import pytest

from fastweights.cli.console import as_it_is, note, printable, say, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_spelt_out_on_a_terminal_alone():
    text = "a\x1b[31mred\x07\r\u202e\x9b1m\ud800é\t漢\n"
    assert shown(text, Terminal()) == printable(text) == "a\\x1b[31mred\\x07\\r\\u202e\\x9b1m\\ud800é\t漢\n"
    assert shown(text, io.StringIO()) == text


@pytest.mark.parametrize(("to", "stream"), [(say, 0), (note, 1)])
def test_brackets_are_no_markup(capsys, to, stream):
    to("runs/[v2]/a[/x] \x1b]0;title\x07")
    assert capsys.readouterr()[stream] == "runs/[v2]/a[/x] \\x1b]0;title\\x07\n"


def test_nor_are_they_in_what_rich_shows():
    assert as_it_is("[bold]x[/bold]").plain == "[bold]x[/bold]"


def test_a_closed_stream_is_no_terminal():
    assert shown("\x1b", None) == "\x1b"
