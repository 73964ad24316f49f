"""FastWeightsConfig: a base model's config, how its attention became fast weights, and the block before its head."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from fastweights.errors import FastWeightsError
from fastweights.models.architectures import local_layers, local_windows
from fastweights.settings.conversion import BEFORE, EIGHT_BITS, ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings


class _OfBase:
    """A value that is the base config's own, and saved beside it for whoever reads a config from outside."""

    def __init__(self, default: Any = None) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: FastWeightsConfig | None, owner: type | None = None) -> Any:
        return self if config is None else getattr(config.base, self.name, self.default)

    def __set__(self, config: FastWeightsConfig, value: Any) -> None:
        if value != self.__get__(config):
            setattr(config.base, self.name, value)


_SHIM = "modeling_fastweights"
_SHIM_CODE = '''"""How transformers loads this model by itself: from_pretrained(..., trust_remote_code=True).

The package fastweights must be installed; with `import fastweights` before, transformers does without this file.
"""

from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.modeling import FastWeightsForCausalLM, FastWeightsModel

__all__ = ["FastWeightsConfig", "FastWeightsForCausalLM", "FastWeightsModel"]
'''
_SHIM_CLASSES = {
    "AutoConfig": f"{_SHIM}.FastWeightsConfig",
    "AutoModel": f"{_SHIM}.FastWeightsModel",
    "AutoModelForCausalLM": f"{_SHIM}.FastWeightsForCausalLM",
}


@strict
class FastWeightsConfig(PreTrainedConfig):
    """Config of a model with fast weights.

    Args:
        base_config: config of the model that was converted.
        conversion: how its attention became fast weights (the fields of ConversionConfig).
        fast_weight_layer: what a Fast Weight Layer before the unembedding is made of (the fields of
            FastWeightLayerSettings); None for no such layer.
        base_model: folder or hub name of the model that was converted: the teacher, when training.

    Raises:
        FastWeightsError: if a setting is unknown or not allowed.
    """

    model_type = "fastweights"
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")}  # noqa: RUF012 (transformers reads it from the class)

    base_config: dict | PreTrainedConfig | None = None
    conversion: dict | None = None
    fast_weight_layer: dict | None = None
    base_model: str | None = None
    hidden_size = _OfBase()
    num_hidden_layers = _OfBase()
    num_attention_heads = _OfBase()
    vocab_size = _OfBase()
    max_position_embeddings = _OfBase()
    use_cache = _OfBase(default=True)
    tie_word_embeddings = _OfBase(default=False)

    def __post_init__(self, **kwargs) -> None:
        # The parent's constructor forgets which attention a given base config was made for.
        implementation = getattr(self.base_config, "_attn_implementation", None)
        outside = {name: kwargs.pop(name) for name in _OUTSIDE if name in kwargs}
        _refuse_earlier_version(self.conversion, kwargs)
        super().__post_init__(**kwargs)
        if implementation is not None and self._attn_implementation is None:
            self._attn_implementation = implementation
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, token, None) is None:
                setattr(self, token, getattr(self.base, token, None))
        # TRL, too, looks here for classes that transformers does not have.
        self.auto_map = dict(_SHIM_CLASSES)
        conversion = self.conversion or {}
        if "layer_types" in conversion:  # saved, perhaps by an earlier version
            conversion = {**BEFORE, **conversion}
        settings = _made_of(ConversionConfig, "conversion", conversion)
        self.conversion = asdict(settings.for_layers(self.num_hidden_layers, local_layers(self.base)))
        if set(self.layer_types) != {"full_attention"}:
            # A plan would spread heads over devices, and not their gates.
            self.base.base_model_tp_plan = None  # type: ignore[misc]
        for name in _SETTABLE & outside.keys():
            setattr(self, name, outside[name])
        _ = self.fast_weight_layer_settings  # refuses an unknown one

    @property
    def base(self) -> PreTrainedConfig:
        """Config of the model that was converted."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.base_config

    @property
    def settings(self) -> ConversionConfig:
        """How the attention became fast weights, with a type for each layer."""
        return _made_of(ConversionConfig, "conversion", self.conversion or {})

    @property
    def fast_weight_layer_settings(self) -> FastWeightLayerSettings | None:
        """Of the block before the unembedding, None without one."""
        if self.fast_weight_layer is None:
            return None
        return _made_of(FastWeightLayerSettings, "fast_weight_layer", self.fast_weight_layer)

    @property
    def layer_types(self) -> list[str]:
        """Type of each layer, under the name that transformers' caches look for."""
        return (self.conversion or {}).get("layer_types")  # type: ignore[return-value]

    @property
    def growing_layers(self) -> list[int]:
        """Those that keep all tokens: with softmax attention, and no window of their own."""
        windows = local_windows(self.base)
        return [i for i, kind in enumerate(self.layer_types) if kind == "full_attention" and windows[i] is None]

    @property
    def sliding_window(self) -> int:
        """The window of hybrid layers, or of most, under the name that transformers' caches look for.

        Raises:
            AttributeError: without one, as in any config of a model without windows.
        """
        window = (self.conversion or {}).get("window")
        if not window:
            raise AttributeError("this model has no hybrid layers, and so no sliding_window")
        return window

    @property
    def windows(self) -> list[int]:
        """The window of each layer, 0 without one."""
        return (self.conversion or {}).get("windows")  # type: ignore[return-value]

    @property
    def windows_in_eight_bits(self) -> bool:
        """Whether hybrid layers keep their windows' keys and values so."""
        return (self.conversion or {}).get("window_dtype") == EIGHT_BITS

    @property
    def states_in_eight_bits(self) -> bool:
        """Whether caches keep fast weights so."""
        return (self.conversion or {}).get("state_dtype") == EIGHT_BITS

    @property
    def softmax_in_eight_bits(self) -> bool:
        """Whether caches keep the keys and values of layers with softmax attention so."""
        return (self.conversion or {}).get("softmax_dtype") == EIGHT_BITS

    @property
    def sinks(self) -> int:
        """First tokens that stay visible to the softmax of hybrid layers."""
        return (self.conversion or {}).get("sinks") or 0

    @property
    def convolution_shape(self) -> tuple[int, int] | None:
        """Channels of each layer's short convolution, and tokens that it sees; None without one."""
        size = (self.conversion or {}).get("conv_size")
        return ((self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim, size) if size else None

    @sliding_window.setter
    def sliding_window(self, value: int | None) -> None:
        if value != getattr(self, "sliding_window", None):
            self.conversion = asdict(self.settings.with_window(value or 0))

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return getattr(self.base, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return getattr(self.base, "head_dim", None) or self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """As saved: with what the base config says, for those who look for it at the usual place."""
        return super().to_dict() | {name: getattr(self, name) for name in _OUTSIDE if hasattr(self, name)}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the config, and beside it what lets transformers load the model without an import of this package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, f"{_SHIM}.py").write_text(_SHIM_CODE, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would save a copy of this package's code where the shim goes."""


_SETTABLE = {name for name, value in vars(FastWeightsConfig).items() if isinstance(value, _OfBase)} | {"sliding_window"}
_OUTSIDE = (*sorted(_SETTABLE), "layer_types", "num_key_value_heads", "head_dim")


def _made_of(settings: type, name: str, given: dict) -> Any:
    known = [field.name for field in fields(settings)]
    if unknown := sorted(set(given) - set(known)):
        raise FastWeightsError(f"{name} has {', '.join(unknown)}; known settings are {', '.join(sorted(known))}")
    return settings(**given)


def _refuse_earlier_version(conversion: dict | None, kwargs: dict) -> None:
    if conversion is None and {"rule", "window", "positions"} <= kwargs.keys():
        raise FastWeightsError(
            "this model was saved by an earlier version of fastweights, whose names of weights are no longer read: "
            "convert and train it again"
        )


AutoConfig.register(FastWeightsConfig.model_type, FastWeightsConfig)
