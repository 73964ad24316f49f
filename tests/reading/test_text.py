"""Texts in pieces: the tokens of the whole, whatever the pieces, the compression and the tokenizer."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fastweights.data import first_tokens, token_ids
from fastweights.errors import FastWeightsError
from fastweights.reading.text import text_lines, token_pieces, tokens_in_pieces, whole_text

STANDARD_INPUT = Path("-")


def all_ids(pieces) -> list[int]:
    return torch.cat([piece.ids for piece in pieces]).tolist()


def standard_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


@pytest.mark.parametrize("size", [1, 7, 64, 100000])
def test_a_file_is_read_in_pieces_without_changing_a_byte(tmp_path, tokenizer, size):
    text = "".join(f"Zeile {i},  zwei Leerzeichen\n\tund 'ümläuts' – {i * 7919}.\n" for i in range(40))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    pieces = list(token_pieces(file, tokenizer, size=size))
    assert tokenizer.decode(all_ids(pieces)) == text
    assert pieces[-1].characters == len(text)
    assert pieces[-1].bytes == file.stat().st_size
    assert len(pieces) > 1 or size > len(text)


CHINESE = "快速权重是模型在阅读时写入的矩阵。\n" * 3000


@pytest.mark.parametrize("size", [5, 100, 4096])
@pytest.mark.parametrize("name", ["models/stories15M", "tokenizers/gpt2"])
def test_tokens_are_those_of_the_whole(shared_data, name, size):
    """Those of SentencePiece put a mark before every text they are given."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / name)
    book = json.loads(whole_text(shared_data / "books" / "validation.jsonl.gz").splitlines()[0])["text"][:40_000]
    wiki = whole_text(shared_data / "wikitext-2-raw" / "wiki.valid.raw.gz")[:40_000]
    code = "It's a fine day;  we'll see   what 12345 brings.\n\n  Indented lines, too.\n" * 30
    for text in (book, wiki, code, CHINESE[:20_000], "x" * 9000 + " and a word"):
        pieces = tokens_in_pieces((text[i : i + size] for i in range(0, len(text), size)), tokenizer)
        ids = torch.cat([ids for _, ids in pieces]).tolist()
        whole = token_ids([text], tokenizer)[0]
        if " " in text[:4096]:
            assert ids == whole
        else:  # where to cut is anybody's guess, but nothing is lost
            assert tokenizer.decode(ids) == text


def test_a_text_without_words_comes_in_pieces_too(tokenizer):
    pieces = [text for text, _ in tokens_in_pieces([CHINESE[i : i + 1000] for i in range(0, 30_000, 1000)], tokenizer)]
    assert len(pieces) > 5
    assert "".join(pieces) == CHINESE[:30_000]


def test_going_on_in_the_middle(tmp_path, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories15M")
    file = tmp_path / "text.txt"
    file.write_text("One day, a girl named Lily found a needle.\n" * 50)
    pieces = list(token_pieces(file, tokenizer, size=300))
    for n in (1, 3, len(pieces)):
        rest = list(token_pieces(file, tokenizer, size=500, skip=pieces[n - 1].characters))
        assert all_ids(pieces[:n]) + [i for piece in rest for i in piece.ids.tolist()] == all_ids(pieces)
    with pytest.raises(FastWeightsError, match="has 2150 characters, and 2151 are to be skipped"):
        list(token_pieces(file, tokenizer, skip=2151))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_texts(tmp_path, tokenizer, suffix, pack):
    text = "".join(f"line {i}\n" for i in range(3000))
    whole, cut, bad = (tmp_path / f"{name}.txt{suffix}" for name in ("whole", "cut", "bad"))
    packed = pack(text.encode())
    whole.write_bytes(packed)
    cut.write_bytes(packed[: len(packed) // 2])
    bad.write_bytes(packed[:10] + b"\xff" * 50 + packed[60:])
    pieces = list(token_pieces(whole, tokenizer))
    assert tokenizer.decode(all_ids(pieces)) == text
    assert pieces[-1].bytes == len(packed)
    for file in (cut, bad):
        with pytest.raises(FastWeightsError, match="is not whole UTF-8 text") as caught:
            list(token_pieces(file, tokenizer))
        assert "\n" not in str(caught.value)


def test_standard_input(tokenizer, monkeypatch):
    """UTF-8 whatever the locale."""
    standard_input(monkeypatch, "naïve\ntext".encode())
    assert tokenizer.decode(all_ids(token_pieces(STANDARD_INPUT, tokenizer))) == "naïve\ntext"
    standard_input(monkeypatch, b"one\r\n\ntwo")
    assert list(text_lines(STANDARD_INPUT)) == ["one", "", "two"]
    standard_input(monkeypatch, b"one\r\n")
    assert whole_text(STANDARD_INPUT) == "one\r\n"
    assert not sys.stdin.closed
    for read in (whole_text, lambda path: list(text_lines(path)), lambda path: list(token_pieces(path, tokenizer))):
        standard_input(monkeypatch, b"")
        with pytest.raises(FastWeightsError, match="standard input is empty"):
            read(STANDARD_INPUT)
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(FastWeightsError, match="standard input is closed"):
            read(STANDARD_INPUT)


def test_bad_texts(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xff")
    for name, message in (
        ("none.txt", "does not exist"),
        ("empty.txt", "is empty"),
        ("binary.txt", "not whole UTF-8"),
    ):
        with pytest.raises(FastWeightsError, match=message):
            list(token_pieces(tmp_path / name, tokenizer))


def test_tokens_before_a_text(tokenizer, shared_data):
    assert first_tokens(tokenizer) == []
    assert first_tokens(AutoTokenizer.from_pretrained(shared_data / "models" / "stories15M")) == [1]
