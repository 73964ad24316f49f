"""Names of models: a folder, a .gguf file, a name on the Hugging Face hub, or "embedded"."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fastweights.embedded import MODEL_NAME
from fastweights.errors import FastWeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"


def resolve_model(source: str) -> str:
    """The folder or hub name behind a name that a user may give."""
    if source != EMBEDDED:
        return source
    folder = Path(str(files("fastweights.embedded"))) / MODEL_NAME
    if not (folder / "model.safetensors").exists():
        raise FastWeightsError("the embedded model is missing from this installation: install fastweights again")
    return str(folder)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    from transformers import AutoTokenizer

    resolved = resolve_model(source)
    path = Path(resolved)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(resolved)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FastWeightsError(f"cannot load a tokenizer from {source}: {reason}") from error
