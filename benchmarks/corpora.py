"""Real corpora as folders of documents that `--data.text` reads: enwik8 (pages), WikiText-2 (articles), stories as
running text, and stories whole, each a document of its own.

    python -m benchmarks.corpora SOURCE OUTPUT [--megabytes 12]

SOURCE holds enwik8.gz, wikitext-2-raw/wiki.{train,valid,test}.raw.gz and tinystories/stories.txt.gz, or some of them.
OUTPUT gets a folder for each, with train.jsonl, validation.jsonl and test.jsonl. Of enwik8's standard split (90, 5 and
5 MB) each part is cut to its first `megabytes`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

SPLITS = ("train", "validation", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=int, default=12)
    arguments = parser.parse_args()
    known = {"enwik8": enwik8, "wikitext-2": wikitext, "stories": stories, "whole-stories": whole_stories}
    for name, make in known.items():
        parts = make(arguments.source, arguments.megabytes * 1_000_000)
        if parts is None:
            print(f"{name}: not in {arguments.source}")
            continue
        for split, documents in zip(SPLITS, parts, strict=True):
            write(arguments.output / name / f"{split}.jsonl", documents)
            size = sum(len(text.encode()) for text in documents)
            print(f"{name} {split}: {len(documents):,} documents, {size:,} bytes")


def enwik8(source: Path, limit: int) -> list[list[str]] | None:
    """Pages of the encyclopedia, with their markup."""
    file = source / "enwik8.gz"
    if not file.is_file():
        return None
    data = gzip.decompress(file.read_bytes())
    parts = (data[:90_000_000], data[90_000_000:95_000_000], data[95_000_000:])
    return [
        [page for page in re.split(r"(?=  <page>)", part[:limit].decode(errors="ignore")) if page.strip()]
        for part in parts
    ]


def wikitext(source: Path, limit: int) -> list[list[str]] | None:
    """Articles, each from its line ` = Title = ` on."""
    files = [source / "wikitext-2-raw" / f"wiki.{part}.raw.gz" for part in ("train", "valid", "test")]
    if not all(file.is_file() for file in files):
        return None
    texts = [gzip.decompress(file.read_bytes()).decode() for file in files]
    return [[text for text in re.split(r"(?m)^(?= = [^=]+ = $)", part) if text.strip()] for part in texts]


def stories(source: Path, limit: int) -> list[list[str]] | None:
    """Running text: the stories are too short to be documents of their own; eight tenths, one tenth, one tenth."""
    text = _stories(source)
    if text is None:
        return None
    lines = text.splitlines(keepends=True)
    cuts = [0, len(lines) * 8 // 10, len(lines) * 9 // 10, len(lines)]
    return [["".join(lines[start:stop])] for start, stop in pairwise(cuts)]


def whole_stories(source: Path, limit: int) -> list[list[str]] | None:
    """Each a document; the last 220 for tests, the 220 before them for validation. Between paragraphs is an empty line,
    between stories none; but a hundred or so of the others have none between paragraphs either, and fall apart."""
    text = _stories(source)
    if text is None:
        return None
    found = [story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", text) if story.strip()]
    return [found[:-440], found[-440:-220], found[-220:]]


def _stories(source: Path) -> str | None:
    file = source / "tinystories" / "stories.txt.gz"
    return gzip.decompress(file.read_bytes()).decode() if file.is_file() else None


def write(file: Path, documents: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for text in documents:
            out.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
