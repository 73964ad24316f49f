"""Models with their matrices in few bits, by transformers' own way: `from_pretrained(..., quantization_config=...)`.

Any causal LM takes it, converted or not, so that the two can be compared. What is saved has the few bits and says so in
its config; once `fastweights` is imported, transformers loads it again. States, gates and factors stay in float32.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from fastweights.errors import FastWeightsError, check_name
from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.quantised import LINEAR, QuantisedLinear, kept_as
from fastweights.models.decoding import forget_steps
from fastweights.settings.weights import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "fastweights"
_HEAD = "lm_head"


class WeightsConfig(QuantizationConfigMixin):
    """In how many bits the matrices of a model's linear layers are kept.

    Args:
        weights: "bf16", "int8" (a scale for each row) or "int4" (scale and offset for groups of 32; the unembedding has
            int8 then).
        modules_to_not_convert: names of layers, or of modules that have them inside, which stay as they are.
        modules_in_int8: likewise, which have eight bits where others have four; by default converted attention, as what
            it learns is smaller than a step of four bits, and the unembedding where a Fast Weight Layer learns from
            it, which stays whole where it is not named. A model that is saved in few bits names its own, if any.
        others: what transformers saves beside these.

    Raises:
        FastWeightsError: `weights` is none of these; once whole weights are loaded, none is in a module that
            `modules_in_int8` names.
    """

    modules_in_int8: list[str] | None = None

    def __init__(
        self,
        weights: str = "int4",
        modules_to_not_convert: list[str] | None = None,
        modules_in_int8: list[str] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        check_name("weights", weights, LINEAR)
        self.weights, self.modules_to_not_convert = weights, modules_to_not_convert
        if modules_in_int8 is not None:  # configs from before have no such line, and memories know models by theirs
            self.modules_in_int8 = modules_in_int8


class WeightsQuantizer(HfQuantizer):
    """What `from_pretrained` does with a `WeightsConfig`: it loads whole weights and rounds them, or rounded ones."""

    quantization_config: WeightsConfig

    def __init__(self, quantization_config: WeightsConfig, **kwargs: Any) -> None:
        super().__init__(copy(quantization_config), **kwargs)  # which may be given for other models, too

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            for name, layer in linear_layers(model, config).items():
                kind = _kind(model, name, layer, config)
                columns, rows = _sizes(layer)
                with torch.device("meta"):
                    _put(model, name, kind(columns, rows, bias=layer.bias is not None))
        elif config.modules_in_int8 is None:
            if names := _in_int8(model, config.weights):
                config.modules_in_int8 = names
        else:
            _check_modules(config.modules_in_int8, [*linear_layers(model, config)])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            _replace(model, self.quantization_config)
            return model
        for module in model.modules():
            if isinstance(module, QuantisedLinear):
                module.pack()
        return model

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Nothing learns in so few bits, and peft knows no adapter for them."""
        return False


register_quantization_config(METHOD)(WeightsConfig)
register_quantizer(METHOD)(WeightsQuantizer)


_Model = TypeVar("_Model", bound="PreTrainedModel")


def quantise(model: _Model, weights: str) -> _Model:
    """Keep the matrices of a model that is in memory in few bits, in place.

    Args:
        model: any causal LM, in float32 or bf16.
        weights: "fp32", which leaves them as they are, or what `WeightsConfig` takes.

    Returns:
        The same model.

    Raises:
        FastWeightsError: there is no such kind, or the model is quantised already.
    """
    check_name("weights", weights, WEIGHTS)
    has = weights_of(model)
    if weights == "fp32" or has == weights:
        return model
    if has != "fp32":
        raise FastWeightsError(
            f"the model's weights are {has} already, and {weights} were asked for: give the model before that, or "
            "leave weights out"
        )
    config = WeightsConfig(weights)
    forget_steps(model)
    quantizer = WeightsQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    quantizer.postprocess_model(model)
    model.__dict__["hf_quantizer"] = quantizer
    return model


def weights_of(model: PreTrainedModel) -> str:
    """How a model's matrices are kept: what `quantise` takes, or another quantiser's name; "fp32" for plain ones."""
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, WeightsConfig):
        return config.weights
    method = getattr(config, "quant_method", config)
    # The weights of a .gguf file are made whole when it is loaded.
    return "fp32" if method in (None, QuantizationMethod.GGUF) else str(getattr(method, "value", method))


def check_not_quantised(model: PreTrainedModel, what: str) -> None:
    """Refuse a model whose matrices were rounded here, and can neither be trained nor changed.

    Args:
        model: any.
        what: is to be done with it.
    """
    if (has := weights_of(model)) in LINEAR:
        raise FastWeightsError(
            f"the model's weights are {has}, and {what} needs them whole: give the model before that"
        )


def linear_layers(model: PreTrainedModel, config: WeightsConfig) -> dict[str, nn.Linear | Conv1D]:
    """Those whose matrices are to be kept in few bits, by name; none of what conversion added.

    Args:
        model: any causal LM.
        config: says which are left out.
    """
    whole = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
    skipped = [*(config.modules_to_not_convert or ())]
    if _learns_from_head(model) and _HEAD not in (config.modules_in_int8 or ()):
        skipped.append(_HEAD)
    return {  # type: ignore[return-value]
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and not whole.intersection(name.split("."))
        and not _is_among(name, skipped)
    }


def _learns_from_head(model: PreTrainedModel) -> bool:
    return any("fast_weight_layer" in name for name, _ in model.named_parameters())


def _in_int8(model: PreTrainedModel, weights: str) -> list[str]:
    """Converted attention, by names within the base model, which are the same with a head and without one; and a head
    that a Fast Weight Layer learns from."""
    modules = model.base_model.named_modules()
    names = [name for name, module in modules if isinstance(module, FastWeightAttention)] if weights == "int4" else []
    head = model.get_output_embeddings()
    if weights != "bf16" and _learns_from_head(model) and type(head) is nn.Linear:
        names.append(_HEAD)
    return names


def _is_among(name: str, parts: list[str]) -> bool:
    """Whether a layer is one of these, or in one of these modules."""
    return any(f".{part}." in f".{name}." for part in parts)


def _check_modules(parts: list[str], layers: list[str]) -> None:
    """Refuse one that no layer is in, but for the head, which a headless model has not."""
    for part in parts:
        if part != _HEAD and not any(_is_among(name, [part]) for name in layers):
            raise FastWeightsError(
                f"modules_in_int8 has {part!r}, and the model no linear layer of that name that is to have few bits, "
                f"nor a module with such layers; there is {next(iter(layers), 'none')}, for example"
            )


def _replace(model: PreTrainedModel, config: WeightsConfig) -> None:
    layers = linear_layers(model, config)
    if away := [name for name, layer in layers.items() if layer.weight.is_meta]:
        raise FastWeightsError(
            f"{len(away)} matrices are not in memory, such as {away[0]}, and cannot be rounded to {config.weights} "
            "there: load the model without offloading, save it in few bits, and load that with this device_map"
        )
    for name, layer in layers.items():
        _put(model, name, _kind(model, name, layer, config).of(layer))


def _kind(model: PreTrainedModel, name: str, layer: nn.Linear | Conv1D, config: WeightsConfig) -> type[QuantisedLinear]:
    eight = layer is model.get_output_embeddings() or _is_among(name, config.modules_in_int8 or [])
    return kept_as(config.weights, *_sizes(layer), eight=eight)


def _sizes(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs."""
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else tuple(layer.weight.shape[::-1])  # type: ignore[return-value]


def _put(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module.train(model.training))
    for tied in ("all_tied_weights_keys", "_tied_weights_keys"):
        if isinstance(keys := getattr(model, tied, None), dict):  # that of a class, too, which stays as it is
            setattr(model, tied, {key: value for key, value in keys.items() if key != f"{name}.weight"})
