"""convert(): a causal language model gets fast weights; add_fast_weight_layer(): it gets a block that learns."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from fastweights.errors import FastWeightsError, check_name
from fastweights.layers.attention import check_known
from fastweights.layers.fast_weight_layer import FastWeightLayer
from fastweights.layers.linear import use_onednn
from fastweights.layers.mix_gate import MixGate
from fastweights.layers.window import window_attention
from fastweights.models.architectures import architecture_of, attention_modules, local_windows
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.decoding import forget_steps, why_plain
from fastweights.models.loading import load_model, name_of
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.models.quantisation import check_not_quantised, quantise, weights_of
from fastweights.models.recording import record_calls
from fastweights.settings.conversion import AUTO, ConversionConfig, KeptDtype
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.weights import WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

_PROBE_TOKENS = 16
# Of scores and logits: below a tenth of their height they bend nothing that a probe would notice.
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Relative error of a layer's output, or of the logits, that rounding explains.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUNDING_OF_SHORT = 0.05


def convert(model: str | Path | PreTrainedModel, config: ConversionConfig | None = None) -> FastWeightsForCausalLM:
    """Replace the softmax attention of a pretrained model by fast weights, keeping every pretrained weight.

    The result needs training (`transfer`, then `finetune`) before it speaks like the original.

    Args:
        model: folder or hub name of the model, or the model itself, which stays as it is.
        config: how to convert; by default the paper's pure form.

    Returns:
        The converted model, on the device and in the dtype of the original.

    Raises:
        FastWeightsError: if the model is of no known family, has fast weights already, or has something in its
            attention or head that its family's row cannot express.
    """
    return _converted(model, config, share=False)


def convert_beside(model: str | Path | PreTrainedModel, config: ConversionConfig) -> FastWeightsForCausalLM:
    """As `convert`, with the model's own weights in both: for what reads them, or trains what stands beside them.

    Args:
        model: as there; one that is given itself must not be trained, or written into, from then on.
        config: how to convert.
    """
    return _converted(model, config, share=True)


def _converted(
    model: str | Path | PreTrainedModel, config: ConversionConfig | None, *, share: bool
) -> FastWeightsForCausalLM:
    base = _own(model, share=share)
    check_softmax(base, type(model).__name__ if isinstance(model, PreTrainedModel) else str(model))
    return with_config(base, config or ConversionConfig())


def copy_beside(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own, and the weights of the model."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def rest_on_windows(model: FastWeightsForCausalLM) -> bool:
    """Leave the fast weights of a fresh conversion out where a window stands beside them, until training finds factors.

    They are sums over a text, of any size, and would drown what the window says, which is of use as it is.

    Args:
        model: the conversion; its factors are changed in place.

    Returns:
        Whether there are windows.
    """
    beside = [layer for layer in model.fast_attentions() if layer.window]
    for layer in beside:
        layer.fast_scale.zero_()
    return bool(beside)


def check_softmax(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that is converted already, under the name that it was given by.

    Raises:
        FastWeightsError: it is.
    """
    if isinstance(model, FastWeightsForCausalLM):
        raise FastWeightsError(f"{name} has fast weights already; give the model that it was converted from")


def add_fast_weight_layer(
    model: str | Path | PreTrainedModel, settings: FastWeightLayerSettings | None = None
) -> FastWeightsForCausalLM:
    """Put a Fast Weight Layer before the unembedding; it is the identity until it is trained (`train --stage meta`).

    Args:
        model: folder or hub name of the model, or the model itself, which stays as it is. One with softmax attention
            keeps it.
        settings: what the layer is made of.

    Returns:
        The model with the layer.

    Raises:
        FastWeightsError: if the model is of no known family, or has such a layer already.
    """
    settings = settings or FastWeightLayerSettings()
    model = _own(model)
    if not isinstance(model, FastWeightsForCausalLM):
        return with_config(model, ConversionConfig(layers="none"), settings)
    if model.fast_weight_layer is not None:
        raise FastWeightsError("the model has a Fast Weight Layer already; give the model that it was added to")
    model.config.fast_weight_layer = asdict(settings)
    model.model.fast_weight_layer = FastWeightLayer(model.config.hidden_size, settings).to(model.device)
    return model


def add_mix_gates(model: FastWeightsForCausalLM) -> None:
    """Give a converted model's layers their gates on the mix, in place, where they have none; training makes something
    of them (`train --model MODEL --convert.mix-gate`).

    Args:
        model: which computes what it did.
    """
    for layer in model.fast_attentions():
        if layer.mix_gate is None:
            gate = MixGate(model.config.hidden_size, layer.heads, window=layer.window > 0)
            layer.mix_gate = gate.to(layer.fast_scale)
    model.config.conversion = asdict(replace(model.config.settings, mix_gate=True))
    model.model.keep_in_fp32()
    forget_steps(model)


def _own(model: str | Path | PreTrainedModel, *, share: bool = False) -> PreTrainedModel:
    """A causal language model to change, from its name or as a copy, whose weights may be the same."""
    if isinstance(model, (str, PathLike)):
        return load_model(model)  # type: ignore[arg-type]
    check_causal_model(model)
    return copy_beside(model) if share else copy.deepcopy(model)


def check_causal_model(model: object) -> None:
    """Refuse what is no causal language model with a head on one device, or has an adapter of peft's in it.

    Args:
        model: whatever was given for one.
    """
    kind = type(model).__name__
    merged = "merge its adapter with peft's merge_and_unload(), and give what that returns"
    if not isinstance(model, PreTrainedModel):
        what = merged if hasattr(model, "peft_config") else "give a folder, a hub name or a causal language model"
        raise FastWeightsError(f"a {kind} was given: {what}")
    _check_one_device(model)
    if isinstance(model, FastWeightsForCausalLM):
        return
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise FastWeightsError(f"{kind} has a peft adapter in its layers: {merged}")
    if model.get_output_embeddings() is None:
        raise FastWeightsError(f"{kind} has no unembedding: give the causal language model, with its head")


def _check_one_device(model: PreTrainedModel) -> None:
    """Refuse a model that accelerate has spread out: what is put into it would lie elsewhere than its hooks expect."""
    spread: dict[str, object] = getattr(model, "hf_device_map", None) or {}
    places = sorted(set(map(str, spread.values())) or {str(parameter.device) for parameter in model.parameters()})
    away = "disk" in places or (places == ["meta"] and any(hasattr(part, "_hf_hook") for part in model.modules()))
    if len(places) > 1 or away:
        raise FastWeightsError(
            f"the model lies on {', '.join(places)}: load it without device_map, convert it and save it; what was "
            "saved can be loaded with one"
        )


def with_config(
    base: PreTrainedModel, conversion: ConversionConfig, block: FastWeightLayerSettings | None = None
) -> FastWeightsForCausalLM:
    """A model with fast weights that takes `base` over, and changes it.

    Args:
        base: a causal language model.
        conversion: how to convert it.
        block: of a Fast Weight Layer before the unembedding; None for no such layer.
    """
    check_not_quantised(base, "conversion")
    config = FastWeightsConfig(
        base_config=base.config,
        conversion=asdict(conversion),
        fast_weight_layer=None if block is None else asdict(block),
        base_model=name_of(base),
    )
    check_row(base, config)
    model = FastWeightsForCausalLM(config, base=base)
    use_onednn(model)
    return model


def load_for_decoding(
    source: str | Path, weights: str | None = None, softmax_dtype: KeptDtype | None = None
) -> PreTrainedModel:
    """As `load_model`, and a softmax model as `layers="none"` has it if it then decodes by this library's steps.

    Args:
        source: as there.
        weights: as there.
        softmax_dtype: of keys and values in layers with softmax attention, where it is to be another than the model's.

    Raises:
        FastWeightsError: as there, or no layer of the model has such an attention with a cache of ours.
    """
    check_name("weights", weights or "fp32", WEIGHTS)
    model = load_model(source)
    whole = weights_of(model) == "fp32"
    model = quantise(_by_our_steps(model) if whole else model, weights or "fp32")
    if softmax_dtype is not None:
        _keep_softmax_in(softmax_dtype, model, source)
    return model


def _keep_softmax_in(dtype: KeptDtype, model: PreTrainedModel, source: str | Path) -> None:
    if not isinstance(model, FastWeightsForCausalLM):
        if dtype == AUTO:
            return
        raise FastWeightsError(
            f"softmax_dtype is {dtype} and {source} goes through transformers' modules, whose caches are its own: "
            "leave it out, or convert the model with layers none"
        )
    conversion = replace(model.config.settings, softmax_dtype=dtype).for_layers(len(model.config.layer_types))
    assert model.config.conversion is not None
    model.config.conversion["softmax_dtype"] = conversion.softmax_dtype


def _by_our_steps(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that takes them, or the model as it is."""
    if isinstance(model, FastWeightsForCausalLM):
        return model
    try:
        ours = with_config(model, ConversionConfig(layers="none")).eval()
    except FastWeightsError:  # it has more than its family's row says
        return model
    return ours if why_plain(ours) is None else model


@torch.no_grad()
def check_row(base: PreTrainedModel, config: FastWeightsConfig) -> None:
    """Refuse a model with more in its attention, or between its last hidden state and its logits, than its row says.

    A few tokens are read: an exact softmax over the row's queries, keys and values must give each attention's output,
    and the unembedding of the last hidden state the logits.

    Args:
        base: a causal language model.
        config: of the model that it is to become.

    Raises:
        FastWeightsError: with what differs.
    """
    row, headless = architecture_of(base.config), base.base_model
    for name in _CAPS:
        if (cap := getattr(base.config, name, None)) is not None:
            raise FastWeightsError(f"{name} is {cap} in the model's config; only models without such caps convert")
    attention = attention_modules(headless, row)
    converted = [i for i, layer_type in enumerate(config.layer_types) if layer_type != "full_attention"]
    windows = local_windows(base.config)
    for i in converted:
        check_known(attention[i], row.projections)
        if windows[i] is not None:
            some = "leave it as full_attention in layer_types"
            every = "to convert it as if it saw all, set sliding_window in its config to None"
            raise FastWeightsError(
                f"layer {i} has sliding-window attention over {windows[i]} tokens, whose memory is constant already: "
                f"{some if None in windows else every}"
            )
    if base.device.type == "meta":
        return
    was_training = base.training
    base.eval()
    ids = torch.randint(base.config.vocab_size, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with record_calls(headless, row) as calls:
        logits = base(input_ids=ids.to(base.device), use_cache=False).logits
        hidden = headless(input_ids=ids.to(base.device), use_cache=False).last_hidden_state
    head = base.get_output_embeddings()
    if head is None or not _is_close(head(hidden), logits):
        raise FastWeightsError(
            f"the logits of {type(base).__name__} are more than its unembedding of the last hidden state: models of "
            f"this family are converted only without it (type {base.config.model_type!r})"
        )
    if config.fast_weight_layer is not None and hidden.shape[-1] != config.hidden_size:
        raise FastWeightsError(
            f"the unembedding of {type(base).__name__} takes {hidden.shape[-1]} channels and the model has "
            f"{config.hidden_size}: a Fast Weight Layer needs as many in both"
        )
    layers: list[Any] = list(headless.get_submodule(row.layers))  # type: ignore[call-overload]
    for i in converted:
        call = calls[i]
        if config.settings.positions == "drop" and row.positions is not None:
            assert row.norm is not None
            if not _is_close(layers[i].get_submodule(row.norm)(call.stream), call.inputs):
                raise FastWeightsError(
                    f"layer {i} has no normalisation before its attention, so its absolute positions cannot be taken "
                    "out: leave positions at keep"
                )
        q, k, v = row.projections.project(attention[i], call.inputs, config.head_dim)
        if call.position_embeddings is not None:
            q, k = row.projections.rotate(q, k, call.position_embeddings)
        scale: float = attention[i].scaling  # type: ignore[assignment]
        y = window_attention(q, k, v, window=_PROBE_TOKENS, scale=scale)
        if not _is_close(row.projections.output(attention[i], y.flatten(-2)), call.output):
            raise FastWeightsError(
                f"the attention of layer {i} ({type(attention[i]).__name__}) is not what its row in ARCHITECTURES says "
                f"(type {base.config.model_type!r}): it cannot be converted; leave it as full_attention"
            )
    base.train(was_training)


def _is_close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    error = (found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
    return bool(error <= _ROUNDING.get(truth.dtype, _ROUNDING_OF_SHORT))
