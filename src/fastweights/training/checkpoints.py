"""Folders that are known to be whole: one that is sealed has a list, written last, of its files and of what is in them.

A checkpoint is gone on from only if all that it lists is as it was written; otherwise the one before it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from typing import TYPE_CHECKING

from fastweights.errors import FastWeightsError
from fastweights.files import flush_all, write_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger("fastweights")

CHECKPOINT = "checkpoint"  # transformers' PREFIX_CHECKPOINT_DIR, whose module is slow to import
MANIFEST = "manifest.json"
FINISHED = "finished"
"""The list of a stage that came to its end: of its model, and of how it was trained."""
_KEPT = 2


def seal(folder: Path, files: Iterable[Path], name: str = MANIFEST) -> None:
    """Flush files to the disk, then list them with their sizes and SHA-256.

    Args:
        folder: that they lie in.
        files: what makes the folder whole.
        name: of the list.
    """
    files = sorted(file for file in files if file != folder / name)
    flush_all(files)
    listed = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
        if file.is_file()
    }
    write_text(folder / name, json.dumps(listed, indent=1) + "\n")


def damage(folder: Path, name: str = MANIFEST) -> str | None:
    """What became of a folder since it was sealed, in a few words; None if it is whole."""
    if not (folder / name).is_file():
        return "it was cut off while it was written"
    try:
        for file, was in json.loads((folder / name).read_text(encoding="utf-8")).items():
            if not (folder / file).is_file():
                return f"{file!r} is missing"
            if (folder / file).stat().st_size != was["bytes"] or _sha256(folder / file) != was["sha256"]:
                return f"{file!r} is not what was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{name} cannot be read"
    return None


def last_checkpoint(stage: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next((path for path in _newest_first(stage) if damage(path) is None), None)


def checkpoint_to_resume(stage: Path) -> Path | None:
    """The newest whole checkpoint, with a line in the log about each that was passed over; None where none was begun.

    Raises:
        FastWeightsError: none is whole, and one was.
    """
    passed, was_whole = [], False
    if (stage / FINISHED).exists():
        passed, was_whole = [f"{stage} is damaged: {damage(stage, FINISHED)}"], True
    found = None
    for path in _newest_first(stage):
        problem = damage(path)
        if problem is None:
            found = path
            break
        passed.append(f"{path} is passed over: {problem}")
        was_whole |= (path / MANIFEST).exists()
    if found is None and was_whole:
        raise FastWeightsError(
            f"{passed[0]}; no whole checkpoint is left in {stage}: put the file back, or start anew with --overwrite"
        )
    for line in passed:
        logger.warning("%s; going on from %s", line, "the beginning" if found is None else found.name)
    return found


def drop_others(newest: Path) -> None:
    """Delete all checkpoints beside the newest, just sealed, but the last one before it that was sealed, too."""
    number, kept = _number(newest), 1
    for path in _newest_first(newest.parent):
        if path != newest:
            if _number(path) < number and kept < _KEPT and (path / MANIFEST).exists():
                kept += 1
            else:
                shutil.rmtree(path, ignore_errors=True)


def clear(stage: Path) -> None:
    """Delete a stage's checkpoints and its finished mark, and nothing else."""
    (stage / FINISHED).unlink(missing_ok=True)
    drop_all(stage)


def drop_all(stage: Path) -> None:
    """Delete all checkpoints of a stage, which one that came to its end has no more use for."""
    for path in _newest_first(stage):
        shutil.rmtree(path)


def _newest_first(stage: Path) -> list[Path]:
    """Of the Trainer's own; a copy that somebody made of one, checkpoint-kept-500, is left alone."""
    paths = (path for path in stage.glob(f"{CHECKPOINT}-*") if re.fullmatch(rf"{CHECKPOINT}-[0-9]+", path.name))
    return sorted(paths, key=_number, reverse=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
