"""A conversion as an adapter: what makes a base model one with fast weights, in a small folder as peft's are.

    adapter_config.json        peft's LoraConfig; under "fastweights" how to convert, and what tells the base model
    adapter_model.safetensors  LoRA of the projections and the conversion's own parameters, under peft's names

peft loads such a folder onto `convert(base, settings)` by itself, and `load_adapter` without peft.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastweights.errors import FastWeightsError, reason_of
from fastweights.files import model_written_whole
from fastweights.layers.attention import UNIT
from fastweights.models.conversion import convert_beside, copy_beside, with_config
from fastweights.models.loading import adapter_folder, load_model, not_finite
from fastweights.models.lora import ADAPTER, add_lora, tensors_beside
from fastweights.models.names import find_base, lasting_name, resolve_model
from fastweights.models.quantisation import check_not_quantised
from fastweights.settings.conversion import BEFORE, ConversionConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.conversion import KeptDtype

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "fastweights"
FORMAT = 1
_PREFIX = "base_model.model."
_LORA = re.compile(r"\.lora_[AB]\.default\.weight$")
_NO_TARGETS = "dummy-target-modules"
"""peft's name for an adapter without LoRA."""
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_ROWS, _NUMBERS, _STRIDE = 16, 16, 1_000_003
_MOST = {2: 0.2, 1: 0.01}
"""Relative difference of matrices and of vectors that is still the same model. In matrices that were quantised to eight
bits it is 0.01, to five 0.04, to four 0.08 to 0.14; vectors are not quantised, and rounding to bf16 is 0.002."""


def save_adapter(
    model: FastWeightsForCausalLM, folder: str | Path, *, base: str | Path | PreTrainedModel, replace: bool = False
) -> None:
    """Write what training made of a conversion, without its base model; whole or not at all.

    Matrices are stored in bf16, so that what is loaded differs by this rounding; vectors in fp32.

    Args:
        model: a conversion, with peft's LoRA in it (adapter "default") or without any; it stays as it is.
        folder: new, or one of an adapter, which is replaced.
        base: the model that was converted, or its name.
        replace: whether it may take the place of a model in that folder.

    Raises:
        FastWeightsError: more was trained than an adapter holds, or it cannot be written.
    """
    folder = Path(folder)
    check_not_quantised(model, "an adapter")
    if (folder / "config.json").exists() and not replace:
        raise FastWeightsError(f"{folder} has a model in it: give the adapter a folder of its own")
    original = convert_beside(base, model.config.settings)
    lora = _lora_settings(model)
    check_rest(model, original, "train with LoRA, or keep the whole model")
    kept = {
        _PREFIX + name.replace(".default.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in tensors_beside(model).items()
    }
    kept = {name: x.to(torch.bfloat16 if x.ndim > 1 else torch.float32) for name, x in kept.items()}
    if bad := not_finite(kept):
        raise FastWeightsError(f"{bad} of the model is not finite, and no adapter was saved: train it again")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lasting_name(original.config.base_model),
        "inference_mode": True,
        **lora,
        OURS: {
            "format": FORMAT,
            "conversion": asdict(model.config.settings),
            "base": {name: getattr(original.config.base, name, None) for name in _SIZES},
            "sample": {name: " ".join(f"{x:.4g}" for x in row.tolist()) for name, row in _sample(original).items()},
        },
    }
    with model_written_whole(folder) as partial:
        save_file(kept, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def load_adapter(
    folder: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    merge: bool = True,
    window: int | None = None,
    wide_window: int | None = None,
    window_dtype: KeptDtype | None = None,
    state_dtype: KeptDtype | None = None,
    softmax_dtype: KeptDtype | None = None,
    share: bool = False,
) -> FastWeightsForCausalLM:
    """The base model of an adapter, converted, and with the adapter in its weights; peft is not needed.

    The base is known by its family, its sizes and a sample of its weights. That lets quantised copies pass, down to
    four bits, and so it cannot tell the model from one that was finetuned from it so gently that its matrices differ by
    less than a fifth and its norms by less than a hundredth.

    Args:
        folder: that `save_adapter` made, or its name on the hub, or "smollm2".
        base: the base model, which stays as it is, or its name, where it is not at the place that the adapter names.
        dtype: of the weights; gates and factors are fp32 in any case.
        merge: whether LoRA goes into the weights; else it stands beside them, by peft, to be trained on.
        window: of its hybrid layers, where it is to be another than the adapter's: a longer one takes more memory and
            keeps more, without any training.
        wide_window: the same of those layers that have a longer one than the others.
        window_dtype: of the windows' keys and values, where it is to be another than the adapter's: "int8" takes a
            quarter of float32's memory, "auto" is the model's.
        state_dtype: of the fast weights that caches keep, in the same way; "auto" is float32.
        softmax_dtype: of keys and values in layers that keep their softmax attention.
        share: whether what is returned is to have the very weights of `base`, a model, beside LoRA that is not merged;
            they are not to be trained then, nor written into.

    Returns:
        The model in evaluation mode, with plain linear layers if merged.

    Raises:
        FastWeightsError: the adapter is none, is damaged, belongs to another base model, or to one that is not to be
            had; or it has no window, or no longer one, that could be another.
    """
    if share and (merge or not isinstance(base, PreTrainedModel)):
        raise FastWeightsError("share was given, which is for a base model at hand and LoRA beside it: leave it out")
    place = Path(resolve_model(folder))
    adapter = _read(place if place.is_dir() else adapter_folder(folder) or place)
    source = base_of(folder, adapter.config) if base is None else base
    try:
        if isinstance(source, PreTrainedModel):
            found = copy_beside(source) if share else copy.deepcopy(source)
        else:
            found = load_model(source, dtype=dtype)
    except FastWeightsError as error:
        raise FastWeightsError(f"the base model of the adapter {folder} is not to be had: {error}") from error
    source = found.config.name_or_path if isinstance(source, PreTrainedModel) else source
    what = f"{source} is not the base model of the adapter {folder}"
    for name, value in adapter.sizes.items():
        if getattr(found.config, name, None) != value:
            raise FastWeightsError(f"{what}: it has {name} {getattr(found.config, name, None)}, and that had {value}")
    settings = _with_windows(adapter.settings, window, wide_window, what=str(folder))
    dtypes = {"window_dtype": window_dtype, "state_dtype": state_dtype, "softmax_dtype": softmax_dtype}
    settings = replace(settings, **{name: given for name, given in dtypes.items() if given is not None})
    model = with_config(found, settings)
    _check_sample(adapter.sample, model, what)
    _fill(adapter, model, merge=merge)
    model.config.name_or_path = str(adapter.folder)
    return model.eval()


def adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """The config of an adapter of ours; None for anything else, such as a model with or without peft's adapters.

    Raises:
        FastWeightsError: it is no JSON.
    """
    file = os.path.join(folder, CONFIG)
    if not os.path.isfile(file) or os.path.isfile(os.path.join(folder, "config.json")):
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FastWeightsError(f"{file} cannot be read ({reason_of(error)}): save or download it again") from error
    return config if isinstance(config, dict) and OURS in config else None


def base_of(folder: str | Path, config: dict[str, Any]) -> str:
    """Where the base model of an adapter in `folder` is, as far as its config knows."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise FastWeightsError(
            f"the adapter {folder} does not name its base model: fastweights merge takes it as --base"
        )
    return find_base(name)


def _with_windows(
    settings: ConversionConfig, window: int | None, wide_window: int | None, what: str
) -> ConversionConfig:
    if window is None and wide_window is None:
        return settings
    if window is not None and (settings.window == 0 or window < 2):
        raise FastWeightsError(
            f"window is {window}, and that of the adapter {what} {settings.window}: one that has a window can be given "
            "another, of 2 tokens up"
        )
    window = settings.window if window is None else window
    if wide_window is not None and (not settings.wide_window or wide_window <= window):
        raise FastWeightsError(
            f"wide_window is {wide_window}, and that of the adapter {what} {settings.wide_window}: one that has layers "
            f"with a longer window than the others' {window} can be given another that is longer"
        )
    return settings.with_window(window, wide_window)


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    config: dict[str, Any]
    settings: ConversionConfig
    sizes: dict[str, Any]
    sample: dict[str, Float[Tensor, " _"]]
    targets: list[str]
    """Names of the linear layers with LoRA."""
    rank: int
    scale: float
    tensors: dict[str, Tensor]
    """By their names in the converted model."""


def _read(folder: Path) -> _Adapter:
    config = adapter_config(folder)
    if config is None:
        raise FastWeightsError(f"{folder} is no adapter with fast weights: give a folder that save_adapter made")
    try:
        ours, targets = config[OURS], config["target_modules"]
        if ours["format"] != FORMAT:
            raise FastWeightsError(
                f"{folder} is an adapter of format {ours['format']}, and this version reads {FORMAT}: install the "
                "fastweights that made it"
            )
        if odd := [name for name in _VARIANTS if config.get(name)]:
            raise FastWeightsError(
                f"{folder} has {odd[0]}, a variant of LoRA that is not read here: merge it with peft"
            )
        tensors = load_file(folder / WEIGHTS)
        return _Adapter(
            folder=folder.resolve(),
            config=config,
            settings=ConversionConfig(**{**BEFORE, **ours["conversion"]}),
            sizes={name: ours["base"][name] for name in _SIZES},
            sample={name: torch.tensor([float(x) for x in row.split()]) for name, row in ours["sample"].items()},
            targets=[] if targets == _NO_TARGETS else list(targets),
            rank=config["r"],
            scale=config["lora_alpha"] / config["r"],
            tensors={name.removeprefix(_PREFIX).replace(".base_layer.", "."): x for name, x in tensors.items()},
        )
    except FastWeightsError:
        raise
    except Exception as error:  # of safetensors, of the system, of a config with something else in a value's place
        missing = f"it has no {error}" if isinstance(error, KeyError) else reason_of(error)
        raise FastWeightsError(f"{folder} is no whole adapter ({missing}): save or download it again") from error


_VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")


def _lora_settings(model: FastWeightsForCausalLM) -> dict[str, Any]:
    """What of peft's LoraConfig says which layers have LoRA, and how much of it."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    tensors = [name for name in model.state_dict() if ".lora_" in name]
    kinds = {(m.r.get("default"), m.lora_alpha.get("default"), m.scaling.get("default")) for m in layers.values()}  # type: ignore[union-attr, operator]
    rank, alpha, scale = kinds.pop() if kinds else (1, 1, 1.0)
    if kinds or not all(map(_LORA.search, tensors)) or scale != alpha / rank:
        raise FastWeightsError(
            "the model has LoRA of several ranks, or of another kind than peft's plain one with the name default: "
            "an adapter holds that alone; merge it and save the whole model"
        )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers) or _NO_TARGETS,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
    }


def check_rest(model: FastWeightsForCausalLM, original: FastWeightsForCausalLM, advice: str) -> None:
    """Refuse to leave out what is not the base model's own, bit for bit.

    Args:
        model: a conversion, with LoRA or without.
        original: the same conversion of the base model, untrained.
        advice: what to do instead.
    """
    new = set(original.new_tensors())
    theirs = {name: x for name, x in original.state_dict().items() if name not in new}
    ours = {name.replace(".base_layer.", "."): x for name, x in model.state_dict().items() if ".lora_" not in name}
    for name, tensor in ours.items():
        if name in new:
            continue
        if name not in theirs or not theirs[name].to(tensor).equal(tensor):
            raise FastWeightsError(
                f"{name} is not as in the base model {original.config.base_model or ''}, and an adapter holds LoRA, "
                f"gates and factors alone: {advice}"
            )


def _sample(model: FastWeightsForCausalLM) -> dict[str, Float[Tensor, " _"]]:
    """A few numbers of a few of the weights that come from the base model, by which to know it again."""
    new, base = set(model.new_parameter_names()), {}
    for name, parameter in sorted(model.model.base.named_parameters()):
        if f"model.base.{name}" not in new:
            base.setdefault(parameter.ndim, []).append((name, parameter.detach().flatten()))
    chosen = [row for ndim in _MOST for row in _spread(base.get(ndim, []))]
    return {name: x[torch.arange(_NUMBERS) * _STRIDE % len(x)].float().cpu() for name, x in chosen}


def _spread(rows: list) -> list:
    """At most `_ROWS` of them, of all kinds and from all layers."""
    return [rows[i * _STRIDE % len(rows)] for i in range(_ROWS)] if len(rows) > _ROWS else rows


@torch.no_grad()
def _check_sample(expected: dict[str, Tensor], model: FastWeightsForCausalLM, what: str) -> None:
    found, base = _sample(model), model.model.base
    if others := sorted(expected.keys() ^ found.keys()):
        raise FastWeightsError(f"{what}: only one of the two has {others[0]}")
    for ndim, most in _MOST.items():
        rows = [(found[name], row) for name, row in expected.items() if base.get_parameter(name).ndim == ndim]
        if any(len(mine) != len(row) for mine, row in rows):
            raise FastWeightsError(f"{what}, which has a sample of its weights that is damaged: save the adapter again")
        units = [row.norm().clamp(min=1e-30) for _, row in rows]  # rows of zeros, as biases may be, count for nothing
        distances = [(mine - row).norm() / unit for (mine, row), unit in zip(rows, units, strict=True)]
        sizes = [row.norm() / unit for (_, row), unit in zip(rows, units, strict=True)]
        if not (difference := torch.stack(distances).norm() / torch.stack(sizes).norm()) <= most:
            raise FastWeightsError(
                f"{what}: its {'matrices' if ndim > 1 else 'vectors'} differ by {difference:.0%} of their size, and a "
                f"copy's by {most:.0%} at most; name the model that was converted"
            )


@torch.no_grad()
def _fill(adapter: _Adapter, model: FastWeightsForCausalLM, *, merge: bool) -> None:
    """Put the adapter into the weights of the model that it belongs to, or its LoRA beside them."""
    tensors, what = adapter.tensors, f"the weights of the adapter {adapter.folder}"
    new = model.new_tensors()
    shapes = {name: tensor.shape for name, tensor in new.items()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name in adapter.targets:
        if name not in linear:
            raise FastWeightsError(f"{what} have LoRA for {name}, which is no linear layer: save the adapter again")
        rows, columns = _as_linear(linear[name]).shape
        shapes[f"{name}.lora_A.weight"] = torch.Size((adapter.rank, columns))
        shapes[f"{name}.lora_B.weight"] = torch.Size((rows, adapter.rank))
    for name in shapes.keys() - tensors.keys():
        if name.endswith(UNIT):
            tensors[name] = torch.ones(shapes[name])
    if others := sorted(tensors.keys() ^ shapes.keys()):
        missing = "have no" if others[0] in shapes else "have an unknown"
        raise FastWeightsError(f"{what} {missing} {others[0]}: save or download it again")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            given, needed = tuple(tensors[name].shape), tuple(shape)
            raise FastWeightsError(f"{what} have {name} of shape {given}, and the model of {needed}: save it again")
    if bad := not_finite(tensors):
        raise FastWeightsError(f"{what} have numbers in {bad} that are not finite: train or download it again")
    for name, tensor in new.items():
        tensor.copy_(tensors[name])
    if adapter.targets and not merge:
        add_lora(model, adapter.rank, alpha=adapter.config["lora_alpha"], targets=adapter.targets)
        for name in adapter.targets:
            for x in "AB":
                model.get_parameter(f"{name}.lora_{x}.{ADAPTER}.weight").copy_(tensors[f"{name}.lora_{x}.weight"])
        return
    for name in adapter.targets:
        a, b = (tensors[f"{name}.lora_{x}.weight"].float() for x in "AB")
        weight = _as_linear(linear[name])
        weight.copy_(weight.float() + adapter.scale * (b @ a))


def _as_linear(layer: nn.Linear | Conv1D) -> Tensor:
    """The matrix as nn.Linear has it; GPT-2's layers have it transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
