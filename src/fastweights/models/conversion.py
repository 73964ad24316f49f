"""convert(): a pretrained causal language model becomes one with fast weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastweights.errors import FastWeightsError, reason_of
from fastweights.layers.linear import use_onednn
from fastweights.models.architectures import architecture_of
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.options import ADVANCED, SEVERAL, SWITCH
from fastweights.sources import check_source


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """How a model's attention becomes fast weights."""

    rule: Annotated[str, ADVANCED] = "decay"
    """Update rule of the fast weights: decay."""
    feature_map: Annotated[str, ADVANCED] = "identity"
    """Feature map of queries and keys: identity."""
    window: int = 0
    """Tokens that an exact softmax sees beside the fast weights, 0 for none; memory stays constant either way."""
    layer_types: Annotated[list[str] | None, ADVANCED, SEVERAL] = None
    """Per layer linear_attention, hybrid_sliding or full_attention; by default all are converted."""
    value_gate: Annotated[bool, ADVANCED, SWITCH] = True
    """Decay per value channel too, as in the paper."""
    rotary: Annotated[bool, ADVANCED, SWITCH] = True
    """Give the fast weights queries and keys with rotary embedding, where the base model has one; the window's have."""
    gate_bias: Annotated[tuple[float, float], ADVANCED] = (2.0, 6.0)
    """First and last gate bias of a head at the start: a spread of time constants."""
    positions: Literal["keep", "drop"] = "keep"
    """Absolute positions of GPT-2: keep them (text ends at the trained length) or drop them (text of any length)."""


def convert(model: str | Path | PreTrainedModel, config: ConversionConfig | None = None) -> FastWeightsForCausalLM:
    """Replace the softmax attention of a pretrained model by fast weights, keeping every pretrained weight.

    The result needs training (`transfer`, then `finetune`) before it speaks like the original.

    Args:
        model: folder or hub name of the model, or the model itself, which stays as it is.
        config: how to convert; by default the paper's pure form.
    """
    config = config or ConversionConfig()
    base = copy.deepcopy(model) if isinstance(model, PreTrainedModel) else load_model(model)
    if isinstance(base, FastWeightsForCausalLM):
        raise FastWeightsError(f"{model} has fast weights already; give the model that it was converted from")
    architecture_of(base.config)
    return FastWeightsForCausalLM(
        FastWeightsConfig(
            base_config=base.config,
            rule=config.rule,
            feature_map=config.feature_map,
            layer_types=config.layer_types,
            window=config.window,
            value_gate=config.value_gate,
            rotary=config.rotary,
            gate_bias=list(config.gate_bias),
            positions=config.positions,
            base_model=name_of(base),
        ),
        base=base,
    )


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, gguf_file: str | None = None
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, converted or not, in evaluation mode.

    Args:
        source: a `save_pretrained` folder, a .gguf file, or a hub name.
        dtype: of the weights; states and gates are fp32 in any case.
        gguf_file: name of a GGUF file inside `source`.
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
