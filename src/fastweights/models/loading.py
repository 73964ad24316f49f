"""Models by name (a folder, an adapter's folder, a .gguf file, a name on the hub, `names.py`), and their tokenizers."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fastweights.errors import FastWeightsError, check_name, reason_of
from fastweights.files import recover
from fastweights.hub import ask_hub, fetch, fetched, is_hub_name
from fastweights.layers.linear import use_onednn
from fastweights.models.architectures import architecture_of
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.names import resolve_model, without_hub
from fastweights.models.quantisation import quantise
from fastweights.settings.weights import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_CONFIG = "config.json"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ALLOWED = "give a save_pretrained folder, a .gguf file or a hub name"


def check_apart(source: str | Path, output: Path) -> None:
    """Refuse to write a model over, or around, the one that it is made from."""
    place = Path(resolve_model(source))
    if not os.path.exists(place):
        return
    folder = (place if place.is_dir() else place.parent).resolve()
    if folder == output.resolve():
        raise FastWeightsError(f"output {output} is the model's own folder, which stays as it is: give another")
    if output.resolve() in folder.parents:
        raise FastWeightsError(f"output {output} has the model {source} inside it, which stays as it is: give another")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; an adapter's is its base model's.

    Args:
        source: a `save_pretrained` folder, an adapter's, a .gguf file, a hub name, "embedded", "smollm2" or
            "smollm2-base".

    Raises:
        FastWeightsError: there is none, it is damaged, it needs code of its own, or it has tokens that the model lacks.
    """
    from transformers import AutoTokenizer

    name, arguments = _located(source)
    if (adapter := _adapter(name, arguments)) is not None:
        from fastweights.models.adapters import base_of

        source = base_of(source, adapter)
        name, arguments = _located(source)
    try:
        with _read_once() if "gguf_file" in arguments else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        # A .gguf file has one list of tokens for both.
        config = None if "gguf_file" in arguments else AutoConfig.from_pretrained(name, **arguments)
        last = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:
        raise _not_loaded("a tokenizer", source, error) from error
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and last >= size:
        raise FastWeightsError(
            f"the tokenizer in {source} has tokens up to {last}, and the model a vocabulary of {size}: give a folder "
            "whose model and tokenizer belong together"
        )
    return tokenizer


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    weights: str | None = None,
    gguf_file: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, converted or not, in evaluation mode.

    No code that comes with a model is ever run.

    Args:
        source: a `save_pretrained` folder, one of `save_adapter`, a .gguf file, a hub name, "embedded", "smollm2" or
            "smollm2-base".
        dtype: of the weights; states and gates are fp32 in any case.
        weights: "bf16", "int8" or "int4" to keep the matrices of linear layers so, "fp32" or None to keep them as they
            are; a model that was saved so has them so in any case.
        gguf_file: name of a GGUF file inside `source`.
        device_map: where the parts of the model lie, as transformers' `from_pretrained` takes it; of no adapter, which
            is added to its base model in memory, nor with `weights` that are to be rounded there.
        offload_folder: for the parts that lie on disk.

    Returns:
        The model, whose linear layers take oneDNN's products where these are faster (`layers/linear.py`).

    Raises:
        FastWeightsError: there is no such model, it is of no known family, or its weights are damaged or not those of
            its config; or it is an adapter, and a `device_map` is given.
    """
    check_name("weights", weights or "fp32", WEIGHTS)
    places = {"device_map": device_map, "offload_folder": offload_folder}
    places = {name: value for name, value in places.items() if value is not None}
    return quantise(_load_whole(source, dtype, gguf_file, places), weights or "fp32")


def _load_whole(
    source: str | Path, dtype: torch.dtype, gguf_file: str | None, places: dict[str, Any]
) -> PreTrainedModel:
    name, arguments = _located(source, gguf_file)
    if _adapter(name, arguments) is not None:
        from fastweights.models.adapters import load_adapter  # which loads its base model from here

        if places:
            raise FastWeightsError(
                f"{source} is an adapter, which is added to its base model in memory: make it a model with "
                f"`fastweights merge`, and give that with {next(iter(places))}"
            )
        return load_adapter(source if os.path.isdir(resolve_model(source)) else Path(name), dtype=dtype)
    arguments |= places
    gguf_file = arguments.get("gguf_file")
    try:
        with nullcontext() if gguf_file is None else _read_once():
            config = AutoConfig.from_pretrained(name, **arguments)
            if config.model_type != FastWeightsConfig.model_type:
                architecture_of(config)
            _check_no_kernels(config, source)
            if gguf_file is not None:
                arguments["config"] = config
            model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                name, dtype=dtype, use_safetensors=None if gguf_file else True, output_loading_info=True, **arguments
            )
    except FastWeightsError:
        raise
    except Exception as error:  # of transformers, of its checks of configs, of safetensors, of torch
        raise _not_loaded("a model", source, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # what is then saved is the adapter alone
        raise FastWeightsError(
            f"{source} has a peft adapter beside its model: merge the two with peft's merge_and_unload, and "
            "give what that saves"
        )
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if missing and set(missing) <= _head_keys(model):
        raise FastWeightsError(
            f"the model in {source} has no unembedding ({missing[0]}): give the causal language model, with its head"
        )
    if missing:
        raise FastWeightsError(
            f"the weights in {source} are not those of its config: {len(missing)} names do not match, "
            f"such as {missing[0]}; save the model again with save_pretrained"
        )
    _check_finite(model, source)
    use_onednn(model)
    if gguf_file is not None:
        model.config.name_or_path = str(Path(name) / gguf_file)
    return model.eval()


_reading_once = threading.RLock()


@contextmanager
def _read_once() -> Iterator[None]:
    """Within it a .gguf file is parsed once, and its table of names made once, for all that transformers asks of them.

    Either takes seconds, and transformers asks for the one with each config and each list of weights, and for the
    other with each module of a model.
    """
    try:
        import gguf
    except ImportError:  # of which transformers has more to say
        yield
        return
    with _reading_once:
        own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        instead = {**own, "GGUFReader": _of_plain_bytes(gguf.GGUFReader)}
        for name, function in instead.items():
            setattr(gguf, name, lru_cache(function))
        try:
            yield
        finally:
            for name, function in own.items():
                setattr(gguf, name, function)


def _of_plain_bytes(reader: type) -> type:
    """gguf's reader, whose `data` is a plain array of the file's bytes.

    It takes some 500,000 slices of a tokenizer's file, each of which makes a new memory map of NumPy's, with all that
    this keeps: 3.4 seconds for SmolLM2's, and 1.0 of a plain array.
    """

    class Plain(reader):
        @property
        def data(self) -> np.ndarray:
            return self._bytes

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._bytes = np.asarray(mapped)

    return Plain


def _adapter(place: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The config of an adapter of ours, None where there is something else, such as a file of the folder."""
    from fastweights.models.adapters import adapter_config

    return None if "gguf_file" in arguments or not os.path.isdir(place) else adapter_config(place)


def adapter_folder(source: str | Path) -> Path | None:
    """Where an adapter of ours is, on this machine or, from now on, off the hub; None where there is something else.

    Raises:
        FastWeightsError: there is nothing.
    """
    name, arguments = _located(source)
    return None if _adapter(name, arguments) is None else Path(name)


def _located(source: str | Path, gguf_file: str | None = None) -> tuple[str, dict[str, Any]]:
    """The folder or hub name of a model, and the arguments of transformers' `from_pretrained` that go with it.

    Of an adapter the folder, whether it was a hub name or not.
    """
    from fastweights.models.adapters import CONFIG
    from fastweights.models.adapters import WEIGHTS as ADAPTER_WEIGHTS

    name = resolve_model(source)
    if gguf_file is None and name.endswith(".gguf") and os.path.isfile(name):
        name, gguf_file = os.path.split(os.path.abspath(name))
    arguments: dict[str, Any] = {"trust_remote_code": False}
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
    needed = gguf_file or _CONFIG
    if os.path.isdir(name):
        if gguf_file is None and not any(os.path.isfile(os.path.join(name, file)) for file in (_CONFIG, CONFIG)):
            recover(Path(name))
        if not os.path.isfile(os.path.join(name, needed)) and _adapter(name, arguments) is None:
            raise FastWeightsError(f"there is no {needed} in {source}, so it is no model's folder: {_ALLOWED}")
        return name, arguments
    if os.path.exists(name):
        raise FastWeightsError(f"{source} is no folder: {_ALLOWED}")
    if name.startswith((".", "~")) or name.endswith(".gguf") or not is_hub_name(name):
        raise FastWeightsError(f"{source} does not exist: {_ALLOWED}")
    reason, files = ask_hub(name, "model")
    if reason is None and gguf_file is None and CONFIG in files and _CONFIG not in files:
        folder = fetch(name, CONFIG)
        if _adapter(str(folder), arguments) is not None:  # not one of peft's, which transformers loads
            folder = fetch(name, CONFIG, ADAPTER_WEIGHTS)
            return str(folder), arguments
    if reason is not None and fetched(name, needed) is None:
        folder = fetched(name, CONFIG)
        if folder is None or _adapter(str(folder), arguments) is None:
            raise FastWeightsError(f"there is no folder {name}, and {reason}: {without_hub(name) or _ALLOWED}")
        return str(folder), arguments
    arguments["local_files_only"] = reason is not None
    return name, arguments


def _check_no_kernels(config: PreTrainedConfig, source: str | Path) -> None:
    """Refuse an attention implementation that is a name on the hub, whose code transformers would fetch and run."""
    for part in (config, getattr(config, "base_config", None)):
        if "/" in str(named := getattr(part, "_attn_implementation", None)):
            raise FastWeightsError(
                f"{source} asks for attention by code from the hub ({named}), which is never run: take "
                "attn_implementation out of its config"
            )


def _not_loaded(what: str, source: str | Path, error: Exception) -> FastWeightsError:
    if "trust_remote_code" in str(error):
        return FastWeightsError(
            f"{source} needs Python code that comes with it, which is never run: give a model of a family that "
            "transformers itself has"
        )
    return FastWeightsError(f"cannot load {what} from {source}: {reason_of(error)}")


def _head_keys(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    named = [(name, module) for name, module in model.named_modules() if module is head]
    return {f"{name}.{key}" for name, module in named for key in module.state_dict()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of one with a number that is not finite; None if there is none."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


@torch.no_grad()
def _check_finite(model: PreTrainedModel, source: str | Path) -> None:
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if parameter.is_meta or not parameter.numel() or parameter.dtype not in _FLOATS:
            continue
        # NaN and infinities show in the extremes, which take one pass and no room.
        if not torch.stack(parameter.aminmax()).isfinite().all():
            raise FastWeightsError(f"{name} of the model in {source} is not finite: train it or download it again")


def on_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model, moved to a device by its name in torch: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        FastWeightsError: this machine has none, or too little room there, or one that does not compute.
    """
    try:
        torch.zeros(1, device=device).item()
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        raise FastWeightsError(
            f"device {device!r} cannot be used: {reason_of(error)}; give cpu, or a GPU with room for the model, which "
            "takes half of it with weights bf16"
        ) from error


def name_of(model: PreTrainedModel) -> str | None:
    """Where a model came from: an absolute path, if it is on this machine, or a hub name."""
    name = model.config.name_or_path
    return str(Path(name).resolve()) if name and Path(name).exists() else name or None
