"""The one exception that users see (what was given, what is allowed, what to do, in one line), and its checks."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class FastWeightsError(ValueError):
    """An input that the library refuses; its message is one line and complete."""


class NoSuchSplitError(FastWeightsError):
    """A text has no split of that name."""


class DivergedError(FastWeightsError):
    """What was computed is no longer finite: a loss, or a weight that was trained."""


def reason_of(error: BaseException) -> str:
    """The line of another library's error that says most."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":") if lines else type(error).__name__


def check_name(what: str, given: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among those that are known.

    Args:
        what: the setting that it was given for.
        given: the name.
        known: all that there are.
    """
    known = list(known)
    if given not in known:
        raise FastWeightsError(f"{what} {given!r} is unknown; known are {', '.join(known)}")


def check_file(path: Path, advice: str, *, or_pipe: bool = False) -> None:
    """Refuse what is no file, or if that will do no pipe, that can be read, and say what to do instead."""
    if path.is_dir():
        raise FastWeightsError(f"{path} is a folder: {advice}")
    if not (path.is_file() or (or_pipe and path.is_fifo())):
        what = "is no plain file" if path.exists() else "does not exist"
        raise FastWeightsError(f"{path} {what}: {advice}")
    if not os.access(path, os.R_OK):
        raise FastWeightsError(f"{path} may not be read: {advice}")


def check_new_file(path: Path, advice: str) -> None:
    """Refuse a place where no file can be written, and say what to do instead."""
    if not path.parent.is_dir():
        raise FastWeightsError(f"{path.parent} is no folder: make it first, or {advice}")
    if path.is_dir():
        raise FastWeightsError(f"{path} is a folder: {advice}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FastWeightsError(f"{path.parent} may not be written to: {advice}")


def check_folder(output: Path) -> None:
    """Refuse what cannot be, or become, a folder to write to."""
    output = output.absolute()
    path = next(path for path in (output, *output.parents) if path.exists())
    if not path.is_dir():
        raise FastWeightsError(f"output {output}: {path} is a file, give a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise FastWeightsError(f"output {output}: {path} may not be written to, give another folder")


def whole_number(name: str, value: Any) -> int:
    """A setting that counts something, which JSON may have as 64.0.

    Raises:
        FastWeightsError: it is a fraction, or no number.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, str) or number != value:
        raise FastWeightsError(f"{name} is {value!r}; it must be a whole number")
    return number


def make_whole(settings: object, *names: str) -> None:
    """Have these of a frozen dataclass be integers, or None if that is their default; raises as `whole_number` does."""
    for name in names:
        value = getattr(settings, name)
        if value is not None or getattr(type(settings), name) is not None:
            object.__setattr__(settings, name, whole_number(name, value))


def check_seed(seed: int) -> None:
    """Refuse what NumPy takes for no seed."""
    if not 0 <= seed < 2**32:
        raise FastWeightsError(f"seed is {seed}; allowed are 0 to {2**32 - 1}")
