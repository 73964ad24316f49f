"""What goes to a terminal: text of models, files and users is shown as it is, never taken for markup or commands."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from typing import TextIO

_LAYOUT = "\n\t"


def say(line: str, style: str = "") -> None:
    """Print a line that a command was asked for."""
    Console(soft_wrap=True).print(as_it_is(line, style), highlight=False)


def note(line: str, style: str = "") -> None:
    """Print a line about what is being done, apart from what a command was asked for."""
    Console(stderr=True, soft_wrap=True).print(as_it_is(line, style), highlight=False)


def as_it_is(text: str, style: str = "") -> Text:
    """Text for rich, in which [v2] is no markup."""
    return Text(printable(text), style=style)


def printable(text: str) -> str:
    r"""Text with its control characters, but for new lines and tabs, spelt out, such as \x1b.

    A terminal takes these for commands: to write over what it shows, to change its title, to fill the clipboard.
    """
    return "".join(character if _is_shown(character) else _spelt_out(character) for character in text)


def shown(text: str, file: TextIO | None) -> str:
    """Text for a file, None if it is closed: whole, unless that is a terminal."""
    return printable(text) if file is not None and file.isatty() else text


class Line:
    """What is printed bit by bit; if it is broken off, whatever is said of that stands on a line of its own."""

    begun = False

    def write(self, text: str) -> None:
        """Go on with the line."""
        print(shown(text, sys.stdout), end="", flush=True)
        self.begun = self.begun or bool(text)

    def end(self) -> None:
        """End it if it was begun."""
        if self.begun:
            print(flush=True)
        self.begun = False


def use_utf8() -> None:
    """Take names, texts and both standard streams for UTF-8, whatever the locale says.

    What output cannot be encoded is spelt out. For names and arguments Python has to start anew.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace")


def _is_shown(character: str) -> bool:
    # Cc: control characters; Cf: formats, among them those that turn the direction of text round; Cs: lone surrogates.
    return (
        character in _LAYOUT or character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
    )


def _spelt_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
