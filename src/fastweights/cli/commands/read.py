"""`fastweights read`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastweights.data import token_pieces
from fastweights.errors import check_file, check_new_file
from fastweights.evaluation.peak_memory import PeakMemory
from fastweights.models import load_model
from fastweights.models.loading import load_tokenizer, resolve_model
from fastweights.reading.memory import load_memory, new_memory


def read(
    model: str,
    file: Path,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    memory: Path | None = None,
) -> None:
    """Read a text of any length at constant memory, and save what the model remembers of it.

    Parameters
    ----------
    model
        A converted model: a folder or a hub name.
    file
        UTF-8 text, plain or .gz.
    output
        Memory file to write: of one size, some MB, whatever the length of the text.
    memory
        Memory to go on from, by the same model.
    """
    check_file(file, "give an existing text file")
    check_new_file(output, "save the memory elsewhere")
    loaded, tokenizer = load_model(resolve_model(model)), load_tokenizer(model)
    remembered = new_memory(loaded) if memory is None else load_memory(loaded, memory)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    before = remembered.tokens
    with Progress(*columns, console=Console(stderr=True)) as bar:
        total = None if file.suffix == ".gz" else file.stat().st_size
        task = bar.add_task(f"reading {file.name}", total=total)

        def pieces():
            for ids, size in token_pieces(file, tokenizer):
                for part in ids.split(4096):
                    yield part
                    bar.advance(task, size * len(part) / max(1, len(ids)))

        with PeakMemory(loaded.device) as peak:
            start = time.perf_counter()
            remembered.read(pieces())
            seconds = time.perf_counter() - start
    remembered.save(output)
    tokens, size = remembered.tokens - before, output.stat().st_size / 1e6
    taken = "" if peak.bytes is None else f", peak memory {peak.bytes / 1e6:.0f} MB"
    print(f"read {tokens:,} tokens, {tokens / seconds:,.0f} a second{taken}; {output} has {size:.1f} MB")
