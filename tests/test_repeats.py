"""Texts in which passages come again."""

from __future__ import annotations

import random
import subprocess
import sys

from benchmarks.repeats import repeated


def numbered(count: int) -> str:
    """Five characters each."""
    return "".join(f"{i:04d} " for i in range(count))


def test_all_text_is_there_in_order_and_what_comes_again_stood_before():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 9000)))
    out = repeated(text, random.Random(0))
    places: dict[str, list[int]] = {}
    for at, character in enumerate(out):
        if character != "\n":
            before = places.setdefault(character, [])
            assert not before or any(700 < at - place <= 6001 for place in before)
            before.append(at)
    assert "".join(places) == text  # by where each came first
    assert max(map(len, places.values())) > 1


def test_a_third_came_before_and_a_short_text_is_itself():
    text = numbered(9000)
    out = repeated(text, random.Random(0))
    assert 0.28 < 1 - len(text) / len(out) < 0.40
    assert repeated(text, random.Random(0)) == out != repeated(text, random.Random(1))
    assert repeated(text[:2000], random.Random(0)) == text[:2000]


def test_a_folder(tmp_path):
    texts, output = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "a.train.txt").write_bytes(numbered(2000).encode() + "é".encode()[:1])
    (texts / "b.validation.txt").write_text(numbered(2000))

    def run(folder):
        command = [sys.executable, "-m", "benchmarks.repeats", str(folder), str(output)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(texts).returncode == 0
    assert (output / "b.validation.txt").read_text() == numbered(2000)
    assert (output / "a.train.txt").read_text() == repeated(numbered(2000), random.Random(0))
    assert run(texts).stderr == f"benchmarks.repeats: {output} exists: name a new folder\n"
    assert "no .txt file with `train`" in run(tmp_path).stderr
