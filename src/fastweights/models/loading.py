"""Models by name: a folder, a .gguf file, a name on the Hugging Face hub, or "embedded"; and their tokenizers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastweights.embedded import MODEL_NAME
from fastweights.errors import FastWeightsError, reason_of
from fastweights.layers.linear import use_onednn
from fastweights.models.architectures import architecture_of
from fastweights.models.configuration import FastWeightsConfig

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


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, gguf_file: str | None = None
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, converted or not, in evaluation mode.

    Args:
        source: a `save_pretrained` folder, a .gguf file, or a hub name.
        dtype: of the weights; states and gates are fp32 in any case.
        gguf_file: name of a GGUF file inside `source`.

    Returns:
        The model, whose linear layers take oneDNN's products where these are faster (`layers/linear.py`).

    Raises:
        FastWeightsError: there is no such model, it is of no known family, or its weights are not those of its config.
    """
    check_source(str(source))
    path = Path(source)
    if path.suffix == ".gguf":
        source, gguf_file = path.parent, path.name
        path = path.parent
    if path.exists() and not path.is_dir():
        raise FastWeightsError(f"{source} is no folder: give a save_pretrained folder, a .gguf file or a hub name")
    arguments = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(str(source), **arguments)
        if config.model_type != FastWeightsConfig.model_type:
            architecture_of(config)
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            str(source), dtype=dtype, use_safetensors=None if gguf_file else True, output_loading_info=True, **arguments
        )
    except FastWeightsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise FastWeightsError(f"cannot load a model from {source}: {reason_of(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if missing:
        raise FastWeightsError(
            f"the weights in {source} are not those of its config: {len(missing)} names do not match, "
            f"such as {missing[0]}; save the model again with save_pretrained"
        )
    use_onednn(model)
    if gguf_file is not None:
        model.config.name_or_path = str(Path(source) / gguf_file)
    return model.eval()


def name_of(model: PreTrainedModel) -> str | None:
    """Where a model came from: an absolute path, if it is on this machine, or a hub name."""
    name = model.config.name_or_path
    return str(Path(name).resolve()) if name and Path(name).exists() else name or None
