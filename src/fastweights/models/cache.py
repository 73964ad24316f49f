"""Cache layers for transformers' `DynamicCache` that hold fast weights and know how many tokens made them.

transformers' own linear layers cannot tell their length, which GPT-2 and Llama ask for to number their positions, and
they mark a state as present only when a convolution is there too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from fastweights.errors import FastWeightsError
from fastweights.layers.fast_weight_layer import FastWeightLayerState, FastWeights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor
    from transformers import Cache


class FastWeightsCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """The state of a pure layer, (B, G, K, V) in fp32."""

    is_compileable = False
    is_sliding = False

    def __init__(self, number_of_states: int = 1) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.cumulative_length = 0

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, *, tokens: int = 0, **kwargs):
        self.cumulative_length += tokens
        return _keep(self, recurrent_states, state_idx)

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise RuntimeError("a layer of pure fast weights keeps states that it is given, and makes none")

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError("a layer of pure fast weights keeps no keys and values")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for i, state in self.recurrent_states.items():
            self.recurrent_states[i] = None if state is None else state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices) -> None:
        for i, state in self.recurrent_states.items():
            self.recurrent_states[i] = None if state is None else state[indices, ...]


class HybridCacheLayer(LinearAttentionAndSlidingWindowAttentionLayer):
    """The state of a hybrid layer: fast weights, and the keys and values of the window's last real tokens."""

    real: Bool[Tensor, "B kept"] | None = None
    """False where a row has had fewer real tokens than are kept; None if none has."""

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, *, tokens: int = 0, **kwargs):
        return _keep(self, recurrent_states, state_idx)  # the window counts the tokens

    def with_kept(self, new: Bool[Tensor, "B T"] | None, length: int) -> Bool[Tensor, "B L"] | None:
        """Which of `length` keys are real, those that were kept and the new ones; None if all are."""
        if self.real is None:
            return None if new is None else pad(new, (length - new.shape[1], 0), value=True)
        if new is None:
            return pad(self.real, (0, length - self.real.shape[1]), value=True)
        return torch.cat((self.real, new), 1)

    def keep(self, keys: Tensor, values: Tensor, real: Bool[Tensor, "B L"] | None) -> None:
        """The last of these, of which padding stands in front, for the tokens to come."""
        room = self.sliding_window - 1
        if keys.shape[-2] > room + 1 or real is not None:
            # The view that transformers keeps would hold all the keys of a long text alive.
            self.keys, self.values = (kept[:, :, -room:].clone() for kept in (keys, values))
        self.real = None if real is None else real[:, -room:].clone()

    batch_repeat = FastWeightsCacheLayer.batch_repeat_interleave
    batch_select = FastWeightsCacheLayer.batch_select_indices

    def reset(self) -> None:
        super().reset()
        self.real = None

    def reorder_cache(self, beam_idx) -> None:
        super().reorder_cache(beam_idx)
        self.real = None if self.real is None else self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.batch_repeat(repeats)
        self.real = None if self.real is None else self.real.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices) -> None:
        super().batch_select_indices(indices)
        self.batch_select(indices)
        self.real = None if self.real is None else self.real[indices]


class FastWeightLayerCache(FastWeightsCacheLayer):
    """The state of a Fast Weight Layer, and each row's last position, which has no label yet."""

    def __init__(self) -> None:
        super().__init__(number_of_states=len(PendingPosition._fields) + 2 * len(FastWeights._fields) + 1)

    def keep(self, state: FastWeightLayerState, pending: PendingPosition, tokens: int) -> None:
        """Take the place of what was kept before."""
        for i, tensor in enumerate((*pending, *state.tensors())):
            self.update_recurrent_state(tensor, i)
        self.cumulative_length += tokens

    def kept(self) -> tuple[FastWeightLayerState, PendingPosition] | None:
        """What the last piece of text left, None before the first."""
        if not any(self.has_previous_state.values()):
            return None
        tensors: list[Any] = [tensor for tensor in self.recurrent_states.values() if tensor is not None]
        n = len(PendingPosition._fields)
        return FastWeightLayerState.from_tensors(tensors[n:]), PendingPosition(*tensors[:n])


class PendingPosition(NamedTuple):
    """The last real position of each row; it takes its gradient step once the next token is known."""

    hidden: Float[Tensor, "B 1 d"]
    real: Bool[Tensor, "B 1"]
    """False for a row that had no real token yet."""


def _keep(layer: LinearAttentionLayer, state: Tensor, state_idx: int) -> Tensor:
    # Another tensor, where transformers writes into the old one, which a backward pass may still need.
    if not layer.is_recurrent_states_initialized[state_idx]:
        layer.device = state.device
        layer.is_recurrent_states_initialized[state_idx] = True
    layer.recurrent_states[state_idx] = state
    layer.has_previous_state[state_idx] = True
    return state


def adopt_cache(cache: Cache, layer_types: list[str], window: int, *, fast_weight_layer: bool = False) -> Cache:
    """Put our layers where `cache` has transformers' own, not yet used ones; a Fast Weight Layer's is the last."""
    if fast_weight_layer and not any(isinstance(layer, FastWeightLayerCache) for layer in cache.layers):
        cache.layers += [DynamicLayer() for _ in range(len(layer_types) - len(cache.layers))]
        cache.layers.append(FastWeightLayerCache())
    for i, layer_type in enumerate(layer_types[: len(cache.layers)]):
        layer = cache.layers[i]
        if layer_type == "linear_attention" and not isinstance(layer, FastWeightsCacheLayer):
            cache.layers[i] = FastWeightsCacheLayer()
        elif layer_type == "hybrid_sliding" and not isinstance(layer, HybridCacheLayer):
            cache.layers[i] = HybridCacheLayer(sliding_window=window)
    ours = (FastWeightsCacheLayer, HybridCacheLayer)
    if any(isinstance(x, StaticLayer) for x in cache.layers) and any(isinstance(x, ours) for x in cache.layers):
        # transformers would leave out the mask that hides the empty places of its static layers.
        raise FastWeightsError(
            "a static cache was given, and this model has layers with softmax attention beside its fast weights: leave "
            "cache_implementation out, or use a DynamicCache"
        )
    return cache


def fast_weight_layer_cache(cache: Cache) -> FastWeightLayerCache | None:
    """The Fast Weight Layer's part of a cache."""
    return next((layer for layer in cache.layers if isinstance(layer, FastWeightLayerCache)), None)


def detach(cache: Cache) -> None:
    """Cut the graph of what was read so far, so that gradients reach back to here and no further."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, getattr(layer, name).detach())
        states = getattr(layer, "recurrent_states", {})
        for i, state in states.items():
            states[i] = None if state is None else state.detach()


def layer_tensors(layer) -> dict[str, Tensor]:
    """All that a layer of a cache holds between two tokens: its states, and its keys and values."""
    found = {f"state{i}": state for i, state in getattr(layer, "recurrent_states", {}).items()}
    found |= {name: getattr(layer, name, None) for name in ("keys", "values")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def state_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds between two tokens."""
    tensors = [tensor for layer in cache.layers for tensor in layer_tensors(layer).values()]
    # A view keeps alive all that it views.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
