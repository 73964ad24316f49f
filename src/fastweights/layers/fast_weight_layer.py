"""FastWeightLayer: a block before the unembedding whose weights take gradient steps on the text just read.

    u = W1 h + b1;  a = relu(u)²;  r = W2 a + b2;  n = γ ⊙ normalise(r) + c;  y = h + s ⊙ n;  logits = U y

K. Clark et al., "Meta-Learning Fast Weight Language Models", EMNLP 2022 (arXiv 2212.02475). The *slow pass* runs the
block with fixed weights and takes the gradient of each position's next-token loss with respect to the output of u, r
and n. The *fast pass* runs it with weights that have taken the gradient steps of all earlier positions. The gradient of
a dense layer at one position has rank one, so its fast part is linear attention, strictly causal:

    W_t x = W x - η Σ_{i<t} λ^{t-1-i} δ_i (x_i · x)

with slow inputs x_i as keys, slow gradients δ_i as values and the fast pass's own input x as query. That is the decay
rule read before it is written to.

Two things here are dynamic evaluation's (Krause et al., 2019) and not the paper's, and both can be switched off. The
decay λ, which is learned, pulls the weights back towards the trained ones after each step; λ = 1 is the paper. And the
fixed weights of the slow pass are those that the fast pass had at the start of a segment of some tokens, not for ever
the trained ones: otherwise the block takes the steps against one and the same error over and over, however long ago
they have corrected it. The residual connection and the scale s, which starts at 0, are ours too: they let the block
start as the identity.

Everything is differentiated end to end. The slow gradients are written out below as a forward computation, so plain
backpropagation gives the second-order terms of meta-learning.

Notation: B batch, T time, d width of the model, m = 4 d width of the block, V vocabulary.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import align_module_device  # fetches offloaded weights where their module is not called
from torch import nn
from torch.nn.functional import logsigmoid, relu

from fastweights.layers.host_copy import HostCopy
from fastweights.layers.linear import linear, linear_by_row
from fastweights.layers.next_token_gradient import NO_LABEL, next_token_gradient
from fastweights.layers.precision import uncast
from fastweights.ops import decay_rule
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from fastweights.layers.next_token_gradient import Unembedding

_EPSILON = 1e-5
# Of W1, b1, W2, b2, γ and c, over W2's: about where training takes them. Offsets add up all steps of a text, whatever
# it says, and training all but switches their steps off.
_INITIAL_STEPS = (0.03, 1e-4, 1.0, 1e-4, 3.0, 1e-4)


class FastWeights(NamedTuple):
    """What steps have added to the weights, in fp32."""

    up: Float[Tensor, "B 1 d+1 m"]
    """To W1 (transposed), and to b1 in the last row."""
    down: Float[Tensor, "B 1 m+1 d"]
    norm: Float[Tensor, "B 1 1 2d"]
    """To γ, then to c."""

    def where(self, rows: Bool[Tensor, " B"], other: FastWeights) -> FastWeights:
        """The same, with the rows of `other` where `rows` says so."""
        here, pairs = rows.to(self.up.device)[:, None, None, None], zip(other, self, strict=True)
        return FastWeights(*(torch.where(here, new, old) for new, old in pairs))


class FastWeightLayerState(NamedTuple):
    """The state of a stream of text."""

    now: FastWeights
    """After all steps so far."""
    seen: FastWeights | None
    """At the start of the segment: where gradients are taken. None if that is always at the trained weights."""
    steps: Int[Tensor, " B"]
    """Taken since the start of the segment."""

    def tensors(self) -> list[Tensor]:
        """All of it; `from_tensors` takes it back."""
        return [*self.now] if self.seen is None else [*self.now, *self.seen, self.steps]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> FastWeightLayerState:
        """The state that gave these `tensors()`."""
        n = len(FastWeights._fields)
        now, rest = FastWeights(*tensors[:n]), tensors[n:]
        if not rest:
            return cls(now, None, torch.zeros(len(now.up), dtype=torch.long, device=now.up.device))
        return cls(now, FastWeights(*rest[:n]), rest[n])


class Piece(NamedTuple):
    """Positions from `first` up to `end`."""

    first: int
    end: int
    begins: Bool[Tensor, " B"] | None
    """Rows where a document begins with it; None if none does."""
    ends: Bool[Tensor, " B"] | None
    """Rows whose segment ends with it; None if none does."""
    all_end: bool


class Pieces:
    """Where a call's positions are cut, so that documents begin and segments end at borders, whichever row has them.

    A GPU sends where that is as soon as these are made, and is waited for where a layer reads.

    Args:
        starts: True where another document begins; None if nowhere.
        ends: True where a row's segment ends; None without segments.
        steps: of each row, since the start of its segment, once all positions are read.
        length: T.
    """

    def __init__(
        self,
        starts: Bool[Tensor, "B T"] | None,
        ends: Bool[Tensor, "B T"] | None,
        steps: Int[Tensor, " B"],
        length: int,
    ) -> None:
        self._starts, self._ends, self.steps, self._length = starts, ends, steps, length
        nowhere = torch.zeros(length, dtype=torch.bool, device=steps.device)
        rows = [nowhere if starts is None else starts.any(0)]
        rows += [nowhere, nowhere] if ends is None else [ends.any(0), ends.all(0)]
        self._told = None if starts is None and ends is None else HostCopy(torch.stack(rows))

    def cut(self) -> Iterator[Piece]:
        """Each in turn."""
        T = self._length
        begin, end_some, end_all = [[False] * T] * 3 if self._told is None else self._told.tolist()
        borders = [0, *(t for t in range(1, T) if begin[t] or end_some[t - 1]), T]
        for first, end in pairwise(borders):
            begins = self._starts[:, first] if self._starts is not None and any(begin[first:end]) else None
            ends = self._ends[:, end - 1] if self._ends is not None and any(end_some[first:end]) else None
            yield Piece(first, end, begins, ends, ends is not None and end_all[end - 1])


class _SlowPass(NamedTuple):
    a: Float[Tensor, "B T m"]
    du: Float[Tensor, "B T m"]
    dr: Float[Tensor, "B T d"]
    dnorm: Float[Tensor, "B T 2d"]


class _Dense(nn.Module):
    """x Wᵀ + b in fp32, whatever the model's dtype: sums over a long text have no room in bf16.

    No nn.Linear: who puts numbers of 8 bits or adapters in the place of those must leave these, whose weights the slow
    pass reads itself.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Drawn as nn.Linear's are, so that a seed gives the model that it gave when these were some.
        drawn = nn.Linear(in_features, out_features, dtype=torch.float32)
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        return linear(x, self.weight, self.bias)


class FastWeightLayer(nn.Module):
    """The block.

    Args:
        hidden_size: width of the model.
        settings: what it is made of; by default with a learned decay.
    """

    def __init__(self, hidden_size: int, settings: FastWeightLayerSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or FastWeightLayerSettings()
        width = self.settings.expansion * hidden_size
        self.up = _Dense(hidden_size, width)
        self.down = _Dense(width, hidden_size)
        self.norm_scale = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.norm_offset = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.output_scale = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        if self.settings.updates:
            self.log_step_size = nn.Parameter(torch.empty(6, dtype=torch.float32))
            self._make_decay(hidden_size, width)
        self.reset_parameters()

    def _make_decay(self, hidden_size: int, width: int) -> None:
        if self.settings.decay == "scalar":
            self.decay_logit = nn.Parameter(torch.empty(3, dtype=torch.float32))
        elif self.settings.decay == "input":
            self.decay_gate = _Dense(hidden_size, 3)
        elif self.settings.decay == "channel":
            sizes = {"up_key": hidden_size + 1, "up_value": width, "down_key": width + 1, "down_value": hidden_size}
            sizes["norm_value"] = 2 * hidden_size
            self.decay_logits = nn.ParameterDict(
                {name: nn.Parameter(torch.empty(size, dtype=torch.float32)) for name, size in sizes.items()}
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity on what goes in."""
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            layer.bias.zero_()
        self.norm_scale.fill_(1.0)
        self.norm_offset.zero_()
        self.output_scale.zero_()
        if not self.settings.updates:
            return
        steps = self.settings.initial_step_size * self.log_step_size.new_tensor(_INITIAL_STEPS)
        self.log_step_size.copy_(steps.log())
        kept = self.settings.initial_decay
        if self.settings.decay == "scalar":
            self.decay_logit.fill_(_logit(kept))
        elif self.settings.decay == "input":
            self.decay_gate.weight.zero_()
            self.decay_gate.bias.fill_(_logit(kept))
        elif self.settings.decay == "channel":
            for name, logit in self.decay_logits.items():
                # The decay of an entry is the product of its row's and its column's.
                logit.fill_(_logit(kept if name == "norm_value" else math.sqrt(kept)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastWeightLayer:
        """model.to(torch.bfloat16) casts all of a model; this layer stays in fp32."""
        return super()._apply(lambda x: uncast(x, fn(x)), recurse)

    def small_parameter_names(self) -> list[str]:
        """Names of scales, step sizes and decays, which learn at a rate of their own."""
        matrices = ("up.", "down.", "decay_gate.weight")
        return [name for name, _ in self.named_parameters() if not name.startswith(matrices)]

    def step_sizes(self) -> Float[Tensor, " 6"]:
        """Of W1, b1, W2, b2, γ and c."""
        return self.log_step_size.exp()

    def forward(
        self,
        hidden_states: Float[Tensor, "B T d"],
        labels: Int[Tensor, "B T"],
        unembedding: Unembedding,
        state: FastWeightLayerState | None = None,
        *,
        starts: Bool[Tensor, "B T"] | None = None,
        pieces: Pieces | None = None,
    ) -> tuple[Float[Tensor, "B T d"], FastWeightLayerState | None]:
        """What the unembedding is given, and the state after the last position.

        Position t sees the labels of earlier positions only. A position without a label takes no step: it writes
        nothing, and nothing fades.

        Args:
            hidden_states: what the model would give its unembedding.
            labels: token that follows each position, -100 where none is known or where it must not be learned from.
            unembedding: the model's; its weights decide the slow gradients.
            state: to go on from; by default that of a text's start.
            starts: True where another document begins, which starts with no fast weights.
            pieces: what `self.pieces` says of these, if it was asked before: a GPU is not waited for then.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            h = hidden_states.to(self.up.weight.dtype)
            if not self.settings.updates:
                r = self.down(relu(self.up(h)).square())
                n = _normalise(r)[0] * self.norm_scale + self.norm_offset
                return (h + self.output_scale * n).to(hidden_states.dtype), None
            state = state or self.initial_state(h)
            pieces = pieces or self.pieces(labels, state, starts)
            y, state = self._read(h, labels, unembedding, state, pieces)
        return y.to(hidden_states.dtype), state

    def initial_state(self, like: Float[Tensor, "B T d"]) -> FastWeightLayerState:
        """The state before any text."""
        B, d, m = len(like), self.up.in_features, self.up.out_features
        zeros = (
            like.new_zeros(B, 1, *shape, dtype=self.up.weight.dtype) for shape in ((d + 1, m), (m + 1, d), (1, 2 * d))
        )
        now = FastWeights(*zeros)
        return FastWeightLayerState(now, now if self.settings.segment else None, like.new_zeros(B, dtype=torch.long))

    def pieces(
        self,
        labels: Int[Tensor, "B T"],
        state: FastWeightLayerState | None = None,
        starts: Bool[Tensor, "B T"] | None = None,
    ) -> Pieces:
        """Where a call's positions are cut, which hangs on numbers that a GPU may have.

        Args:
            labels: as of `forward`.
            state: as of `forward`.
            starts: as of `forward`.
        """
        segment, known = self.settings.segment, labels != NO_LABEL
        before = labels.new_zeros(len(labels)) if state is None else state.steps
        if not self.settings.updates:
            return Pieces(None, None, before, labels.shape[1])
        if not segment or not labels.shape[1]:
            return Pieces(starts, None, before, labels.shape[1])
        # Rows end their segments at places of their own, since only positions with a label count.
        counted = known.cumsum(1)
        at_start = -before[:, None]
        if starts is not None:
            at_start = torch.where(starts, counted - known.long(), at_start).cummax(1).values
        taken = counted - at_start
        return Pieces(starts, known & (taken % segment == 0), taken[:, -1] % segment, labels.shape[1])

    def _read(
        self, h: Tensor, labels: Tensor, unembedding: Unembedding, state: FastWeightLayerState, pieces: Pieces
    ) -> tuple[Tensor, FastWeightLayerState]:
        known, outputs = labels != NO_LABEL, []
        now, seen, _ = state
        for piece in pieces.cut():
            if piece.begins is not None:
                new = self.initial_state(h)
                now = now.where(piece.begins, new.now)
                seen = None if seen is None or new.seen is None else seen.where(piece.begins, new.seen)
            here = slice(piece.first, piece.end)
            y, now = self._piece(h[:, here], labels[:, here], known[:, here], unembedding, now, seen)
            outputs.append(y)
            if seen is not None and piece.ends is not None:
                seen = now if piece.all_end else seen.where(piece.ends, now)
        return torch.cat(outputs, 1), FastWeightLayerState(now, seen, pieces.steps.to(h.device))

    def _piece(
        self,
        h: Tensor,
        labels: Tensor,
        known: Tensor,
        unembedding: Unembedding,
        now: FastWeights,
        seen: FastWeights | None,
    ) -> tuple[Tensor, FastWeights]:
        """Positions of one segment, the fast weights at whose start are `seen`."""
        u = self.up(h)
        slow = self._slow_pass(h, u, labels, unembedding, seen)
        return self._fast_pass(h, u, slow, known, now)

    def _slow_pass(
        self, h: Tensor, u: Tensor, labels: Tensor, unembedding: Unembedding, seen: FastWeights | None
    ) -> _SlowPass:
        """Gradients of each position's loss with respect to the outputs of the block's layers; 0 without a label."""
        scale, offset = self.norm_scale, self.norm_offset
        if seen is not None:
            u = u + _change(h, seen.up)
            scale, offset = (
                w + change for w, change in zip((scale, offset), seen.norm[:, 0].chunk(2, -1), strict=True)
            )
        a = relu(u).square()
        r = self.down(a) if seen is None else self.down(a) + _change(a, seen.down)
        normalised, deviation = _normalise(r)
        y = h + self.output_scale * (normalised * scale + offset)
        dn = self.output_scale * next_token_gradient(y, labels, unembedding, self.settings.slow_vocabulary)
        dr = dn * scale
        dr = (dr - dr.mean(-1, keepdim=True) - normalised * (dr * normalised).mean(-1, keepdim=True)) / deviation
        with align_module_device(self.down):
            da = linear(dr, self.down.weight.t())
        if seen is not None:
            da = da + linear_by_row(dr, seen.down[:, 0, :-1])
        du = da * 2 * relu(u)
        return _SlowPass(a, du, dr, torch.cat((dn * normalised, dn), -1))

    def _fast_pass(
        self, h: Tensor, u: Tensor, slow: _SlowPass, known: Tensor, state: FastWeights
    ) -> tuple[Tensor, FastWeights]:
        steps = self.step_sizes()
        up_decay, down_decay, norm_decay = self._log_decays(h, known)
        change, up = _steps(h, h, -slow.du, steps[0:2], known, up_decay, state.up)
        a = relu(u + change).square()
        change, down = _steps(a, slow.a, -slow.dr, steps[2:4], known, down_decay, state.down)
        normalised, _ = _normalise(self.down(a) + change)
        ones = known[..., None].to(h.dtype)
        values = -slow.dnorm * steps[4:6].repeat_interleave(h.shape[-1])
        change, norm = _decayed_sum(torch.ones_like(ones), ones, values, norm_decay, state.norm)
        scale, offset = change.chunk(2, -1)
        n = normalised * (self.norm_scale + scale) + self.norm_offset + offset
        return h + self.output_scale * n, FastWeights(up, down, norm)

    def _log_decays(self, h: Tensor, known: Bool[Tensor, "B T"]) -> list[tuple[Tensor | None, Tensor | None]]:
        """(key side, value side) of each layer, (B, T, 1 or channels); 0 where no step is taken."""
        if self.settings.decay == "none":
            return [(None, None)] * 3
        if self.settings.decay == "channel":
            logits = self.decay_logits
            with align_module_device(logits):
                gates = [
                    _where_known(logits[name], known) if name in logits else None
                    for name in ("up_key", "up_value", "down_key", "down_value", "norm_key", "norm_value")
                ]
            return list(zip(gates[::2], gates[1::2], strict=True))
        logits = self.decay_logit.expand(*known.shape, 3) if self.settings.decay == "scalar" else self.decay_gate(h)
        return [(_where_known(logits[..., i : i + 1], known), None) for i in range(3)]


def _change(x: Float[Tensor, "B T n"], change: Float[Tensor, "B 1 n+1 k"]) -> Float[Tensor, "B T k"]:
    """What a change of a dense layer's weights and bias changes in its output."""
    return linear_by_row(x, change[:, 0, :-1].mT) + change[:, 0, -1:]


def _steps(
    query: Float[Tensor, "B T n"],
    key: Float[Tensor, "B T n"],
    value: Float[Tensor, "B T k"],
    step_sizes: Float[Tensor, " 2"],
    known: Bool[Tensor, "B T"],
    log_decay: tuple[Tensor | None, Tensor | None],
    state: Float[Tensor, "B 1 n+1 k"],
) -> tuple[Float[Tensor, "B T k"], Float[Tensor, "B 1 n+1 k"]]:
    """What the steps so far have changed in a dense layer's output; its bias is a weight whose input is always 1."""
    ones = known[..., None].to(key.dtype)
    key = torch.cat((key * ones * step_sizes[0], ones * step_sizes[1]), -1)
    query = torch.cat((query, torch.ones_like(ones)), -1)
    return _decayed_sum(query, key, value, log_decay, state)


def _decayed_sum(
    query: Tensor, key: Tensor, value: Tensor, log_decay: tuple[Tensor | None, Tensor | None], state: Tensor
) -> tuple[Tensor, Tensor]:
    key_decay, value_decay = (gate if gate is None else gate[:, :, None] for gate in log_decay)
    o, final = decay_rule(
        query[:, :, None],
        key[:, :, None],
        value[:, :, None],
        key_decay,
        value_decay,
        initial_state=state,
        output_final_state=True,
        inclusive=False,
    )
    assert final is not None
    return o[:, :, 0], final


def _where_known(logits: Tensor, known: Bool[Tensor, "B T"]) -> Tensor:
    return torch.where(known[..., None], logsigmoid(logits), 0.0)


def _normalise(r: Tensor) -> tuple[Tensor, Tensor]:
    centred = r - r.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + _EPSILON).sqrt()
    return centred / deviation, deviation


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)
