"""FastWeightAttention: takes the place of a pretrained softmax attention and keeps its projections.

    y_t = α u S_tᵀ φ(q_t) + β softmax_window(q, k, v)_t   the second term in hybrid layers only, with sinks: `window.py`

with a state S that a rule (`rules.py`) writes, a feature map φ (`feature_maps.py`) and the pretrained W_q, W_k, W_v and
W_o; a gate may weigh both terms token by token (`mix_gate.py`). In a hybrid layer S_t holds, by default, the tokens
that have left the window of token t and are no sinks, so that each token is in one of the two places. The factors α and
β, learned per head, and the window are ours, and the unit u, which calibration sets: fast weights are sums over a long
text, of any size, and a step of an optimizer that suits all other factors would be many times an α that holds that size
as well. The rest is
H. H. Mao, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights", EMNLP 2022 (arXiv 2210.04243).

Notation: B batch, T time, H query heads, G key/value heads, D width of a head, K width of a key after the feature map,
V width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import Cache

from fastweights.errors import FastWeightsError
from fastweights.layers.precision import KeepsFloat32
from fastweights.layers.rules import TokenMarks
from fastweights.layers.window import WindowTokens, windowed

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from fastweights.layers.convolution import ShortConvolution
    from fastweights.layers.feature_maps import FeatureMap, Projection
    from fastweights.layers.mix_gate import MixGate
    from fastweights.layers.rules import Rule
    from fastweights.layers.window import KeysAndValues, WindowEmbeddings

UNIT = "fast_unit"
"""Buffer of each head's unit; models, adapters and memories from before there were any have none: it was 1."""

NEW_MODULES = ("rule", "query_map", "key_map", "value_map", "convolution", "mix_gate")
"""Of a layer, that the base model does not have; there need not be all."""
NEW_PARTS = (*NEW_MODULES, "fast_scale", "window_scale", "window_bias")
"""These, and its own parameters."""


class Projections(Protocol):
    """How one architecture computes queries, keys, values and output from its own modules."""

    def modules(self) -> set[str]:
        """Names of all modules of the attention that this knows of."""
        ...

    def project(self, attention: nn.Module, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k (B, T, G, D) and v (B, T, G, V)."""
        ...

    def rotate(self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q and k with rotary embedding, in architectures that have one."""
        ...

    def output(self, attention: nn.Module, y: Tensor) -> Tensor:
        """(B, T, H*V) back to the residual stream's width."""
        ...


class StateCache(Protocol):
    """What a layer needs of its part of a cache."""

    def state(self) -> Tensor | None:
        """(B, G, K, V) after the tokens so far; None before the first."""
        ...

    def write(self, state: Tensor, tokens: int) -> None:
        """Take the place of the state before, `tokens` tokens on."""
        ...

    def tail(self) -> Tensor | None:
        """(B, (H + 2G) D, n - 1) of the last tokens, which a short convolution goes on from; None before the first."""
        ...

    def put_tail(self, tail: Tensor) -> None:
        """Take the place of the tail before."""
        ...


class WindowCache(StateCache, Protocol):
    """What a layer with a window needs besides."""

    sinks: KeysAndValues | None
    """Of each row's document; None before the first token."""

    def document_length(self) -> int | Int[Tensor, "B 1"]:
        """Tokens of its document that each row has read."""
        ...

    def with_kept(self, k: Tensor, v: Tensor) -> KeysAndValues:
        """The window's keys and values so far, and the new ones after them."""
        ...

    def keep(self, last: KeysAndValues, sinks: KeysAndValues | None, count: Int[Tensor, "B 1"] | None) -> None:
        """What the tokens to come will see; `count` is the new `document_length`, None if one for all tokens does."""
        ...


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention that is replaced."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int


class FastWeightAttention(KeepsFloat32):
    """A recurrent layer in the place, and with the projections, of `attention`.

    The modules of `attention` become modules of this layer under their own names, so that checkpoints, adapters and
    weight patterns made for the base model still fit.

    Args:
        attention: the pretrained attention.
        projections: how to use its modules.
        rule: what the fast weights do with each token.
        query_map: feature map of the queries that read them.
        key_map: of the keys that they are written under.
        value_map: of the values that are written, which the window has as they are; None for none.
        convolution: of all queries, keys and values, of the window as well; None for none.
        mix_gate: of each head, on what the fast weights and the window say; None for none.
        shape: sizes of `attention`.
        layer_idx: place of the layer in the model, and in its cache.
        window: tokens that an exact softmax sees beside the fast weights; 0 for none.
        sinks: first tokens of a document that stay visible to this softmax.
        write: which tokens the fast weights beside a window hold: "all", or those "leaving" it.
        window_bias: whether to learn a bias for each head and distance in the window, and for each sink.
        eight_bits: whether the window's keys and values are rounded to eight bits, in which its cache then keeps them.
        rotary: whether the fast weights' queries and keys have the base model's rotary embedding; the window's have.
        rotates: whether `attention` uses the rotary embedding that it is given.
        cache_argument: under which name the base model's layers hand over their cache.

    Raises:
        FastWeightsError: if `attention` has a module or parameter that `projections` does not know of.
    """

    fast_unit: Tensor
    """Of each head's factor, (H,); set by calibration, not trained."""
    window_only: bool = False
    """Leave the fast weights out where no cache wants their state: for training with their factor held at 0."""

    def __init__(
        self,
        attention: nn.Module,
        projections: Projections,
        rule: Rule,
        query_map: FeatureMap,
        key_map: FeatureMap,
        value_map: Projection | None = None,
        convolution: ShortConvolution | None = None,
        mix_gate: MixGate | None = None,
        *,
        shape: AttentionShape,
        layer_idx: int,
        window: int = 0,
        sinks: int = 0,
        write: str = "all",
        window_bias: bool = False,
        eight_bits: bool = False,
        rotary: bool = True,
        rotates: bool = True,
        cache_argument: str = "cache",
    ) -> None:
        super().__init__()
        check_known(attention, projections)
        self.replaced = type(attention)
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.projections, self.rule = projections, rule
        self.query_map, self.key_map, self.value_map = query_map, key_map, value_map
        self.convolution, self.mix_gate = convolution, mix_gate
        self.layer_idx, self.cache_argument = layer_idx, cache_argument
        self.window, self.sinks, self.rotary, self.rotates = window, sinks, rotary, rotates
        self.eight_bits = eight_bits
        self.writes_leaving = bool(window) and write == "leaving"
        self.takes_rotary_off = self.writes_leaving and rotates and not rotary
        """Of the keys that are written, which the window has kept with it."""
        self.scaling: float = attention.scaling  # type: ignore[assignment]
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.fast_scale = nn.Parameter(torch.ones(shape.heads, dtype=torch.float32))
        self.register_buffer(UNIT, torch.ones(shape.heads, dtype=torch.float32))
        self.window_scale = nn.Parameter(torch.ones(shape.heads, dtype=torch.float32)) if window else None
        bias = torch.zeros(shape.heads, window + sinks, dtype=torch.float32) if window and window_bias else None
        self.window_bias = None if bias is None else nn.Parameter(bias)

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Start as a layer that was never trained; projections stay as they are."""
        for module in self.new_modules():
            module.reset_parameters()
        self.fast_scale.fill_(1.0)
        self.fast_unit.fill_(1.0)
        if self.window_scale is not None:
            self.window_scale.fill_(1.0)
        if self.window_bias is not None:
            self.window_bias.zero_()

    def new_modules(self) -> list[Rule | FeatureMap | ShortConvolution | MixGate]:
        """Those that the base model does not have."""
        return [module for name in NEW_MODULES if (module := getattr(self, name)) is not None]

    def new_parameter_names(self) -> list[str]:
        """Names of the parameters that the base model does not have."""
        return [name for name, _ in self.named_parameters() if name.split(".")[0] in NEW_PARTS]

    def factors(self) -> list[nn.Parameter]:
        """Of the fast weights, and of the window if there is one."""
        return [self.fast_scale] if self.window_scale is None else [self.fast_scale, self.window_scale]

    def factors_of_fast_weights(self) -> list[nn.Parameter]:
        """At 0 a window is alone: of the fast weights, and of what a gate takes off the window in their favour."""
        share = None if self.mix_gate is None else self.mix_gate.share
        return [self.fast_scale] if share is None else [self.fast_scale, share]

    def forward(
        self,
        hidden_states: Float[Tensor, "B T d"],
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        window_embeddings: dict[int, WindowEmbeddings] | None = None,
        marks: TokenMarks | None = None,
        feature_positions: Int[Tensor, "_ T"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B T d"], None]:
        """The attention's output; the state comes from and goes to the cache.

        Args:
            hidden_states: the layer's input.
            position_embeddings: cosines and sines of the base model's rotary embedding, where it has one.
            window_embeddings: the same for sinks and for keys that leave the window, by the layer's window
                (`FastWeightsModel.window_embeddings`).
            marks: padding and borders of documents among the tokens.
            feature_positions: of the tokens, for a feature map that needs them; None for 0, 1, 2, ...
            **kwargs: what else the base model hands its attention: the cache under its own name, and what a recurrence
                has no use for, such as a 4-D mask.

        Raises:
            FastWeightsError: if a cache comes under another name than the base model's row says.
        """
        cache = kwargs.pop(self.cache_argument, None)
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                raise FastWeightsError(
                    f"layer {self.layer_idx} was given a cache as {name} and looks for it in {self.cache_argument}: "
                    "its state would be lost; correct cache_argument in the family's row of ARCHITECTURES"
                )
        layer_cache = None if cache is None else cache.layers[self.layer_idx]
        fast, window = self.read(
            hidden_states, layer_cache, position_embeddings, window_embeddings, marks, feature_positions
        )
        return self.mix(hidden_states, fast, window), None

    def read(
        self,
        x: Float[Tensor, "B T d"],
        cache: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        window_embeddings: dict[int, WindowEmbeddings] | None = None,
        marks: TokenMarks | None = None,
        feature_positions: Int[Tensor, "_ T"] | None = None,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H V"] | None]:
        """What the fast weights and the window (None without one) say, before their learned factors.

        Args:
            x: the layer's input.
            cache: a `StateCache`, or with a window a `WindowCache`, to start from and write to.
            position_embeddings: of the rotary embedding.
            window_embeddings: for sinks and for keys that leave the window, by the layer's window.
            marks: padding and borders of documents.
            feature_positions: of the tokens, for a feature map that needs them; None for 0, 1, 2, ...
        """
        marks = TokenMarks() if marks is None else marks
        position_embeddings = position_embeddings if self.rotates else None
        q, k, v = self.project(x)
        if self.convolution is not None:
            q, k, v = self._convolved(self.convolution, (q, k, v), cache, marks)
        rotated, sink_q, of_leaving = (q, k), q, None
        if position_embeddings is not None and (self.rotary or self.window):
            rotated = self.projections.rotate(q, k, position_embeddings)
        if position_embeddings is not None and (self.sinks or self.takes_rotary_off):
            assert window_embeddings is not None
            of_sinks, of_leaving = window_embeddings[self.window]
            if of_sinks is not None:
                sink_q, _ = self.projections.rotate(q, k[:, :, :0], of_sinks)
        if self.rotary:
            q, k = rotated
        window = None
        window_only = self.window_only and cache is None
        if self.window:
            window, left = windowed(
                WindowTokens(*rotated, v, sink_q),
                cache,
                window=self.window,
                scale=self.scaling,
                sinks=self.sinks,
                bias=self.window_bias,
                marks=marks,
                leaving=self.writes_leaving and not window_only,
                eight_bits=self.eight_bits,
            )
            if window_only:
                return torch.zeros_like(window), window
            if left is not None:
                # Before anything has left a document's window its state is empty: a token may as well be padding.
                k, v, marks = left.k, left.v, marks._replace(real=left.any)
                if of_leaving is not None:
                    _, k = self.projections.rotate(q[:, :, :0], k, of_leaving)
                    k = k.to(v.dtype)
        fast, state = self.rule(
            x,
            *self._features(q, k, feature_positions),
            v if self.value_map is None else self.value_map(v),
            scale=self.scaling,
            marks=marks,
            state=None if cache is None else cache.state(),
            keep_state=cache is not None,
            inclusive=not self.writes_leaving,
        )
        if cache is not None:
            cache.write(state, x.shape[1])
        return fast, window

    def _convolved(
        self,
        convolution: ShortConvolution,
        parts: tuple[Tensor, Tensor, Tensor],
        cache: StateCache | None,
        marks: TokenMarks,
    ) -> list[Tensor]:
        """q, k and v, each head's channels of them by themselves."""
        joined = torch.cat([part.flatten(2) for part in parts], -1)
        joined, tail = convolution(joined, None if cache is None else cache.tail(), marks)
        if cache is not None:
            cache.put_tail(tail)
        widths = [part.shape[2] * part.shape[3] for part in parts]
        return [new.unflatten(2, old.shape[2:]) for new, old in zip(joined.split(widths, 2), parts, strict=True)]

    def _features(
        self, q: Float[Tensor, "B T H D"], k: Float[Tensor, "B T G D"], positions: Int[Tensor, "_ T"] | None
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T G K"]]:
        if not self.query_map.positional:
            return self.query_map(q), self.key_map(k)
        if positions is None:
            positions = torch.arange(q.shape[1], device=q.device)[None]
        # The key that is written beside a token is its own, or that of the token which now leaves the window.
        behind = self.window - 1 if self.writes_leaving else 0
        return self.query_map(q, positions + behind), self.key_map(k, positions)

    def project(
        self, x: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B T G D"], Float[Tensor, "B T G V"]]:
        """q, k and v, before a convolution and the rotary embedding."""
        return self.projections.project(self, x, self.head_dim)

    def output(self, y: Float[Tensor, "B T HV"]) -> Float[Tensor, "B T d"]:
        """Back to the residual stream."""
        return self.projections.output(self, y)

    def mix(
        self, x: Float[Tensor, "B T d"], fast: Float[Tensor, "B T H V"], window: Float[Tensor, "B T H V"] | None
    ) -> Float[Tensor, "B T d"]:
        """Scale by the learned factors, and by the gate of each token `x` where there is one, add, and project to the
        residual stream."""
        factors, of_window = self.fast_scale * self.fast_unit, self.window_scale
        if self.mix_gate is not None and not self.window_only:
            often, less = self.mix_gate(x)
            factors, of_window = often * factors, None if of_window is None else less * of_window
        y = fast * factors.to(fast.dtype)[..., None]
        if window is not None and of_window is not None:
            y = y + window * of_window.to(window.dtype)[..., None]
        return self.output(y.flatten(-2))


def check_known(attention: nn.Module, projections: Projections) -> None:
    """Refuse an attention with a part that its projections would leave out."""
    has = {name for name, _ in attention.named_children()} | {
        name for name, _ in attention.named_parameters(recurse=False)
    }
    if unknown := sorted(has - projections.modules()):
        raise FastWeightsError(
            f"{type(attention).__name__} has {', '.join(unknown)}, which {type(projections).__name__} would leave out: "
            "this family needs a row of its own in ARCHITECTURES"
        )
    if missing := sorted(projections.modules() - has):
        raise FastWeightsError(f"{type(attention).__name__} has no {', '.join(missing)}: the family's row is wrong")
