"""FastWeightAttention: takes the place of a pretrained softmax attention and keeps its projections.

    S_t = (f_t z_tᵀ) ⊙ S_{t-1} + k_t v_tᵀ          state, K x V per key/value head, in fp32
    y_t = α S_tᵀ q_t + β softmax_window(q, k, v)_t   the second term in hybrid layers only
    f_t = sigmoid(W_f x_t + b_f)                    key-side gate
    z_t = sigmoid(W_z x_t + b_z)                    value-side gate

H. H. Mao, "Fine-Tuning Pre-trained Transformers into Decaying Fast Weights", EMNLP 2022 (arXiv 2210.04243), with the
layer's input x and its pretrained W_q, W_k, W_v, W_o. The factors α and β, learned per head, and the window are ours.

Notation: B batch, T time, H query heads, G key/value heads, K and V widths of a key and a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from fastweights.errors import FastWeightsError
from fastweights.layers.linear import linear
from fastweights.layers.window import window_attention
from fastweights.ops import decay_rule

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import Cache

RULES = ("decay",)
FEATURE_MAPS = ("identity",)
NEW_PARAMETERS = ("key_gate", "value_gate", "fast_scale", "window_scale", "window_bias")


@dataclass(frozen=True)
class FastWeightSettings:
    """What a layer's fast weights are made of."""

    rule: str = "decay"
    feature_map: str = "identity"
    window: int = 0
    """Tokens that an exact softmax sees beside the fast weights; 0 for none."""
    value_gate: bool = True
    window_bias: bool = False
    """Learn a bias for each head and distance in the window, for models that have lost their absolute positions."""
    rotary: bool = True
    """Give the fast weights queries and keys with the base model's rotary embedding, where it has one, as the window's
    always are."""
    gate_bias: tuple[float, float] = (2.0, 6.0)
    """First and last gate bias of a head: time constants start spread between e^first and e^last tokens."""

    def __post_init__(self) -> None:
        for name, allowed in (("rule", RULES), ("feature_map", FEATURE_MAPS)):
            if (given := getattr(self, name)) not in allowed:
                raise FastWeightsError(f"{name} {given!r} is unknown; known are {', '.join(allowed)}")
        if not all(math.isfinite(bias) for bias in self.gate_bias):
            raise FastWeightsError(f"gate_bias is {self.gate_bias}; it must be two finite numbers")
        if self.window < 0 or self.window == 1:
            raise FastWeightsError(f"window is {self.window}; allowed are 0 (none) and 2 or more tokens")


class Projections(Protocol):
    """How one architecture computes queries, keys, values and output from its own modules."""

    def project(self, attention: FastWeightAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, K), k (B, T, G, K) and v (B, T, G, V)."""
        ...

    def rotate(self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q and k with rotary embedding, in architectures that have one."""
        ...

    def output(self, attention: FastWeightAttention, y: Tensor) -> Tensor:
        """(B, T, H*V) back to the residual stream's width."""
        ...


class FastWeightAttention(nn.Module):
    """A recurrent layer in the place, and with the projections, of `attention`.

    The modules of `attention` become modules of this layer under their own names, so that checkpoints, adapters and
    weight patterns made for the base model still fit.
    """

    def __init__(
        self,
        attention: nn.Module,
        projections: Projections,
        settings: FastWeightSettings,
        *,
        layer_idx: int,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.projections = projections
        self.settings = settings
        self.layer_idx = layer_idx
        self.scaling: float = attention.scaling  # type: ignore[assignment]
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        gates = kv_heads * head_dim
        # fp32 whatever the model's dtype: decays close to 1 have no room in bf16.
        self.key_gate = nn.Linear(hidden_size, gates, dtype=torch.float32)
        self.value_gate = nn.Linear(hidden_size, gates, dtype=torch.float32) if settings.value_gate else None
        self.fast_scale = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.window_scale = nn.Parameter(torch.ones(heads, dtype=torch.float32)) if settings.window else None
        has_bias = settings.window and settings.window_bias
        self.window_bias = nn.Parameter(torch.zeros(heads, settings.window, dtype=torch.float32)) if has_bias else None

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Gates that start independent of their input, with a spread of time constants in every head.

        Gu et al., "Improving the Gating Mechanism of Recurrent Neural Networks" (arXiv 1910.09890).
        """
        first, last = self.settings.gate_bias
        for gate in filter(None, (self.key_gate, self.value_gate)):
            gate.weight.zero_()
            gate.bias.copy_(torch.linspace(first, last, self.head_dim).repeat(self.kv_heads))
        self.fast_scale.fill_(1.0)
        if self.window_scale is not None:
            self.window_scale.fill_(1.0)
        if self.window_bias is not None:
            self.window_bias.zero_()

    def new_parameter_names(self) -> list[str]:
        """Names of the parameters that the base model does not have."""
        return [name for name, _ in self.named_parameters() if name.split(".")[0] in NEW_PARAMETERS]

    def forward(
        self,
        hidden_states: Float[Tensor, "B T d"],
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,  # the base model's 4-D mask, of no use to a recurrence
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        padding_mask: Bool[Tensor, "B L"] | None = None,
        **kwargs,
    ) -> tuple[Float[Tensor, "B T d"], None]:
        """The attention's output; the state comes from and goes to `past_key_values`.

        Args:
            padding_mask: False where a token is padding, over the new tokens (L = T) or all so far (L > T).
        """
        fast, window = self.read(hidden_states, past_key_values, position_embeddings, padding_mask)
        return self.mix(fast, window), None

    def read(
        self,
        x: Float[Tensor, "B T d"],
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        padding_mask: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H V"] | None]:
        """What the fast weights and the window (None without one) say, before their learned factors."""
        length = x.shape[1]
        q, k, v = self.projections.project(self, x)
        rotated = q, k
        if position_embeddings is not None and (self.settings.rotary or self.settings.window):
            rotated = self.projections.rotate(q, k, position_embeddings)
        if self.settings.rotary:
            q, k = rotated
        key_log_decay, value_log_decay = self.log_decays(x)
        real = None if padding_mask is None else padding_mask[:, -length:, None, None]
        if real is not None:
            # A padded token writes nothing and forgets nothing: the state stays as it is, bit for bit.
            k, v = k.masked_fill(~real, 0), v.masked_fill(~real, 0)
            key_log_decay = key_log_decay.masked_fill(~real, 0)
            value_log_decay = None if value_log_decay is None else value_log_decay.masked_fill(~real, 0)

        state = None if past_key_values is None else past_key_values.get_recurrent_state(self.layer_idx)
        fast, state = decay_rule(
            q,
            k,
            v,
            key_log_decay,
            value_log_decay,
            scale=self.scaling,
            initial_state=state,
            output_final_state=past_key_values is not None,
        )
        if past_key_values is not None:
            assert state is not None
            past_key_values.update_recurrent_state(state, self.layer_idx, tokens=length)
        return fast, self._window(*rotated, v, past_key_values, padding_mask) if self.settings.window else None

    def mix(self, fast: Float[Tensor, "B T H V"], window: Float[Tensor, "B T H V"] | None) -> Float[Tensor, "B T d"]:
        """Scale by the learned factors, add, and project to the residual stream."""
        y = fast * self.fast_scale.to(fast.dtype)[:, None]
        if window is not None and self.window_scale is not None:
            y = y + window * self.window_scale.to(window.dtype)[:, None]
        return self.projections.output(self, y.flatten(-2))

    def log_decays(self, x: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B T G K"], Float[Tensor, "B T G V"] | None]:
        """Both gates in log space and fp32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            gates = []
            for gate in (self.key_gate, self.value_gate):
                logits = None if gate is None else linear(x, gate.weight.float(), gate.bias.float())
                gates.append(None if logits is None else logsigmoid(logits).unflatten(-1, (self.kv_heads, -1)))
        return gates[0], gates[1]

    def _window(self, q, k, v, past_key_values, padding_mask):
        """Padding takes no room in the window: each row's real tokens stand together at its end."""
        cache: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        real = None if padding_mask is None else padding_mask[:, -q.shape[1] :]
        if past_key_values is not None:
            keys, values = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
            real = cache.with_kept(real, k.shape[1])
        back = None
        if real is not None and (real[:, :-1] & ~real[:, 1:]).any():
            order = real[:, -q.shape[1] :].byte().argsort(dim=1, stable=True)
            q, back = _take(q, order), order.argsort(1)
            order = real.byte().argsort(dim=1, stable=True)
            k, v, real = _take(k, order), _take(v, order), real.gather(1, order)
        if cache is not None:
            cache.keep(k.transpose(1, 2), v.transpose(1, 2), real)
        o = window_attention(
            q, k, v, window=self.settings.window, scale=self.scaling, bias=self.window_bias, key_mask=real
        )
        return o if back is None else _take(o, back)


def _take(x: Float[Tensor, "B T H D"], order: Int[Tensor, "B T"]) -> Float[Tensor, "B T H D"]:
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))
