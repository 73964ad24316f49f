"""Files and folders that nobody loses: written whole or not at all, never over others unasked, by one run alone.

What is new is written beside its place, flushed to the disk and renamed, so that a process that is killed, or a disk
that is full, leaves what was there before.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastweights.errors import FastWeightsError, check_folder, check_new_file, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOCK_FILE = ".fastweights.lock"
_PARTIAL = ".fastweights-partial-"
_OLD = "old"
# Of a model that is overwritten, what a save of another may leave: weights in other pieces, another kind of tokenizer.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_OF_A_MODEL = {"generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
_OF_A_MODEL |= {"special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"}
_OF_A_MODEL |= {"config.json", "adapter_config.json", "adapter_model.safetensors"}
_OF_A_MODEL |= {"chat_template.jinja", "chat_template.json", "additional_chat_templates", "modeling_fastweights.py"}
_CONFIGS = {"config.json", "adapter_config.json"}
"""Without one of these, a folder is neither a model nor an adapter."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; once the block ends it is flushed to the disk and takes the place of `path`.

    Args:
        path: of the file, new or old, in a folder that exists.

    Raises:
        FastWeightsError: it cannot be written; what was at `path` is as it was.
    """
    path = Path(path)
    try:
        with _beside(path) as partial:
            yield partial
            _flush(partial)
            os.chmod(partial, 0o666 & ~_umask())  # whoever made it may have kept it to himself
            os.replace(partial, path)
            _flush(path.parent)
    except OSError as error:
        raise FastWeightsError(f"cannot write {path}: {said(error)}; what was there is as it was") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def flush_all(paths: Iterable[Path]) -> None:
    """See to it that files, and the entries of the folders they lie in, are on the disk."""
    paths = list(paths)
    for path in [*paths, *{path.parent for path in paths}]:
        _flush(path)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer to a folder, whole or not at all; see `model_written_whole`."""
    with model_written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


@contextmanager
def model_written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside to save a model and its tokenizer, or an adapter, in; at the end all is moved into `folder`.

    Into a folder that exists, for instance of the run that made the model, files are moved one by one: the config goes
    first and comes last, so that a folder in which a kill left half of them is no model, until `recover` brings the old
    one back.

    Args:
        folder: new, or one whose model may be replaced; all else in it stays.

    Raises:
        FastWeightsError: it cannot be written; a model that was there is as it was.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Within a folder that exists, where its next run finds what a kill left of it.
        with _beside(folder / "new" if folder.exists() else folder) as partial:
            partial.mkdir()
            yield partial
            for path in partial.rglob("*"):
                os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())
                _flush(path)
            _flush(partial)
            if folder.exists():
                _move_into(partial, folder)
            else:
                os.replace(partial, folder)
            _flush(folder.parent)
    except Exception as error:  # safetensors and tokenizers have classes of their own for a full disk
        if isinstance(error, FastWeightsError):
            raise
        raise FastWeightsError(f"cannot save the model to {folder}: {said(error)}") from error


def _move_into(partial: Path, folder: Path) -> None:
    """Move a saved model into a folder, out of which another goes first; that comes back if something is in the way."""
    new, aside = {path.name for path in partial.iterdir()}, partial.parent / _OLD
    aside.mkdir()
    old = [path for path in folder.iterdir() if path.name in new | _OF_A_MODEL or _WEIGHTS.fullmatch(path.name)]
    moved: list[tuple[Path, Path]] = []
    try:
        moves = [(path, aside / path.name) for path in sorted(old, key=lambda path: path.name not in _CONFIGS)]
        moves += [(partial / name, folder / name) for name in sorted(new, key=lambda name: name in _CONFIGS)]
        for source, target in moves:
            os.replace(source, target)
            moved.append((source, target))
            if source.name in _CONFIGS:
                _flush(folder)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise


def check_output_file(path: Path, *, overwrite: bool, inputs: Iterable[Path] = (), advice: str) -> None:
    """Refuse to write where something is that nobody asked to overwrite, or that is no plain file.

    Args:
        path: of the file to write.
        overwrite: whether a plain file there may be replaced.
        inputs: files and folders that are read, which are never written over or into.
        advice: what to do instead.

    Raises:
        FastWeightsError: says which of these it is.
    """
    check_new_file(path, advice)
    place = path.resolve()
    for given in inputs:
        given = given.resolve()
        if place == given or (given.is_dir() and given in place.parents):
            raise FastWeightsError(f"output {path} is, or lies in, {given}, which is read: {advice}")
    if path.exists() and not path.is_file():
        raise FastWeightsError(f"output {path} is no plain file: {advice}")
    if path.exists() and not overwrite:
        raise FastWeightsError(f"output {path} exists: {advice}, or replace it with --overwrite")


def check_output_folder(folder: Path, *, overwrite: bool, names: Iterable[str] | None = None) -> None:
    """Refuse a folder that cannot be written to, or has something in it that nobody asked to overwrite.

    Args:
        folder: to write to.
        overwrite: whether what is there may be replaced.
        names: of the files that would be replaced; by default nothing at all may be there.

    Raises:
        FastWeightsError: says what is there.
    """
    check_folder(folder)
    if overwrite or not folder.exists():
        return
    there = things_in(folder)
    found = there if names is None else [name for name in there if name in set(names)]
    if found:
        raise FastWeightsError(
            f"output {folder} has {found[0]} in it{_others(found)}: give another folder, or replace what is there with "
            "--overwrite"
        )


def make_folder(folder: Path) -> None:
    """Make a folder to write to, and those that it is to lie in."""
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastWeightsError(f"cannot make the folder {folder}: {said(error)}") from error


def things_in(folder: Path) -> list[str]:
    """Names of what is in a folder, but for what this module itself left there."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith((LOCK_FILE, _PARTIAL)))


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep others from writing to `folder` within the block; a process that ends, however it ends, lets go of it.

    Raises:
        FastWeightsError: another process writes to it.
    """
    make_folder(folder)
    with _locked(folder / LOCK_FILE, f"another process is writing to {folder}", folder, "folder"):
        for left in folder.glob(f"{_PARTIAL}*"):  # by a process that was killed
            _bring_back(left / _OLD, folder)
            shutil.rmtree(left)
        yield


def recover(folder: Path) -> None:
    """Bring back the model that a process was replacing when it was killed, unless another process is at it."""
    if any(folder.glob(f"{_PARTIAL}*")):
        with suppress(FastWeightsError), only_run(folder):
            pass


def _bring_back(old: Path, folder: Path) -> None:
    if _has_config(old) and not _has_config(folder):
        for path in sorted(old.iterdir(), key=lambda path: path.name in _CONFIGS):
            os.replace(path, folder / path.name)


def _has_config(folder: Path) -> bool:
    return any((folder / name).exists() for name in _CONFIGS)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep others on this machine from writing to the same file within the block.

    Raises:
        FastWeightsError: another process is about to.
    """
    name = hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()[:32]
    lock = Path(tempfile.gettempdir()) / f"fastweights-{name}.lock"
    with _locked(lock, f"another process is about to write {path}", path, "file"):
        yield


@contextmanager
def _locked(lock: Path, taken: str, place: Path, kind: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    held = FileLock(lock, blocking=False)
    try:
        held.acquire()
    except Timeout:
        raise FastWeightsError(f"{taken}: wait for it, or give another {kind}") from None
    except (OSError, NotImplementedError) as error:  # a file system that knows no locks
        raise FastWeightsError(f"{place} cannot be kept to one process: {said(error)}; give another {kind}") from error
    try:
        yield
    finally:
        held.release()


def said(error: BaseException) -> str:
    """What an error of the system or of a library says, in a user's words."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    if "os error 28" in text or "No space left" in text or os.strerror(errno.ENOSPC) in text:
        return os.strerror(errno.ENOSPC).lower()
    if "inline_container.cc" in text:  # torch.save, which does not say why
        return "it could not be written to its end, as on a full disk"
    return reason_of(error)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name in the same folder for a file or folder to be; what is left of it afterwards is deleted."""
    holder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.parent))
    try:
        yield holder / "new"
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _others(found: list[str]) -> str:
    return "" if len(found) == 1 else f" and {len(found) - 1} more"
