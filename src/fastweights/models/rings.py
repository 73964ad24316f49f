"""What caches keep of keys and values: tensors or eight bits, and places that stay while single tokens come.

A window is a `Ring` then, and a layer that sees all tokens, whose keys grow, a `GrowingWindow` with room behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad
from transformers.cache_utils import DynamicLayer

from fastweights.layers.eight_bits import EightBits, rounded
from fastweights.layers.window import KeysAndValues

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int, Int8, Shaped
    from torch import Tensor

CODES, EXPONENTS = "_codes", "_exponents"
"""What the two tensors of numbers in eight bits have behind their name."""
_MORE_TOKENS = 256
"""Room for more in a softmax layer, or a quarter of what it has, before all is copied to a larger place."""


def numbers_of(kept: Tensor | EightBits | None) -> Tensor | None:
    """What is kept, as a tensor."""
    return kept.numbers() if isinstance(kept, EightBits) else kept


def wants_derivatives(x: Tensor) -> bool:
    """Whether what is kept of it must be the very tensor."""
    return x.requires_grad or forward_ad._current_level >= 0


@dataclass
class Ring:
    """What a window keeps, in places that stay while single tokens come: token t of W in place t mod W."""

    k: Float[Tensor, "B G D W"] | Int8[Tensor, "B G D W"]
    """Keys, or in a window of eight bits their codes."""
    v: Float[Tensor, "B G W V"] | Int8[Tensor, "B G W V"]
    k_exponents: Int8[Tensor, "B G _ W"]
    """Of the codes; of none where there are no codes."""
    v_exponents: Int8[Tensor, "B G _ W"]
    sink_k: Float[Tensor, "B G S D"]
    sink_v: Float[Tensor, "B G S V"]
    tokens: int
    """Read so far."""

    def sinks(self) -> KeysAndValues:
        """The document's first tokens, in the order of caches."""
        return KeysAndValues(self.sink_k.transpose(1, 2), self.sink_v.transpose(1, 2))

    def last(self) -> tuple[Float[Tensor, "B G L D"] | EightBits, Float[Tensor, "B G L V"] | EightBits]:
        """Keys and values of the last W - 1 tokens, or of all, in their order."""
        window = self.v.shape[2]
        order = torch.arange(max(0, self.tokens - window + 1), self.tokens, device=self.v.device) % window
        k, v = self.k[..., order].transpose(2, 3), self.v[:, :, order]
        if k.dtype != torch.int8:
            return k, v
        exponents = (x[..., order].transpose(2, 3).contiguous() for x in (self.k_exponents, self.v_exponents))
        k, v = (EightBits(x.contiguous(), own, self.sink_k.dtype) for x, own in zip((k, v), exponents, strict=True))
        return k, v


class Rows:
    """A layer of a cache whose rows change places."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows in this order."""
        self.change_states(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.change_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self.change_states(lambda state: state[indices, ...])

    def change_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """All that is held by what `change` makes of it."""
        raise NotImplementedError


class KeepsKeysAndValues:
    """A layer's keys and values, in eight bits where that is asked for and nobody wants a derivative through them."""

    eight_bits = False
    is_initialized: bool
    device: torch.device
    _kept: tuple[Tensor | EightBits | None, Tensor | EightBits | None] = (None, None)

    @property
    def keys(self) -> Tensor | None:
        """Of the window, a copy of one in eight bits; whoever asks for them ends the ring, if there is one."""
        self.leave_ring()
        return numbers_of(self._kept[0])

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.leave_ring()
        self._kept = (self._as_kept(keys), self._kept[1])

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        self.leave_ring()
        return numbers_of(self._kept[1])

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.leave_ring()
        self._kept = (self._kept[0], self._as_kept(values))

    def _as_kept(self, x: Tensor | None) -> Tensor | EightBits | None:
        if x is None or not self.eight_bits or not x.numel() or wants_derivatives(x):
            return x
        return EightBits.of(x)

    def kept(self) -> dict[str, Tensor]:
        """Keys and values as they are in memory, by name."""
        self.leave_ring()
        found = {}
        for name, x in zip(("keys", "values"), self._kept, strict=True):
            if isinstance(x, EightBits):
                found |= {f"{name}{CODES}": x.codes, f"{name}{EXPONENTS}": x.exponents}
            elif x is not None:
                found[name] = x
        return found

    def change_kept(self, change: Callable[[Tensor], Tensor]) -> None:
        """Keys and values by what `change` makes of their rows."""
        self.leave_ring()
        keys, values = (
            x.change(change) if isinstance(x, EightBits) else None if x is None else change(x) for x in self._kept
        )
        self._kept = keys, values

    @property
    def kept_shape(self) -> tuple[int, ...] | None:
        """(B, G, tokens, D) of the keys, once they are by themselves; None before the first."""
        self.leave_ring()
        keys = self._kept[0]
        keys = keys.codes if isinstance(keys, EightBits) else keys
        return None if keys is None or keys.ndim < 4 else tuple(keys.shape)

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """Of the keys as numbers, once they are by themselves."""
        self.leave_ring()
        return None if self._kept[0] is None else self._kept[0].dtype

    def offload(self) -> None:
        """To the CPU, as it is."""
        self.change_kept(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to where the layer is."""
        if self.is_initialized:
            self.change_kept(lambda x: x.to(self.device, non_blocking=True))

    def leave_ring(self) -> None:
        """Keep keys and values by themselves again, and not in places for single tokens."""
        raise NotImplementedError


class Windowed(KeepsKeysAndValues):
    """A layer's keys and values of a window, which are a ring while single tokens come."""

    sliding_window: int
    number_of_sinks = 0
    ring: Ring | None = None
    """In the place of keys, values and sinks, while single tokens come."""
    _sinks: KeysAndValues | None = None

    @property
    def sinks(self) -> KeysAndValues | None:
        """The first tokens of each row's document; what stands for those it has not read yet is seen by none."""
        if self.ring is None:
            return self._sinks
        return self.ring.sinks() if self.number_of_sinks else None

    @sinks.setter
    def sinks(self, sinks: KeysAndValues | None) -> None:
        self.leave_ring()
        self._sinks = sinks

    def leave_ring(self) -> None:
        """Keep keys, values and sinks by themselves again."""
        if self.ring is not None:
            self._kept, self._sinks, self.ring = self.ring.last(), self.sinks, None

    def as_ring(self) -> Ring | None:
        """The window as a ring from now on; None where rows are at different places, or some of it is not there."""
        (keys, values), window, sinks = self._kept, self.sliding_window, self.number_of_sinks
        tokens = self.document_length()
        if self.ring is not None or keys is None or values is None or not isinstance(tokens, int):
            return self.ring
        if keys.dtype != torch.float32 or bool(sinks) != (self.sinks is not None):
            return None
        if isinstance(keys, EightBits) and isinstance(values, EightBits):
            parts = keys.codes, values.codes, keys.exponents, values.exponents
        elif isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and not self.eight_bits:
            parts = keys, values
        else:
            return None
        B, G, L, _ = parts[0].shape
        if min(tokens, window - 1) != L:
            return None
        order = torch.arange(tokens - L, tokens, device=parts[0].device) % window
        k, v, *exponents = (x.new_zeros(B, G, window, x.shape[3]) for x in parts)
        for place, x in zip((k, v, *exponents), parts, strict=True):
            place[:, :, order] = x
        exponents = exponents or [x.new_zeros(B, G, window, 0, dtype=torch.int8) for x in (k, v)]
        first = [torch.zeros(B, G, 0, x.shape[3], dtype=keys.dtype, device=x.device) for x in (k, v)]
        if self.sinks is not None:
            first = [x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in self.sinks]
        k, *exponents = (x.transpose(2, 3).contiguous() for x in (k, *exponents))
        ring = Ring(k, v, *exponents, *first, tokens=tokens)
        self._kept, self._sinks, self.ring = (None, None), None, ring
        return self.ring

    def document_length(self) -> int | Int[Tensor, "B 1"]:
        """Tokens of its document that each row has read."""
        raise NotImplementedError


class GrowingCacheLayer(Rows, KeepsKeysAndValues, DynamicLayer):
    """Keys and values, in eight bits, of a layer that keeps its softmax attention over all tokens."""

    eight_bits = True
    window: GrowingWindow | None = None
    """In the place of keys and values, while single tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """All that the new tokens see, which is rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.leave_ring()
        kept = [_and_more(old, new) for old, new in zip(self._kept, (key_states, value_states), strict=True)]
        self._kept = kept[0], kept[1]
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """Tokens read."""
        if self.window is not None:
            return self.window.tokens
        return 0 if self.kept_shape is None else self.kept_shape[2]

    def leave_ring(self) -> None:
        """Keep keys and values by themselves again."""
        if self.window is not None:
            window, self.window = self.window, None
            self._kept = window.kept()

    def change_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """All that is held by what `change` makes of it."""
        self.change_kept(change)


def _and_more(kept: Tensor | EightBits | None, new: Tensor) -> Tensor | EightBits:
    """What is kept, and new numbers behind it: in eight bits, or as such numbers where derivatives are wanted."""
    assert kept is not None
    if isinstance(kept, EightBits) and not wants_derivatives(new):
        codes, exponents = (torch.cat(pair, 2) for pair in zip(kept[:2], EightBits.of(new)[:2], strict=True))
        return EightBits(codes, exponents, kept.dtype)
    joined = torch.cat((numbers_of(kept), rounded(new)), -2)  # type: ignore[arg-type]
    return joined if wants_derivatives(joined) else EightBits.of(joined)


class GrowingWindow:
    """A softmax layer's keys and values with room behind them for single tokens.

    A `DynamicLayer` has a view of those that there are; whoever gives it others, as transformers' modules do with each
    token, ends this. A `GrowingCacheLayer` has this in their place.

    Args:
        layer: with keys and values of the same tokens.
    """

    def __init__(self, layer: DynamicLayer | GrowingCacheLayer) -> None:
        if isinstance(layer, GrowingCacheLayer):
            layer.leave_ring()
            # What a call with gradients left is rounded, and only not in eight bits.
            keys, values = (x if isinstance(x, EightBits) else EightBits.of(x) for x in layer._kept)  # type: ignore[arg-type]
            parts = keys.codes, values.codes, keys.exponents, values.exponents
        else:
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            none = keys[..., :0].to(torch.int8)
            parts = keys, values, none, none
        self._dtype, self.layer, tokens = keys.dtype, layer, parts[0].shape[2]
        self.room = tokens + max(_MORE_TOKENS, tokens // 4)
        k, v, *exponents = parts
        self.k, self.k_exponents, self.v_exponents = (
            _with_room(x.transpose(2, 3), self.room, dim=3) for x in (k, *exponents)
        )
        self.v = _with_room(v, self.room, dim=2)
        if isinstance(layer, GrowingCacheLayer):
            layer._kept, layer.window = (None, None), self
        self.show(tokens)

    def show(self, tokens: int) -> None:
        """Let the layer have so many."""
        self.tokens = tokens
        if not isinstance(self.layer, GrowingCacheLayer):
            self._shown = self.k[..., :tokens].transpose(2, 3), self.v[:, :, :tokens]
            self.layer.keys, self.layer.values = self._shown

    def is_current(self) -> bool:
        """Whether the layer has what it was last shown."""
        if isinstance(self.layer, GrowingCacheLayer):
            return self.layer.window is self
        return self.layer.keys is self._shown[0] and self.layer.values is self._shown[1]

    def kept(self) -> tuple[EightBits, EightBits]:
        """Keys and values by themselves, in eight bits."""
        k, k_exponents, v_exponents = (
            x[..., : self.tokens].transpose(2, 3).clone(memory_format=torch.contiguous_format)
            for x in (self.k, self.k_exponents, self.v_exponents)
        )
        v = self.v[:, :, : self.tokens].clone(memory_format=torch.contiguous_format)
        return EightBits(k, k_exponents, self._dtype), EightBits(v, v_exponents, self._dtype)

    def ring(self) -> Ring:
        """As the kernel takes windows: one that no token leaves."""
        sinks = torch.zeros(*self.v.shape[:2], 0, self.v.shape[3], dtype=torch.float32)
        return Ring(self.k, self.v, self.k_exponents, self.v_exponents, sinks, sinks, tokens=0)


def _with_room(x: Shaped[Tensor, "B G _ _"], room: int, *, dim: int) -> Shaped[Tensor, "B G _ _"]:
    """With places for so many tokens, which are numbered by that dimension."""
    longer = x.new_empty(*x.shape[:dim], room, *x.shape[dim + 1 :])
    longer.narrow(dim, 0, x.shape[dim]).copy_(x)
    return longer
