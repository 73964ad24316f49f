"""`fastweights read`"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fastweights.cli.console import note, printable, say
from fastweights.cli.stops import Stopped, Stops
from fastweights.errors import FastWeightsError
from fastweights.files import check_output_file, only_writer
from fastweights.progress import BYTES, Progress
from fastweights.settings.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from fastweights.reading.memory import Memory

_SIZE = 2**13
"""Characters of a piece: a stop waits for no more than one of them."""


def read(
    model: str,
    files: Annotated[tuple[Path, ...], Parameter(allow_leading_hyphen=True)],
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    memory: Path | None = None,
    skip: int = 0,
    save_minutes: float = 5.0,
    weights: Weights | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Read texts of any length at constant memory, and save what the model remembers of them.

    Stopped with Ctrl-C or by SIGTERM, it saves what was read, and says how to go on.

    Parameters
    ----------
    model
        A converted model: a folder or a hub name.
    files
        UTF-8 texts, plain, .gz, .bz2 or .xz, each a document; "-" for standard input.
    output
        Memory file to write: of one size, some MB, whatever the length of the texts.
    memory
        Memory to go on from, by the same model.
    skip
        Characters of the first text to leave out, which `memory` has read.
    save_minutes
        Minutes after which what was read so far is saved.
    weights
        Keep matrices as "bf16", "int8" or "int4": less memory, more tokens a second, a little less exact; what goes
        on from the memory must have the same.
    device
        Where to compute: "cpu", whose steps have kernels of their own, or a GPU, such as "cuda".
    overwrite
        Replace what is at `output`, which may be `memory`.
    """
    from fastweights.evaluation.peak_memory import PeakMemory
    from fastweights.models.loading import load_model, load_tokenizer, on_device, resolve_model
    from fastweights.reading.memory import load_memory, new_memory
    from fastweights.reading.text import check_text

    if skip < 0 or not save_minutes > 0:
        raise FastWeightsError(f"skip is {skip}, save_minutes {save_minutes}; allowed are at least 0, and above 0")
    for file in files:
        check_text(file)
    source = resolve_model(model)
    inputs = [path for path in (*files, Path(source)) if path.exists()]
    check_output_file(output, overwrite=overwrite, inputs=inputs, advice="save the memory elsewhere")
    loaded, tokenizer = on_device(load_model(source, weights=weights), device), load_tokenizer(model)
    remembered = new_memory(loaded) if memory is None else load_memory(loaded, memory)
    before, start, saved = remembered.tokens, time.perf_counter(), time.monotonic()
    place, stops = _Place(0, skip), Stops()
    try:
        with only_writer(output), stops, PeakMemory(loaded.device) as peak:
            for _ in _read_all(remembered, files, tokenizer, place, stops):
                if time.monotonic() - saved > 60 * save_minutes:
                    remembered.save(output)
                    saved = time.monotonic()
            seconds = time.perf_counter() - start
            remembered.save(output)
    except Stopped:
        remembered.save(output)
        line = f"stopped: {output} remembers {files[place.file]} up to character {place.characters}; "
        given = ["--memory", str(output)] + ([] if weights is None else ["--weights", weights])
        given += [] if device == "cpu" else ["--device", device]
        if any(_is_pipe(file) for file in files[place.file :]):  # what comes of it again is not what came
            note(f"{line}what comes next can be read with {shlex.join(given)}")
        else:
            rest = [model, *map(str, files[place.file :]), "--skip", str(place.characters), *given]
            note(f"{line}go on with {shlex.join(['fastweights', 'read', *rest, '-o', str(output), '--overwrite'])}")
        sys.exit(128 + stops.number)
    except FastWeightsError as error:
        if remembered.tokens > before and _saved(remembered, output):
            raise FastWeightsError(f"{error}; {output} remembers what came before") from error
        raise
    tokens, size = remembered.tokens - before, output.stat().st_size / 1e6
    taken = "" if peak.bytes is None else f", peak memory {peak.bytes / 1e6:.0f} MB"
    line = f"read {tokens:,} tokens, {tokens / seconds:,.0f} a second{taken}; {output} has {size:.1f} MB"
    say(line)


def _saved(memory: Memory, output: Path) -> bool:
    """Save what was read before an error, unless the error is in it."""
    try:
        memory.save(output)
    except FastWeightsError:
        return False
    return True


def _is_pipe(file: Path) -> bool:
    """Whether what was read of it is gone, and its size unknown."""
    from fastweights.reading.text import STANDARD_INPUT

    return file == STANDARD_INPUT or file.is_fifo()


@dataclass
class _Place:
    """Where to go on."""

    file: int
    characters: int


def _read_all(
    memory: Memory, files: tuple[Path, ...], tokenizer: PreTrainedTokenizerBase, place: _Place, stops: Stops
) -> Iterator[None]:
    """Read from a place on, which moves; between two pieces there is time for other things."""
    import torch

    from fastweights.data import first_tokens
    from fastweights.reading.text import token_pieces

    pipes = [_is_pipe(file) for file in files]
    sizes = [0 if is_pipe else file.stat().st_size for file, is_pipe in zip(files, pipes, strict=True)]
    total = None if any(pipes) else sum(sizes)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = first_tokens(tokenizer)
    before = torch.tensor(start if memory.last_token is None and not place.characters else [], dtype=torch.long)
    for index, file in enumerate(files):
        with Progress(printable(f"reading {file.name}"), unit=BYTES, quick=True) as progress:
            for piece in token_pieces(file, tokenizer, size=_SIZE, skip=place.characters):
                with stops.after():
                    memory.read([torch.cat((before, piece.ids))])
                    before = before[:0]
                    place.characters = piece.characters
                progress(sum(sizes[:index]) + piece.bytes, total)
                yield
        if index + 1 < len(files):
            with stops.after():
                memory.read([torch.tensor([*end, *start], dtype=torch.long)])
                place.file, place.characters = index + 1, 0
