"""Texts in which passages come again, to train on: python -m benchmarks.repeats texts texts-repeated

After every 500 to 1,500 characters of a text, 200 to 800 follow that stood 700 to 6,000 before, so that a third of what
comes out was there already, mostly farther back than a window of 128 tokens sees. A softmax model copies such passages,
and its divergence from a model with fast weights then says token for token what these should have held. What it gives:
docs/log.md.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

_NEW, _AGAIN, _BACK = (500, 1500), (200, 800), (700, 6000)
"""Characters of new text, of a passage that comes again, and from its beginning to where it does."""
_FIRST = 3000
"""Characters before which nothing comes again."""


def repeated(text: str, generator: random.Random) -> str:
    """The text, with passages of it again."""
    out, at = "", 0
    while at < len(text):
        length = generator.randint(*_NEW)
        out += text[at : at + length]
        at += length
        if len(out) > _FIRST:
            length = generator.randint(*_AGAIN)
            start = len(out) - generator.randint(_BACK[0] + length, min(_BACK[1], len(out)))
            out += f"\n{out[start : start + length]}\n"
    return out


def write_repeats(texts: Path, output: Path) -> None:
    """A new folder of the same .txt files, with repeats in those that have `train` in their name."""
    whole = output.with_name(f"{output.name}.partial")
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    generator = random.Random(0)
    for file in sorted(texts.glob("*.txt")):
        text = file.read_text(encoding="utf-8", errors="ignore")  # a text may end within a character
        again = repeated(text, generator) if "train" in file.name else text
        (whole / file.name).write_text(again, encoding="utf-8")
        print(f"{file.name}: {len(text):,} characters, {len(again):,} with repeats")
    whole.rename(output)


def main() -> None:
    """Write all files of a folder anew: those of training with repeats, all others as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder of .txt files; training text has `train` in its name")
    parser.add_argument("output", type=Path, help="folder to write to, which is not there yet")
    arguments = parser.parse_args()
    if not list(arguments.texts.glob("*train*.txt")):
        sys.exit(f"benchmarks.repeats: {arguments.texts} has no .txt file with `train` in its name: give one that has")
    if arguments.output.exists():
        sys.exit(f"benchmarks.repeats: {arguments.output} exists: name a new folder")
    write_repeats(arguments.texts, arguments.output)


if __name__ == "__main__":
    main()
