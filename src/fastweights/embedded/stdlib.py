"""The standard library as a corpus: real prose and code, some 10 MB, on every machine that runs Python.

One document is one source file, or one topic of Python's own manual (`pydoc_data`). The split is by top-level module:
the CRC-32 of its name decides, so it is the same on every machine and in every Python version, and no module is seen
both in training and in testing.
"""

import importlib
import os
import sysconfig
import zlib
from pathlib import Path

from fastweights.errors import FastWeightsError

SPLITS = ("train", "validation", "test")

_BUCKETS = 24
_HELD_OUT = {7: "validation", 10: "test"}  # about 130 and 210 kB of 10 MB
_SKIPPED_FOLDERS = {
    # tables and tests: little language in them, and many installations leave the tests out
    *("encodings", "idle_test", "test", "tests", "__pycache__"),
    # not the standard library
    *("dist-packages", "site-packages", "lib-dynload"),
}


def split_of(module: str) -> str:
    """The split, one of `SPLITS`, that a top-level module belongs to."""
    return _HELD_OUT.get(zlib.crc32(module.encode()) % _BUCKETS, "train")


def stdlib_documents(split: str) -> list[str]:
    """Texts of the given split ("train", "validation" or "test"), in a fixed order."""
    if split not in SPLITS:
        raise FastWeightsError(f"the standard library has no split {split!r}; it has {', '.join(SPLITS)}")
    sources = [text for path in _sources() if split_of(_module(path)) == split and (text := _read(path)).strip()]
    topics = [text.strip() + "\n" for topic, text in manual().items() if split_of(f"topic:{topic}") == split]
    return sources + topics


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources() -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(_root()):
        # Skipped before they are entered: site-packages may hold far more than the library itself.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    skipped = ("_sysconfigdata", "topics.py")  # the machine's build settings; and the manual, which is read as text
    return sorted((path for path in found if not path.name.startswith(skipped)), key=lambda path: path.as_posix())


def _module(path: Path) -> str:
    return path.relative_to(_root()).parts[0].removesuffix(".py")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def manual() -> dict[str, str]:
    """The topics of Python's manual by name; none where it was left out of the installation."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package Python's manual apart
        return {}
    return dict(sorted(topics.items()))
