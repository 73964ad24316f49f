"""FastWeightsConfig: a base model's config, and what its fast weights are made of."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from fastweights.errors import FastWeightsError
from fastweights.layers.attention import FastWeightSettings
from fastweights.layers.fast_weight_layer import FastWeightLayerSettings
from fastweights.models.architectures import architecture_of

LAYER_TYPES = ("linear_attention", "hybrid_sliding", "full_attention")
POSITIONS = ("keep", "drop")


@strict
class FastWeightsConfig(PreTrainedConfig):
    """Config of a converted model.

    Args:
        base_config: config of the model that was converted.
        rule: update rule of the fast weights.
        feature_map: feature map of queries and keys.
        layer_types: per layer "linear_attention" (fast weights alone), "hybrid_sliding" (fast weights and an exact
            softmax window) or "full_attention" (the base model's own).
        window: tokens in the exact window of hybrid layers.
        value_gate: whether the state also decays per value channel.
        rotary: whether the fast weights' queries and keys have the base model's rotary embedding; the window's have.
        gate_bias: first and last gate bias of a head at the start.
        base_model: folder or hub name of the model that was converted: the teacher, when training.
        fast_weight_layer: what a Fast Weight Layer before the unembedding is made of (the fields of
            FastWeightLayerSettings); None for no such layer.
        positions: "keep" the base model's absolute positions, which end at its trained length, or "drop" them.
    """

    model_type = "fastweights"
    sub_configs_defaults = {"base_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")}  # noqa: RUF012 (transformers reads it from the class)

    base_config: dict | PreTrainedConfig | None = None
    rule: str = "decay"
    feature_map: str = "identity"
    layer_types: list[str] | None = None
    window: int = 0
    value_gate: bool = True
    rotary: bool = True
    gate_bias: list[float] | tuple[float, ...] = (2.0, 6.0)
    positions: Literal["keep", "drop"] = "keep"
    base_model: str | None = None
    fast_weight_layer: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        # The parent's constructor forgets which attention a given base config was made for.
        implementation = getattr(self.base_config, "_attn_implementation", None)
        super().__post_init__(**kwargs)
        if implementation is not None and self._attn_implementation is None:
            self._attn_implementation = implementation
        assert isinstance(self.base_config, PreTrainedConfig)
        self.tie_word_embeddings = bool(getattr(self.base_config, "tie_word_embeddings", False))
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, token, None) is None:
                setattr(self, token, getattr(self.base_config, token, None))
        self.layer_types = _checked_layer_types(self.layer_types, self.num_hidden_layers, self.window)
        _ = self.settings_of(0)  # refuses an unknown rule or feature map
        _ = self.fast_weight_layer_settings

    @property
    def base(self) -> PreTrainedConfig:
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.base_config

    @property
    def hidden_size(self) -> int:
        return self.base.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.base.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.base.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return getattr(self.base, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.base, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.base.vocab_size = value

    @property
    def sliding_window(self) -> int:
        """The name under which transformers' caches look for the window."""
        return self.window

    @property
    def fast_weight_layer_settings(self) -> FastWeightLayerSettings | None:
        """Of the block before the unembedding, None without one."""
        if self.fast_weight_layer is None:
            return None
        known = {field.name for field in fields(FastWeightLayerSettings)}
        unknown = sorted(set(self.fast_weight_layer) - known)
        if unknown:
            raise FastWeightsError(
                f"fast_weight_layer has {', '.join(unknown)}; known settings are {', '.join(sorted(known))}"
            )
        return FastWeightLayerSettings(**self.fast_weight_layer)

    def settings_of(self, layer: int) -> FastWeightSettings:
        """Settings of one layer; pure layers have no window."""
        assert self.layer_types is not None
        return FastWeightSettings(
            rule=self.rule,
            feature_map=self.feature_map,
            window=self.window if self.layer_types[layer] == "hybrid_sliding" else 0,
            value_gate=self.value_gate,
            window_bias=self.positions == "drop" and architecture_of(self.base).positions is not None,
            rotary=self.rotary,
            gate_bias=(self.gate_bias[0], self.gate_bias[-1]),
        )


def _checked_layer_types(layer_types: list[str] | None, layers: int, window: int) -> list[str]:
    if layer_types is None:
        layer_types = ["hybrid_sliding" if window else "linear_attention"] * layers
    unknown = sorted(set(layer_types) - set(LAYER_TYPES))
    if unknown:
        raise FastWeightsError(f"layer_types has {', '.join(unknown)}; known are {', '.join(LAYER_TYPES)}")
    if len(layer_types) != layers:
        raise FastWeightsError(f"layer_types has {len(layer_types)} entries; the base model has {layers} layers")
    if "hybrid_sliding" in layer_types and window < 2:
        raise FastWeightsError(f"layer_types has hybrid_sliding and window is {window}; give a window of 2 or more")
    if window and "hybrid_sliding" not in layer_types:
        raise FastWeightsError(f"window is {window} and layer_types has no hybrid_sliding: no layer would have it")
    return list(layer_types)
