"""Names of models: a folder, a .gguf file, a name on the Hugging Face hub, or "embedded"."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fastweights.embedded import MODEL_NAME
from fastweights.errors import FastWeightsError, reason_of

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


def check_source(source: str) -> None:
    """Refuse a name that can only be a folder's or file's, and of none that is there."""
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".gguf")
    if looks_local and not Path(source).exists():
        raise FastWeightsError(f"{source} does not exist: give a save_pretrained folder, a .gguf file or a hub name")


def check_apart(source: str, output: Path) -> None:
    """Refuse to write a model over the one that it is made from."""
    folder = Path(resolve_model(source))
    if folder.exists() and folder.resolve() == output.resolve():
        raise FastWeightsError(f"output {output} is the model's own folder, which stays as it is: give another")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    from transformers import AutoTokenizer

    resolved = resolve_model(source)
    path = Path(resolved)
    check_source(resolved)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(resolved)
    except Exception as error:
        raise FastWeightsError(f"cannot load a tokenizer from {source}: {reason_of(error)}") from error
