"""FastWeightsForCausalLM: a pretrained causal language model whose attention is fast weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from fastweights.errors import FastWeightsError
from fastweights.layers.attention import NEW_PARAMETERS, FastWeightAttention
from fastweights.layers.fast_weight_layer import NO_LABEL, FastWeightLayer
from fastweights.layers.linear import use_onednn
from fastweights.models.architectures import architecture_of, attention_modules, position_limit
from fastweights.models.cache import PendingPosition, adopt_cache, fast_weight_layer_cache
from fastweights.models.configuration import FastWeightsConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class AttentionRecord(NamedTuple):
    """What went into and came out of one layer's attention in the teacher."""

    inputs: Float[Tensor, "B T d"]
    """What the student's layer is given: the teacher's input, less its absolute positions if the student has none."""
    output: Float[Tensor, "B T d"]
    variance: Float[Tensor, ""]
    """Of the output: the unit in which the student's error is measured."""
    teacher_inputs: Float[Tensor, "B T d"]
    position_embeddings: tuple[Tensor, Tensor] | None


class FastWeightsForCausalLM(PreTrainedModel, GenerationMixin):
    """One class for every architecture: `model` is the base model with its attention replaced.

    Args:
        config: names the base model and its fast weights.
        base: a model to take over, whose attention is replaced in place; by default a new one with random weights.
    """

    config_class = FastWeightsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A recurrent state cannot be rolled back, so generate() refuses assisted decoding.
    _is_stateful = True
    _keep_in_fp32_modules_strict = [*NEW_PARAMETERS, "fast_weight_layer"]  # noqa: RUF012

    config: FastWeightsConfig

    def __init__(self, config: FastWeightsConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.architecture = architecture_of(config.base)
        self.model = AutoModelForCausalLM.from_config(config.base) if base is None else base
        use_onednn(self.model)
        config.dtype = config.base.dtype = self.model.dtype  # as loading sets it: a config is then always saved alike
        self._no_split_modules = self.model._no_split_modules
        self.fast_layers = _replace_attention(self.model, config)
        if config.positions == "drop" and self.architecture.positions is not None:
            _drop_positions(self.model, self.architecture.positions)
        self.max_positions = None if config.positions == "drop" else position_limit(config.base)
        settings = config.fast_weight_layer_settings
        self.fast_weight_layer = None if settings is None else FastWeightLayer(config.hidden_size, settings)
        self.post_init()
        for layer in self.fast_weight_layers():
            layer.reset_new_parameters()
        if self.fast_weight_layer is not None:
            self.fast_weight_layer.reset_parameters()
        if base is not None:
            self.to(base.device)  # type: ignore[arg-type]

    def fast_weight_layers(self) -> list[FastWeightAttention]:
        """The converted layers, in order."""
        modules = attention_modules(self.model, self.architecture)
        return [module for module in modules if isinstance(module, FastWeightAttention)]

    def new_parameter_names(self) -> list[str]:
        """Names of the parameters that conversion added: gates and scales."""
        return [
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, FastWeightAttention)
            for parameter in module.new_parameter_names()
        ]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        attention_records: list[AttentionRecord] | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """Like any causal LM's.

        Args:
            attention_mask: 0 where a token is padding, for all tokens so far; for the new ones alone (L = T), or left
                out, if no earlier one was padding.
            position_ids: by default the number of real tokens before each token.
            past_key_values: state to start from; it is updated in place. Without one the state is zero.
            use_cache: whether to return the state; by default when not training.
            attention_records: read no tokens; the loss is then the mean of `reproduction_errors` of these.
        """
        if attention_records is not None:
            return CausalLMOutputWithPast(loss=self.reproduction_errors(attention_records).mean())
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise FastWeightsError("forward needs input_ids or inputs_embeds; neither was given")
        use_cache = not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self.adopt(past_key_values)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise FastWeightsError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; fast weights take (batch, length) masks"
            )

        padding_mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is not None:
            _check_mask_covers_padding(attention_mask, past_key_values, past, given.shape[1])
            past_key_values.has_padding = padding_mask is not None  # type: ignore[attr-defined]
        if position_ids is None and attention_mask is not None:
            position_ids = _positions(attention_mask, given.shape[1], past)
        if offset := getattr(past_key_values, "position_offset", 0):
            # A memory: the text began long before what its cache is said to hold (memory.py).
            if position_ids is None:
                position_ids = torch.arange(past, past + given.shape[1], device=given.device)[None]
            position_ids = position_ids + offset
        self._check_positions(position_ids, past + given.shape[1])
        if len(self.fast_layers) == self.config.num_hidden_layers:
            # No layer reads the 4-D mask that the base model would build; a mask of four dimensions is passed as it is.
            attention_mask = given.new_zeros(1, 1, 1, 1)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "padding_mask": padding_mask,
            **kwargs,
        }
        if self.fast_weight_layer is None:
            return self.model(labels=labels, logits_to_keep=logits_to_keep, **arguments)
        if input_ids is None:
            raise FastWeightsError("a Fast Weight Layer learns from the tokens it reads: give input_ids")
        return_dict = arguments.pop("return_dict", None)
        outputs = self.model.base_model(**arguments)
        hidden = self._read_and_learn(outputs.last_hidden_state, input_ids, padding_mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._unembedding()(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.model.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def _read_and_learn(
        self, hidden: Float[Tensor, "B T d"], input_ids: Tensor, padding_mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "B T d"]:
        """Through the Fast Weight Layer, which goes on from what `cache` holds and leaves its state there."""
        assert self.fast_weight_layer is not None
        length = input_ids.shape[1]
        real = torch.ones_like(input_ids, dtype=torch.bool) if padding_mask is None else padding_mask[:, -length:]
        memory = (
            None if cache is None or not self.fast_weight_layer.settings.updates else fast_weight_layer_cache(cache)
        )
        before = None if memory is None else memory.kept()
        state = None
        if before is not None:
            # The position that was last is read again, now that its label is known.
            state, pending = before
            hidden = torch.cat((pending.hidden.to(hidden.dtype), hidden), 1)
            real = torch.cat((pending.real, real), 1)
            input_ids = torch.cat((torch.zeros_like(input_ids[:, :1]), input_ids), 1)
        labels = _next_real_tokens(input_ids, real)
        output, state = self.fast_weight_layer(hidden, labels, self._unembedding(), state)
        if memory is not None:
            memory.keep(state, _last_real_position(hidden, real), length)
        return output[:, -length:]

    def _unembedding(self) -> nn.Linear:
        unembedding = self.model.get_output_embeddings()
        assert isinstance(unembedding, nn.Linear)
        return unembedding

    def adopt(self, cache: Cache) -> None:
        """Make a new cache one that holds this model's states."""
        layer_types, window = self.config.layer_types or [], self.config.window
        adopt_cache(cache, layer_types, window, fast_weight_layer=self.fast_weight_layer is not None)

    def reproduction_errors(self, records: list[AttentionRecord]) -> Float[Tensor, " layers"]:
        """How far each converted layer, given the teacher's own input, is from the teacher's attention output.

        Mean squared error relative to the output's variance: 1 is as good as saying its mean, 0 is perfect.

        Args:
            records: one for each layer of the model, converted or not.
        """
        errors = []
        for layer in self.fast_weight_layers():
            record = records[layer.layer_idx]
            output, _ = layer(record.inputs, position_embeddings=record.position_embeddings)
            errors.append((output - record.output).square().mean() / record.variance)
        return torch.stack(errors)

    def _check_positions(self, position_ids: Tensor | None, length: int) -> None:
        limit = self.max_positions
        if limit is None or length <= limit:
            return
        if position_ids is None or int(position_ids.max()) >= limit:
            raise FastWeightsError(
                f"the text is {length} tokens long and this model's absolute positions end at {limit}; "
                'convert with positions="drop" for text of any length'
            )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(model_kwargs.get("past_key_values"), Cache):
            self.adopt(model_kwargs["past_key_values"])
        return result


def _replace_attention(model: PreTrainedModel, config: FastWeightsConfig) -> list[int]:
    """Put fast weights where `config.layer_types` asks for them; returns the indices of those layers."""
    architecture = architecture_of(config.base)
    replaced = []
    for i, layer in enumerate(model.get_submodule(architecture.layers)):  # type: ignore[arg-type]
        assert config.layer_types is not None
        if config.layer_types[i] == "full_attention":
            continue
        attention = layer.get_submodule(architecture.attention)
        fast = FastWeightAttention(
            attention,
            architecture.projections,
            config.settings_of(i),
            layer_idx=i,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        layer.set_submodule(architecture.attention, fast)
        replaced.append(i)
    return replaced


class ConstantPosition(nn.Module):
    """Stands where absolute positions were: the same vector everywhere."""

    def __init__(self, positions: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(positions.weight.detach().mean(0, keepdim=True))

    def forward(self, position_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T d"]:
        return self.weight.expand(*position_ids.shape, -1)


def _drop_positions(model: nn.Module, name: str) -> None:
    positions = model.get_submodule(name)
    if isinstance(positions, nn.Embedding):
        model.set_submodule(name, ConstantPosition(positions))


def _next_real_tokens(input_ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The token that follows each real position, padding left out; -100 where none does."""
    T = input_ids.shape[1]
    places = torch.where(real, torch.arange(T, device=real.device), T)
    following = nn.functional.pad(places[:, 1:], (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    tokens = input_ids.gather(1, following.clamp(max=T - 1))
    return tokens.masked_fill(~real | (following == T), NO_LABEL)


def _last_real_position(hidden: Float[Tensor, "B T d"], real: Bool[Tensor, "B T"]) -> PendingPosition:
    last = torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(1)
    return PendingPosition(
        hidden[torch.arange(len(hidden), device=hidden.device), last, None], real.any(1, keepdim=True)
    )


def _check_mask_covers_padding(attention_mask: Tensor | None, cache: Cache, past: int, length: int) -> None:
    """Refuse to take padding that `cache` has read for tokens."""
    covers = attention_mask is not None and attention_mask.shape[1] == past + length
    if past and getattr(cache, "has_padding", False) and not covers:
        given = "none" if attention_mask is None else f"one of length {attention_mask.shape[1]}"
        raise FastWeightsError(
            f"attention_mask is {given}, and among the {past} tokens before these {length} was padding: give one for "
            f"all of them, of length {past + length}"
        )


def _positions(attention_mask: Tensor, length: int, past: int) -> Int[Tensor, "B T"]:
    """How many real tokens come before each new one, so that padding on the left shifts nothing."""
    seen = attention_mask.long().cumsum(-1) - 1
    if attention_mask.shape[1] == length:
        seen = seen + past
    return seen[:, -length:].clamp(min=0)
