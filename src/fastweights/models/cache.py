"""FastWeightsCache: what a model knows of the text so far.

It is transformers' `DynamicCache` with layers of ours, which hold fast weights, know how many tokens made them, and
whether padding or several documents were among these. (transformers' own linear layers cannot tell their length, which
base models ask for to number their positions.) Everything is kept in the layers: a `DynamicCache` that a user made
works as well, as ours take the place of its still empty ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)

from fastweights.errors import FastWeightsError
from fastweights.layers.eight_bits import EightBits, rounded
from fastweights.layers.fast_weight_layer import FastWeightLayerState, FastWeights
from fastweights.layers.window import KeysAndValues
from fastweights.models.architectures import local_windows
from fastweights.models.rings import (
    CODES,
    EXPONENTS,
    GrowingCacheLayer,
    KeepsKeysAndValues,
    Rows,
    Windowed,
    numbers_of,
    wants_derivatives,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int, Int8
    from torch import Tensor

    from fastweights.models.configuration import FastWeightsConfig
    from fastweights.models.decoding import DecodingState


class Counting(Rows):
    """How many tokens made a layer's state, whose own size does not tell."""

    cumulative_length: int
    """Tokens read, padding included."""
    position_offset = 0
    """Positions before the first token that the cache is said to hold."""

    @property
    def next_position(self) -> int:
        """Of the token that comes next, padding counted."""
        return self.position_offset + self.cumulative_length


class _Recurrent(Counting, LinearAttentionLayer):
    """States, and what they were made of."""

    padded = False
    """Whether padding was among them."""
    several_documents = False
    """Whether they are more than one document, of which softmax over all tokens would see the earlier ones."""
    state_in_eight_bits = False
    """Whether the state is kept so, where nobody wants a derivative through it."""
    exponents: Int8[Tensor, "B G K _"] | None = None
    """Of the state, which is codes then; None where it is in its own dtype."""
    _state_dtype = torch.float32

    @property
    def is_compileable(self) -> bool:
        """No: each state is another tensor."""
        return False

    def state(self, state_idx: int = 0) -> Tensor | None:
        """A state; None before the first token."""
        if not self.has_previous_state[state_idx]:
            return None
        return self.recurrent_states[state_idx] if self.exponents is None else numbers_of(self._held_state())

    @property
    def state_shape(self) -> tuple[int, ...] | None:
        """(B, G, K, V) of the state; None before the first token."""
        state = self.recurrent_states[0] if self.has_previous_state[0] else None
        return None if state is None else tuple(state.shape)

    def keep_state(self, state: Tensor) -> None:
        """Take the place of the state before, in eight bits where it is kept so, once its tokens are counted."""
        self.exponents = None
        if self.state_in_eight_bits and not wants_derivatives(state):
            state, self.exponents, self._state_dtype = EightBits.of(state, self.next_position - 1)
        self.put(state)

    def put(self, state: Tensor, state_idx: int = 0) -> None:
        """Take the place of the state before.

        Another tensor, where transformers writes into the old one, which a backward pass may still need.
        """
        if not self.is_recurrent_states_initialized[state_idx]:
            self.device = state.device
            self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = state
        self.has_previous_state[state_idx] = True

    def tail(self) -> Tensor | None:
        """What a short convolution goes on from; None before the first token."""
        return self.conv_states[0] if self.has_previous_state[0] else None

    def put_tail(self, tail: Tensor) -> None:
        """Take the place of the tail before."""
        self.conv_states[0] = tail
        self.is_conv_states_initialized[0] = True

    def own_tail(self) -> Tensor:
        """As `own_state`, of the tail."""
        tail = self.tail()
        assert tail is not None
        self.put_tail(tail.clone(memory_format=torch.contiguous_format))
        return self.conv_states[0]  # type: ignore[return-value]

    def restore_state(self, state: EightBits) -> None:
        """One that was kept so, as it is."""
        codes, self.exponents, self._state_dtype = state
        self.put(codes)

    def own_state(self) -> Tensor | EightBits:
        """The state in memory that nobody else holds, so that it may be written over, as single tokens then do."""
        state = self.recurrent_states[0]
        assert state is not None
        state = state.clone(memory_format=torch.contiguous_format)
        if self.exponents is None:
            self.keep_state(state)
        else:
            self.exponents = self.exponents.clone(memory_format=torch.contiguous_format)
            self.put(state)
        return self._held_state()  # type: ignore[return-value]

    def has_state(self, state: Tensor | EightBits) -> bool:
        """Whether it still is what `own_state` gave."""
        return self.recurrent_states[0] is (state.codes if isinstance(state, EightBits) else state)

    def _held_state(self) -> Tensor | EightBits | None:
        state = self.recurrent_states[0]
        if state is None or self.exponents is None:
            return state
        return EightBits(state, self.exponents, self._state_dtype)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        """transformers' name for both ways to take the place of a state."""
        if state_idx == 0:
            self.keep_state(recurrent_states)
        else:
            self.put(recurrent_states, state_idx)
        return recurrent_states

    def reset(self) -> None:
        """As new."""
        LinearAttentionLayer.reset(self)
        self.cumulative_length = self.position_offset = 0
        self.padded = self.several_documents = False
        self.exponents = None

    def change_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """Each state by what `change` makes of it."""
        for states in (self.recurrent_states, self.conv_states):
            for i, state in states.items():
                states[i] = None if state is None else change(state)
        self.exponents = None if self.exponents is None else change(self.exponents)


class PureCacheLayer(_Recurrent, CacheLayerMixin):
    """The state of a pure layer, (B, G, K, V)."""

    is_sliding = False

    def __init__(self, number_of_states: int = 1, *, state_in_eight_bits: bool = False) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.cumulative_length, self.state_in_eight_bits = 0, state_in_eight_bits

    def write(self, state: Tensor, tokens: int) -> None:
        """The state after `tokens` more tokens."""
        self.cumulative_length += tokens
        self.keep_state(state)

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: states are given."""
        raise RuntimeError("a layer of pure fast weights keeps states that it is given, and makes none")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Of layers with softmax attention."""
        raise RuntimeError("a layer of pure fast weights keeps no keys and values")

    def get_seq_length(self) -> int:
        """Tokens read."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask over the new tokens would do."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No end."""
        return -1

    offload = LinearAttentionLayer.offload
    prefetch = LinearAttentionLayer.prefetch


class SlidingCacheLayer(Counting, Windowed, DynamicSlidingWindowLayer):
    """Keys and values of a softmax layer that has a window of its own, as most of Gemma 3's have."""

    documents: Int[Tensor, "B L"] | None = None
    """By number the document of each token that is kept, -1 for padding; None while there was only one."""

    def __init__(self, sliding_window: int, *, eight_bits: bool = False) -> None:
        super().__init__(sliding_window)
        self.eight_bits = eight_bits

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """All that the new tokens see; what the window keeps of it is kept by itself, not as a view of it all."""
        if self.eight_bits:
            key_states, value_states = rounded(key_states), rounded(value_states)
        seen = super().update(key_states, value_states, *args, **kwargs)
        as_it_is = not self.eight_bits or wants_derivatives(key_states)
        if not self.record_past and ((as_it_is and key_states.shape[2] > 1) or self.sliding_window == 1):
            room = self.sliding_window - 1
            self.keys, self.values = (x[:, :, max(0, x.shape[2] - room) :].clone() for x in seen)
        return seen

    def activate_past_recording(self) -> None:
        """Keep more than the window until `crop`, which a ring cannot."""
        self.leave_ring()
        super().activate_past_recording()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of what new tokens may see, and the position of its first, among all that were read."""
        kept = 0 if self.kept_shape is None else min(self.kept_shape[2], self.sliding_window - 1)
        return kept + query_length, self.next_position - kept

    def document_length(self) -> int:
        """Tokens that each row has read."""
        return self.next_position

    def change_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """All that is held, also where the layer is said to hold no tokens, by what `change` makes of it."""
        self.change_kept(change)
        self.documents = None if self.documents is None else change(self.documents)

    def reset(self) -> None:
        """As new."""
        super().reset()
        self.position_offset, self.documents = 0, None


class HybridCacheLayer(Windowed, _Recurrent, LinearAttentionAndSlidingWindowAttentionLayer):
    """The state of a hybrid layer: fast weights, and the keys and values of the window and of sinks."""

    count: Int[Tensor, "B 1"] | None = None
    """Tokens of its document that each row has read, once rows may differ; None while all they read is one."""

    def __init__(
        self,
        sliding_window: int,
        number_of_sinks: int = 0,
        *,
        eight_bits: bool = False,
        state_in_eight_bits: bool = False,
    ) -> None:
        super().__init__(sliding_window=sliding_window)
        self.number_of_sinks, self.eight_bits = number_of_sinks, eight_bits
        self.state_in_eight_bits = state_in_eight_bits

    def write(self, state: Tensor, tokens: int) -> None:
        """The state after the new tokens, which the window has counted."""
        self.keep_state(state)

    def document_length(self) -> int | Int[Tensor, "B 1"]:
        """Tokens of its document that each row has read."""
        return self.next_position if self.count is None else self.count

    def with_kept(self, k: Tensor, v: Tensor) -> KeysAndValues:
        """The window's keys and values so far, and the new ones after them."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.eight_bits and self.is_initialized:  # `keep` will round what stays
            self.cumulative_length += k.shape[2]
            k, v = (torch.cat((kept, new), 2) for kept, new in ((self.keys, k), (self.values, v)) if kept is not None)
        else:
            k, v = self.update(k, v)
        return KeysAndValues(k.transpose(1, 2), v.transpose(1, 2))

    def keep(self, last: KeysAndValues, sinks: KeysAndValues | None, count: Int[Tensor, "B 1"] | None) -> None:
        """What the tokens to come will see."""
        room = self.sliding_window - 1
        if last.k.shape[1] > room + 1 or count is not None or self.eight_bits:
            # The view that transformers keeps would hold all the keys of a long text alive, in another order.
            self.keys, self.values = (kept[:, -room:].transpose(1, 2).clone() for kept in last)
        self.sinks, self.count = sinks, count

    def reset(self) -> None:
        """As new."""
        LinearAttentionAndSlidingWindowAttentionLayer.reset(self)
        _Recurrent.reset(self)
        self.sinks = self.count = None

    def change_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """All that is held by what `change` makes of it; transformers passes over keys of no tokens."""
        super().change_states(change)
        self.change_kept(change)
        self.count = None if self.count is None else change(self.count)
        self.sinks = None if self.sinks is None else KeysAndValues(*map(change, self.sinks))

    def offload(self) -> None:
        """To the CPU, window and state."""
        Windowed.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Back to where the layer is."""
        Windowed.prefetch(self)
        LinearAttentionLayer.prefetch(self)


class PendingPosition(NamedTuple):
    """The last real position of each row; it takes its gradient step once the next token is known."""

    hidden: Float[Tensor, "B 1 d"]
    real: Bool[Tensor, "B 1"]
    """False for a row that had no real token yet."""

    @classmethod
    def last_of(cls, hidden: Float[Tensor, "B T d"], real: Bool[Tensor, "B T"]) -> PendingPosition:
        """The last real position of each row among these."""
        real = real.to(hidden.device)  # of a model on several GPUs
        last = torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(1)
        return cls(hidden[torch.arange(len(hidden), device=hidden.device), last, None], real.any(1, keepdim=True))


class BlockCacheLayer(PureCacheLayer):
    """The state of a Fast Weight Layer, and each row's last position, which has no label yet."""

    def __init__(self) -> None:
        super().__init__(number_of_states=len(PendingPosition._fields) + 2 * len(FastWeights._fields) + 1)

    def replace(self, state: FastWeightLayerState, pending: PendingPosition, tokens: int) -> None:
        """Take the place of what was kept before, `tokens` tokens on."""
        for i, tensor in enumerate((*pending, *state.tensors())):
            self.put(tensor, i)
        self.cumulative_length += tokens

    def kept(self) -> tuple[FastWeightLayerState, PendingPosition] | None:
        """What the last piece of text left, None before the first."""
        if not any(self.has_previous_state.values()):
            return None
        tensors: list[Any] = [tensor for tensor in self.recurrent_states.values() if tensor is not None]
        n = len(PendingPosition._fields)
        return FastWeightLayerState.from_tensors(tensors[n:]), PendingPosition(*tensors[:n])


class FastWeightsCache(DynamicCache):
    """The state of a model with fast weights: its size does not depend on the length of the text.

    Args:
        config: of the model.

    Raises:
        FastWeightsError: from `over`, if another model's cache was given, or a static one beside layers with softmax
            attention.
    """

    def __init__(self, config: FastWeightsConfig) -> None:
        super().__init__(config=config)
        self._adopt_layers(config)

    is_view = False
    """Whether another cache, which a user made, has the same layers."""
    decoding: DecodingState | None = None
    """What goes on from it token by token (`decoding.py`), while nothing else does."""
    _padded = _several_documents = False
    reordered = False
    """Whether rows have changed places, as those of a beam do with each token."""

    _saved: list[_Saved] | None = None
    """What there is to go back to; None where nobody will."""

    @classmethod
    def over(cls, cache: Cache, config: FastWeightsConfig) -> FastWeightsCache:
        """The same cache as one of ours, which shares its layers: they are ours from now on, in both.

        Args:
            cache: any of transformers'.
            config: of the model.
        """
        if isinstance(cache, cls) and cache.fits(config):
            return cache
        ours = cls.__new__(cls)
        ours.__dict__.update(cache.__dict__)
        ours.is_view = ours.is_view or not isinstance(cache, cls)
        ours._adopt_layers(config)
        return ours

    def fits(self, config: FastWeightsConfig) -> bool:
        """Whether each layer is of the kind that the model's is.

        Args:
            config: of the model.
        """
        types, block, sizes = config.layer_types, config.fast_weight_layer is not None, _Sizes.of(config)
        return len(self.layers) == len(types) + block and all(
            _fits(layer, i, config, sizes) for i, layer in enumerate(self.layers[: len(types)])
        )

    def _adopt_layers(self, config: FastWeightsConfig) -> None:
        types, sizes = config.layer_types, _Sizes.of(config)
        if len(self.layers) < len(types):
            self.layers += DynamicCache(config=config).layers[len(self.layers) :]
        if config.fast_weight_layer is not None and self.block is None:
            self.layers.append(BlockCacheLayer())
        self._give_softmax_layers_their_windows(config)
        static = any(isinstance(layer, StaticLayer) for layer in self.layers)
        if config.softmax_in_eight_bits and static:
            raise FastWeightsError(
                "a static cache was given, and this model keeps the keys and values of its softmax attention in eight "
                "bits: leave cache_implementation out, or use a DynamicCache"
            )
        for i, kind in enumerate(types):
            layer = self.layers[i]
            if _fits(layer, i, config, sizes):
                continue
            if not _is_unused(layer):
                raise FastWeightsError(
                    f"layer {i} of the cache is a {type(layer).__name__} with tokens in it, and this model's is "
                    f"{kind}: the cache is another model's; begin with a new one"
                )
            self.layers[i] = _new_layer(i, config)
        if self.recurrent and static:
            # transformers would leave out the mask that hides the empty places of its static layers.
            raise FastWeightsError(
                "a static cache was given, and this model has layers with softmax attention beside its fast weights: "
                "leave cache_implementation out, or use a DynamicCache"
            )

    def _give_softmax_layers_their_windows(self, config: FastWeightsConfig) -> None:
        if not any(local_windows(config.base)) or "full_attention" not in config.layer_types:
            return
        theirs = DynamicCache(config=config.base).layers
        for i, kind in enumerate(config.layer_types):
            layer = self.layers[i]
            if kind == "full_attention" and type(layer) in _GROWING and not layer.is_initialized:
                window = getattr(theirs[i], "sliding_window", None)
                few = config.softmax_in_eight_bits
                self.layers[i] = theirs[i] if window is None else SlidingCacheLayer(window, eight_bits=few)

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        tensors = (tensor for layer in self.layers for tensor in layer_tensors(layer).values())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def remembers(self) -> bool:
        """Whether what is said of the tokens so far is still known when this cache is given again."""
        return bool(self.recurrent) or not self.is_view

    @property
    def recurrent(self) -> list[_Recurrent]:
        """The layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, _Recurrent)]

    def document_length(self) -> int | Int[Tensor, "B 1"]:
        """Tokens of its document that each row has read, of a model with windows."""
        return next(layer.document_length() for layer in self.layers if isinstance(layer, HybridCacheLayer))

    @property
    def block(self) -> BlockCacheLayer | None:
        """The Fast Weight Layer's part."""
        return next((layer for layer in self.layers if isinstance(layer, BlockCacheLayer)), None)

    @block.setter
    def block(self, block: BlockCacheLayer) -> None:
        for i, layer in enumerate(self.layers):
            if isinstance(layer, BlockCacheLayer):
                self.layers[i] = block

    @property
    def is_sliding(self) -> list[bool]:
        """Of each layer whose window is the base model's own, for which this builds its masks."""
        return [getattr(layer, "is_sliding", False) and not isinstance(layer, _Recurrent) for layer in self.layers]

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer of ours that has others beside it, by which transformers is to measure its masks.

        Where all are ours, none, as `generate` asks none of these how many tokens it has read.
        """
        ours = [isinstance(layer, _Recurrent) for layer in self.layers]
        return [is_ours and not all(ours) for is_ours in ours]

    @property
    def padded(self) -> bool:
        """Whether padding is among the tokens so far."""
        return self._padded or any(layer.padded for layer in self.recurrent)

    @padded.setter
    def padded(self, value: bool) -> None:
        self._padded = value
        for layer in self.recurrent:
            layer.padded = value

    @property
    def several_documents(self) -> bool:
        """Whether the tokens so far are more than one document."""
        several = (layer.several_documents for layer in self.recurrent)
        return self._several_documents or any(several) or any(layer.documents is not None for layer in self._sliding)

    @several_documents.setter
    def several_documents(self, value: bool) -> None:
        self._several_documents = value
        for layer in self.recurrent:
            layer.several_documents = value

    def note(self, *, past: int, padded: bool, starts: Bool[Tensor, "B T"] | None) -> None:
        """Remember what was special about tokens, once they are read.

        Args:
            past: tokens before them.
            padded: whether padding is among all so far.
            starts: where documents began among them.
        """
        # One that begins where nothing was read is the only one.
        several = starts is not None and bool(past or starts[:, 1:].any())
        several = several or (past > 0 and self.several_documents)
        if padded != self.padded:
            self.padded = padded
        if several != self.several_documents:
            self.several_documents = several

    def note_documents(self, numbers: Int[Tensor, "B L"]) -> None:
        """Which document each of the last tokens is of, for layers with windows of their own."""
        for layer in self._sliding:
            layer.documents = numbers[:, max(0, numbers.shape[1] - layer.sliding_window + 1) :]

    def reset(self) -> None:
        """As new."""
        super().reset()
        self.padded = self.several_documents = self.reordered = False
        self._saved = None if self._saved is None else []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """The rows in this order."""
        super().reorder_cache(beam_idx)
        self.reordered = True

    @property
    def _sliding(self) -> list[SlidingCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlidingCacheLayer)]

    @property
    def counting(self) -> list[Counting]:
        """The layers whose state has a size that does not tell how many tokens made it."""
        return [layer for layer in self.layers if isinstance(layer, Counting)]

    @property
    def position_offset(self) -> int:
        """Positions before the first token that the cache is said to hold."""
        return max((layer.position_offset for layer in self.counting), default=0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token, by which a softmax layer's own window is masked."""
        layer = self.layers[layer_idx]
        return layer.next_position if isinstance(layer, SlidingCacheLayer) else super().get_query_offset(layer_idx)

    def begin_here(self) -> None:
        """Be said to hold no tokens from now on, while positions go on from where they are.

        For transformers' `generate`, which wants all the tokens that a cache has read. Where padding or other documents
        are among these, positions count them, too.

        Raises:
            FastWeightsError: a layer with softmax over all tokens has read some, whose number its positions go by.
        """
        if any(layer.get_seq_length() for layer in self.layers if not isinstance(layer, Counting)):
            raise FastWeightsError(
                "a layer with softmax attention over all tokens cannot begin anew with the others: begin_here is for "
                "models whose memory has a constant size"
            )
        for layer in self.counting:
            layer.position_offset += layer.cumulative_length
            layer.cumulative_length = 0

    def save_states(self) -> None:
        """From now on keep states to go back to with `crop`, as the assistant of another model does."""
        self._saved = []
        for layer in self.layers:
            if hasattr(layer, "record_past"):  # transformers' own way to go back, which keeps a window's keys meanwhile
                layer.record_past = False

    @property
    def keeps_states(self) -> bool:
        """Whether it does."""
        return self._saved is not None

    def about_to_read(self) -> None:
        """Keep the state as it is, if it is to be kept; tensors in it are not written to any more."""
        if self._saved is not None and not (self._saved and self._saved[-1].length == self.get_seq_length()):
            layers = [_attributes(layer) for layer in self.layers]
            self._saved.append(_Saved(self.get_seq_length(), layers))
            self.decoding = None  # what goes on from here begins with a copy

    def crop(self, tokens_to_remove: int) -> None:
        """Go back at least so many tokens, to the last state before these that was kept; later ones are dropped.

        Steps of single tokens on a CPU keep none between them, so that more tokens may have to be read again:
        `get_seq_length` says from where on, and `generate` does.

        Args:
            tokens_to_remove: 0, or a negative number, as transformers has it.

        Raises:
            FastWeightsError: no state was kept that is old enough, or the number is positive.
        """
        if tokens_to_remove > 0:
            raise FastWeightsError(f"tokens_to_remove is {tokens_to_remove}; allowed are 0 and negative numbers")
        if not tokens_to_remove:
            self._saved = self._saved and self._saved[-_KEPT:]
            return
        length = self.get_seq_length() + tokens_to_remove
        old_enough = [saved for saved in self._saved or () if saved.length <= length]
        if not old_enough:
            raise FastWeightsError(
                f"a cache of fast weights with {self.get_seq_length()} tokens was to go back to {length}, and has kept "
                "no state of then: read the text anew"
            )
        for layer, attributes in zip(self.layers, old_enough[-1].layers, strict=True):
            vars(layer).clear()
            vars(layer).update(_copied(attributes))
        self.decoding = None
        self._saved = old_enough[-_KEPT:]

    def lengths(self) -> list[int]:
        """Tokens read, of each layer that counts them."""
        return [layer.cumulative_length for layer in self.counting]

    def set_lengths(self, lengths: list[int]) -> None:
        """The counterpart of `lengths`."""
        for layer, length in zip(self.counting, lengths, strict=True):
            if isinstance(layer, Windowed):
                layer.leave_ring()  # it would lose its places
            layer.cumulative_length = length


_GROWING = DynamicLayer, DynamicSlidingWindowLayer
"""transformers' layers of a cache that nothing was said of."""
_KEPT = 2
"""States that are left after each `crop`, so that memory stays as it is however long the text."""


class _Saved(NamedTuple):
    """A state that was kept."""

    length: int
    """Tokens read."""
    layers: list[dict[str, Any]]
    """Attributes of each layer."""


def _attributes(layer: Any) -> dict[str, Any]:
    if isinstance(layer, KeepsKeysAndValues):
        layer.leave_ring()  # which single tokens are written into
    return _copied(vars(layer))


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in attributes.items()}


class _Sizes(NamedTuple):
    """Of what each layer with fast weights keeps; a config is slow to ask for them."""

    kv_heads: int
    convolution: tuple[int, int] | None

    @classmethod
    def of(cls, config: FastWeightsConfig) -> _Sizes:
        return cls(config.num_key_value_heads, config.convolution_shape)

    def fit(self, layer: _Recurrent) -> bool:
        """Whether what a layer has read is of as many heads, with a tail that the model's convolution goes on from."""
        if (shape := layer.state_shape) is None:
            return True
        if shape[1] != self.kv_heads:
            return False
        tail = layer.tail()
        if tail is None or self.convolution is None:
            return tail is None and self.convolution is None
        channels, size = self.convolution
        return tuple(tail.shape[1:]) == (channels, size - 1)


def _fits(layer: Any, i: int, config: FastWeightsConfig, sizes: _Sizes) -> bool:
    kind = config.layer_types[i]
    if kind != "full_attention" and isinstance(layer, _Recurrent) and not sizes.fit(layer):
        return False
    if isinstance(layer, _Recurrent) and layer.state_in_eight_bits != config.states_in_eight_bits:
        return False
    if kind == "linear_attention":
        return isinstance(layer, PureCacheLayer) and not isinstance(layer, BlockCacheLayer)
    if kind == "hybrid_sliding":
        if not isinstance(layer, HybridCacheLayer):
            return False
        has = layer.sliding_window, layer.number_of_sinks, layer.eight_bits
        return has == (config.windows[i], config.sinks, config.windows_in_eight_bits)
    few = getattr(layer, "eight_bits", False)
    return not isinstance(layer, LinearAttentionCacheLayerMixin) and few == config.softmax_in_eight_bits


def _new_layer(i: int, config: FastWeightsConfig) -> Any:
    kind, few = config.layer_types[i], config.states_in_eight_bits
    if kind == "linear_attention":
        return PureCacheLayer(state_in_eight_bits=few)
    if kind != "hybrid_sliding":
        return GrowingCacheLayer() if config.softmax_in_eight_bits else DynamicLayer()
    of_window = config.windows[i], config.sinks
    return HybridCacheLayer(*of_window, eight_bits=config.windows_in_eight_bits, state_in_eight_bits=few)


def _is_unused(layer: Any) -> bool:
    """Whether nothing was read; of transformers' other layers with softmax attention, never so."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return not any(layer.has_previous_state.values())
    if isinstance(layer, StaticLayer):
        return not layer.is_initialized
    return type(layer) in (DynamicLayer, GrowingCacheLayer) and not layer.is_initialized


def detach(cache: Cache) -> None:
    """Cut the graph of what any cache holds, so that gradients reach back to here and no further."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).detach())
        if isinstance(layer, _Recurrent):
            layer.change_states(torch.Tensor.detach)


def layer_tensors(layer) -> dict[str, Tensor]:
    """All that a layer of any cache holds between two tokens: its states, and its keys and values."""
    found = {f"state{i}": state for i, state in getattr(layer, "recurrent_states", {}).items()}
    if getattr(layer, "exponents", None) is not None:
        found |= {f"state0{CODES}": found.pop("state0"), f"state0{EXPONENTS}": layer.exponents}
    found["tail"] = getattr(layer, "conv_states", {}).get(0)
    if isinstance(layer, KeepsKeysAndValues):
        found |= layer.kept()
    else:
        found |= {name: getattr(layer, name, None) for name in ("keys", "values")}
    found["count"] = getattr(layer, "count", None)
    if isinstance(layer, HybridCacheLayer) and layer.sinks is not None:
        found |= {"sink_keys": layer.sinks.k, "sink_values": layer.sinks.v}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def state_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds between two tokens."""
    tensors = [tensor for layer in cache.layers for tensor in layer_tensors(layer).values()]
    # A view keeps alive all that it views.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
