"""The file of sampled documents: whole at any time, and the same whether sampling was interrupted or not."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastweights.errors import FastWeightsError, reason_of
from fastweights.files import written_whole
from fastweights.reading.memory import fingerprint
from fastweights.settings.sampling import ADDED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from fastweights.reading.sampling import SampledDocument
    from fastweights.settings.sampling import SamplingConfig

_PACKED = ".jsonl.gz"


def check_name_of_samples(path: Path) -> None:
    """Refuse a name by which nobody would know the format."""
    if not path.name.endswith((".jsonl", _PACKED)):
        raise FastWeightsError(f"output {path} has another suffix than .jsonl or {_PACKED}: give a name with one")


def name_of_run(model: PreTrainedModel, config: SamplingConfig, prompts: Sequence[str]) -> str:
    """Ten characters that tell apart what was sampled by other models, with other settings or from other prompts."""
    told = {name: value for name, value in asdict(config).items() if name != "tokens"}
    settings = {name: value for name, value in told.items() if not (name in ADDED and value == ADDED[name])}
    said = json.dumps([fingerprint(model), settings, list(prompts)])
    return hashlib.sha256(said.encode()).hexdigest()[:10]


class SampledText:
    """A file of JSON lines with the fields text, tokens and run, and what is still to be written to it.

    Args:
        path: of a .jsonl or .jsonl.gz file.
        run: `name_of_run` gives it.
        resume: go on with the file that is there, if any; otherwise `save` writes over it.

    Raises:
        FastWeightsError: the file to go on with is damaged, or of another run.
    """

    def __init__(self, path: Path, run: str, *, resume: bool) -> None:
        self.path, self.run = path, run
        self.documents = self.tokens = 0
        self._waiting: list[bytes] = []
        self._keep = resume and path.exists()
        if self._keep:
            self._read()

    def add(self, batch: Sequence[SampledDocument]) -> None:
        """Take a batch, which `save` writes."""
        rows = [{"text": document.text, "tokens": document.tokens, "run": self.run} for document in batch]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        # Each batch is packed alone, so that the file does not depend on when it was written to.
        packed = gzip.compress(lines, mtime=0) if self.path.name.endswith(_PACKED) else lines
        self._waiting.append(packed)
        self.documents += len(batch)
        self.tokens += sum(document.tokens for document in batch)

    def save(self) -> None:
        """Write what waits to be written."""
        if not self._waiting:
            return
        with written_whole(self.path) as partial:
            if self._keep:
                shutil.copyfile(self.path, partial)
            with partial.open("ab") as file:
                file.writelines(self._waiting)
        self._waiting, self._keep = [], True

    def _read(self) -> None:
        opener = gzip.open if self.path.name.endswith(_PACKED) else open
        try:
            with opener(self.path, "rb") as file:
                rows = [json.loads(line) for line in file]
            runs = {row["run"] for row in rows}
            self.documents, self.tokens = len(rows), sum(row["tokens"] for row in rows)
        except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
            raise FastWeightsError(
                f"{self.path} is no whole file of sampled text ({reason_of(error)}): start anew with --overwrite, or "
                "give another output"
            ) from error
        if runs - {self.run}:
            raise FastWeightsError(
                f"{self.path} was sampled from another model, with other settings or from other prompts: give those "
                "again, start anew with --overwrite, or give another output"
            )
