"""Texts of any length as tokens, a piece at a time and at constant memory: the tokens are those of the whole text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastweights.data import token_ids
from fastweights.errors import FastWeightsError, check_file, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO, TextIO

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

STANDARD_INPUT = Path("-")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ADVICE = "give UTF-8 text, plain, .gz, .bz2 or .xz"
_SIZE = 2**16
_LONGEST_WORD = 2**12


class Piece(NamedTuple):
    """Some of a text."""

    ids: Int[Tensor, " n"]
    characters: int
    """Of the text, from its beginning to the end of this piece."""
    bytes: int
    """Of the file, compressed or not, that were read for it."""


def check_text(path: Path) -> None:
    """Refuse what `token_pieces` cannot open.

    Args:
        path: of a file or a pipe, or "-" for standard input.

    Raises:
        FastWeightsError: there is no such file or it may not be read, or standard input is closed.
    """
    if path != STANDARD_INPUT:
        check_file(path, "give an existing text file", or_pipe=True)
    elif sys.stdin is None or sys.stdin.closed:
        raise FastWeightsError("standard input is closed: pipe a text into this command, or name a file")


def token_pieces(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, size: int = _SIZE, skip: int = 0
) -> Iterator[Piece]:
    """A text, a piece at a time; one that is compressed by its suffix.

    Args:
        path: UTF-8 text, plain, .gz, .bz2 or .xz; "-" for standard input.
        tokenizer: the model's.
        size: characters of a piece, about.
        skip: characters to leave out, where an earlier piece ended.

    Raises:
        FastWeightsError: the file does not exist, may not be read, is no whole UTF-8 text, is empty, or ends before
            `skip`.
    """
    with _opened(path) as (text, file):
        place = _skip(path, text, skip)
        chunks = iter(lambda: _read(path, text, size), "")
        for piece, ids in tokens_in_pieces(chunks, tokenizer, inside=skip > 0):
            place += len(piece)
            yield Piece(ids, place, file.bytes)
        if not place:
            raise FastWeightsError(f"{_name(path)} is empty: give a text that is not")


def whole_text(path: Path) -> str:
    """A text at once, with its line ends as they are; what is wrong with it is refused as by `token_pieces`."""
    with _opened(path, newline="") as (text, _):
        whole = _read(path, text, -1)
    if not whole:
        raise FastWeightsError(f"{_name(path)} is empty: give a text that is not")
    return whole


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text without their ends, each as soon as it is there."""
    found = False
    with _opened(path, newline="") as (text, _):
        while line := _read(path, text, None):
            found = True
            yield line.removesuffix("\n").removesuffix("\r")
    if not found:
        raise FastWeightsError(f"{_name(path)} is empty: give a text that is not")


def tokens_in_pieces(
    chunks: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, inside: bool = False
) -> Iterator[tuple[str, Int[Tensor, " n"]]]:
    """(text, token ids) of a text that comes in chunks.

    Pieces end where tokenizers part words, and all but the first are tokenized with a character before them: there are
    tokenizers that put a mark before every text.

    Args:
        chunks: of the text, cut anywhere.
        tokenizer: the model's.
        inside: whether there was text before the first.
    """
    for text in _cut_between_words(chunks):
        if inside:
            before = "a" if text[0].isspace() else "\n"  # no tokenizer joins it with what follows
            alone, both = token_ids([before, before + text], tokenizer)
            ids = both[len(alone) :]
        else:
            (ids,) = token_ids([text], tokenizer)
        inside = True
        yield text, torch.tensor(ids, dtype=torch.long)


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase, *, inside: bool) -> Int[Tensor, " n"]:
    """Token ids of a text, which stands `inside` another or begins one."""
    pieces = [ids for _, ids in tokens_in_pieces([text], tokenizer, inside=inside)]
    return torch.cat([torch.tensor([], dtype=torch.long), *pieces])


def _cut_between_words(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for more in chunks:
        text = rest + more
        cut = _last_word_start(text)
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def _last_word_start(text: str) -> int:
    """Where the last space between two words stands, or the last end of a line after one; 0 to wait for such a place.

    Some tokenizers join punctuation and the end of its line: in a text without words this is where to cut nevertheless,
    or else at the end.
    """
    places = range(len(text) - 2, 0, -1)
    found = next((i for i in places if _between_words(*text[i - 1 : i + 2])), 0)
    if found or len(text) < _LONGEST_WORD:
        return found
    return next((i for i in places if text[i] == "\n" and not text[i - 1].isspace()), len(text))


def _between_words(before: str, here: str, after: str) -> bool:
    return (here == "\n" and before.isalnum()) or (here == " " and not before.isspace() and not after.isspace())


class _CountedFile(io.RawIOBase):
    """Another file, that knows how many bytes of it were read, a pipe, too."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        read = self.file.readinto1(buffer)  # type: ignore[attr-defined]
        self.bytes += read
        return read


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[tuple[TextIO, _CountedFile]]:
    """A text, and the file beneath it."""
    check_text(path)
    with ExitStack() as stack:
        file = sys.stdin.buffer if path == STANDARD_INPUT else stack.enter_context(path.open("rb"))
        counted = _CountedFile(file)
        opener = _OPENERS.get(path.suffix)
        unpacked = io.BufferedReader(counted) if opener is None else opener(io.BufferedReader(counted))
        yield io.TextIOWrapper(unpacked, encoding="utf-8", newline=newline), counted  # type: ignore[arg-type]


def _read(path: Path, text: TextIO, size: int | None) -> str:
    """So many characters, -1 for all, or a line for None."""
    try:
        return text.readline() if size is None else text.read(size)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise FastWeightsError(f"{_name(path)} is not whole UTF-8 text ({reason_of(error)}): {_ADVICE}") from error


def _skip(path: Path, text: TextIO, characters: int) -> int:
    left = characters
    while left:
        skipped = len(_read(path, text, min(left, _SIZE)))
        if not skipped:
            raise FastWeightsError(
                f"{_name(path)} has {characters - left} characters, and {characters} are to be skipped: give fewer"
            )
        left -= skipped
    return characters


def _name(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else str(path)
