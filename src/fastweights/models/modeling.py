"""FastWeightsModel and FastWeightsForCausalLM: a pretrained language model whose attention is fast weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

import fastweights.models.quantisation  # noqa: F401 (transformers learns of it)
from fastweights.errors import FastWeightsError
from fastweights.layers.attention import NEW_PARTS, UNIT, FastWeightAttention
from fastweights.layers.fast_weight_layer import FastWeightLayer, FastWeightLayerState, Pieces
from fastweights.layers.feature_maps import FEATURE_MAPS
from fastweights.layers.linear import use_onednn
from fastweights.layers.next_token_gradient import NO_LABEL
from fastweights.layers.rules import TokenMarks
from fastweights.layers.window import WindowEmbeddings, token_index
from fastweights.models.architectures import architecture_of, attention_modules, position_limit
from fastweights.models.cache import BlockCacheLayer, FastWeightsCache, PendingPosition, SlidingCacheLayer
from fastweights.models.configuration import FastWeightsConfig
from fastweights.models.decoding import decode
from fastweights.models.documents import (
    Numbers,
    Reading,
    can_be_read,
    check_consecutive,
    documents_masks,
    next_real_tokens,
    read_tokens,
)
from fastweights.models.initialisation import initialise, mark_as_initialised
from fastweights.models.replacement import drop_positions, inverse_rotation, keep_frequencies, replace_attention
from fastweights.models.unembedding import readable

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from fastweights.layers.next_token_gradient import Unembedding

_FLOAT32_PARTS = {*NEW_PARTS, UNIT, "fast_weight_layer"}


class AttentionRecord(NamedTuple):
    """What went into and came out of one layer's attention in the teacher."""

    inputs: Float[Tensor, "B T d"]
    """What the student's layer is given: the teacher's input, less its absolute positions if the student has none."""
    output: Float[Tensor, "B T d"]
    variance: Float[Tensor, ""]
    """Of the output: the unit in which the student's error is measured."""
    teacher_inputs: Float[Tensor, "B T d"]
    position_embeddings: tuple[Tensor, Tensor] | None


class Lesson(NamedTuple):
    """What a Fast Weight Layer learns of one call's tokens. t is T, or T + 1 where a position waited for its label."""

    labels: Int[Tensor, "B t"]
    pieces: Pieces
    real: Bool[Tensor, "B t"]
    before: tuple[FastWeightLayerState, PendingPosition] | None
    """What the tokens before left."""
    block: BlockCacheLayer | None
    """Where these leave theirs."""


class FastWeightsPreTrainedModel(PreTrainedModel):
    """What both models tell transformers about themselves."""

    config_class = FastWeightsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # A recurrent state cannot be rolled back to any token, so generate() refuses to have it assisted; it may assist.
    _is_stateful = True
    _keys_to_ignore_on_load_missing = [rf"\.{UNIT}$"]  # noqa: RUF012 (transformers' own)

    config: FastWeightsConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers lets modules of custom code without parameters of their own, GPT-2's among them, start wrong."""
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would save a copy of this file beside the weights; the config saves what they need."""

    def initialize_weights(self) -> None:
        """Let what a checkpoint lacks start as in a new model; transformers calls this."""
        initialise(self, self.base_model.base, super().initialize_weights)  # type: ignore[arg-type]


class FastWeightsModel(FastWeightsPreTrainedModel):
    """The model without its head; `base` is the base model's, with its attention replaced.

    Masks, caches, padding, positions and borders of packed documents are its business, and so is the Fast Weight Layer,
    so that whoever calls it gets what `FastWeightsForCausalLM` gives its unembedding.

    Args:
        config: names the base model and its fast weights.
        base: a headless model to take over, whose attention is replaced in place; by default a new one with random
            weights.
    """

    def __init__(self, config: FastWeightsConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.architecture = architecture_of(config.base)
        self.base: PreTrainedModel = AutoModelForCausalLM.from_config(config.base).base_model if base is None else base
        if base is not None and base.device.type != "meta":
            mark_as_initialised(base)
        config.dtype = config.base.dtype = self.base.dtype  # as loading sets it: a config is then always saved alike
        self._no_split_modules = self.base._no_split_modules
        if set(config.layer_types) != {"full_attention"}:
            recorded = self.base._can_record_outputs or {}
            self.base._can_record_outputs = {name: what for name, what in recorded.items() if "attentions" not in name}
            keep_frequencies(self.base, self.architecture)
        replace_attention(self.base, config)
        self._windows, self._in_eight_bits = [*config.windows], config.windows_in_eight_bits
        self._takes_rotary_off = any(layer.takes_rotary_off for layer in self.fast_attentions())
        self._positional = FEATURE_MAPS[config.settings.feature_map].positional
        self.max_positions = position_limit(config.base)
        """Where absolute positions end; None where there are none."""
        if config.settings.positions == "drop" and self.architecture.positions is not None:
            drop_positions(self.base, self.architecture)
            self.max_positions = None
        settings = config.fast_weight_layer_settings
        self.fast_weight_layer = None if settings is None else FastWeightLayer(config.hidden_size, settings)
        self.keep_in_fp32()
        self.post_init()

    def keep_in_fp32(self) -> None:
        """Tell transformers what to load in float32 whatever the dtype, and its quantisers what to leave alone."""
        named = (*self.named_parameters(), *self.named_buffers())
        parts = {part for name, _ in named for part in name.split(".")}
        self._keep_in_fp32_modules_strict = parts & _FLOAT32_PARTS
        # Quantisers read this list alone, match from a name's beginning, and it may not have what the other has.
        self._keep_in_fp32_modules = {rf".*\.{part}\..*" for part in ("rule", "mix_gate") if part in parts}

    def fast_attentions(self) -> list[FastWeightAttention]:
        """The attention of each converted layer, in order."""
        modules = attention_modules(self.base, self.architecture)
        return [module for module in modules if isinstance(module, FastWeightAttention)]

    def unembedding(self, positions: int) -> AbstractContextManager[Unembedding]:
        """The head of the model that this one belongs to, from which a Fast Weight Layer learns, in memory.

        Args:
            positions: how many of them have a label.

        Raises:
            FastWeightsError: if this one is alone and its embeddings are not tied, or if the head is no matrix of ours.
        """
        causal: FastWeightsForCausalLM | None = self.__dict__.get("causal")
        if causal is not None:
            return readable(causal.lm_head, positions)
        if not self.config.tie_word_embeddings:
            raise FastWeightsError(
                "this model has a Fast Weight Layer, which learns from the unembedding, and was loaded without it: "
                "load it with AutoModelForCausalLM"
            )
        return readable(self.get_input_embeddings(), positions)

    def window_embeddings(
        self,
        tokens: Tensor,
        position_ids: Int[Tensor, "_ T"] | None = None,
        marks: TokenMarks | None = None,
        before: int | Int[Tensor, "B 1"] = 0,
    ) -> dict[int, WindowEmbeddings] | None:
        """What each window needs beside the tokens' own rotary embedding; None where it needs nothing.

        For sinks a query stands where it is, but never farther from them than when the window has just lost them all:
        a distance that the base model knows, however long the text. A window keeps keys as its softmax reads them, and
        fast weights without rotary embedding (`rotary=False`) are given them without it: it is taken off a key when
        that leaves the window, W - 1 places behind.

        Args:
            tokens: the new ones, (B, T) or with more dimensions.
            position_ids: of these; by default their places in their document.
            marks: padding and borders of documents among these.
            before: tokens of its document that each row has read.
        """
        sinks = self.config.sinks
        if self.architecture.rotary is None or not (sinks or self._takes_rotary_off):
            return None
        index = token_index(tokens.shape[1], before, marks or TokenMarks(), tokens.device)
        positions = index if position_ids is None else position_ids
        like = torch.empty(0, dtype=self.dtype, device=tokens.device)
        rotary = self.base.get_submodule(self.architecture.rotary)
        kind, found = self.architecture.rotary_arguments, {}
        for window in set(self.config.windows) - {0}:
            of_sinks = of_leaving = None
            if sinks:
                too_far = (index - (window + sinks - 1)).clamp(min=0)
                of_sinks = rotary(like, positions - too_far, *kind)
            if self._takes_rotary_off:
                of_leaving = inverse_rotation(*rotary(like, positions - (window - 1), *kind))
            found[window] = WindowEmbeddings(of_sinks, of_leaving)
        return found

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the base model others."""
        self.base.set_input_embeddings(value)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Int[Tensor, " bounds"] | None = None,
        seq_idx: Int[Tensor, "B T"] | None = None,
        document_starts: Bool[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Like any model's of transformers.

        Args:
            input_ids: tokens.
            attention_mask: 0 where a token is padding, for all tokens so far; for the new ones alone (L = T), or left
                out, if no earlier one was padding.
            position_ids: by default the number of real tokens before each token. Where they start anew, so does the
                state: documents packed into one row do not see each other. Where fast weights take the rotary
                embedding off what they write (`rotary=False`) each must be the one after the last in its document,
                and the first 0 if a cache is to go on from there.
            cache: state to start from; it is updated in place. Without one the state is zero.
            inputs_embeds: instead of tokens.
            use_cache: whether to return the state; by default as the config says, and not when training.
            cu_seq_lens_q: bounds of packed documents, in a single row.
            seq_idx: number of the document that each token belongs to.
            document_starts: True where a document begins, which starts with no fast weights.
            **kwargs: for the base model.

        Returns:
            Last hidden state (B, T, d), after the Fast Weight Layer where there is one, and the state.

        Raises:
            FastWeightsError: if the input cannot be read as it was meant.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise FastWeightsError("forward needs input_ids or inputs_embeds; neither was given")
        self._check_windows()
        self._check_outputs(kwargs)
        _check_others(kwargs, cu_seq_lens_q)
        use_cache = bool(self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.training and (use_cache or cache is not None):
            self._check_checkpointing(cache)
        if use_cache and cache is None:
            cache = FastWeightsCache(self.config)
        ours = None if cache is None else FastWeightsCache.over(cache, self.config)
        past = 0 if ours is None else ours.get_seq_length()
        if ours is not None:
            ours.about_to_read()
        reading = read_tokens(
            (given.shape[0], given.shape[1]),
            ours,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=cu_seq_lens_q,
            seq_idx=seq_idx,
            document_starts=document_starts,
        )
        read = past if ours is None else past + ours.position_offset
        self._check_positions(reading.position_ids, read + given.shape[1], chosen=position_ids is not None)
        real, starts = reading.marks
        if real is not None or starts is not None:
            kwargs["marks"] = reading.marks
        if self.config.sinks or self._takes_rotary_off:
            before = 0 if ours is None else ours.document_length()
            if self._takes_rotary_off and position_ids is not None:
                check_consecutive(reading.position_ids, reading.marks, before, ours)
            kwargs["window_embeddings"] = self.window_embeddings(given, reading.position_ids, reading.marks, before)
        position_ids = reading.position_ids
        if position_ids is None:  # OPT would count them in a mask, and there may be none to count in
            position_ids = torch.arange(past, past + given.shape[1], device=given.device)[None]
        if self._positional:
            kwargs["feature_positions"] = position_ids
        in_windows = _documents_in_windows(reading, ours, given)
        lesson = None if self.fast_weight_layer is None else self.lesson(input_ids, real, starts, ours)
        outputs = self.base(
            input_ids=input_ids,
            attention_mask=self._softmax_mask(reading, ours, past, given, in_windows),
            position_ids=position_ids,
            cache=ours,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if ours is not None:
            ours.note(past=past, padded=reading.mask is not None, starts=starts)
            if in_windows is not None:
                ours.note_documents(in_windows.seen)
        hidden = outputs.last_hidden_state
        if lesson is not None:
            hidden = self.read_and_learn(hidden, lesson)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            cache=cache if use_cache else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_windows(self) -> None:
        """Caches would be made as the config says, and layers look for what they were made with."""
        if self.config.windows != self._windows:
            raise FastWeightsError(
                f"the config's windows are {self.config.windows} now, and the model was made with {self._windows}: "
                "save it, and what is loaded has the others"
            )
        if self.config.windows_in_eight_bits != self._in_eight_bits:
            raise FastWeightsError(
                "the config's window_dtype is another than the model was made with: save it, and what is loaded has it"
            )

    def _ask_as_config_does(self, kwargs: dict[str, Any]) -> None:
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True

    def _check_outputs(self, kwargs: dict[str, Any]) -> None:
        """Pass on what the config asks for, which the base model's does not say, and refuse maps that are not there."""
        self._ask_as_config_does(kwargs)
        if not kwargs.get("output_attentions"):
            return
        types = self.config.layer_types
        if softmax := [i for i, layer_type in enumerate(types) if layer_type == "full_attention"]:
            softmax = f"; only layers {', '.join(map(str, softmax))} have" if len(softmax) < len(types) else None
        else:
            softmax = ", and this model has no other layers"
        if softmax is not None:
            raise FastWeightsError(
                f"output_attentions was asked for: layers with fast weights have no attention maps{softmax}"
            )

    def _check_positions(self, position_ids: Tensor | None, length: int, *, chosen: bool) -> None:
        limit = self.max_positions
        if limit is None:
            return
        if length <= limit and not (chosen and can_be_read(position_ids)):
            return
        last = length - 1 if position_ids is None else int(position_ids.max())
        if last >= limit:
            what = f"the text is {length} tokens long" if length > limit else f"position_ids go up to {last}"
            raise FastWeightsError(
                f"{what} and this model's absolute positions end at {limit}; "
                'convert with positions="drop" for text of any length'
            )

    def _check_checkpointing(self, cache: Cache | None) -> None:
        """transformers' checkpointed layers drop their cache."""
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            what = "use_cache" if cache is None else "cache"
            raise FastWeightsError(
                f"{what} was given while training with activation checkpointing, which keeps no states: leave it out, "
                "or call activation_checkpointing_disable()"
            )

    def _softmax_mask(
        self,
        reading: Reading,
        cache: FastWeightsCache | None,
        past: int,
        given: Tensor,
        in_windows: Numbers | None,
    ) -> Tensor | dict[str, Tensor] | None:
        """What the base model's own attention is to see; a mask of four dimensions is passed on as it is."""
        if "full_attention" not in self.config.layer_types:
            # No layer reads the 4-D mask that the base model would build.
            return given.new_zeros(1, 1, 1, 1)
        real, starts = reading.marks
        if starts is None and not (past and cache is not None and cache.several_documents):
            return _mask_of_all(reading, cache)
        is_known = in_windows is not None and not self.config.growing_layers
        if not is_known and (past or (cache is not None and not cache.remembers)):
            raise FastWeightsError(
                "several documents were packed into one row, and layers with softmax attention cannot go on after "
                "that, nor begin it after other tokens: give them without a cache, or convert all layers"
            )
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise FastWeightsError(
                "several documents were packed into one row, which layers with softmax attention tell apart only with "
                'attn_implementation "sdpa" or "eager": give one document a row'
            )
        if in_windows is None:
            assert starts is not None
            in_windows = Numbers.of(starts, real)
        return documents_masks(self.config.base, in_windows, self.dtype)

    def lesson(
        self,
        input_ids: Int[Tensor, "B T"] | None,
        real: Bool[Tensor, "B T"] | None,
        starts: Bool[Tensor, "B T"] | None,
        cache: FastWeightsCache | None,
    ) -> Lesson:
        """What the Fast Weight Layer is to learn, before the base model says anything.

        Args:
            input_ids: the tokens that the base model is given.
            real: which of them are no padding; None if all are.
            starts: where other documents begin; None if nowhere.
            cache: of all tokens before.

        Raises:
            FastWeightsError: there are no tokens, from which alone it learns.
        """
        layer = self.fast_weight_layer
        assert layer is not None
        if input_ids is None:
            raise FastWeightsError("a Fast Weight Layer learns from the tokens it reads: give input_ids")
        real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
        block = None if cache is None or not layer.settings.updates else cache.block
        before, state = None if block is None else block.kept(), None
        if before is not None:
            # The position that was last is read again, now that its label is known.
            state, pending = before
            real = torch.cat((pending.real, real), 1)
            input_ids = torch.cat((torch.zeros_like(input_ids[:, :1]), input_ids), 1)
            starts = None if starts is None else nn.functional.pad(starts, (1, 0), value=False)
        labels = next_real_tokens(input_ids, real, starts, NO_LABEL)
        return Lesson(labels, layer.pieces(labels, state, starts), real, before, block)

    def read_and_learn(self, hidden: Float[Tensor, "B T d"], lesson: Lesson) -> Float[Tensor, "B T d"]:
        """Through the Fast Weight Layer, which goes on from what the lesson's cache holds and leaves its state there.

        Args:
            hidden: what the base model says.
            lesson: of the same tokens.

        Returns:
            What the unembedding is given.
        """
        layer = self.fast_weight_layer
        assert layer is not None
        length, labels, state = hidden.shape[1], lesson.labels, None
        if lesson.before is not None:
            state, pending = lesson.before
            hidden = torch.cat((pending.hidden.to(hidden.dtype), hidden), 1)
        learned = labels.numel()
        if labels.is_cpu and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            learned = int((labels != NO_LABEL).sum())
        with self.unembedding(learned) as unembedding:
            output, state = layer(hidden, labels, unembedding, state, pieces=lesson.pieces)
        if lesson.block is not None:
            lesson.block.replace(state, PendingPosition.last_of(hidden, lesson.real), length)
        return output[:, -length:]


class FastWeightsForCausalLM(FastWeightsPreTrainedModel, GenerationMixin):
    """One class for every architecture: `model` without the head, and the base model's own head.

    Args:
        config: names the base model and its fast weights.
        base: a causal language model to take over, whose attention is replaced in place; by default a new one with
            random weights.
    """

    def __init__(self, config: FastWeightsConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        causal: PreTrainedModel = AutoModelForCausalLM.from_config(config.base) if base is None else base
        if base is not None and base.device.type != "meta":
            mark_as_initialised(base)
        self.model = FastWeightsModel(config, base=causal.base_model)  # type: ignore[arg-type]
        self.lm_head: nn.Linear = causal.get_output_embeddings()  # type: ignore[assignment]
        self.model.__dict__["causal"] = self  # no module of its own, which would make each a part of the other
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        if base is None:
            use_onednn(self)
        else:
            self.generation_config = base.generation_config
            self.to(base.device)  # type: ignore[arg-type]

    @property
    def max_positions(self) -> int | None:
        """Where absolute positions end; None where there are none."""
        return self.model.max_positions

    @property
    def fast_weight_layer(self) -> FastWeightLayer | None:
        """The block before the unembedding, None without one."""
        return self.model.fast_weight_layer

    def fast_attentions(self) -> list[FastWeightAttention]:
        """The attention of each converted layer, in order."""
        return self.model.fast_attentions()

    def new_parameter_names(self) -> list[str]:
        """Names of the parameters that conversion added: gates and scales."""
        return [
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, FastWeightAttention)
            for parameter in module.new_parameter_names()
        ]

    def new_tensors(self) -> dict[str, Tensor]:
        """All that conversion added to the weights, by name: these parameters, and the units of the factors."""
        units = {name: buffer for name, buffer in self.named_buffers() if name.endswith(UNIT)}
        return {name: self.get_parameter(name) for name in self.new_parameter_names()} | units

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another unembedding."""
        self.lm_head = new_embeddings  # type: ignore[assignment]

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T d"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        attention_records: list[AttentionRecord] | None = None,
        loss_of: Callable[[Tensor, nn.Module, Any], Tensor] | None = None,
        targets: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Like any causal LM's; what `FastWeightsModel.forward` takes, and besides:

        Args:
            labels: next tokens are predicted of these; -100 where none counts.
            logits_to_keep: of how many last positions, or of which; 0 for all.
            attention_records: read no tokens; the loss is then the mean of `reproduction_errors` of these.
            loss_of: makes the loss of the last hidden states, the unembedding and `targets`; there are no logits
                then, and `labels` and `logits_to_keep` are of no account.
            targets: what it is given; tensors in it go with the batch where that is scattered.

        Returns:
            Loss, logits (B, T, V), None with `loss_of`, and the state.
        """
        if attention_records is not None:
            return CausalLMOutputWithPast(loss=self.reproduction_errors(attention_records, position_ids).mean())
        if self.model.__dict__.get("causal") is not self:  # a replica of DataParallel's
            self.model.__dict__["causal"] = self
        self.model._ask_as_config_does(kwargs)
        others = {
            **kwargs,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "loss_of": loss_of,
            "no cache": not (self.config.use_cache if use_cache is None else use_cache),
        }
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = decode(self, input_ids, cache, attention_mask, position_ids, others)
        if logits is not None:
            return CausalLMOutputWithPast(logits=logits[:, kept], cache=cache)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = logits = None
        if loss_of is not None:
            loss = loss_of(outputs.last_hidden_state, self.lm_head, targets)
        else:
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def reproduction_errors(
        self, records: list[AttentionRecord], position_ids: Int[Tensor, "_ T"] | None = None
    ) -> Float[Tensor, " layers"]:
        """How far each converted layer, given the teacher's own input, is from the teacher's attention output.

        Mean squared error relative to the output's variance: 1 is as good as saying its mean, 0 is perfect.

        Args:
            records: one for each layer of the model, converted or not.
            position_ids: that the teacher was given, which start anew where documents do.

        Returns:
            The error of each converted layer, in order.
        """
        shape = (records[0].inputs.shape[0], records[0].inputs.shape[1])
        marks, errors = read_tokens(shape, None, position_ids=position_ids).marks, []
        window_embeddings = self.model.window_embeddings(records[0].inputs, position_ids, marks)
        for layer in self.fast_attentions():
            record = records[layer.layer_idx]
            output, _ = layer(
                record.inputs,
                position_embeddings=record.position_embeddings,
                window_embeddings=window_embeddings,
                marks=marks,
            )
            errors.append((output - record.output).square().mean() / record.variance)
        return torch.stack(errors)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(cache := model_kwargs.get("cache"), Cache):
            model_kwargs["cache"] = ours = FastWeightsCache.over(cache, self.config)
            if generation_config.is_assistant and not ours.get_seq_length():
                ours.save_states()
        return result


def _mask_of_all(reading: Reading, cache: FastWeightsCache | None) -> Tensor | None:
    """False where a token is padding, of all that were read, as layers with windows of their own count them."""
    if reading.mask is None or cache is None:
        return reading.mask
    return nn.functional.pad(reading.mask, (cache.position_offset, 0), value=True)


def _documents_in_windows(reading: Reading, cache: FastWeightsCache | None, given: Tensor) -> Numbers | None:
    """Documents that layers with windows of their own see; None where they see one, or there are no such layers."""
    starts = reading.marks.starts
    layer = None if cache is None else next((x for x in cache.layers if isinstance(x, SlidingCacheLayer)), None)
    if layer is None or (starts is None and layer.documents is None):
        return None
    if starts is not None and not layer.next_position and not starts[:, 1:].any():
        return None  # one that begins where nothing was read
    if starts is None:
        starts = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
    T = starts.shape[1]
    kept = layer.get_mask_sizes(T)[0] - T
    before = layer.documents
    if before is None:
        before = torch.zeros(len(starts), kept, dtype=torch.long, device=given.device)
        mask = _mask_of_all(reading, cache)
        if mask is not None:
            before = before.masked_fill(~mask[:, -T - kept : -T], -1)
    return Numbers.of(starts, reading.marks.real, before)


def _check_others(kwargs: dict[str, Any], cu_seq_lens_q: Tensor | None) -> None:
    """Refuse what the base model would swallow without a word; take out what it needs no more."""
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise FastWeightsError(f"a cache was given as {name}: give it as cache")
    if "cu_seqlens" in kwargs or (kwargs.get("cu_seq_lens_k") is not None and cu_seq_lens_q is None):
        raise FastWeightsError("bounds of packed documents were given without cu_seq_lens_q: give them under that name")
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)


AutoModel.register(FastWeightsConfig, FastWeightsModel)
AutoModelForCausalLM.register(FastWeightsConfig, FastWeightsForCausalLM)
# `transformers serve` asks transformers for a class of this name, and the one that it imported itself: loading its
# processors, transformers puts another in its own place.
_server = sys.modules.get("transformers.cli.serving.model_manager")
for _module in (transformers, getattr(_server, "transformers", transformers)):
    _module.FastWeightsForCausalLM = FastWeightsForCausalLM  # type: ignore[attr-defined]
